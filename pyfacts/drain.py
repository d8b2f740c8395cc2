"""What a capture takes on a GPU, on its way to the host, which does not wait for it.

How large an encoding is, only the GPU knows, and only once it has packed it. So activations travel in steps: packed
into buffers for the worst case, their sizes behind them to the host; when the host has read those, planes of just that
size, copied to pinned memory on a stream of their own; from there to memory of their own. A `Drain` takes the second
step of a tensor when `DEPTH` more have been started, and the third another `DEPTH` later, or at the end: the host then
waits for that tensor alone, while the GPU has the later ones to do.

The steps are queued on the stream that is current, which must be the same from the first to the last.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import replace

import torch
from torch import Tensor

from . import ops
from .encoding import EncodedActivations, encode

DEPTH = 2
"""How many tensors may wait for their next step: for the first one in buffers as large as the tensor."""
LARGEST_BYTES = 512 << 20
"""A larger tensor is encoded at once, and waited for."""

Activations = EncodedActivations | Tensor
Steps = Generator[None, None, Activations]


class Drain:
    """Brings activations to the host, one after the other; `finish` what it returns before you use it."""

    def __init__(self) -> None:
        self._waiting: tuple[deque[Draining], deque[Draining]] = (deque(), deque())

    def encode(self, x: Tensor) -> EncodedActivations | Draining:
        """Queues the encoding of x [n_tokens, n_features]; the host may wait for one of those before it."""
        if not on_gpu(x):
            return encode(x)
        return self._start(_pack(x) if x.numel() * x.itemsize <= LARGEST_BYTES else _move(encode(x)))

    def move(self, x: Activations) -> Activations | Draining:
        """Queues the copy of what is encoded, or is to stay dense and will not be changed."""
        return self._start(_move(x)) if on_gpu(x) else x

    def _start(self, steps: Steps) -> Draining:
        started = draining = Draining(steps)
        for waiting in self._waiting:
            waiting.append(draining)
            if len(waiting) <= DEPTH:
                break
            draining = waiting.popleft()
            draining.advance()
        return started


class Draining:
    """Activations between two steps."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self._result: Activations | None = None
        self.advance()

    def advance(self) -> None:
        """Takes the next step, if there is one."""
        if self._result is None:
            try:
                next(self._steps)
            except StopIteration as end:
                self._result = end.value

    def finish(self) -> Activations:
        """Takes the steps that are left; returns the activations, on the CPU."""
        while self._result is None:
            self.advance()
        return self._result


def _pack(x: Tensor) -> Steps:
    arena = ops.empty_arena(x, *x.shape)
    ops.encode_out(x, arena)
    del x
    sizes, *_ = _canonicalise(arena, 0, 0)
    read_sizes = read_later(sizes)
    yield
    _, index, values, tile_ptr = _canonicalise(arena, *read_sizes())
    packed = EncodedActivations(arena.counts, index, values, tile_ptr, arena.n_features)
    del arena
    return (yield from _move(packed))


def _canonicalise(arena: ops.Arena, index_bytes: int, n_values: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sizes of index and values, and index, values and tile_ptr: if these sizes were given."""
    n_columns, n_tokens = arena.counts.shape
    index, values = arena.index.new_empty(index_bytes), arena.values.new_empty(n_values)
    tile_ptr = arena.cursor.new_empty((n_columns, -(-n_tokens // ops.TILE_TOKENS), 2))
    sizes = arena.cursor.new_empty(2)
    ops.canonicalise_out(arena, index, values, tile_ptr, sizes)
    return sizes, index, values, tile_ptr


def _move(x: Activations) -> Steps:
    if isinstance(x, Tensor):
        take = copy_later([x])
        del x
        yield
        return take()[0]
    take = copy_later([*x.planes] if x.sq_norm is None else [*x.planes, x.sq_norm])
    yield
    counts, index, values, tile_ptr, *sq_norm = take()
    x = replace(x, counts=counts, index=index, values=values, tile_ptr=tile_ptr)
    return replace(x, sq_norm=sq_norm[0]) if sq_norm else x


# ---- what only a GPU can do: the tests put something else here -------------------------------------------------------


def on_gpu(x: Activations) -> bool:
    return x.device.type == "cuda"


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


def copy_later(tensors: list[Tensor]) -> Callable[[], list[Tensor]]:
    """Queues the copies of tensors on one GPU to the host, on a stream of their own; what is returned waits for them.

    They land in pinned memory, which torch keeps and uses again, and are moved from there when they are taken: so much
    pinned memory is in use as copies are under way, whatever becomes of the results.
    """
    device = tensors[0].device
    stream = _copy_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        on_host = [torch.empty(x.shape, dtype=x.dtype, pin_memory=True) for x in tensors]
        for x, copy in zip(tensors, on_host, strict=True):
            copy.copy_(x, non_blocking=True)
            x.record_stream(stream)  # its memory is not given to others before
        copied = torch.cuda.Event()
        copied.record(stream)

    def take() -> list[Tensor]:
        copied.synchronize()
        return [torch.empty(copy.shape, dtype=copy.dtype).copy_(copy) for copy in on_host]

    return take


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
