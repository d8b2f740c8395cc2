"""How sparse an SAE's latents are on given activations, and how much of those they explain."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import ops
from ..scalars import at_least_one

if TYPE_CHECKING:
    from .record import SAE


@dataclass(frozen=True)
class SAEMetrics:
    """What `SAE.metrics` measured.

    Attributes:
        n_tokens: how many tokens were seen.
        l0: mean number of latents of a token that are not zero.
        density: l0 as a share of d_sae.
        fvu: fraction of variance unexplained, sum of |x - reconstruction|^2 over sum of |x - mean of x|^2; NaN if all
            tokens are equal.
        dead: int64, the latents that no token activated, ascending.
    """

    n_tokens: int
    l0: float
    density: float
    fvu: float
    dead: Tensor

    @property
    def n_dead(self) -> int:
        """How many latents no token activated."""
        return len(self.dead)


def measure(sae: "SAE", x: Tensor, batch_size: int) -> SAEMetrics:
    """Measures sae on x [n_tokens, d_in]; memory is that of one batch."""
    if len(x) == 0:
        raise ValueError(f"metrics need at least one token, got x of shape {tuple(x.shape)}")
    batches = x.split(at_least_one("batch_size", batch_size))
    shift = x[0].double()  # near the mean, and exactly it if all tokens are equal
    total = torch.zeros_like(shift)
    for batch in batches:
        total += (batch.double() - shift).sum(dim=0)
    mean = shift + total / len(x)
    nnz, error, variance = 0, 0.0, 0.0
    fired = torch.zeros(sae.d_sae, dtype=torch.bool, device=x.device)
    for batch in batches:
        enc = sae.encode(batch)
        nnz += enc.nnz
        _, latents, _ = ops.to_csr(enc.planes, enc.n_features)
        fired[latents] = True
        exact = batch.double()
        error += _sq_norm(exact - sae.decode(enc, batch))
        variance += _sq_norm(exact - mean)
    l0 = nnz / len(x)
    fvu = error / variance if variance > 0 else math.nan
    return SAEMetrics(len(x), l0, l0 / sae.d_sae, fvu, (~fired).nonzero().flatten())


def _sq_norm(x: Tensor) -> float:
    return x.square().sum().item()
