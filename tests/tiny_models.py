"""Tiny random models of every architecture that the tests hook, built from configs: no downloads, a blink each."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

VOCAB, D_MODEL, D_MLP, LAYERS, HEADS = 50, 16, 40, 2, 2

_LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": D_MODEL,
    "intermediate_size": D_MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_T5 = {
    "vocab_size": VOCAB,
    "d_model": D_MODEL,
    "d_kv": 8,
    "d_ff": D_MLP,
    "num_layers": LAYERS,
    "num_decoder_layers": LAYERS + 1,
    "num_heads": HEADS,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}
_GEMMA3_TEXT = _LLAMA | {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}


def opt(cls: str = "OPTForCausalLM", **changes) -> nn.Module:
    config = {
        "vocab_size": VOCAB,
        "hidden_size": D_MODEL,
        "word_embed_proj_dim": D_MODEL,
        "ffn_dim": D_MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": 64,
        "pad_token_id": 1,
        "dropout": 0.0,
    }
    return _build("OPTConfig", cls, config | changes)


def _build(config_class: str, model_class: str, config: dict) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**config)).eval()
    with torch.no_grad():  # biases start at zero in most models, which would hide an off-by-a-bias
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
    return model


def beam() -> nn.Module:
    return _build("BeamConfig", "BeamForCausalLM", _LLAMA)


def esmc() -> nn.Module:
    return _build("EsmcConfig", "EsmcModel", {key: _LLAMA[key] for key in list(_LLAMA)[:5]})


def gpt_neox_japanese() -> nn.Module:
    config = {"hidden_size": D_MODEL, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    config |= {"vocab_size": VOCAB, "intermediate_multiple_size": 2}
    return _build("GPTNeoXJapaneseConfig", "GPTNeoXJapaneseForCausalLM", config)


def xlm() -> nn.Module:
    config = {"vocab_size": VOCAB, "emb_dim": D_MODEL, "n_layers": LAYERS, "n_heads": HEADS}
    return _build("XLMConfig", "XLMModel", config)


def zaya() -> nn.Module:
    return _build("ZayaConfig", "ZayaForCausalLM", _LLAMA)


def gpt2(**changes) -> nn.Module:
    config = {
        "vocab_size": VOCAB,
        "n_embd": D_MODEL,
        "n_inner": D_MLP,
        "n_layer": LAYERS,
        "n_head": HEADS,
        "n_positions": 64,
    }
    return _build("GPT2Config", "GPT2LMHeadModel", config | {"bos_token_id": 1, "eos_token_id": 2} | changes)


def llama_like(name: str, **changes) -> nn.Module:
    return _build(f"{name}Config", f"{name}ForCausalLM", _LLAMA | changes)


def gemma3_multimodal() -> nn.Module:
    import transformers

    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
    }
    config = transformers.Gemma3Config(
        text_config=_GEMMA3_TEXT,
        vision_config=vision | {"patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=49,
    )
    torch.manual_seed(0)
    return transformers.Gemma3ForConditionalGeneration(config).eval()


def gemma3n() -> nn.Module:
    config = _LLAMA | {
        "head_dim": 8,
        "intermediate_size": [D_MLP, D_MLP + 8],
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 8,
        "altup_num_inputs": 2,
        "num_kv_shared_layers": 0,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.95, 0.0],
        "layer_types": ["full_attention", "full_attention"],
    }
    return _build("Gemma3nTextConfig", "Gemma3nForCausalLM", config)


def t5(gated: bool = False, cls: str = "T5ForConditionalGeneration", **changes) -> nn.Module:
    return _build("T5Config", cls, _T5 | {"feed_forward_proj": "gated-gelu" if gated else "relu"} | changes)


def bert(kind: str = "Bert", **changes) -> nn.Module:
    config = {k: v for k, v in _LLAMA.items() if k not in ("num_key_value_heads", "bos_token_id", "eos_token_id")}
    return _build(f"{kind}Config", f"{kind}Model", config | changes)


def mixtral() -> nn.Module:
    return llama_like("Mixtral", num_local_experts=4, num_experts_per_tok=2)


def qwen2_moe() -> nn.Module:
    """Layer 0 is dense, layer 1 has experts and a shared expert of another width beside them."""
    return llama_like(
        "Qwen2Moe",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=12,
        shared_expert_intermediate_size=24,
        mlp_only_layers=[0],
        decoder_sparse_step=1,
    )


def qwen3_moe() -> nn.Module:
    return llama_like("Qwen3Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12, head_dim=8)


def deepseek() -> nn.Module:
    """Layer 0 is dense, layer 1 has experts and shared experts."""
    return llama_like(
        "DeepseekV3",
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        n_shared_experts=2,
        moe_intermediate_size=12,
        first_k_dense_replace=1,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
    )


DECODERS: dict[str, Callable[[], nn.Module]] = {
    "opt": opt,
    "opt-base": lambda: opt("OPTModel"),
    "opt-post-norm": lambda: opt(do_layer_norm_before=False),
    "gpt2": gpt2,
    "gpt2-wide": lambda: gpt2(n_inner=None),
    "gpt-neox": lambda: llama_like("GPTNeoX", hidden_act="gelu"),
    "gpt-neox-sequential": lambda: llama_like("GPTNeoX", use_parallel_residual=False),
    "llama": lambda: llama_like("Llama"),
    "mistral": lambda: llama_like("Mistral"),
    "qwen2": lambda: llama_like("Qwen2"),
    "qwen3": lambda: llama_like("Qwen3", head_dim=8),
    "gemma2": lambda: llama_like("Gemma2", head_dim=8, sliding_window=8),
    "gemma3-text": lambda: _build("Gemma3TextConfig", "Gemma3ForCausalLM", _GEMMA3_TEXT),
    "gemma3-multimodal": gemma3_multimodal,
    "gemma3n": gemma3n,
    "phi": lambda: llama_like("Phi"),
    "phi3": lambda: llama_like("Phi3"),
    "nemotron": lambda: llama_like("Nemotron"),
    "olmo2": lambda: llama_like("Olmo2"),
    "bert": bert,
    "t5-encoder": lambda: t5(cls="T5EncoderModel"),
}
"""Models with one stream of tokens, called as model(input_ids)."""

ENCODER_DECODERS: dict[str, Callable[[], nn.Module]] = {
    "t5": t5,
    "t5-gated": lambda: t5(gated=True),
    "t5-base": lambda: t5(cls="T5Model"),
}

MIXTURES: dict[str, Callable[[], nn.Module]] = {
    "mixtral": mixtral,
    "qwen2-moe": qwen2_moe,
    "qwen3-moe": qwen3_moe,
    "deepseek": deepseek,
}


def tokens(batch: int = 2, length: int = 7, seed: int = 0) -> torch.Tensor:
    """Random token ids [batch, length], none of them a padding or other special token."""
    return torch.randint(3, VOCAB - 2, (batch, length), generator=torch.Generator().manual_seed(seed))


class PlainMlp(nn.Module):
    """A model with no blocks to recognise: x [batch, pos, 6] -> fc1 -> ReLU -> fc2."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2 = nn.Linear(6, 20), nn.Linear(20, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(torch.relu(self.fc1(x)))
