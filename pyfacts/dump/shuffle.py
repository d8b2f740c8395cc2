"""Shuffled batches for training on a dump: whole blocks are read, tokens leave them in random order."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import _storage
from ..scalars import as_int, at_least_one
from .arrays import BITS

if TYPE_CHECKING:
    from .reader import DumpedHook

MIXED_BLOCKS = 8


def batches(
    hooks: "Sequence[DumpedHook]",
    blocks: list[tuple[int, int]],
    batch_size: int,
    seed: int,
    rank: int,
    world_size: int,
) -> Iterator[dict[str, Any]]:
    """See `Dump.batches`; `blocks` are (shard, block)."""
    batch_size, seed = at_least_one("batch_size", batch_size), as_int("seed", seed)
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    rank, world_size = as_int("rank", rank), as_int("world_size", world_size)
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in [0, world_size), got {rank} of {world_size}")
    if not hooks:
        raise ValueError("batches needs at least one hook")
    return _batches(hooks, blocks, batch_size, seed, rank, world_size)


def _batches(
    hooks: "Sequence[DumpedHook]",
    blocks: list[tuple[int, int]],
    batch_size: int,
    seed: int,
    rank: int,
    world_size: int,
) -> Iterator[dict[str, Any]]:
    order = np.random.default_rng([seed, 0]).permutation(len(blocks))[rank::world_size].tolist()
    rng = np.random.default_rng([seed, 1, rank, world_size])
    loaded: dict[int, list[Any]] = {}  # block number -> its encoding or rows, by hook
    pool = np.empty((0, 2), np.int64)  # (block number, token in it)
    for i in range(0, len(order), MIXED_BLOCKS):
        group = order[i : i + MIXED_BLOCKS]
        fresh = []
        for number in group:
            loaded[number] = [_by_token(hook._read_block(*blocks[number])) for hook in hooks]
            n_tokens = hooks[0]._block_tokens(*blocks[number])
            fresh.append(np.stack([np.full(n_tokens, number), np.arange(n_tokens)], axis=1))
        waiting = np.concatenate([pool, rng.permutation(np.concatenate(fresh))])  # what is left over leaves first
        last = i + MIXED_BLOCKS >= len(order)
        n_batched = len(waiting) if last else len(waiting) // batch_size * batch_size
        mixed, pool = rng.permutation(waiting[:n_batched]), waiting[n_batched:]
        for start in range(0, n_batched, batch_size):
            yield _gather(hooks, loaded, mixed[start : start + batch_size])
        needed = set(pool[:, 0].tolist())
        loaded = {number: block for number, block in loaded.items() if number in needed}


def _by_token(block: "_storage.Encoding | np.ndarray") -> "_storage.TokenRows | np.ndarray":
    """The block in memory of its own, as it is read long after its file was checked."""
    return block.copy() if isinstance(block, np.ndarray) else _storage.TokenRows(block)


def _gather(hooks: "Sequence[DumpedHook]", loaded: dict[int, list[Any]], picked: np.ndarray) -> dict[str, Any]:
    """Dense rows of (block number, token) pairs, by hook, in the order of the pairs."""
    numbers, which = np.unique(picked[:, 0], return_inverse=True)
    tokens = np.ascontiguousarray(picked[:, 1])
    batch = {}
    for h, hook in enumerate(hooks):
        blocks = [loaded[number][h] for number in numbers.tolist()]
        rows = np.empty((len(picked), hook.width), BITS[hook.dtype])
        if hook.kind == "rows":
            for b, block in enumerate(blocks):
                rows[which == b] = block[tokens[which == b]]
        else:
            _storage.gather_rows(blocks, which, tokens, rows)
        batch[hook.name] = hook._dump.framework.rows(rows, hook.dtype)
    return batch
