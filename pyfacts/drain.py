"""Encoding on a GPU that the host does not wait for.

How large an encoding is, only the GPU knows, and only once it has packed it. So a `Drain` packs into buffers for the
worst case, lets the sizes travel to the host behind that, and looks at them when `DEPTH` more tensors have been packed,
or at the end. The host then waits for that tensor alone, while the GPU has the later ones to do, and exchanges the
buffers for planes that hold what is stored and no more.

Everything is queued on the stream that is current, which must be the same from packing to the end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from . import ops
from .encoding import EncodedActivations, encode

DEPTH = 2
"""How many tensors may lie in buffers, each as large as the tensor, at a time."""
LARGEST_BYTES = 512 << 20
"""A larger tensor is encoded at once, and waited for."""


class Drain:
    """Encodes tensors [n_tokens, n_features] one after the other; `finish` what it returns before you use it."""

    def __init__(self) -> None:
        self._packed: deque[Packed] = deque()

    def encode(self, x: Tensor) -> EncodedActivations | Packed:
        """Queues the encoding of x and returns; the host may wait for the oldest of those before it."""
        if not suits(x):
            return encode(x)
        packed = Packed(x)
        self._packed.append(packed)
        if len(self._packed) > DEPTH:
            self._packed.popleft().finish()
        return packed


class Packed:
    """A tensor that is being packed on its GPU."""

    def __init__(self, x: Tensor) -> None:
        self._arena = ops.empty_arena(x, *x.shape)
        n_columns, n_tokens = self._arena.counts.shape
        self._tile_ptr = x.new_empty((n_columns, -(-n_tokens // ops.TILE_TOKENS), 2), dtype=torch.int64)
        self._sizes = x.new_empty(2, dtype=torch.int64)
        ops.encode_out(x, self._arena)
        self._canonicalise(0, 0)  # for the sizes
        self._read_sizes = read_later(self._sizes)
        self._finished: EncodedActivations | None = None

    def finish(self) -> EncodedActivations:
        """Waits until it is packed, and queues the copy to planes of its size."""
        if self._finished is None:
            index, values = self._canonicalise(*self._read_sizes())
            planes = self._arena.counts, index, values, self._tile_ptr
            self._finished = EncodedActivations(*planes, n_features=self._arena.n_features)
            del self._arena, self._tile_ptr, self._sizes, self._read_sizes
        return self._finished

    def _canonicalise(self, index_bytes: int, n_values: int) -> tuple[Tensor, Tensor]:
        index = self._arena.index.new_empty(index_bytes)
        values = self._arena.values.new_empty(n_values)
        ops.canonicalise_out(self._arena, index, values, self._tile_ptr, self._sizes)
        return index, values


def suits(x: Tensor) -> bool:
    """Whether x is on a GPU, and small enough for buffers of the worst case."""
    return x.is_cuda and x.numel() * x.itemsize <= LARGEST_BYTES


def read_later(x: Tensor) -> Callable[[], list[int]]:
    """Queues the copy of a small tensor on a GPU to the host; what is returned waits for that, and gives its values."""
    on_host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    on_host.copy_(x, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(x.device))

    def read() -> list[int]:
        copied.synchronize()
        return on_host.tolist()

    return read
