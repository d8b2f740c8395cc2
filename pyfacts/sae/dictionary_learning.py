"""dictionary_learning's `ae.pt`: a state_dict, and a config.json beside it that names the class.

Most classes can be told by their tensors; AutoEncoderTopK and BatchTopKSAE hold the same ones and need the config.json.
Each is loaded as the library's `load_dictionary` does and encodes as its `encode` does by default: a BatchTopK SAE with
the threshold that training left in it. (A threshold below 0, which the library saves before it has an estimate, keeps
every positive latent there, and so it does here.)
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from .checkpoint import Config, Tensors
from .files import read_torch
from .fold import fold_norms, folded, project, row_norms
from .gated import gated_to_jumprelu
from .record import SAE

_LINEAR = {"encoder.weight", "encoder.bias", "decoder.weight"}
_MATRICES = {"W_enc", "b_enc", "W_dec", "b_dec"}
TENSORS = {
    "AutoEncoder": _LINEAR | {"bias"},
    "AutoEncoderNew": _LINEAR | {"decoder.bias"},
    "GatedAutoEncoder": {"encoder.weight", "decoder.weight", "decoder_bias", "r_mag", "gate_bias", "mag_bias"},
    "AutoEncoderTopK": _LINEAR | {"b_dec", "k", "threshold"},
    "BatchTopKSAE": _LINEAR | {"b_dec", "k", "threshold"},
    "MatryoshkaBatchTopKSAE": _MATRICES | {"k", "threshold", "group_sizes"},
    "JumpReluAutoEncoder": _MATRICES | {"threshold"},
}


def load(path: Path, dtype: torch.dtype | None) -> SAE:
    tensors = read_torch(path)
    config_path = _config_path(path)
    trainer = Config.read(config_path).section("trainer") if config_path.exists() else Config(config_path, {})
    dict_class = trainer.text("dict_class") or _class_by_tensors(path, tensors)
    if dict_class not in LOADERS:
        raise trainer.error("trainer.dict_class", f"must be one of {sorted(LOADERS)}, got {dict_class!r}")
    sae = LOADERS[dict_class](tensors, dtype, trainer)
    tensors.finish()
    sae.architecture, sae.source_format = dict_class, "dictionary_learning"
    return sae


def _config_path(path: Path) -> Path:
    """Beside the file; of what training saved on its way, in `checkpoints`, above that directory."""
    beside = path.parent / "config.json"
    above = path.parent.parent / "config.json"
    return above if path.parent.name == "checkpoints" and not beside.exists() else beside


def _class_by_tensors(path: Path, tensors: Tensors) -> str:
    fitting = [name for name, wanted in TENSORS.items() if wanted == tensors.names()]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise CheckpointError(
            path, None, f"may be one of {fitting}: config.json beside it must say which, as trainer.dict_class"
        )
    raise CheckpointError(path, None, f"holds the tensors of no known class: {sorted(tensors.names())}")


def _auto_encoder(tensors: Tensors, dtype: torch.dtype | None, trainer: Config) -> SAE:
    weight, W_dec = _linear_weights(tensors, dtype)
    b_enc = tensors.vector("encoder.bias", len(weight))
    b_dec = tensors.vector("bias", weight.shape[1])
    norms = row_norms(W_dec)
    if not torch.allclose(norms, torch.ones_like(norms)):  # as AutoEncoder.from_pretrained, which load_dictionary calls
        if not norms.all():
            raise tensors.error("decoder.weight", f"has no direction for latent {int((norms == 0).nonzero()[0])}")
        b_enc = fold_norms(weight, b_enc, W_dec, norms)
    return folded(weight, b_enc - project(weight, b_dec), W_dec, b_dec)


def _auto_encoder_new(tensors: Tensors, dtype: torch.dtype | None, trainer: Config) -> SAE:
    weight, W_dec = _linear_weights(tensors, dtype)
    b_enc = tensors.vector("encoder.bias", len(weight))
    return folded(weight, b_enc, W_dec, tensors.vector("decoder.bias", weight.shape[1]))


def _gated(tensors: Tensors, dtype: torch.dtype | None, trainer: Config) -> SAE:
    weight, W_dec = _linear_weights(tensors, dtype)
    b_dec = tensors.vector("decoder_bias", weight.shape[1])
    b_enc, threshold = gated_to_jumprelu(tensors, weight, b_dec, b_gate="gate_bias", b_mag="mag_bias")
    return folded(weight, b_enc, W_dec, b_dec, activation="jumprelu", threshold=threshold)


def _topk(tensors: Tensors, dtype: torch.dtype | None, trainer: Config) -> SAE:
    tensors.number("threshold")  # for encode(use_threshold=True), which is not the default
    k = _k(tensors, trainer, tensors.matrix_shape("encoder.weight")[0])
    return folded(*_centred_linear(tensors, dtype), activation="topk", k=k)


def _batch_topk(tensors: Tensors, dtype: torch.dtype | None, trainer: Config) -> SAE:
    d_sae = tensors.matrix_shape("encoder.weight")[0]
    _k(tensors, trainer, d_sae)
    threshold = torch.full((d_sae,), tensors.number("threshold"), dtype=torch.float64, device="cpu")
    return folded(*_centred_linear(tensors, dtype), activation="jumprelu", threshold=threshold)


def _matryoshka(tensors: Tensors, dtype: torch.dtype | None, trainer: Config) -> SAE:
    d_sae = tensors.matrix_shape("W_enc")[1]
    _k(tensors, trainer, d_sae)
    group_sizes = tensors.integers("group_sizes")
    if min(group_sizes, default=0) < 1 or sum(group_sizes) != d_sae:
        raise tensors.error("group_sizes", f"must be positive and add up to {d_sae}, got {group_sizes}")
    threshold = torch.full((d_sae,), tensors.number("threshold"), dtype=torch.float64, device="cpu")
    weight, b_enc, W_dec, b_dec = tensors.matrices(dtype)
    b_enc = b_enc - project(weight, b_dec)
    return folded(weight, b_enc, W_dec, b_dec, activation="jumprelu", threshold=threshold)


def _jumprelu(tensors: Tensors, dtype: torch.dtype | None, trainer: Config) -> SAE:
    threshold = tensors.vector("threshold", tensors.matrix_shape("W_enc")[1])
    return folded(*tensors.matrices(dtype), activation="jumprelu", threshold=threshold)


LOADERS: dict[str, Callable[[Tensors, torch.dtype | None, Config], SAE]] = {
    "AutoEncoder": _auto_encoder,
    "AutoEncoderNew": _auto_encoder_new,
    "GatedAutoEncoder": _gated,
    "AutoEncoderTopK": _topk,
    "BatchTopKSAE": _batch_topk,
    "MatryoshkaBatchTopKSAE": _matryoshka,
    "JumpReluAutoEncoder": _jumprelu,
}


def _linear_weights(tensors: Tensors, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    d_sae, d_in = tensors.matrix_shape("encoder.weight")
    dtype = dtype or tensors.dtype("encoder.weight")
    weight = tensors.rows("encoder.weight", (d_sae, d_in), dtype)
    return weight, tensors.rows("decoder.weight", (d_in, d_sae), dtype, transpose=True)


def _centred_linear(tensors: Tensors, dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight, W_dec = _linear_weights(tensors, dtype)
    b_dec = tensors.vector("b_dec", weight.shape[1])
    return weight, tensors.vector("encoder.bias", len(weight)) - project(weight, b_dec), W_dec, b_dec


def _k(tensors: Tensors, trainer: Config, d_sae: int) -> int:
    k = tensors.integer("k")
    if not 1 <= k <= d_sae:
        raise tensors.error("k", f"must be 1 to {d_sae}, the number of latents, got {k}")
    trainer.expect("k", k, f"that is the k of {tensors.path.name}")
    return k
