"""Folding a checkpoint's scales and biases into its weights: float64, a block of latents at a time.

`weight` is the encoder row by row, [d_sae, d_in]. Blocks keep the float64 copies small beside the weights.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .record import SAE

BLOCK_ELEMENTS = 1 << 22


def project(weight: Tensor, vector: Tensor) -> Tensor:
    """Returns weight @ vector, float64 [d_sae]: by how much a bias on the input shifts each latent."""
    return torch.cat([block.double() @ vector.double() for block in _blocks(weight)])


def row_norms(matrix: Tensor) -> Tensor:
    """Returns the norm of each row, float64."""
    return torch.cat([block.double().norm(dim=1) for block in _blocks(matrix)])


def scale_rows(matrix: Tensor, scale: Tensor) -> None:
    """Multiplies each row by its scale, in place."""
    start = 0
    for block in _blocks(matrix):
        block.copy_(block.double() * scale[start : start + len(block), None])
        start += len(block)


def fold_norms(weight: Tensor, b_enc: Tensor, W_dec: Tensor, norms: Tensor) -> Tensor:
    """Latents times the norms of their decoder directions, directions of norm 1; returns the encoder's bias."""
    scale_rows(weight, norms)
    scale_rows(W_dec, 1 / norms)
    return b_enc * norms


def folded(
    weight: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, threshold: Tensor | None = None, **fields: Any
) -> SAE:
    """The SAE of the matrices and of float64 vectors, which take the matrices' dtype; `fields` as of `SAE`."""
    dtype = weight.dtype
    threshold = None if threshold is None else threshold.to(dtype)
    return SAE(weight.T, b_enc.to(dtype), W_dec, b_dec.to(dtype), threshold=threshold, copy=False, **fields)


def _blocks(matrix: Tensor) -> Iterator[Tensor]:
    return iter(matrix.split(max(1, BLOCK_ELEMENTS // matrix.shape[1])))
