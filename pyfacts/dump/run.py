"""`pyfacts.dump`: runs a model over tokens and writes what its hooks carry, shard by shard, resumable at any point."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import zstandard
from torch import Tensor, nn

from .. import __version__
from ..attach import SaesByHook
from ..capture import DENSE_ABOVE
from ..encoding import EncodedActivations, human_bytes
from ..integers import at_least_one
from ..stream import ActivationStream, check_neurons_to_select, check_select
from . import layout
from .arguments import (
    check_lengths,
    check_vocabulary,
    default_context,
    dumped_points,
    load_model,
    load_tokenizer,
    model_inputs,
    worker,
)
from .blocks import is_full, write_block
from .errors import DumpError
from .fingerprint import describe_model, describe_sae, plain
from .inputs import Batch, Survey, Tokens, read_tokens
from .layout import HookSpec
from .plan import PLAN_FILE, Plan, ShardRecord, check_same, record_name, shard_name
from .reader import Dump, open_dump
from .shard_writer import ShardWriter, WriterThread
from .store import Store, open_store
from .surroundings import Signals, caught_signals, evaluating

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


def dump(
    model: nn.Module | str | os.PathLike[str],
    tokens: Any,
    out: str | os.PathLike[str],
    names_filter: Any = None,
    select: Any = None,
    saes: SaesByHook | None = None,
    codec: str = "zstd",
    batch_size: int = 8,
    context_size: int | None = None,
    token_mask: Any = None,
    shard_tokens: int = 65536,
    rank: int | None = None,
    world_size: int | None = None,
    allow_dense: bool = False,
    *,
    tokenizer: Any = None,
    progress: Callable[[Progress], None] | None = None,
) -> Dump:
    """Runs `model` over `tokens` and writes the activations of its hooks to `out`.

    Call it again with the same arguments to resume: shards that are committed are not computed again, and the bytes of
    all shards are those of an undisturbed dump. Several processes may dump into one place at once; each takes the
    shards of its rank and then helps with what is left.

    Args:
        model: a module, which is called in eval mode without gradients; or a Hugging Face name or directory, which is
            loaded onto the GPU of `LOCAL_RANK` (0 without), or the CPU if there is none or pyfacts has no kernels for
            it.
        tokens: token ids [n_sequences, pos] or [n] without padding (tensor or array, memory-mapped too); what a
            tokenizer returned (padding is dropped by its attention mask); a list of lists; a Hugging Face data set; or
            a path to .txt, .jsonl, .parquet, .npy or a saved data set. Each sequence is given to the model on its own,
            in batches padded on the right.
        out: a directory, or an address that fsspec knows (`s3://bucket/out`, with s3fs installed): then shards are
            written to a temporary directory first (`TMPDIR`), and uploaded when they are whole.
        names_filter: the hooks, as in `pyfacts.capture`; None for every MLP's neurons or, with `saes`, no hook but
            their latents.
        select: what to keep of neurons, such as `pyfacts.topk(64)`; None for every value that is not zero.
            It does not apply to latents of SAEs.
        saes: SAEs by the hook whose activations they read, as in `pyfacts.capture`: their latents are dumped as
            `<hook>.hook_sae_acts_post`. The plan records each SAE's config and a hash of its weights.
        codec: "zstd"; "split", smaller by a tenth to a quarter; or "none", which is faster to write and larger.
        batch_size: sequences of a forward pass.
        context_size: documents and streams are cut into sequences of this many tokens. For text the default is what the
            model takes, 2048 at most.
        token_mask: which tokens to capture: bools shaped like `tokens`, or a function of one sequence's ids (NumPy,
            int [n]) to bools [n]; such as `lambda ids: ids != bos`.
        shard_tokens: captured tokens of a shard, about.
        rank, world_size: this process's number and how many there are; by default those of torchrun or Slurm, or one.
        allow_dense: dump even if the neurons are mostly non-zero.
        tokenizer: for text; by default the one of the model's name or directory.
        progress: called after every batch with a `Progress`; once, if all was committed before.

    Returns:
        The finished dump, opened.

    Raises:
        ValueError, TypeError: an argument is wrong, the text is empty, or the neurons are dense.
        DumpError: the directory holds another dump, or the disk refuses. What was committed stays.
        DumpInterrupted: SIGTERM or SIGUSR1 came (if this is the main thread). What was committed stays.

    Example:
        >>> import pyfacts
        >>> d = pyfacts.dump("facebook/opt-125m", "corpus.jsonl", "out")  # doctest: +SKIP
        >>> d["blocks.3.mlp.hook_post"].top_tokens(5)  # doctest: +SKIP
    """
    if codec not in layout.CODECS:
        raise ValueError(f"codec must be one of {', '.join(layout.CODECS)}, got {codec!r}")
    batch_size, shard_tokens = at_least_one("batch_size", batch_size), at_least_one("shard_tokens", shard_tokens)
    context_size = None if context_size is None else at_least_one("context_size", context_size)
    check_select(select)
    rank, world_size = worker(rank, world_size)
    module, name = load_model(model)
    points, latents = dumped_points(module, names_filter, saes)
    check_neurons_to_select(select, points)
    store = open_store(out)
    with store.writing():
        source = read_tokens(
            tokens,
            store.spool,
            load_tokenizer=functools.cache(lambda: load_tokenizer(tokenizer, module, name)),
            context_size=context_size,
            default_context_size=default_context(module),
            token_mask=token_mask,
        )
        check_lengths(module, int(source.length.max(initial=0)))
        survey = source.survey()
        check_vocabulary(module, survey.highest_id)
        plan = Plan(
            model=describe_model(module, name),
            tokens={
                "context_size": source.context_size,
                "n_sequences": source.n_sequences,
                "n_input_tokens": int(source.length.sum()),
                "n_tokens": int(survey.captured.sum()),
                "highest_id": survey.highest_id,
                "xxh3": survey.xxh3,
                "tokenizer": getattr(tokenizer, "name_or_path", None) or name,
            },
            hooks=tuple(HookSpec(p.name, p.module_path, p.side, p.width or 0, p.kind, "") for p in (*points, *latents)),
            saes={point.name: describe_sae(sae) for point, sae in latents.items()},
            **_shards(survey, batch_size, shard_tokens),
            batch_size=batch_size,
            shard_tokens=shard_tokens,
            codec=codec,
            signed_zero=False,
            select=None if select is None else plain(select.describe()),
            created_with={"pyfacts": __version__, "torch": torch.__version__, "zstandard": zstandard.__version__},
        )
        with (
            evaluating(module),
            caught_signals() as signals,
            ActivationStream(module, points, select=select, stop_early=True, saes=latents) as stream,
        ):
            _Run(store, plan, source, stream, allow_dense, progress, signals).run(rank, world_size)
    return open_dump(out)


class _Run:
    """One process's part in a dump."""

    def __init__(
        self,
        store: Store,
        plan: Plan,
        tokens: Tokens,
        stream: ActivationStream,
        allow_dense: bool,
        progress: Callable[[Progress], None] | None,
        signals: Signals,
    ) -> None:
        self._store, self._plan, self._tokens, self._stream = store, plan, tokens, stream
        self._allow_dense, self._progress, self._signals = allow_dense, progress, signals
        self._probed: tuple[int, _Captured] | None = None  # the first batch, by its first sequence
        self._projection = (0, 0)
        self._tokens_done = self._tokens_resumed = self._shards_done = 0

    def run(self, rank: int, world_size: int) -> None:
        with self._store.write_errors():
            existing = self._read_plan()
            names = self._store.names()
            self._sweeps = self._store.creates_once
        if existing is not None:
            self._plan = existing
        todo = [shard for shard in range(self._plan.n_shards) if record_name(shard) not in names]
        others = [shard for r in range(world_size) if r != rank for shard in reversed(todo[r::world_size])]
        todo = todo[rank::world_size] + others
        self._shards_done = self._plan.n_shards - len(todo)
        self._tokens_resumed = self._tokens_done = self._plan.n_tokens - sum(map(self._shard_tokens, todo))
        if todo:
            self._probe(todo[0])
            if existing is None:
                self._write_plan()
        for shard in todo:
            if self._committed(shard):  # by another worker, meanwhile
                self._tokens_done += self._shard_tokens(shard)
            else:
                self._write_shard(shard)
            self._shards_done += 1
            self._report()
        if not todo:
            self._report()
        self._sweep()

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
            captured = self._forward(begin, end)
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

    def _write_shard(self, shard: int) -> None:
        plan = self._plan
        done = self._tokens_done
        with self._store.write_errors():
            try:
                writer = ShardWriter(self._store, plan, shard)
            except FileNotFoundError:
                if not self._committed(shard):
                    raise
                self._tokens_done += self._shard_tokens(shard)  # somebody helped, and has swept our directory away
                return
        thread = WriterThread()
        try:
            pending: dict[str, list[Any]] = {hook.name: [] for hook in plan.hooks}
            waiting = 0
            for begin, end in self._batches(shard):
                self._signals.check(self._shards_done, self._plan.n_shards)
                captured = self._forward(begin, end)
                if captured is None:
                    continue
                batch, parts = captured
                writer.add_tokens(batch.ids[batch.captured], batch.document, batch.position)
                for hook in plan.hooks:
                    _seen(hook, parts[hook.name])
                    pending[hook.name].append(parts[hook.name])
                waiting += len(batch.document)
                self._tokens_done += len(batch.document)
                self._report()
                if is_full(plan, pending, waiting):
                    thread.submit(functools.partial(write_block, self._store, writer, plan, pending))
                    pending, waiting = {hook.name: [] for hook in plan.hooks}, 0
                    if self._committed(shard):  # somebody helped
                        thread.wait()
                        writer.abandon()
                        self._tokens_done = done + self._shard_tokens(shard)
                        return
            if waiting:
                thread.submit(functools.partial(write_block, self._store, writer, plan, pending))
            thread.wait()
            with self._store.write_errors():
                writer.commit()
        except BaseException:
            thread.close()
            with contextlib.suppress(DumpError):  # the store may be what failed
                if not self._committed(shard):
                    writer.abandon()
            raise
        finally:
            thread.close()

    def _batches(self, shard: int) -> Iterator[tuple[int, int]]:
        begin, end = self._plan.sequences[shard : shard + 2]
        for first in range(begin, end, self._plan.batch_size):
            yield first, min(first + self._plan.batch_size, end)

    def _forward(self, begin: int, end: int) -> "_Captured | None":
        """Sequences [begin, end) and the activations of their captured tokens by hook; None if there are none."""
        if self._probed is not None and self._probed[0] == begin:
            captured, self._probed = self._probed[1], None
            return captured
        batch = self._tokens.batch(begin, end)
        if not batch.captured.any():
            return None
        args, kwargs = model_inputs(self._stream.model, batch.ids, batch.attention)
        parts = self._stream.run(torch.from_numpy(batch.captured), *args, **kwargs)
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
                    self._shards_done,
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


# ---- arguments -------------------------------------------------------------------------------------------------------


def _shards(survey: Survey, batch_size: int, shard_tokens: int) -> dict[str, tuple[int, ...]]:
    """Cuts sequences into shards of whole batches with at least `shard_tokens` captured tokens, but for the last."""
    n_sequences = len(survey.captured)
    sequences, token_starts = [0], [0]
    captured = np.add.reduceat(survey.captured, np.arange(0, n_sequences, batch_size))
    total = 0
    for batch, count in enumerate(captured.tolist(), start=1):
        total += count
        if total - token_starts[-1] >= shard_tokens:
            sequences.append(min(batch * batch_size, n_sequences))
            token_starts.append(total)
    if total > token_starts[-1]:
        sequences.append(n_sequences)
        token_starts.append(total)
    sequences[-1] = n_sequences  # batches without any token join the shard before them
    return {"sequences": tuple(sequences), "token_starts": tuple(token_starts)}


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
    density = sum(part.nnz for part in encoded.values()) / max(1, sum(part.shape.numel() for part in encoded.values()))
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
