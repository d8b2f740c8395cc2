"""Which library wrote a checkpoint, told by its files."""

import os
from collections.abc import Callable
from pathlib import Path

import torch

from ..encoding import DTYPES
from ..errors import CheckpointError
from . import dictionary_learning, gemma_scope, sae_lens, sparsify
from .record import SAE

LOADERS: dict[str, Callable[[Path, torch.dtype | None], SAE]] = {
    "sae_weights.safetensors": sae_lens.load,
    "sae.safetensors": sparsify.load,
    "params.npz": gemma_scope.load_npz,
    "params.safetensors": gemma_scope.load_safetensors,
    "ae.pt": dictionary_learning.load,
}
LFS_POINTER = b"version https://git-lfs"
SUFFIXES = {".npz": gemma_scope.load_npz, ".pt": dictionary_learning.load}


def load_sae(path: str | os.PathLike[str], device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> SAE:
    """Loads an SAE that another library saved, without that library, and without running code of the checkpoint.

    - SAELens: a directory with cfg.json and sae_weights.safetensors; architectures standard, topk, jumprelu, gated,
      and training checkpoints of batchtopk and matryoshka_batchtopk.
    - Gemma Scope: `params.npz`; and Gemma Scope 2: a directory with config.json and params.safetensors.
    - EleutherAI sparsify: a directory with cfg.json and sae.safetensors; TopK.
    - dictionary_learning: `ae.pt`, with its config.json beside it, or above `checkpoints/`; AutoEncoder,
      AutoEncoderNew, GatedAutoEncoder, AutoEncoderTopK, BatchTopKSAE, MatryoshkaBatchTopKSAE, JumpReluAutoEncoder.

    Latents and reconstructions are those of the library that saved it, within rounding: what it subtracts from the
    input and the scales that it applies are folded into W_enc, b_enc and W_dec in float64 (in bfloat16 and float16 the
    folded bias is rounded to 8 or 11 bits; float32 is the safe choice), a gated SAE becomes the JumpReLU SAE that it
    equals, and a BatchTopK SAE uses the threshold that training left in it. What cannot be had exactly is refused.
    A warning tells of an SAE that was trained on other activations than the published model has: SAELens' on a model
    that TransformerLens had processed (`center_writing_weights`), and Gemma Scope's on rows of the embedding's table.

    Args:
        path: the directory, or the file of weights in it.
        device: where to put the weights.
        dtype: float32, bfloat16 or float16; None for the checkpoint's own (float32, if it is another).

    Raises:
        FileNotFoundError: the path or a file beside it is not there.
        CheckpointError: (a ValueError) the checkpoint is damaged, or cannot be used exactly; the message names the file
            and the field.
        TypeError: dtype is another.

    Example:
        >>> import numpy as np, pathlib, tempfile, pyfacts
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "params.npz"
        >>> weights = dict(W_enc=np.eye(2, 3), b_enc=np.zeros(3), W_dec=np.eye(3, 2), b_dec=np.zeros(2))
        >>> np.savez(path, **weights, threshold=np.ones(3))
        >>> pyfacts.load_sae(path).activation
        'jumprelu'
    """
    if dtype is not None and dtype not in DTYPES:
        raise TypeError(f"dtype must be float32, bfloat16, float16 or None, got {dtype}")
    weights = _find_weights(Path(os.path.expanduser(path)))
    _refuse_pointer(weights)
    return _loader(weights)(weights, dtype).to(device)


def _find_weights(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not there; give an SAE's directory or its file of weights")
    found = [path / name for name in LOADERS if (path / name).is_file()]
    if not found:
        raise FileNotFoundError(f"{path} holds no SAE: none of {', '.join(LOADERS)} is in it")
    if len(found) > 1:
        raise CheckpointError(path, None, f"holds more than one SAE; give one of {', '.join(map(str, found))}")
    return found[0]


def _refuse_pointer(weights: Path) -> None:
    with open(weights, "rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise CheckpointError(
                weights, None, "is a pointer of git-lfs, not the weights: fetch them with git lfs pull"
            )


def _loader(weights: Path) -> Callable[[Path, torch.dtype | None], SAE]:
    loader = LOADERS.get(weights.name) or SUFFIXES.get(weights.suffix)
    if loader is None:
        raise CheckpointError(weights, None, f"must be named {', '.join(LOADERS)}, or end in .npz or .pt")
    return loader
