"""Normalisation of each token before it is encoded, undone after it is decoded.

It depends on the token, so it cannot be folded into weights. Both are SAELens' (`normalize_activations`).
"""

from dataclasses import dataclass

from torch import Tensor

INPUT_NORMS = ("layer_norm", "constant_norm_rescale")

LAYER_NORM_EPS = 1e-5


@dataclass(frozen=True)
class RowNorm:
    """x -> (x - shift) * scale_in for the encoder, y -> y * scale_out + shift for what the decoder gives."""

    shift: Tensor  # [n_tokens, 1]
    scale_in: Tensor
    scale_out: Tensor

    def apply(self, x: Tensor) -> Tensor:
        return ((x - self.shift) * self.scale_in).to(x.dtype)

    def undo(self, y: Tensor) -> Tensor:
        return (y * self.scale_out + self.shift).to(y.dtype)


def row_norm(x: Tensor, kind: str) -> RowNorm:
    """Returns what normalises the rows of x [n_tokens, d_in], in float32."""
    x = x.float()
    if kind == "constant_norm_rescale":
        norm = x.norm(dim=-1, keepdim=True)
        root = x.shape[-1] ** 0.5
        return RowNorm(norm.new_zeros(()), root / norm, norm / root)
    deviation = x.std(dim=-1, keepdim=True)
    # Not the inverse of each other: SAELens adds its epsilon on the way in only.
    return RowNorm(x.mean(dim=-1, keepdim=True), 1 / (deviation + LAYER_NORM_EPS), deviation)
