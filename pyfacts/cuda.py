"""Ops on CUDA that have no kernels of their own: torch's, around those of csrc/ops_cuda.cpp.

What is computed and encoded at once goes through the *device form* (csrc/cuda/arena.h): chunks of tokens are multiplied
into scratch memory that fits the L2 cache, and packed from there with `encode_out`, one behind the other, without
waiting for the GPU. `canonicalise` then makes the planes; it waits once, for their sizes.

`slice`, `take`, `cat` and `neuron` run on the CPU: the planes travel there, which are small, and the results back.

Nothing here asks what device its tensors are on, so that the tests run it on the CPU too.
"""

import functools
import itertools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _library, ops
from .ops import Planes

WIDE = 32768
"""Features from which an encoder is an SAE's, of whose latents few are active."""

# None of these was tuned on a GPU yet.
CHUNK_BYTES = 32 << 20
"""Scratch memory of a product: most of the 50 MB of an H100's L2 cache."""
CHUNK_TOKENS = 256
"""And at least as many tokens, where nothing but the product takes memory: with 128 an H200 would wait for the weight,
whose every 2 bytes are 2 operations a token, and its tensor cores do 165 while its memory brings a byte."""
ARENA_BYTES = 4 << 30
"""Values that the device form can hold at once. A longer matrix is made in pieces, each of which waits for the GPU; and
joining them takes 24 bytes a value, so that what is neither long nor wide should not come to it."""
WIDE_ARENA_BYTES = 64 << 20
"""The same for wide encoders: room for every value would be more than a tenth of their dense result."""
DENSE_BYTES = 256 << 20
"""What is unpacked at a time for the gradient of `sparse_linear`."""

FUSED = os.environ.get("PYFACTS_CUDA_FUSED") == "1"
"""Whether `linear_relu_encode` may multiply and pack in one kernel. Off until that kernel has been seen to work on a
GPU; `make gpu-check` tests and measures both ways."""


# ---- encoders that compute what they encode --------------------------------------------------------------------------


def linear_relu_encode(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, threshold: Tensor | None, return_dense: bool
) -> tuple[Tensor, ...]:
    """See `ops.linear_relu_encode`."""
    n_tokens, n_features = len(x), len(weight)
    floor = _floor(activation, threshold, weight)
    step = max(CHUNK_TOKENS, chunk_tokens(x, n_features))
    h = x.new_empty((n_tokens if return_dense else 0, n_features))
    linear = _linear(x, weight, bias, step, h if return_dense else None)

    def compute(start: int, stop: int) -> Tensor:
        z = linear(start, stop)
        if activation == "relu2":
            torch.threshold_(z, 0.0, 0.0).square_()
        elif return_dense and threshold is None:
            torch.threshold_(z, 0.0, 0.0)
        elif return_dense:
            z.masked_fill_(z <= floor[:n_features], 0)
        return z

    in_two_steps = in_chunks(compute, step, None if activation == "relu2" else floor)

    def fill(arena: ops.Arena, begin: int, end: int) -> None:
        dense = h[begin:end] if return_dense else None
        operands = x[begin:end], weight, bias, activation, None if threshold is None else floor[:n_features]
        if not (FUSED and ops.fused_linear_relu_encode_out(*operands, dense, arena)):
            in_two_steps(arena, begin, end)

    planes = pack(x, n_tokens, n_features, fill, least=CHUNK_TOKENS)
    if threshold is not None and bool(threshold.isnan().any()):  # asked only now that the GPU has been waited for
        raise ValueError(f"threshold must not be NaN, and that of feature {int(threshold.isnan().nonzero()[0])} is")
    return h, *planes


def gated_relu_encode(x: Tensor, w_gate: Tensor, w_up: Tensor, b_gate: Tensor | None, b_up: Tensor | None) -> Planes:
    """See `ops.gated_relu_encode`."""
    step = chunk_tokens(x, len(w_gate))
    gate, up = _linear(x, w_gate, b_gate, step), _linear(x, w_up, b_up, step)

    def compute(start: int, stop: int) -> Tensor:
        return torch.threshold_(gate(start, stop), 0.0, 0.0).mul_(up(start, stop))

    return pack(x, len(x), len(w_gate), in_chunks(compute, step))


def linear_topk_encode(x: Tensor, weight: Tensor, bias: Tensor | None, k: int, over_batch: bool) -> Planes:
    """See `ops.linear_topk_encode`."""
    n_tokens, n_features = len(x), len(weight)
    if not 1 <= k <= n_features:
        raise ValueError(f"k must be 1 to {n_features}, got {k}")
    step = chunk_tokens(x, n_features)
    linear = _linear(x, weight, bias, step)

    def relu(start: int, stop: int) -> Tensor:
        return torch.threshold_(linear(start, stop), 0.0, 0.0)

    def largest(start: int, stop: int) -> Tensor:
        h = relu(start, stop)
        return h.masked_fill_(~_largest_of_rows(h, k), 0)

    if not over_batch:
        return pack(x, n_tokens, n_features, in_chunks(largest, step), k * n_tokens)
    at, values = _largest_of_all(relu, step, x, n_features, k * n_tokens)

    def selected(start: int, stop: int) -> Tensor:
        first, last = torch.searchsorted(at, at.new_tensor((start, stop)) * n_features).tolist()
        h = x.new_zeros((stop - start) * n_features)
        h[at[first:last] - start * n_features] = values[first:last]
        return h.view(-1, n_features)

    return pack(x, n_tokens, n_features, in_chunks(selected, step), k * n_tokens)


def _floor(activation: str, threshold: Tensor | None, weight: Tensor) -> Tensor:
    """What each feature must exceed to be stored, [n_columns * 256]: zero, or for JumpReLU its threshold if above."""
    if activation not in ("relu", "relu2", "jumprelu"):
        raise ValueError(f"unknown activation {activation}")
    if (activation == "jumprelu") != (threshold is not None):
        raise ValueError("jumprelu, and it alone, takes a threshold")
    n_features = len(weight)
    floor = weight.new_zeros(ops.columns_of(n_features) * ops.COLUMN_WIDTH)
    if threshold is not None:
        if threshold.shape != (n_features,) or threshold.dtype != weight.dtype:
            raise ValueError(f"threshold must be [{n_features}] of x's dtype, got {threshold.dtype} {threshold.shape}")
        floor[:n_features] = threshold.where(threshold > 0, 0)  # nor -0.0: the kernel compares bits
    return floor


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, step: int, out: Tensor | None = None
) -> Callable[[int, int], Tensor]:
    """A function that gives x @ weight.T + bias of tokens [start, stop), up to `step`: in `out`, or until it is called
    again."""
    scratch: Tensor | None = None

    def linear(start: int, stop: int) -> Tensor:
        nonlocal scratch
        if out is None and scratch is None:
            scratch = x.new_empty((min(step, len(x)), len(weight)))
        z = scratch[: stop - start] if scratch is not None else out[start:stop]  # type: ignore[index]
        return torch.ops.aten.linear.out(x[start:stop], weight, bias, out=z)

    return linear


# ---- selections of what is there already -----------------------------------------------------------------------------


def topk_encode(x: Tensor, k: int) -> Planes:
    """See `ops.topk_encode`."""
    n_tokens, n_features = x.shape
    if not 1 <= k <= n_features:
        raise ValueError(f"k must be 1 to {n_features}, got {k}")

    def largest(start: int, stop: int) -> Tensor:
        rows = x[start:stop]
        return rows.masked_fill(~_largest_of_rows(rows.abs(), k), 0)

    return pack(x, n_tokens, n_features, in_chunks(largest, chunk_tokens(x, n_features)), k * n_tokens)


def row_sq_norm(x: Tensor) -> Tensor:
    """See `ops.row_sq_norm`."""
    return torch.linalg.vector_norm(x, dim=1, dtype=torch.float64).square()


# ---- selections ------------------------------------------------------------------------------------------------------


def _ranks(h: Tensor) -> Tensor:
    """Integers of h's size that order h, of which nothing is below zero, as a selection does: NaN is the largest."""
    bits = h.view(torch.int32 if h.dtype == torch.float32 else torch.int16)
    return bits.masked_fill(h.isnan(), torch.iinfo(bits.dtype).max)


def _largest_of_rows(h: Tensor, k: int) -> Tensor:
    """Where the k largest of each row are, the first of equals: bool, of h's shape."""
    ranks = _ranks(h)
    least = ranks.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
    above, equal = ranks > least, ranks == least
    del ranks  # before the cumulative sum, the largest of the temporaries
    room = k - above.sum(1, keepdim=True)
    equal &= equal.cumsum(1, dtype=torch.int32) <= room
    return above.logical_or_(equal)


def _largest_of_all(
    h: Callable[[int, int], Tensor], step: int, like: Tensor, n_features: int, n: int
) -> tuple[Tensor, Tensor]:
    """The n largest positive values of a matrix whose tokens [start, stop), up to `step`, are h(start, stop), the first
    of equals.

    Returns:
        Where they are, token * n_features + feature, ascending; and the values.
    """
    at = like.new_empty(0, dtype=torch.int64)
    values = like.new_empty(0)
    floor = torch.zeros((), dtype=torch.int64, device=like.device)  # what is no larger cannot enter
    for start in range(0, len(like), step):
        found = h(start, min(start + step, len(like))).flatten()
        entering = (_ranks(found) > floor).nonzero().squeeze(1)
        at = torch.cat([at, entering + start * n_features])
        values = torch.cat([values, found[entering]])
        if len(at) > n:
            ranks = _ranks(values)
            best = ranks.sort(descending=True, stable=True).indices[:n]
            floor = ranks[best[-1]]
            best = best.sort().values
            at, values = at[best], values[best]
    return at, values


# ---- packing in pieces -----------------------------------------------------------------------------------------------

Fill = Callable[[ops.Arena, int, int], None]


def chunk_tokens(like: Tensor, n_features: int, n_bytes: int | None = None) -> int:
    """How many tokens of n_features take n_bytes (CHUNK_BYTES by default): whole tiles, at least one."""
    row_bytes = max(1, n_features) * like.itemsize
    return max(1, (n_bytes or CHUNK_BYTES) // row_bytes // ops.TILE_TOKENS) * ops.TILE_TOKENS


def in_chunks(compute: Callable[[int, int], Tensor], step: int, threshold: Tensor | None = None) -> Fill:
    """A function that packs compute(start, stop), `step` tokens of a matrix, into the device form of [begin, end).

    Args:
        threshold: see `ops.encode_out`.
    """

    def fill(arena: ops.Arena, begin: int, end: int) -> None:
        for start in range(begin, end, step):
            z = compute(start, min(start + step, end))
            ops.encode_out(z, arena, threshold=threshold, first_token=start - begin)

    return fill


def pack(
    like: Tensor, n_tokens: int, n_features: int, fill: Fill, n_values: int | None = None, least: int = 0
) -> Planes:
    """The planes of a matrix that `fill(arena, begin, end)` packs, tokens [begin, end) at a time.

    A small matrix is made in one piece. The pieces of a large one hold what is stored and no more, and are then joined.
    If no more than n_values are known to be stored in all, pieces are longer, for they need less room. Pieces have at
    least `least` tokens, whole tiles.
    """
    n_columns = ops.columns_of(n_features)
    room = WIDE_ARENA_BYTES if n_features >= WIDE else ARENA_BYTES
    step = max(least, chunk_tokens(like, n_columns * ops.COLUMN_WIDTH, room))
    if n_values is not None and n_values * like.itemsize <= room // 2:  # and as much for what pads each group
        padding = n_columns * ops.UNIT_BYTES * ops.TILE_TOKENS // ops.GROUP_TOKENS  # of a tile's groups
        step = max(step, room // 2 // padding * ops.TILE_TOKENS)
    pieces = []
    for begin in range(0, max(1, n_tokens), step):
        end = min(begin + step, n_tokens)
        arena = ops.empty_arena(like, end - begin, n_features, n_values)
        fill(arena, begin, end)
        pieces.append(ops.canonicalise(arena))
        del arena  # before the next one is made, and before they are joined
    return join(pieces) if len(pieces) > 1 else pieces[0]


def join(pieces: list[Planes]) -> Planes:
    """Stacks valid encodings by token; none is empty, and all but the last are whole tiles long."""
    counts, index, values, tile_ptr = zip(*pieces, strict=True)
    sizes = counts[0].new_tensor([[len(i), len(v)] for i, v in zip(index, values, strict=True)], dtype=torch.int64)
    starts = torch.stack([ptr[:, 0] for ptr in tile_ptr], 1)  # [n_columns, n_pieces, 2]
    lengths = torch.cat([starts[1:], sizes[None]]) - starts
    before = sizes.cumsum(0) - sizes  # of the other pieces, where all are laid end to end
    places = starts + before
    moved = (lengths.flatten(0, 1).cumsum(0).view_as(lengths) - lengths - starts)[:, :, None]
    return (
        torch.cat(counts, 1),
        _runs(torch.cat(index), places[..., 0], lengths[..., 0]),
        _runs(torch.cat(values), places[..., 1], lengths[..., 1]),
        torch.cat([ptr + moved[:, i] for i, ptr in enumerate(tile_ptr)], 1),
    )


def _runs(plane: Tensor, starts: Tensor, lengths: Tensor) -> Tensor:
    """The pieces of a plane that start at `starts` and are `lengths` long, one after the other."""
    starts, lengths = starts.flatten(), lengths.flatten()
    moved = torch.repeat_interleave(starts - (lengths.cumsum(0) - lengths), lengths)
    return plane[moved + torch.arange(len(moved), device=plane.device)]


# ---- gradients of a product with an encoding -------------------------------------------------------------------------


def sparse_linear_grad_weight(
    counts: Tensor, index: Tensor, values: Tensor, tile_ptr: Tensor, n_features: int, grad: Tensor
) -> Tensor:
    """The encoding, transposed, times grad [n_tokens, d_out]. Columns lie together: some are unpacked at a time."""
    n_tokens, n_columns = counts.shape[1], len(counts)
    out = values.new_zeros((n_features, grad.shape[1]))
    if n_tokens == 0:
        return out
    # decode checks the rest: here only what would cut the planes elsewhere than between columns.
    starts = [*tile_ptr[:, 0].tolist(), [len(index), len(values)]]
    if starts[0] != [0, 0] or any(i > i_end or v > v_end for (i, v), (i_end, v_end) in itertools.pairwise(starts)):
        raise RuntimeError("not a valid encoding: the columns' starts do not ascend from 0 to the planes' sizes")
    step = max(1, DENSE_BYTES // (n_tokens * ops.COLUMN_WIDTH * values.itemsize))
    for first in range(0, n_columns, step):
        last = min(first + step, n_columns)
        (i, v), (i_end, v_end) = starts[first], starts[last]
        group = (counts[first:last], index[i:i_end], values[v:v_end], tile_ptr[first:last] - tile_ptr[first, 0])
        features = slice(first * ops.COLUMN_WIDTH, min(last * ops.COLUMN_WIDTH, n_features))
        torch.mm(ops.decode(group, features.stop - features.start, True).T, grad, out=out[features])
    return out


# ---- registration ----------------------------------------------------------------------------------------------------


def on_the_cpu(op: Any) -> Callable[..., Any]:
    """A function that runs an op with its tensors on the CPU, and gives the results back on their device."""

    def to(device: torch.device | str, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device)
        return type(value)(to(device, item) for item in value) if isinstance(value, list | tuple) else value

    def run(*arguments: Any) -> Any:
        planes = arguments[0]
        device = (planes[0] if isinstance(planes, list) else planes).device
        return to(device, op(*to("cpu", arguments)))

    return run


def _plain(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel as an op's: dtypes are what they are, and gradients are the op's own matter."""

    @functools.wraps(kernel)
    def run(*arguments: Any) -> Any:
        with torch.no_grad(), torch.autocast("cuda", enabled=False):
            return kernel(*arguments)

    return run


def available() -> bool:
    """Whether pyfacts can work on CUDA tensors here: its kernels were built, and torch has CUDA."""
    return _library.has_cuda()


def register() -> None:
    """Makes these functions the ops' CUDA kernels."""
    encoders = (linear_relu_encode, gated_relu_encode, linear_topk_encode, topk_encode)
    computed = (*encoders, row_sq_norm, sparse_linear_grad_weight)
    kernels: dict[str, Callable[..., Any]] = {kernel.__name__: kernel for kernel in computed}
    kernels |= {name: on_the_cpu(getattr(torch.ops.pyfacts, name)) for name in ("slice", "take", "cat", "neuron")}
    for name, kernel in kernels.items():
        torch.library.impl(f"pyfacts::{name}", "CUDA")(_plain(kernel))


if available():
    register()
