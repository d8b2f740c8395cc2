"""One process's part in a dump: runs the model over the shards that are left, and writes beside its forwards."""

import contextlib
import errno
import secrets
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..capture import DENSE_ABOVE
from ..encoding import EncodedActivations, density_of
from ..stream import ActivationStream
from ..wording import human_bytes
from . import layout
from .arguments import cores, model_inputs
from .blocks import is_full, write_hook
from .errors import DumpError
from .inputs import Batch, Sequences
from .layout import HookSpec
from .plan import PLAN_FILE, Plan, ShardRecord, check_same, record_name, shard_name
from .shard_writer import ShardWriter
from .store import Store, attempted_shard
from .surroundings import Signals

# More would contend for Python's lock, with the thread that runs the model too.
MAX_WRITERS = 4

_Captured = tuple[Batch, dict[str, Any]]


@dataclass(frozen=True)
class Progress:
    """How far a dump is. Sizes are projected from the first batch for all tokens, `packed_bytes` before any codec.

    Attributes:
        tokens_done: captured tokens that have gone through the model or were committed before.
        tokens_resumed: those of them that were committed before this call.
    """

    tokens_done: int
    tokens_total: int
    tokens_resumed: int
    shards_done: int
    shards_total: int
    packed_bytes: int
    dense_bytes: int


class Worker:
    """One process's part in a dump.

    The calling thread runs the model. A pool writes the last block, hook by hook, and one more thread commits the last
    shard: at most one of each at a time, so that two blocks are in memory and two shards in the store's spool.
    """

    def __init__(
        self,
        store: Store,
        plan: Plan,
        tokens: Sequences,
        stream: ActivationStream,
        allow_dense: bool,
        progress: Callable[[Progress], None] | None,
        signals: Signals,
    ) -> None:
        self._store, self._plan, self._tokens, self._stream = store, plan, tokens, stream
        self._allow_dense, self._progress, self._signals = allow_dense, progress, signals
        self._probed: tuple[int, _Captured] | None = None  # the first batch, by its first sequence
        self._projection = (0, 0)
        self._tokens_done = self._tokens_resumed = 0
        self._todo: list[int] = []  # shards that this worker has not begun, nor another committed
        self._own: set[int] = set()  # those that this rank takes first
        self._done: set[int] = set()  # committed shards
        self._n_writers = min(cores(), MAX_WRITERS)
        self._writing: list[Future[None]] = []
        self._committing: Future[None] | None = None

    def run(self, rank: int, world_size: int) -> bool:
        """Computes the shards of this rank, then helps with what is left; whether the model has run."""
        with self._store.write_errors():
            existing = self._read_plan()
            names = self._store.names()
            self._sweeps = self._store.creates_once
        if existing is not None:
            self._plan = existing
        todo = [shard for shard in range(self._plan.n_shards) if record_name(shard) not in names]
        self._todo, self._own = todo, set(todo[rank::world_size])
        self._done = set(range(self._plan.n_shards)).difference(todo)
        self._tokens_resumed = self._tokens_done = self._plan.n_tokens - sum(map(self._shard_tokens, todo))
        shard = self._next()
        has_run = shard is not None
        if shard is not None:
            self._probe(shard)
            if existing is None:
                self._write_plan()
        with (  # leaves when all jobs have ended
            ThreadPoolExecutor(self._n_writers, "pyfacts-writer") as self._writers,
            ThreadPoolExecutor(1, "pyfacts-committer") as self._committer,
        ):
            while shard is not None:
                self._write_shard(shard)
                shard = self._next()
            self._await_commit()
        self._sweep()
        self._report()
        return has_run

    # ---- the plan ----------------------------------------------------------------------------------------------------

    def _read_plan(self) -> Plan | None:
        if not self._store.exists(PLAN_FILE):
            return None
        existing = Plan.read(self._store)
        check_same(existing, self._plan, self._store)
        return existing

    def _write_plan(self) -> None:
        with self._store.write_errors():
            self._store.create(PLAN_FILE, self._plan.to_json())
            plan = self._read_plan()
        assert plan is not None
        self._plan = plan

    def _probe(self, shard: int) -> None:
        """Runs a shard's first batch that captures anything, for dtypes, density and a projection of the bytes."""
        for begin, end in self._batches(shard):
            captured = self._forward(begin, end, self._stream.run_to_the_end)
            if captured is not None:
                break
        assert captured is not None, "a shard holds at least one token"
        self._probed = begin, captured
        _, parts = captured
        hooks = tuple(_seen(hook, parts[hook.name]) for hook in self._plan.hooks)
        self._plan = replace(self._plan, hooks=hooks)
        n_tokens = len(next(iter(parts.values())))
        packed = sum(part.nbytes for part in parts.values())
        dense = sum(hook.width * hook.item_bytes for hook in hooks)
        self._projection = packed * self._plan.n_tokens // n_tokens, dense * self._plan.n_tokens
        if not self._store.exists(PLAN_FILE) and self._plan.select is None and not self._allow_dense:
            _refuse_dense(parts, self._plan.n_tokens)

    # ---- shards ------------------------------------------------------------------------------------------------------

    def _next(self) -> int | None:
        """The shard to compute now: of those that nobody has begun this rank's first, else any; None at the end.

        What a directory shows as begun comes last, and in no order: most of it another worker will have done by then,
        and several that help do not all help with the same. An object store does not show it.
        """
        names = self._store.names()
        committed = {shard for shard in self._todo if record_name(shard) in names}
        self._todo = [shard for shard in self._todo if shard not in committed]
        for shard in committed:
            self._skip(shard, self._tokens_done + self._shard_tokens(shard))
        if not self._todo:
            return None
        begun = {attempted_shard(name) for name in names}
        untouched = [shard for shard in self._todo if shard_name(shard) not in begun]
        own = [shard for shard in untouched if shard in self._own]
        chosen = own[0] if own else secrets.choice(untouched or self._todo)
        self._todo.remove(chosen)
        return chosen

    def _write_shard(self, shard: int) -> None:
        """Computes a shard and hands it over to be committed, unless another worker has done so."""
        done = self._tokens_done + self._shard_tokens(shard)
        writer = self._open(shard)
        if writer is None:
            self._probed = None
            self._skip(shard, done)
            return
        try:
            pending: defaultdict[str, list[Any]] = defaultdict(list)
            waiting = 0
            for begin, end in self._batches(shard):
                self._check()
                captured = self._forward(begin, end)
                if captured is None:
                    continue
                batch, parts = captured
                writer.add_tokens(batch.ids[batch.captured], batch.document, batch.position)
                for hook in self._plan.hooks:
                    _seen(hook, parts[hook.name])
                    pending[hook.name].append(parts[hook.name])
                waiting += len(batch.document)
                self._tokens_done += len(batch.document)
                self._report()
                if is_full(self._plan, pending, waiting):
                    self._write_block(writer, pending)
                    pending, waiting = defaultdict(list), 0
                    if self._committed(shard):
                        self._abandon(writer)
                        self._skip(shard, done)
                        return
            if waiting:
                self._write_block(writer, pending)
            self._await_commit()
        except BaseException:
            self._abandon(writer)
            raise
        self._committing = self._committer.submit(self._commit, shard, writer, self._writing)

    def _open(self, shard: int) -> ShardWriter | None:
        """A new attempt at a shard; None if it is committed."""
        if self._committed(shard):
            return None
        with self._store.write_errors():
            try:
                return ShardWriter(self._store, self._plan, shard)
            except FileNotFoundError:
                if self._committed(shard):  # meanwhile, and our directory was swept away
                    return None
                raise
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE) or self._committing is None:
                    raise
        self._await_commit()  # the files of two shards are more than this process may open
        return self._open(shard)

    def _skip(self, shard: int, tokens_done: int) -> None:
        """Counts a shard that another worker has committed."""
        self._done.add(shard)
        self._tokens_done = tokens_done
        self._report()

    def _check(self) -> None:
        """Raises what has come up beside the forwards: a commit that failed, or a signal once the commit has ended."""
        if self._signals.received is not None or (self._committing is not None and self._committing.done()):
            self._await_commit()
        self._signals.check(len(self._done), self._plan.n_shards)

    def _abandon(self, writer: ShardWriter) -> None:
        """Removes an attempt once nothing writes to it; what could not be written does not matter any more."""
        futures.wait(self._writing)
        self._writing = []
        writer.abandon()

    # ---- beside the forwards -----------------------------------------------------------------------------------------

    def _write_block(self, writer: ShardWriter, parts: Mapping[str, list[Any]]) -> None:
        _await(self._writing)
        self._writing = [
            self._writers.submit(write_hook, self._store, writer[hook.name], hook, self._plan.lossy, parts[hook.name])
            for hook in self._plan.hooks
        ]

    def _commit(self, shard: int, writer: ShardWriter, writing: list[Future[None]]) -> None:
        try:
            _await(writing)
            with self._store.write_errors():
                writer.commit()
        except BaseException:
            with contextlib.suppress(DumpError):  # the store may be what failed
                if not self._committed(shard):
                    writer.abandon()
            raise
        self._done.add(shard)

    def _await_commit(self) -> None:
        committing, self._committing = self._committing, None
        if committing is not None:
            committing.result()

    def _batches(self, shard: int) -> Iterator[tuple[int, int]]:
        begin, end = self._plan.sequences[shard : shard + 2]
        for first in range(begin, end, self._plan.batch_size):
            yield first, min(first + self._plan.batch_size, end)

    def _forward(self, begin: int, end: int, run: Callable[..., dict[str, Any]] | None = None) -> _Captured | None:
        """Sequences [begin, end) and the activations of their captured tokens by hook; None if there are none.

        Args:
            run: the stream's `run_to_the_end`, or None for its `run`.
        """
        if self._probed is not None and self._probed[0] == begin:
            captured, self._probed = self._probed[1], None
            return captured
        batch = self._tokens.batch(begin, end)
        if not batch.captured.any():
            return None
        args, kwargs = model_inputs(self._stream.model, batch.ids, batch.attention)
        parts = (run or self._stream.run)(torch.from_numpy(batch.captured), *args, **kwargs)
        n_tokens = len(batch.document)
        for name, part in parts.items():
            if len(part) != n_tokens:
                raise ValueError(f"{name} gave {len(part)} rows for {n_tokens} captured tokens")
        return batch, {name: part.cpu() for name, part in parts.items()}

    def _committed(self, shard: int) -> bool:
        return self._store.exists(record_name(shard))

    def _shard_tokens(self, shard: int) -> int:
        return self._plan.token_starts[shard + 1] - self._plan.token_starts[shard]

    def _report(self) -> None:
        if self._progress is not None:
            self._progress(
                Progress(
                    self._tokens_done,
                    self._plan.n_tokens,
                    self._tokens_resumed,
                    len(self._done),
                    self._plan.n_shards,
                    *self._projection,
                )
            )

    def _sweep(self) -> None:
        """Removes what killed attempts left behind: whatever belongs to a committed shard and is not in its record.

        A directory of a shard that is not committed may be a living worker's, and stays. One of a committed shard may
        be too, but that worker has lost and finds out when its files are gone. Without hard links two attempts can both
        become the record for a moment, so there nothing is removed.
        """
        if not self._sweeps:
            return
        records, committed = ShardRecord.read_all(self._store, self._plan), {}
        names = self._store.names()
        for shard, record in records.items():
            if record.directory not in names:
                raise DumpError(
                    f"shard {shard} was committed, and its directory {record.directory} is gone: delete this record, "
                    "and dump again to compute it anew",
                    path=self._store.where(record_name(shard)),
                )
            kept = {record.tokens_file.file, *(file.file for file in record.hook_files.values())}
            committed[shard_name(shard)] = record.directory, kept
        with self._store.write_errors():
            self._store.sweep(committed)


def _await(jobs: list[Future[None]]) -> None:
    """Waits for all of them, then raises what one has raised."""
    futures.wait(jobs)
    for job in jobs:
        job.result()


def _seen(planned: HookSpec, part: EncodedActivations | Tensor) -> HookSpec:
    """The hook with the dtype and width that it shows; those that are planned already must be the same."""
    seen = replace(planned, dtype=str(part.dtype).removeprefix("torch."), width=part.shape[1])
    if seen.dtype not in layout.ITEM_BYTES:
        raise ValueError(f"{seen.name} carries {seen.dtype}; a dump holds float32, bfloat16 and float16")
    if isinstance(part, EncodedActivations) and part.signed_zero:
        raise ValueError(f"{seen.name} was packed with signed_zero=True; a dump holds zeros as +0.0: pack without it")
    for name in ("dtype", "width"):
        expected, actual = getattr(planned, name), getattr(seen, name)
        if expected and expected != actual:
            raise DumpError(f"{seen.name} has {name} {actual} now, the dump was begun with {expected}")
    return seen


def _refuse_dense(parts: Mapping[str, Any], n_tokens: int) -> None:
    """Raises ValueError if the neurons of the first batch are dense, all hooks taken together."""
    encoded = {name: part for name, part in parts.items() if isinstance(part, EncodedActivations)}
    density = density_of(encoded.values())
    if density <= DENSE_ABOVE:
        return
    name, densest = max(encoded.items(), key=lambda item: item[1].density)
    n_bytes = sum(part.nbytes for part in parts.values()) * n_tokens // len(densest)
    raise ValueError(
        f"the neurons are {density:.0%} dense ({name}: {densest.density:.0%}): packing would save next to nothing, and "
        f"{n_tokens:,} tokens would take {human_bytes(n_bytes)}. Keep less with select=pyfacts.topk(k) or "
        "pyfacts.min_abs(theta) (--topk, --min-abs), dump the latents of an SAE with saes= (--sae), or say "
        "allow_dense=True (--allow-dense)"
    )
