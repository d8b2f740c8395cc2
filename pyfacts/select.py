"""What to keep of dense activations: the k largest per token, or those above a threshold. Lossy, and it says how much.

A select is any object with `encode(x) -> EncodedActivations` and `describe() -> dict`. What it keeps, it keeps exactly;
the result's `dropped_share` is the share of squared norm that it did not keep.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from . import ops
from .encoding import DTYPES, EncodedActivations, check_matrix, encode
from .scalars import as_float, at_least_one


@runtime_checkable
class Select(Protocol):
    """What `capture(select=...)` takes."""

    def encode(self, x: Tensor) -> EncodedActivations:
        """Packs what is kept of x [n_tokens, n_features], which must not change; `sq_norm` is x's where left out."""

    def describe(self) -> dict[str, object]:
        """What this is, in JSON types: a dump records it, and resumes only under an equal one."""


def keep(select: Select, x: Tensor, name: str) -> EncodedActivations:
    """What a select keeps of a hook's x [n_tokens, n_features], checked, with the squared norms of the whole rows."""
    kept = select.encode(x)
    if not isinstance(kept, EncodedActivations):
        raise TypeError(f"{name}: {select!r} gave {type(kept).__name__}, and not EncodedActivations")
    if kept.shape != x.shape:
        raise ValueError(f"{name}: {select!r} gave {tuple(kept.shape)} of activations {tuple(x.shape)}")
    return kept if kept.sq_norm is not None else replace(kept, sq_norm=ops.row_sq_norm(x).to(kept.device))


class topk:
    """Keeps, for each token, the k activations that are largest in absolute value.

    Exact: among equal ones the lowest feature index wins, and NaN counts as larger than everything. Zeros are never
    stored, so a token with fewer than k non-zeros has that many values.

    Args:
        k: how many, at least 1 and at most the number of features.

    Raises:
        TypeError: k is not an integer.
        ValueError: k is below 1, or (when it is used) above the number of features.

    Example:
        >>> import torch, pyfacts
        >>> enc = pyfacts.topk(2).encode(torch.tensor([[1.0, -3.0, 2.0, 0.5]]))
        >>> enc.to_dense(), round(enc.dropped_share, 4)
        (tensor([[ 0., -3.,  2.,  0.]]), 0.0877)
    """

    def __init__(self, k: int) -> None:
        self.k = at_least_one("k", k)

    @torch.no_grad()
    def encode(self, x: Tensor) -> EncodedActivations:
        """Packs the k largest |x| of each row of x [n_tokens, n_features]."""
        check_matrix("x", x)
        n_features = x.shape[1]
        if self.k > n_features:
            raise ValueError(f"topk(k={self.k}) of activations that have only {n_features} features; lower k")
        return EncodedActivations(*ops.topk_encode(x, self.k), n_features, sq_norm=ops.row_sq_norm(x))

    def describe(self) -> dict[str, object]:
        """{"kind": "topk", "k": k}"""
        return {"kind": "topk", "k": self.k}

    def __repr__(self) -> str:
        return f"pyfacts.topk({self.k})"


class min_abs:
    """Keeps the activations whose absolute value is above a threshold, and NaNs.

    Args:
        theta: at least 0; a float for all features, or a 1-D tensor with one threshold per feature.

    Raises:
        TypeError: theta is neither a number nor a tensor of real numbers.
        ValueError: theta is negative or NaN, not 1-D, or (when it is used) of another length than the features.

    Example:
        >>> import torch, pyfacts
        >>> x = torch.tensor([[1.0, -3.0, 2.0, 0.5]])
        >>> pyfacts.min_abs(1.0).encode(x).to_dense()
        tensor([[ 0., -3.,  2.,  0.]])
        >>> pyfacts.min_abs(torch.tensor([0.5, 4.0, 0.0, 0.5])).encode(x).to_dense()
        tensor([[1., 0., 2., 0.]])
    """

    def __init__(self, theta: float | Tensor) -> None:
        if not isinstance(theta, Tensor):
            theta = as_float("theta", theta, "a number or a 1-D tensor")
        elif theta.is_complex() or theta.dtype == torch.bool:
            raise TypeError(f"theta must hold real numbers, got dtype {theta.dtype}")
        elif theta.dim() > 1:
            raise ValueError(f"theta must be a number or 1-D [n_features], got shape {tuple(theta.shape)}")
        else:
            theta = theta.detach().to(theta.dtype if theta.dtype in DTYPES else torch.float64, copy=True)
            theta = theta if theta.dim() else float(theta)
        thresholds = torch.as_tensor(theta, dtype=torch.float64, device=getattr(theta, "device", "cpu"))
        if not (thresholds >= 0).all():  # NaN too
            raise ValueError(f"theta must be at least 0, got {thresholds.min()}; |activation| is compared with it")
        self.theta = theta

    @torch.no_grad()
    def encode(self, x: Tensor) -> EncodedActivations:
        """Packs the elements of x [n_tokens, n_features] with |x| > theta, and NaNs."""
        if not isinstance(self.theta, Tensor):
            return encode(x, min_abs=self.theta)
        check_matrix("x", x)
        if self.theta.shape[0] != x.shape[1]:
            raise ValueError(
                f"min_abs has one threshold per feature, {self.theta.shape[0]} in all, but the activations have "
                f"{x.shape[1]} features"
            )
        if self.theta.device != x.device:
            self.theta = self.theta.to(x.device)
        # Not |x| > theta: a NaN is kept because it compares false.
        kept = x.masked_fill(x.abs() <= self.theta, 0)
        return replace(encode(kept), sq_norm=ops.row_sq_norm(x))

    def describe(self) -> dict[str, object]:
        """{"kind": "min_abs", "theta": θ}, or for a tensor its length, range and a SHA-256 of its float64 bytes."""
        if not isinstance(self.theta, Tensor):
            return {"kind": "min_abs", "theta": self.theta}
        theta = self.theta.double().cpu()
        return {
            "kind": "min_abs",
            "n_features": theta.shape[0],
            "theta_min": theta.min().item() if theta.numel() else 0.0,
            "theta_max": theta.max().item() if theta.numel() else 0.0,
            "theta_sha256": hashlib.sha256(theta.numpy().tobytes()).hexdigest(),
        }

    def __repr__(self) -> str:
        shown = f"<{self.theta.shape[0]} thresholds>" if isinstance(self.theta, Tensor) else repr(self.theta)
        return f"pyfacts.min_abs({shown})"
