"""What a capture takes on a GPU, on its way to the host, which does not wait for it.

How large an encoding is, only the GPU knows, and only once it has packed it. So activations travel in steps: packed
into buffers for the worst case, their sizes behind them to the host; when the host has read those, planes of just that
size, copied to pinned memory on a stream of their own; from there to memory of their own. A `Drain` takes the second
step of a tensor when `DEPTH` more have been started, and the third another `DEPTH` later, or at the end: the host then
waits for that tensor alone, while the GPU has the later ones to do.

The steps are queued on the stream that is current at the first.
"""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Callable, Generator

import torch
from torch import Tensor

from . import ops
from .encoding import EncodedActivations, encode

DEPTH = 2
"""How many tensors may wait for their next step while another is packed; until the first of their steps, in buffers as
large as they are."""
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
    on_this_stream = stream_of(x)
    arena = ops.empty_arena(x, *x.shape)
    ops.encode_out(x, arena)
    del x
    sizes, *_ = _canonicalise(arena, 0, 0)
    read_sizes = read_later(sizes)
    yield
    exact = read_sizes()
    with on_this_stream():
        _, index, values, tile_ptr = _canonicalise(arena, *exact)
        take = _copy(EncodedActivations(arena.counts, index, values, tile_ptr, arena.n_features))
    del arena, index, values, tile_ptr
    yield
    return take()


def _move(x: Activations) -> Steps:
    take = _copy(x)
    del x
    yield
    return take()


def _canonicalise(arena: ops.Arena, index_bytes: int, n_values: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sizes of index and values, and index, values and tile_ptr: if these sizes were given."""
    n_columns, n_tokens = arena.counts.shape
    index, values = arena.index.new_empty(index_bytes), arena.values.new_empty(n_values)
    tile_ptr = arena.cursor.new_empty((n_columns, ops.tiles_of(n_tokens), 2))
    sizes = arena.cursor.new_empty(2)
    ops.canonicalise_out(arena, index, values, tile_ptr, sizes)
    return sizes, index, values, tile_ptr


def _copy(x: Activations) -> Callable[[], Activations]:
    """Queues the copy to the host; what is returned waits for it."""
    if isinstance(x, Tensor):
        take_tensors = copy_later([x])
        return lambda: take_tensors()[0]
    take_planes = copy_later([*x.planes] if x.sq_norm is None else [*x.planes, x.sq_norm])
    n_features, signed_zero = x.n_features, x.signed_zero

    def take() -> EncodedActivations:
        counts, index, values, tile_ptr, *sq_norm = take_planes()
        return EncodedActivations(counts, index, values, tile_ptr, n_features, signed_zero, *sq_norm)

    return take


# ---- what only a GPU can do: the tests put something else here -------------------------------------------------------


def on_gpu(x: Activations) -> bool:
    return x.device.type == "cuda"


def stream_of(x: Tensor) -> Callable[[], contextlib.AbstractContextManager[object]]:
    """A function that makes current again the stream that is so now on x's GPU."""
    stream = torch.cuda.current_stream(x.device)
    return lambda: torch.cuda.stream(stream)


def read_later(x: Tensor) -> Callable[[], list[int]]:
    """Queues the copy of a small tensor on a GPU to the host; what is returned waits for that, and gives its values."""
    on_host = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=True)
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
        on_host = [torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=True) for x in tensors]
        for x, copy in zip(tensors, on_host, strict=True):
            copy.copy_(x, non_blocking=True)
            x.record_stream(stream)  # its memory is not given to others before
        copied = torch.cuda.Event()
        copied.record(stream)

    def take() -> list[Tensor]:
        copied.synchronize()
        return [torch.empty(copy.shape, dtype=copy.dtype, device="cpu").copy_(copy) for copy in on_host]

    return take


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
