"""The torch ops: planes in, planes out. Only this file and `cuda.py` name `torch.ops.pyfacts`.

An encoding travels as four planes and `n_features`; C = ceil(n_features / 256) columns, R = ceil(n_tokens / 128) tiles:

    counts    uint8   [C, n_tokens]
    index     uint8   [index_bytes]
    values    dtype   [nnz]
    tile_ptr  int64   [C, R, 2]

`pyfacts.encoding` wraps them in a record and checks arguments; use that unless you are writing a `torch.compile`d graph
of your own. On CUDA some of them are `pyfacts.cuda`'s.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _library

_library.load()

COLUMN_WIDTH = 256
TILE_TOKENS = 128
GROUP_TOKENS = 8
UNIT_BYTES = 16

Planes = tuple[Tensor, Tensor, Tensor, Tensor]


def columns_of(n_features: int) -> int:
    """How many columns, the last perhaps narrower."""
    return (n_features + COLUMN_WIDTH - 1) // COLUMN_WIDTH


def tiles_of(n_tokens: int) -> int:
    """How many tiles a column has, the last perhaps of fewer tokens."""
    return (n_tokens + TILE_TOKENS - 1) // TILE_TOKENS


def isa() -> str:
    """Returns the instruction set of the CPU kernels in use: "scalar", "avx2", "avx512" or "avx512vbmi2"."""
    return torch.ops.pyfacts.isa()


def encode(x: Tensor, min_abs: float, signed_zero: bool) -> Planes:
    """Encodes x [n_tokens, n_features] of float32, bfloat16 or float16."""
    return torch.ops.pyfacts.encode(x, min_abs, signed_zero)


def decode(planes: Planes, n_features: int, signed_zero: bool, out: Tensor | None = None) -> Tensor:
    """Returns the dense matrix [n_tokens, n_features]; RuntimeError if the planes are not a valid encoding."""
    if out is None:
        return torch.ops.pyfacts.decode(*planes, n_features, signed_zero)
    torch.ops.pyfacts.decode_out(*planes, n_features, signed_zero, out)
    torch.autograd.graph.increment_version(out)  # lest autograd take what it has saved of it for unchanged
    return out


def linear_relu_encode(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, threshold: Tensor | None, return_dense: bool
) -> tuple[Tensor, Planes]:
    """Encodes act(x @ weight.T + bias), act being "relu", "relu2" or "jumprelu" with its threshold [n_features].

    The dense result [n_tokens, n_features] comes first ([0, n_features] unless return_dense) and carries gradients to
    x, weight and bias.
    """
    dense, *planes = torch.ops.pyfacts.linear_relu_encode(x, weight, bias, activation, threshold, return_dense)
    return dense, tuple(planes)


def gated_relu_encode(x: Tensor, W_gate: Tensor, W_up: Tensor, b_gate: Tensor | None, b_up: Tensor | None) -> Planes:
    """Encodes relu(x @ W_gate.T + b_gate) * (x @ W_up.T + b_up)."""
    return torch.ops.pyfacts.gated_relu_encode(x, W_gate, W_up, b_gate, b_up)


def linear_topk_encode(x: Tensor, weight: Tensor, bias: Tensor | None, k: int, over_batch: bool) -> Planes:
    """Encodes the k largest of relu(x @ weight.T + bias) of every token, or k * n_tokens of them all."""
    return torch.ops.pyfacts.linear_topk_encode(x, weight, bias, k, over_batch)


def topk_encode(x: Tensor, k: int) -> Planes:
    """Encodes the k largest |x| of every row; NaN counts as the largest, and of equals the first come first."""
    return torch.ops.pyfacts.topk_encode(x, k)


def row_sq_norm(x: Tensor) -> Tensor:
    """Returns the squared norm of each row of x, float64 [n_tokens]."""
    return torch.ops.pyfacts.row_sq_norm(x)


def sparse_linear(planes: Planes, W_dec: Tensor, b_dec: Tensor | None) -> Tensor:
    """Returns the encoding times W_dec [n_features, d_out], plus b_dec; RuntimeError if it is not a valid encoding.

    Only stored values are multiplied, so that an infinity or NaN in W_dec reaches just the tokens that use its row.
    """
    return torch.ops.pyfacts.sparse_linear(*planes, W_dec, b_dec)


def slice_tokens(planes: Planes, n_features: int, start: int, stop: int) -> Planes:
    """Returns the encoding of tokens [start, stop), a copy."""
    return torch.ops.pyfacts.slice(*planes, n_features, start, stop)


def take_tokens(planes: Planes, n_features: int, tokens: Tensor) -> Planes:
    """Returns the encoding of some tokens, int64 [n] in any order, a copy."""
    return torch.ops.pyfacts.take(*planes, n_features, tokens)


def cat(encodings: list[Planes], n_features: int) -> Planes:
    """Stacks encodings by token."""
    counts, index, values, tile_ptr = (list(plane) for plane in zip(*encodings, strict=True))
    return torch.ops.pyfacts.cat(counts, index, values, tile_ptr, n_features)


def neuron(planes: Planes, n_features: int, feature: int) -> tuple[Tensor, Tensor]:
    """Returns the tokens (int64, ascending) at which a feature is stored, and its values there."""
    return torch.ops.pyfacts.neuron(*planes, n_features, feature)


def to_csr(planes: Planes, n_features: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns crow_indices [n_tokens + 1], col_indices [nnz] and values [nnz]."""
    return torch.ops.pyfacts.to_csr(*planes, n_features)


# ---- the device form, on CUDA ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arena:
    """Buffers for the device form of a matrix [n_tokens, n_features], which kernels write without knowing its size.

    With G = ceil(n_tokens / 8) groups of tokens (csrc/cuda/arena.h says what each holds):

    Attributes:
        counts: uint8 [C, n_tokens].
        index: uint8 [index_capacity].
        values: dtype [values_capacity].
        group_ptr: int64 [C, G], where each group starts.
        cursor: int64 [1], how much is used; 0 before the first part is packed.
        n_features: of the matrix.
    """

    counts: Tensor
    index: Tensor
    values: Tensor
    group_ptr: Tensor
    cursor: Tensor
    n_features: int

    @property
    def buffers(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """counts, index, values, group_ptr, cursor."""
        return self.counts, self.index, self.values, self.group_ptr, self.cursor


def empty_arena(like: Tensor, n_tokens: int, n_features: int, n_values: int | None = None) -> Arena:
    """Returns buffers that hold any matrix of that shape and of like's dtype, on its device; or of n_values at most."""
    n_columns, n_groups = columns_of(n_features), -(-n_tokens // GROUP_TOKENS)
    n_elements = n_columns * n_groups * GROUP_TOKENS * COLUMN_WIDTH
    n_index, n_stored = n_elements // 8, n_elements
    if n_values is not None:  # a value takes a byte of index at most, and each group's runs are padded
        padding = n_columns * n_groups * UNIT_BYTES
        n_index, n_stored = min(n_index, n_values + padding), min(n_stored, n_values + padding // like.itemsize)
    return Arena(
        like.new_empty((n_columns, n_tokens), dtype=torch.uint8),
        like.new_empty(n_index, dtype=torch.uint8),
        like.new_empty(n_stored),
        like.new_empty((n_columns, n_groups), dtype=torch.int64),
        like.new_zeros(1, dtype=torch.int64),
        n_features,
    )


def encode_out(
    x: Tensor,
    arena: Arena,
    min_abs: float = 0.0,
    signed_zero: bool = False,
    threshold: Tensor | None = None,
    first_token: int = 0,
) -> None:
    """Packs x, some rows of the matrix, without waiting for the GPU.

    Args:
        x: rows from `first_token` on, a multiple of 8, to a multiple of 8 or the matrix's end. Every row is packed
            once, in any order.
        arena: where to. What does not fit is left out, and `canonicalise` complains.
        min_abs, signed_zero: see `pyfacts.encode`.
        threshold: what exceeds its feature's is stored instead, and NaN. [n_columns * 256], x's dtype, none negative.
        first_token: x's place.
    """
    torch.ops.pyfacts.encode_out(x, min_abs, signed_zero, threshold, first_token, arena.n_features, *arena.buffers)


def fused_linear_relu_encode_out(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    threshold: Tensor | None,
    h: Tensor | None,
    arena: Arena,
) -> bool:
    """Fills a fresh arena with act(x @ weight.T + bias) by one kernel, without waiting for the GPU.

    Args:
        x, weight, bias, activation: see `pyfacts.linear_relu_encode`.
        threshold: [n_features] of x's dtype, none below zero and no NaN; with "jumprelu" alone.
        h: where the dense result [n_tokens, n_features] goes as well.
        arena: as large as the result.

    Returns:
        False, and nothing is done, if there is no such kernel for these: it wants an sm_90, 16 bits, sizes that are
        multiples of 8, and addresses that are multiples of 16.
    """
    return torch.ops.pyfacts.fused_linear_relu_encode_out(x, weight, bias, activation, threshold, h, *arena.buffers)


def canonicalise(arena: Arena) -> Planes:
    """Returns the planes, once all parts are packed; waits for their sizes. RuntimeError if they did not fit."""
    return arena.counts, *torch.ops.pyfacts.canonicalise(*arena.buffers, arena.n_features)


def canonicalise_out(arena: Arena, index: Tensor, values: Tensor, tile_ptr: Tensor, sizes: Tensor) -> None:
    """Writes the planes but counts, which is the arena's, without waiting for the GPU.

    Args:
        arena: the device form, all parts packed.
        index, values: buffers; if they are too small, nothing is written to them.
        tile_ptr: int64 [C, R, 2].
        sizes: int64 [2], how much of index and values is used, or would be; -1 if the arena was too small.
    """
    torch.ops.pyfacts.canonicalise_out(*arena.buffers, arena.n_features, index, values, tile_ptr, sizes)


# ---- what torch.compile needs to know: shapes ------------------------------------------------------------------------


def _empty_planes(like: Tensor, n_tokens: Any, n_features: Any) -> Planes:
    context = torch.library.get_ctx()
    n_columns = columns_of(n_features)
    return (
        like.new_empty((n_columns, n_tokens), dtype=torch.uint8),
        like.new_empty((context.new_dynamic_size(),), dtype=torch.uint8),
        like.new_empty((context.new_dynamic_size(),)),
        like.new_empty((n_columns, tiles_of(n_tokens), 2), dtype=torch.int64),
    )


@torch.library.register_fake("pyfacts::encode")
def _(x: Tensor, min_abs: float, signed_zero: bool) -> Planes:
    return _empty_planes(x, x.shape[0], x.shape[1])


@torch.library.register_fake("pyfacts::decode")
def _(counts: Tensor, index: Tensor, values: Tensor, tile_ptr: Tensor, n_features: int, signed_zero: bool) -> Tensor:
    return values.new_empty((counts.shape[1], n_features))


@torch.library.register_fake("pyfacts::decode_out")
def _(
    counts: Tensor, index: Tensor, values: Tensor, tile_ptr: Tensor, n_features: int, signed_zero: bool, out: Tensor
) -> None:
    pass


@torch.library.register_fake("pyfacts::encode_out")
def _(
    x: Tensor,
    min_abs: float,
    signed_zero: bool,
    threshold: Tensor | None,
    first_token: int,
    n_features: int,
    counts: Tensor,
    index: Tensor,
    values: Tensor,
    group_ptr: Tensor,
    cursor: Tensor,
) -> None:
    pass


@torch.library.register_fake("pyfacts::canonicalise")
def _(
    counts: Tensor, index: Tensor, values: Tensor, group_ptr: Tensor, cursor: Tensor, n_features: int
) -> tuple[Tensor, Tensor, Tensor]:
    _, index, values, tile_ptr = _empty_planes(values, counts.shape[1], n_features)
    return index, values, tile_ptr


@torch.library.register_fake("pyfacts::canonicalise_out")
def _(
    counts: Tensor,
    index: Tensor,
    values: Tensor,
    group_ptr: Tensor,
    cursor: Tensor,
    n_features: int,
    out_index: Tensor,
    out_values: Tensor,
    tile_ptr: Tensor,
    sizes: Tensor,
) -> None:
    pass


@torch.library.register_fake("pyfacts::linear_relu_encode")
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, threshold: Tensor | None, return_dense: bool
) -> tuple[Tensor, ...]:
    dense = x.new_empty((x.shape[0] if return_dense else 0, weight.shape[0]))
    return dense, *_empty_planes(x, x.shape[0], weight.shape[0])


@torch.library.register_fake("pyfacts::gated_relu_encode")
def _(x: Tensor, w_gate: Tensor, w_up: Tensor, b_gate: Tensor | None, b_up: Tensor | None) -> Planes:
    return _empty_planes(x, x.shape[0], w_gate.shape[0])


@torch.library.register_fake("pyfacts::linear_topk_encode")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, k: int, over_batch: bool) -> Planes:
    return _empty_planes(x, x.shape[0], weight.shape[0])


@torch.library.register_fake("pyfacts::topk_encode")
def _(x: Tensor, k: int) -> Planes:
    return _empty_planes(x, *x.shape)


@torch.library.register_fake("pyfacts::row_sq_norm")
def _(x: Tensor) -> Tensor:
    return x.new_empty((x.shape[0],), dtype=torch.float64)


@torch.library.register_fake("pyfacts::slice")
def _(
    counts: Tensor, index: Tensor, values: Tensor, tile_ptr: Tensor, n_features: int, start: int, stop: int
) -> Planes:
    return _empty_planes(values, stop - start, n_features)


@torch.library.register_fake("pyfacts::take")
def _(counts: Tensor, index: Tensor, values: Tensor, tile_ptr: Tensor, n_features: int, tokens: Tensor) -> Planes:
    return _empty_planes(values, tokens.shape[0], n_features)


@torch.library.register_fake("pyfacts::cat")
def _(
    counts: list[Tensor], index: list[Tensor], values: list[Tensor], tile_ptr: list[Tensor], n_features: int
) -> Planes:
    n_tokens = sum(plane.shape[1] for plane in counts)
    n_columns = counts[0].shape[0]
    return (
        values[0].new_empty((n_columns, n_tokens), dtype=torch.uint8),
        values[0].new_empty((sum(plane.shape[0] for plane in index),), dtype=torch.uint8),
        values[0].new_empty((sum(plane.shape[0] for plane in values),)),
        values[0].new_empty((n_columns, tiles_of(n_tokens), 2), dtype=torch.int64),
    )


@torch.library.register_fake("pyfacts::neuron")
def _(
    counts: Tensor, index: Tensor, values: Tensor, tile_ptr: Tensor, n_features: int, feature: int
) -> tuple[Tensor, Tensor]:
    n_found = torch.library.get_ctx().new_dynamic_size()
    return values.new_empty((n_found,), dtype=torch.int64), values.new_empty((n_found,))


@torch.library.register_fake("pyfacts::to_csr")
def _(
    counts: Tensor, index: Tensor, values: Tensor, tile_ptr: Tensor, n_features: int
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        values.new_empty((counts.shape[1] + 1,), dtype=torch.int64),
        values.new_empty(values.shape, dtype=torch.int64),
        values.new_empty(values.shape),
    )


@torch.library.register_fake("pyfacts::sparse_linear")
def _(counts: Tensor, index: Tensor, values: Tensor, tile_ptr: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return values.new_empty((counts.shape[1], weight.shape[1]))


@torch.library.register_fake("pyfacts::sparse_linear_grad_weight")
def _(counts: Tensor, index: Tensor, values: Tensor, tile_ptr: Tensor, n_features: int, grad: Tensor) -> Tensor:
    return values.new_empty((n_features, grad.shape[1]))


# ---- gradients of sparse_linear --------------------------------------------------------------------------------------


def _save_sparse_linear(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *planes, weight, _ = inputs
    ctx.save_for_backward(*planes)
    ctx.n_features = weight.shape[0]


def _sparse_linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *_, needs_weight, needs_bias = ctx.needs_input_grad
    grad_weight = None
    if needs_weight:
        grad_weight = torch.ops.pyfacts.sparse_linear_grad_weight(*ctx.saved_tensors, ctx.n_features, grad)
    return None, None, None, None, grad_weight, grad.sum(0) if needs_bias else None


torch.library.register_autograd("pyfacts::sparse_linear", _sparse_linear_backward, setup_context=_save_sparse_linear)


def _save_grad_weight(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])


def _grad_weight_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return None, None, None, None, None, torch.ops.pyfacts.sparse_linear(*ctx.saved_tensors, grad, None)


torch.library.register_autograd(
    "pyfacts::sparse_linear_grad_weight", _grad_weight_backward, setup_context=_save_grad_weight
)


# ---- gradients of linear_relu_encode ---------------------------------------------------------------------------------


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, activation, _, return_dense = inputs
    _, *planes = output
    ctx.mark_non_differentiable(*planes)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, *planes)
    ctx.activation, ctx.return_dense = activation, return_dense


def _backward(ctx: Any, grad_dense: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    """h is unpacked again, for as long as this takes: where it is zero, no gradient passes; a NaN lets it pass."""
    if grad_dense is None or not ctx.return_dense:
        return (None,) * 6
    x, weight, bias, *planes = ctx.saved_tensors
    h = decode(tuple(planes), weight.shape[0], False)
    slope = h
    if ctx.activation == "relu2":
        # h = relu(z)**2, whose derivative 2 * relu(z) is computed anew if it is to be differentiated itself, and in
        # float16, where squares overflow and underflow.
        anew = torch.is_grad_enabled() or h.dtype == torch.float16
        slope = 2 * (torch.nn.functional.linear(x, weight, bias).relu() if anew else h.sqrt())
        grad_dense = grad_dense * slope
    grad = torch.where(slope == 0, 0, grad_dense)
    grad_x = grad @ weight if ctx.needs_input_grad[0] else None
    grad_weight = grad.T @ x if ctx.needs_input_grad[1] else None
    grad_bias = grad.sum(0) if bias is not None and ctx.needs_input_grad[2] else None
    return grad_x, grad_weight, grad_bias, None, None, None


torch.library.register_autograd("pyfacts::linear_relu_encode", _backward, setup_context=_save_for_backward)
