"""SAELens' directories: cfg.json and sae_weights.safetensors.

Training checkpoints of BatchTopK SAEs load as SAELens itself saves them for inference, as JumpReLU SAEs with the
threshold that training estimated.
"""

import re
from pathlib import Path

import torch
from torch import Tensor

from ..warn import warn
from .checkpoint import Config, Tensors
from .files import read_safetensors
from .fold import fold_norms, folded, project, row_norms
from .gated import gated_to_jumprelu
from .input_norm import INPUT_NORMS
from .record import SAE

BATCH_TOPK = ("batchtopk", "matryoshka_batchtopk")
SUPPORTED = ("standard", "topk", "jumprelu", "gated", *BATCH_TOPK)

_TRANSCODER = "a transcoder predicts another module's output; pyfacts loads autoencoders"
REFUSED = {
    "transcoder": _TRANSCODER,
    "skip_transcoder": _TRANSCODER,
    "jumprelu_transcoder": _TRANSCODER,
    "jumprelu_skip_transcoder": _TRANSCODER,
    "abstopk": "it keeps negative latents, and pyfacts' encoders are ReLUs",
    "matching_pursuit": "its latents are found one after another, not by one product",
    "temporal": "its latents depend on the tokens before",
}
LOADED_AS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float32}
CHANGED_BY = {
    "center_writing_weights": re.compile(r"hook_(resid_\w+|(attn|mlp)_(in|out)|[qkv]_input|result|(pos_)?embed)$"),
    "fold_value_biases": re.compile(r"\.hook_([vz]|result)$"),
    "refactor_factored_attn_matrices": re.compile(r"\.hook_([qkvz]|result)$"),
}
"""What TransformerLens can do to a model's weights, and the hooks that then hand out something else."""
MIN_NORM = 1e-8  # SAELens' own floor for the norms that it folds


def load(path: Path, dtype: torch.dtype | None) -> SAE:
    config = Config.read(path.parent / "cfg.json")
    architecture = _architecture(config)
    input_norm = _input_norm(config)
    _warn_of_processing(config, input_norm)
    tensors = read_safetensors(path)
    d_in, d_sae = tensors.matrix_shape("W_enc")
    config.expect("d_in", d_in, f"W_enc of {path.name} is [{d_in}, {d_sae}]")
    config.expect("d_sae", d_sae, f"W_enc of {path.name} is [{d_in}, {d_sae}]")

    dtype = dtype or _dtype(config, tensors)
    weight = tensors.rows("W_enc", (d_in, d_sae), dtype, transpose=True)
    W_dec = tensors.rows("W_dec", (d_sae, d_in), dtype)
    b_dec = tensors.vector("b_dec", d_in)
    subtracted = b_dec if config.flag("apply_b_dec_to_input", True) else None
    threshold = None
    if architecture == "gated":
        b_enc, threshold = gated_to_jumprelu(tensors, weight, subtracted)
    else:
        b_enc = tensors.vector("b_enc", d_sae)
        b_enc = b_enc if subtracted is None else b_enc - project(weight, subtracted)
        threshold = _threshold(architecture, tensors, d_sae)
    if architecture in ("topk", *BATCH_TOPK) and config.flag("rescale_acts_by_decoder_norm", False):
        b_enc = fold_norms(weight, b_enc, W_dec, row_norms(W_dec).clamp(min=MIN_NORM))
    k = None
    if architecture == "topk":
        k = config.integer("k", config.section("activation_fn_kwargs").get("k"), at_most=d_sae)
    _drop_unit_scaling(tensors, d_sae)
    tensors.finish()
    return folded(
        weight,
        b_enc,
        W_dec,
        b_dec,
        threshold,
        activation="topk" if k else "relu" if threshold is None else "jumprelu",
        k=k,
        architecture=architecture,
        input_norm=input_norm,
        hook_name=_hook_name(config),
        source_format="sae_lens",
    )


def _architecture(config: Config) -> str:
    activation = config.text("activation_fn") or config.text("activation_fn_str") or "relu"  # before SAELens 6
    architecture = config.text("architecture") or "standard"
    if activation == "topk" and architecture == "standard":
        architecture = "topk"
    elif activation not in ("relu", "topk"):
        raise config.error("activation_fn", f"must be 'relu' or 'topk', got {activation!r}")
    if architecture in REFUSED:
        raise config.error("architecture", f"is {architecture!r}, which pyfacts refuses: {REFUSED[architecture]}")
    if architecture not in SUPPORTED:
        raise config.error("architecture", f"must be one of {', '.join(SUPPORTED)}, got {architecture!r}")
    return architecture


def _input_norm(config: Config) -> str | None:
    kind = config.get("normalize_activations", "none")
    if kind in ("none", False):
        return None
    if kind in INPUT_NORMS:
        return kind
    if kind in ("expected_average_only_in", True):
        raise config.error(
            "normalize_activations",
            f"is {kind!r}: inputs must be scaled by a factor that the checkpoint does not hold; fold it in SAELens "
            "with sae.fold_activation_norm_scaling_factor(factor) and save the SAE again",
        )
    if kind == "covariance_whitening":
        raise config.error(
            "normalize_activations",
            f"is {kind!r}: inputs must be whitened by matrices that the checkpoint does not hold; fold them in SAELens "
            "with sae.fold_activation_whitening(...) and save the SAE again",
        )
    raise config.error("normalize_activations", f"must be 'none' or one of {', '.join(INPUT_NORMS)}, got {kind!r}")


def _warn_of_processing(config: Config, input_norm: str | None) -> None:
    """Warn if the SAE was trained on activations that the model as published does not have."""
    field = "model_from_pretrained_kwargs"
    kwargs = config.section("metadata").get(field) or config.get(field)
    hook_name = _hook_name(config) or "hook_resid_pre"
    processing = [
        name
        for name, changed in CHANGED_BY.items()
        if isinstance(kwargs, dict) and kwargs.get(name) is True and changed.search(hook_name)
    ]
    if not processing:
        return
    remedy = ""
    if processing == ["center_writing_weights"] and input_norm is None:
        remedy = ". Or subtract sae.W_enc.mean(dim=0) from sae.W_enc: then both models have the same latents"
    names = ", ".join(f"{name}=True" for name in processing)
    warn(
        f"{config.path}: the SAE was trained on a model that TransformerLens had processed with {names}. On the model "
        "as published its latents are others: load it so (HookedTransformer.from_pretrained_no_processing takes these "
        f"arguments, in TransformerLens 4 enable_compatibility_mode){remedy}"
    )


def _dtype(config: Config, tensors: Tensors) -> torch.dtype:
    name = config.text("dtype")
    if name is None:
        return tensors.dtype("W_enc")
    if name.removeprefix("torch.") not in LOADED_AS:
        raise config.error("dtype", f"must be one of {', '.join(LOADED_AS)}, got {name!r}")
    return LOADED_AS[name.removeprefix("torch.")]


def _threshold(architecture: str, tensors: Tensors, d_sae: int) -> Tensor | None:
    if architecture in BATCH_TOPK:
        return torch.full((d_sae,), tensors.number("topk_threshold"), dtype=torch.float64, device="cpu")
    if architecture != "jumprelu":
        return None
    if "log_threshold" in tensors:  # training checkpoints of older versions
        return tensors.vector("log_threshold", d_sae).exp()
    return tensors.vector("threshold", d_sae)


def _drop_unit_scaling(tensors: Tensors, d_sae: int) -> None:
    """Old versions saved a fine-tuning scale with every SAE, most of them ones."""
    if "scaling_factor" not in tensors:
        return
    scale = tensors.vector("scaling_factor", d_sae)
    if not torch.allclose(scale, torch.ones_like(scale)):
        raise tensors.error("scaling_factor", "is not all ones: SAELens 6 and pyfacts do not apply fine-tuned scales")


def _hook_name(config: Config) -> str | None:
    metadata = config.section("metadata")
    return metadata.text("hook_name") or config.text("hook_name") or config.text("hook_point")
