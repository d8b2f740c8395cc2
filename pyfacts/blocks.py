"""What is inside one transformer block: its MLPs, its experts, and where its residual stream can be read.

This is the place to teach pyfacts a new architecture, and most need nothing: an MLP is recognised by its structure.
`DOWN_PROJECTIONS` lists the names that down-projections have; a module of that name outside the attention is one if a
module beside it projects up to the same width. `LAYOUTS` says, by the names of a block's children, which modules carry
the residual stream. A block of an unknown layout still has its neurons and its input and output.

Nothing here imports transformers: the modules are recognised by names, attributes and shapes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import nn

DOWN_PROJECTIONS = frozenset(
    {"down_proj", "fc2", "c_proj", "dense_4h_to_h", "wo", "Wo", "fc_out", "lin2", "w2", "output_linear"}
)
"""The last part of a down-projection's path, over all architectures (BERT's `output.dense` is a rule of its own)."""

WRAPPED = ("base_layer", "linear", "base", "original", "original_layer", "orig", "org_module", "wrapped", "module")
"""What wrappers (PEFT's, torchao's, handmade LoRAs) call the layer that they wrap."""

ATTENTION_PARTS = ("attn", "attention")
"""A path part that contains one of these (in lower case) is attention: `attn.c_proj` is no MLP's down-projection."""

ROUTER_PARTS = frozenset({"gate", "router"})
"""A path part of these names leads to what chooses among experts, which may be an MLP of its own (Zaya's)."""

ORDER = (
    "hook_resid_pre",
    "hook_attn_out",
    "hook_resid_mid",
    "hook_cross_attn_out",
    "hook_resid_mid_cross",
    "hook_mlp_in",
    "mlp.hook_in",
    "mlp.hook_post",
    "hook_mlp_out",
    "hook_resid_post",
)
"""The short names of a block's hooks, in the order in which a forward pass reaches them."""


@dataclass(frozen=True)
class Mlp:
    """A dense MLP of a block. Paths are relative to the block; an empty `holder` is the block itself."""

    holder: str  # the module whose forward is the MLP
    up: str  # (one of) the up-projections: what it reads is what the MLP reads
    down: str  # its input is the neurons
    width: int


@dataclass(frozen=True)
class BlockSurvey:
    """All that can be hooked in one block; `rows` maps a hook's short name to `path` or `path:output`."""

    mlps: tuple[Mlp, ...]
    experts: tuple[str, ...]
    rows: dict[str, str]

    def without_the_stream(self) -> BlockSurvey:
        """The same with what the MLP itself reads as its only row."""
        return replace(self, rows={name: path for name, path in self.rows.items() if name == "mlp.hook_in"})


def survey_block(block: nn.Module) -> BlockSurvey:
    """Find a block's dense MLPs, its experts and its residual-stream hooks, by structure."""
    experts = tuple(_experts(block))
    mlps = tuple(_mlps(block, experts))
    return BlockSurvey(mlps, experts, _rows(block, mlps) if mlps or experts else {})


def inner(module: nn.Module) -> nn.Module:
    """The module itself, without what a LoRA or clipping wrapper puts around it."""
    for attribute in WRAPPED:
        wrapped = getattr(module, attribute, None)
        if isinstance(wrapped, nn.Module):
            return wrapped
    return module


def in_width(module: nn.Module) -> int | None:
    """The last dimension of the module's input, where its attributes or its weight tell; else None.

    `in_features` goes before the weight's shape: a quantised weight is packed, and under tensor parallelism it is a
    shard whose input is one too, which must be an error and not a narrower layer.
    """
    module = inner(module)
    features = getattr(module, "in_features", None)
    if isinstance(features, int):
        return features
    weight = getattr(module, "weight", None)
    if weight is not None and _is_conv1d(module):  # GPT-2's Conv1D keeps its weight as [in, out]
        return int(weight.shape[0])
    if weight is not None and getattr(weight, "ndim", 0) == 2 and not isinstance(module, nn.Embedding):
        return int(weight.shape[1])
    return _norm_width(module)


def out_width(module: nn.Module) -> int | None:
    """The last dimension of the module's output, where its attributes or its weight tell; else None."""
    module = inner(module)
    features = getattr(module, "out_features", None)
    if isinstance(features, int):
        return features
    weight = getattr(module, "weight", None)
    if weight is not None and getattr(weight, "ndim", 0) == 2:
        return int(weight.shape[1] if _is_conv1d(module) or isinstance(module, nn.Embedding) else weight.shape[0])
    return _norm_width(module)


def holds_experts(module: nn.Module) -> bool:
    """Whether the module keeps many experts' weights in one parameter, [n_experts, ...], as transformers 5 does."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return False
    return any(p.ndim >= 3 and min(p.shape[:3]) > 1 for p in module.parameters(recurse=False))


def is_attention(path: str) -> bool:
    """Whether a module's path leads into attention."""
    return any(mark in part.lower() for part in path.split(".") for mark in ATTENTION_PARTS)


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and getattr(getattr(module, "weight", None), "ndim", 0) == 2


def _norm_width(module: nn.Module) -> int | None:
    weight = getattr(module, "weight", None)
    if weight is None or weight.ndim != 1 or "norm" not in type(module).__name__.lower():
        return None
    return int(weight.shape[0])


def _experts(block: nn.Module) -> Iterator[str]:
    """Paths of modules that hold experts: a 3-D parameter, or a list of modules that is called `experts`."""
    found: list[str] = []
    for path, module in block.named_modules():
        if not path or is_attention(path) or any(path.startswith(f"{outer}.") for outer in found):
            continue
        if path.split(".")[-1] == "experts" or holds_experts(module):
            found.append(path)
            yield path


def _mlps(block: nn.Module, experts: tuple[str, ...]) -> Iterator[Mlp]:
    for path, module in block.named_modules():
        holder, _, last = path.rpartition(".")
        if last in DOWN_PROJECTIONS and not (is_attention(path) or _is_router(holder) or _within(path, experts)):
            width = in_width(module)
            up = _up_projection(block.get_submodule(holder), last, width)
            if width is not None and up is not None:
                yield Mlp(holder, f"{holder}.{up}" if holder else up, path, width)
    children = dict(block.named_children())
    if {"intermediate", "output"} <= children.keys():  # BERT and its kin: the MLP's two halves lie in the block itself
        down = getattr(children["output"], "dense", None)
        up_projection = getattr(children["intermediate"], "dense", None)
        if isinstance(down, nn.Module) and isinstance(up_projection, nn.Module):
            width = in_width(down)
            if width is not None and out_width(up_projection) == width:
                yield Mlp("", "intermediate.dense", "output.dense", width)


def _is_router(path: str) -> bool:
    return not ROUTER_PARTS.isdisjoint(path.split("."))


def _up_projection(holder: nn.Module, down: str, width: int | None) -> str | None:
    """The name of a child of `holder` that projects up to `width` (or to twice that, where gate and up are fused).

    If none does, a child that reads what `down` writes: then the widths disagree (tensor parallelism, pruning), and it
    is better to name the hook, and let it complain about the width, than to leave the layer out.
    """
    children = [(name, child) for name, child in holder.named_children() if name != down]
    if width is None:
        return None
    fitting = [name for name, child in children if out_width(child) in (width, 2 * width)]
    d_model = out_width(holder.get_submodule(down))
    fitting += [
        name for name, child in children if in_width(child) == d_model and out_width(child) not in (None, d_model)
    ]
    return fitting[0] if fitting else None


def _within(path: str, roots: tuple[str, ...]) -> bool:
    return any(path == root or path.startswith(f"{root}.") for root in roots)


# --- the residual stream --------------------------------------------------------------------------------------------
#
# What the names mean, after TransformerLens:
#   hook_resid_pre   the block's input                    hook_resid_post  the block's output
#   hook_attn_out    what attention adds to the stream    hook_mlp_out     what the MLP adds to it (after a norm that
#                                                                          follows the sublayer, as in Gemma)
#   hook_resid_mid   hook_resid_pre + hook_attn_out       hook_mlp_in      the stream where the MLP's branch leaves it,
#                                                                          that is before the norm in front of the MLP
#   mlp.hook_in      what the MLP itself reads, after that norm
# Dropout is not undone: the identities hold in eval mode. With a norm after the sum (BERT), hook_resid_post is the
# normalised output, which the next block reads.


def _pre_norm(attn: str, norm: str, mlp: str = "mlp") -> dict[str, str]:
    return {
        "hook_attn_out": f"{attn}:output",
        "hook_resid_mid": norm,
        "hook_mlp_in": norm,
        "hook_mlp_out": f"{mlp}:output",
    }


_LLAMA = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}

LAYOUTS: tuple[tuple[frozenset[str], dict[str, str]], ...] = (
    # Llama, Mistral, Qwen 2/3, Phi-3, Nemotron, and mixtures of experts built like them
    (frozenset(_LLAMA), _pre_norm("self_attn", "post_attention_layernorm")),
    # GPT-2, GPT-Neo
    (frozenset({"ln_1", "attn", "ln_2", "mlp"}), _pre_norm("attn", "ln_2")),
    # GPT-NeoX
    (
        frozenset({"input_layernorm", "post_attention_layernorm", "attention", "mlp"}),
        _pre_norm("attention", "post_attention_layernorm"),
    ),
    # Gemma 2/3: a norm before and after each sublayer
    (
        frozenset(_LLAMA | {"pre_feedforward_layernorm", "post_feedforward_layernorm"}),
        _pre_norm("post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ),
    # OLMo 2: a norm only after each sublayer
    (
        frozenset({"self_attn", "mlp", "post_attention_layernorm", "post_feedforward_layernorm"}),
        _pre_norm("post_attention_layernorm", "mlp", "post_feedforward_layernorm"),
    ),
    # Phi, GPT-J: attention and MLP side by side behind one norm, so there is no stream between them
    (
        frozenset({"self_attn", "mlp", "input_layernorm"}),
        {"hook_attn_out": "self_attn:output", "hook_mlp_in": "", "hook_mlp_out": "mlp:output"},
    ),
    (
        frozenset({"ln_1", "attn", "mlp"}),
        {"hook_attn_out": "attn:output", "hook_mlp_in": "", "hook_mlp_out": "mlp:output"},
    ),
    # BERT: a norm after each sum
    (
        frozenset({"attention", "intermediate", "output"}),
        {
            "hook_attn_out": "attention.output.dense:output",
            "hook_resid_mid": "attention.output.LayerNorm",
            "hook_mlp_in": "intermediate.dense",
            "hook_mlp_out": "output.dense:output",
        },
    ),
)

_OPT = frozenset({"self_attn", "self_attn_layer_norm", "fc1", "fc2", "final_layer_norm"})


def _layout(block: nn.Module) -> dict[str, str]:
    children = [name for name, _ in block.named_children() if "dropout" not in name and not name.startswith("act")]
    if children == ["layer"]:
        return _t5_layout(block)
    if set(children) == _OPT and hasattr(block, "do_layer_norm_before"):
        if block.do_layer_norm_before:
            return _pre_norm("self_attn", "final_layer_norm", "fc2")
        return _pre_norm("self_attn", "self_attn_layer_norm", "fc2") | {"hook_mlp_in": "fc1"}  # OPT-350M, like BERT
    if children[:1] == ["attn"]:
        return {}  # GPT-1 has GPT-2's names and puts its norms after the sums
    return next((dict(rows) for names, rows in LAYOUTS if names == set(children) and _has_all(block, rows)), {})


def _has_all(block: nn.Module, rows: dict[str, str]) -> bool:
    """Whether the modules exist: MPNet's and RoBERTa-PreLayerNorm's blocks have BERT's names, and others inside."""
    paths = {path for path, _ in block.named_modules()}
    return all(path.removesuffix(":output") in paths for path in rows.values())


def _t5_layout(block: nn.Module) -> dict[str, str]:
    sublayers = [{name for name, _ in sub.named_children()} for sub in block.layer]  # type: ignore[union-attr]
    if "SelfAttention" not in sublayers[0] or "DenseReluDense" not in sublayers[-1]:
        return {}
    last = f"layer.{len(sublayers) - 1}"
    rows = _pre_norm("layer.0.SelfAttention", f"{last}.layer_norm", f"{last}.DenseReluDense")
    if len(sublayers) == 3:  # a decoder: cross-attention stands between
        rows["hook_resid_mid"] = "layer.1.layer_norm"
        rows["hook_cross_attn_out"] = "layer.1.EncDecAttention:output"
        rows["hook_resid_mid_cross"] = f"{last}.layer_norm"
    return rows


SCALES_OF_THE_STREAM = (
    "residual_multiplier",  # Granite
    "residual_scale",  # MiniCPM
    "input_residual",  # Doge
    "layer_scalar",  # Gemma 4
    "mlp_beta_factor",  # MiniMax
    "mlp_residual_add_idx",  # Beam
    "scaling_factor",  # ESMC
)
"""Attributes of blocks that scale what a sublayer adds, outside of any module."""


def _rows(block: nn.Module, mlps: tuple[Mlp, ...]) -> dict[str, str]:
    if hasattr(block, "altup"):  # Gemma 3n keeps four streams at once; only the MLP's own branch is one matrix
        return {
            "hook_mlp_in": "pre_feedforward_layernorm",
            "mlp.hook_in": "mlp",
            "hook_mlp_out": "post_feedforward_layernorm:output",
        }
    layout = _layout(block)
    if getattr(block, "use_parallel_residual", False) or getattr(block, "parallel_attn", False):
        layout.pop("hook_resid_mid", None)
    if any(hasattr(block, scale) for scale in SCALES_OF_THE_STREAM):
        layout.pop("hook_attn_out", None)
        layout.pop("hook_mlp_out", None)
    if getattr(getattr(block, "attention", None), "dense_bias", None) is not None:  # GPT-NeoX-Japanese: added outside
        layout.pop("hook_attn_out", None)
    rows = {"hook_resid_pre": "", "hook_resid_post": ":output"} | layout
    if len(mlps) == 1 or (layout and hasattr(block, "mlp")):
        rows["mlp.hook_in"] = "mlp" if hasattr(block, "mlp") else mlps[0].holder or mlps[0].up
    return {name: rows[name] for name in ORDER if name in rows}
