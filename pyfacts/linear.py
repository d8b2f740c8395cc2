"""Encoders and decoders on encodings: `act(x @ weight.T + bias)` straight to packed, and packed times a matrix.

An MLP's up-projection and an SAE's encoder are one operator, a product, an activation and an encoding; so are the
down-projection and an SAE's decoder. None of these builds the dense [n_tokens, n_features] matrix unless asked to.
"""

from typing import Literal, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import ops
from .encoding import DTYPES, EncodedActivations, check_matrix
from .scalars import as_int

ACTIVATIONS = ("relu", "relu2", "jumprelu")


@overload
def linear_relu_encode(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "relu",
    return_dense: Literal[False] = False,
    threshold: Tensor | None = None,
) -> EncodedActivations: ...
@overload
def linear_relu_encode(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "relu",
    *,
    return_dense: Literal[True],
    threshold: Tensor | None = None,
) -> tuple[Tensor, EncodedActivations]: ...
def linear_relu_encode(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "relu",
    return_dense: bool = False,
    threshold: Tensor | None = None,
) -> EncodedActivations | tuple[Tensor, EncodedActivations]:
    """Computes act(x @ weight.T + bias) and packs it; an MLP's up-projection or an SAE's encoder.

    Without `return_dense` the dense result never exists as a whole: blocks of it are encoded while they are in the
    cache. Of a sparse float32 result most is not even computed, on CPUs that multiply bfloat16: a product in bfloat16
    bounds it from above, and what may exceed its threshold is then computed in float32. Under autocast the operands
    take autocast's dtype, as `torch.nn.functional.linear` would.

    Args:
        x: [n_tokens, d_in], float32, bfloat16 or float16.
        weight: [n_features, d_in], x's dtype, as in `torch.nn.Linear` (the transpose of an SAE's `W_enc` and of
            TransformerLens' `W_in`; a transposed view will do).
        bias: [n_features] or None.
        activation: with z = x @ weight.T + bias, "relu"; "relu2", relu(z) squared; or "jumprelu", relu(z) where
            z > threshold and 0 elsewhere. A NaN stays NaN.
        return_dense: also return h [n_tokens, n_features], differentiable in x, weight and bias: the backward pass
            finds in the encoding where h is not zero, and keeps no dense matrix for it.
        threshold: [n_features] of x's dtype, for "jumprelu" only. No gradient flows to it.

    Returns:
        The encoding, or (h, encoding) which agree bit for bit.

    Raises:
        TypeError: a dtype is not supported, or the operands' dtypes differ.
        ValueError: shapes or devices do not fit, the activation is unknown, or a threshold is missing, NaN, or given
            where none belongs.
        NotImplementedError: an operand carries tangents (forward mode).

    Example:
        >>> import torch, pyfacts
        >>> up = torch.nn.Linear(8, 512)
        >>> enc = pyfacts.linear_relu_encode(torch.randn(10, 8), up.weight, up.bias)
        >>> enc.shape
        torch.Size([10, 512])
    """
    x, weight, bias, threshold = _autocast(x, weight, bias, threshold)
    _check_encoder(x, weight, bias)
    _check_activation(activation, threshold, weight)
    if not return_dense:
        x, weight, bias = _detached(x, weight, bias)
    threshold = None if threshold is None else threshold.detach()
    _refuse_tangents(x, weight, bias)
    dense, planes = ops.linear_relu_encode(x, weight, bias, activation, threshold, return_dense)
    encoded = EncodedActivations(*planes, n_features=weight.shape[0])
    return (dense, encoded) if return_dense else encoded


def gated_relu_encode(
    x: Tensor, W_gate: Tensor, W_up: Tensor, b_gate: Tensor | None = None, b_up: Tensor | None = None
) -> EncodedActivations:
    """Computes relu(x @ W_gate.T + b_gate) * (x @ W_up.T + b_up) and packs it: ReGLU, block by block.

    Args:
        x: [n_tokens, d_in], float32, bfloat16 or float16.
        W_gate, W_up: [n_features, d_in], x's dtype, as the `gate_proj.weight` and `up_proj.weight` of a Llama.
        b_gate, b_up: [n_features] or None.

    Returns:
        The encoding [n_tokens, n_features]; a -0.0, which half of the zeros are, is not stored.

    Raises:
        TypeError, ValueError: as `linear_relu_encode`.

    Example:
        >>> import torch, pyfacts
        >>> gate, up = torch.nn.Linear(8, 512), torch.nn.Linear(8, 512)
        >>> pyfacts.gated_relu_encode(torch.randn(10, 8), gate.weight, up.weight, gate.bias, up.bias).shape
        torch.Size([10, 512])
    """
    x, W_gate, W_up, b_gate, b_up = _autocast(x, W_gate, W_up, b_gate, b_up)
    _check_encoder(x, W_gate, b_gate, "W_gate", "b_gate")
    _check_encoder(x, W_up, b_up, "W_up", "b_up")
    if W_gate.shape != W_up.shape:
        raise ValueError(f"W_gate and W_up must have one shape, got {tuple(W_gate.shape)} and {tuple(W_up.shape)}")
    planes = ops.gated_relu_encode(*_detached(x, W_gate, W_up, b_gate, b_up))
    return EncodedActivations(*planes, n_features=W_gate.shape[0])


def linear_topk_encode(x: Tensor, weight: Tensor, bias: Tensor | None, k: int) -> EncodedActivations:
    """Packs the k largest of relu(x @ weight.T + bias) of every token: the encoder of a TopK SAE.

    The selection runs along with the product, block by block; [n_tokens, n_features] is never built. In float32 most
    of it is only bounded, as in `linear_relu_encode`; what is selected is exact.

    Args:
        x: [n_tokens, d_in], float32, bfloat16 or float16.
        weight: [n_features, d_in], x's dtype, as for `linear_relu_encode`.
        bias: [n_features] or None.
        k: 1 to n_features. Of equal values the lowest features are taken; NaN counts as the largest.

    Returns:
        The encoding [n_tokens, n_features] with at most k values of a token: zeros that the ReLU leaves among the k are
        not stored.

    Raises:
        TypeError: as `linear_relu_encode`, or k is not an integer.
        ValueError: as `linear_relu_encode`, or k is out of range.

    Example:
        >>> import torch, pyfacts
        >>> pyfacts.linear_topk_encode(torch.eye(3), torch.eye(3) + 0.1, None, k=1).to_dense()
        tensor([[1.1000, 0.0000, 0.0000],
                [0.0000, 1.1000, 0.0000],
                [0.0000, 0.0000, 1.1000]])
    """
    return _topk(x, weight, bias, k, over_batch=False)


def linear_batch_topk_encode(x: Tensor, weight: Tensor, bias: Tensor | None, k: int) -> EncodedActivations:
    """Packs the k * n_tokens largest of relu(x @ weight.T + bias), whichever tokens they fall on: a BatchTopK SAE's.

    Args:
        x, weight, bias: as for `linear_topk_encode`.
        k: 1 to n_features, the mean number of values of a token. Of equal values those of the earliest tokens, and
            there of the lowest features, are taken; NaN counts as the largest.

    Returns:
        The encoding [n_tokens, n_features] with at most k * n_tokens values.

    Raises:
        TypeError, ValueError: as `linear_topk_encode`.

    Example:
        >>> import torch, pyfacts
        >>> x, weight = torch.tensor([[1.0], [5.0]]), torch.tensor([[1.0], [2.0]])
        >>> pyfacts.linear_batch_topk_encode(x, weight, None, k=1).to_dense()
        tensor([[ 0.,  0.],
                [ 5., 10.]])
    """
    return _topk(x, weight, bias, k, over_batch=True)


def sparse_linear(enc: EncodedActivations, W_dec: Tensor, b_dec: Tensor | None = None) -> Tensor:
    """Computes enc @ W_dec + b_dec from the encoding: an SAE's decoder or an MLP's down-projection.

    Args:
        enc: [n_tokens, n_features].
        W_dec: [n_features, d_out] of enc's dtype: an SAE's `W_dec`, TransformerLens' `W_out`, or the transpose of an
            `nn.Linear`'s weight (`down.weight.T`; it is copied once, as the rows of W_dec are read whole). Under
            autocast it may be of another dtype, and is cast.
        b_dec: [d_out] or None.

    Returns:
        [n_tokens, d_out] of enc's dtype, summed in float32, differentiable in W_dec and b_dec.

    Raises:
        TypeError: enc is not an encoding, or dtypes differ.
        ValueError: shapes or devices do not fit.
        RuntimeError: the planes are not a valid encoding.
        NotImplementedError: W_dec or b_dec carries tangents (forward mode).

    Example:
        >>> import torch, pyfacts
        >>> h, down = torch.relu(torch.randn(10, 512)), torch.nn.Linear(512, 8)
        >>> out = pyfacts.sparse_linear(pyfacts.encode(h), down.weight.T, down.bias)
        >>> torch.allclose(out, down(h), atol=1e-5)
        True
    """
    if not isinstance(enc, EncodedActivations):
        raise TypeError(f"enc must be EncodedActivations, got {type(enc).__name__}; make one with pyfacts.encode")
    check_matrix("W_dec", W_dec)
    if W_dec.shape[0] != enc.n_features:
        hint = "; pass weight.T of an nn.Linear" if W_dec.shape[1] == enc.n_features else ""
        raise ValueError(
            f"W_dec must be [{enc.n_features}, d_out] for enc {tuple(enc.shape)}, got {tuple(W_dec.shape)}{hint}"
        )
    if b_dec is not None:
        _check_vector("b_dec", b_dec, W_dec.shape[1], f"W_dec {tuple(W_dec.shape)}")
    if _autocasts(enc.device):
        W_dec, b_dec = _cast(enc.dtype, W_dec, b_dec)
    _check_alike("enc", enc, W_dec=W_dec, b_dec=b_dec)
    _refuse_tangents(W_dec, b_dec)
    return ops.sparse_linear(enc.planes, W_dec, b_dec)


def _topk(x: Tensor, weight: Tensor, bias: Tensor | None, k: int, over_batch: bool) -> EncodedActivations:
    x, weight, bias = _autocast(x, weight, bias)
    _check_encoder(x, weight, bias)
    k = as_int("k", k)
    if not 1 <= k <= weight.shape[0]:
        raise ValueError(f"k must be 1 to n_features ({weight.shape[0]}), got {k}")
    x, weight, bias = _detached(x, weight, bias)
    planes = ops.linear_topk_encode(x, weight, bias, k, over_batch)
    return EncodedActivations(*planes, n_features=weight.shape[0])


# ---- arguments -------------------------------------------------------------------------------------------------------


def _autocast(x: Tensor, *others: Tensor | None) -> tuple:
    """The operands in autocast's dtype, where autocast is on; those that may not be operands as they are."""
    if not isinstance(x, Tensor) or not _autocasts(x.device):
        return x, *others
    return _cast(torch.get_autocast_dtype(x.device.type), x, *others)


def _autocasts(device: torch.device) -> bool:
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def _cast(dtype: torch.dtype, *operands: Tensor | None) -> tuple:
    return tuple(t.to(dtype) if isinstance(t, Tensor) and t.dtype in DTYPES else t for t in operands)


def _refuse_tangents(*operands: Tensor | None) -> None:
    """NotImplementedError in forward-mode differentiation, where the tangent of an op like ours would be zeros."""
    if torch.compiler.is_compiling():
        return
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in operands):
        raise NotImplementedError(
            "pyfacts differentiates backwards only (.backward(), torch.autograd.grad), not by jvp"
        )


def _detached(*operands: Tensor | None) -> tuple:
    return tuple(None if operand is None else operand.detach() for operand in operands)


def _check_encoder(
    x: Tensor, weight: Tensor, bias: Tensor | None, weight_name: str = "weight", bias_name: str = "bias"
) -> None:
    check_matrix("x", x)
    check_matrix(weight_name, weight)
    if x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"x {tuple(x.shape)} and {weight_name} {tuple(weight.shape)} differ in d_in: {x.shape[1]} and "
            f"{weight.shape[1]}; {weight_name} is [n_features, d_in] as in nn.Linear (the transpose of an SAE's W_enc "
            "and of TransformerLens' W_in)"
        )
    if bias is not None:
        _check_vector(bias_name, bias, weight.shape[0], f"{weight_name} {tuple(weight.shape)}")
    _check_alike("x", x, **{weight_name: weight, bias_name: bias})


def _check_activation(activation: str, threshold: Tensor | None, weight: Tensor) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}")
    if (threshold is None) == (activation == "jumprelu"):
        raise ValueError(
            "activation 'jumprelu' needs a threshold [n_features]"
            if threshold is None
            else f"threshold belongs to activation 'jumprelu', got activation {activation!r}"
        )
    if threshold is not None:
        _check_vector("threshold", threshold, weight.shape[0], f"weight {tuple(weight.shape)}")
        _check_alike("weight", weight, threshold=threshold)
        if threshold.device.type == "cpu" and not torch.compiler.is_compiling() and threshold.isnan().any():
            j = int(threshold.isnan().nonzero()[0])
            raise ValueError(f"threshold must not be NaN, and that of feature {j} is")


def _check_vector(name: str, vector: Tensor, n: int, of: str) -> None:
    if not isinstance(vector, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(vector).__name__}")
    if tuple(vector.shape) != (n,):
        raise ValueError(f"{name} must be [{n}] for {of}, got {tuple(vector.shape)}")


def _check_alike(name: str, reference: Tensor | EncodedActivations, **others: Tensor | None) -> None:
    for other_name, other in others.items():
        if other is not None and other.dtype != reference.dtype:
            raise TypeError(f"{other_name} must have the dtype of {name}, {reference.dtype}, got {other.dtype}")
        if other is not None and other.device != reference.device:
            raise ValueError(f"{other_name} must be on the device of {name}, {reference.device}, got {other.device}")
