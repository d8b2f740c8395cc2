"""`pyfacts.open_dump`: a dump by token, by neuron, by its largest values, or shuffled. Works without torch.

Token indices are those of the plan: a dump that is not finished opens, says so, and its tokens never change their
numbers; reading a range that is not committed is an error that names it.
"""

import heapq
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from .. import _storage
from ..chosen import FEATURES, Chosen, chosen_tokens, cut, in_order
from ..errors import UnknownHookError
from ..scalars import at_least_one, in_range
from ..wording import similar
from . import shuffle
from .arrays import BITS, FRAMEWORKS, numpy_framework
from .cache import Cache
from .errors import DumpError
from .layout import COLUMN_WIDTH, HookSpec
from .plan import PLAN_FILE, Plan, ShardRecord
from .results import Context, FeatureStats, VerifyReport
from .shard_reader import HookFile, TokensFile, block_starts, verify_hook_file, verify_tokens_file
from .statistics import new_statistics
from .store import Store, open_store

OPEN_FILES = 64
CACHED_BYTES = 128 << 20  # decoded blocks that are kept


def open_dump(path: str | os.PathLike[str], framework: str = "torch") -> "Dump":
    """Opens a dump.

    Args:
        path: the directory or address that `pyfacts.dump` wrote.
        framework: "torch", or "numpy", which needs no torch: encodings come as `NumpyActivations`, and bfloat16 values
            as float32.

    Raises:
        DumpError: there is no dump, or dump.json or a commit record is not valid.
        ValueError: the framework is unknown, or the path is empty.
        ImportError: there is no torch, or no client for the address's object store.

    Example:
        >>> d = pyfacts.open_dump("out")  # doctest: +SKIP
        >>> d["blocks.3.mlp.hook_post"][100:200].to_dense()  # doctest: +SKIP
    """
    if framework not in FRAMEWORKS:
        raise ValueError(f"framework must be one of {', '.join(map(repr, FRAMEWORKS))}, got {framework!r}")
    if framework == "torch" and importlib.util.find_spec("torch") is None:
        raise ImportError("torch is not installed: open_dump(path, framework='numpy') reads a dump without it")
    return Dump(open_store(path), framework)


class Dump:
    """A dump, opened by `open_dump`; threads may share it.

    Attributes:
        plan: dump.json as a dict.
        hook_names: the hooks, in the order in which they were asked for (by default that of the forward), then the
            latents of SAEs; `d[name]` reads one.
        n_tokens: captured tokens of the whole plan.
        complete: whether all of them are committed.
        token_ids: int64 [n_tokens], read by tokens as a hook is: `d.token_ids[a:b]`.
        positions: int64 [n_tokens, 2], (document, position), likewise.
    """

    def __init__(self, store: Store, framework: str) -> None:
        if not store.exists(PLAN_FILE):
            raise DumpError(f"is no dump: there is no {PLAN_FILE}", path=store.address)
        self._store, self.path = store, store.address
        self.framework, self._framework_name = FRAMEWORKS[framework](), framework
        self._plan = Plan.read(store)
        self._records = ShardRecord.read_all(store, self._plan)
        self._hooks = {spec.name: DumpedHook(self, spec) for spec in self._plan.hooks}
        self._token_files: Cache[int, TokensFile] = Cache(OPEN_FILES, lambda _: 1)
        self._tokens: Cache[int, tuple[np.ndarray, ...]] = Cache(CACHED_BYTES, lambda t: sum(a.nbytes for a in t))
        self._hook_files: Cache[tuple[int, str], HookFile] = Cache(OPEN_FILES, lambda _: 1)
        self._blocks: Cache[tuple[int, str, int], Any] = Cache(CACHED_BYTES, _block_bytes)
        self._lists: Cache[tuple[int, str, int, int], _storage.FeatureLists] = Cache(CACHED_BYTES, lambda f: f.nbytes)
        self._maxima: Cache[tuple[int, str], np.ndarray] = Cache(CACHED_BYTES, lambda a: a.nbytes)
        self.token_ids = _TokenColumn(self, lambda tokens: tokens[2])
        self.positions = _TokenColumn(self, lambda tokens: np.stack(tokens[:2], axis=1))

    # ---- what it is --------------------------------------------------------------------------------------------------

    @property
    def plan(self) -> dict[str, Any]:
        return self._plan.to_dict()

    @property
    def hook_names(self) -> list[str]:
        return list(self._hooks)

    @property
    def n_tokens(self) -> int:
        return self._plan.n_tokens

    @property
    def n_tokens_committed(self) -> int:
        """Tokens that can be read."""
        return sum(record.n_tokens for record in self._records.values())

    @property
    def complete(self) -> bool:
        return len(self._records) == self._plan.n_shards

    @property
    def n_shards(self) -> int:
        return self._plan.n_shards

    @property
    def n_bytes(self) -> int:
        """Bytes of the committed files."""
        return sum(record.n_bytes for record in self._records.values())

    @property
    def codec(self) -> str:
        return self._plan.codec

    def __contains__(self, hook: object) -> bool:
        return hook in self._hooks

    def __iter__(self) -> Iterator[str]:
        return iter(self.hook_names)

    def __getitem__(self, hook: str) -> "DumpedHook":
        if hook not in self._hooks:
            raise UnknownHookError(
                f"{hook!r} was not dumped; there are {len(self._hooks)} hooks, such as {similar(hook, self._hooks)}"
            )
        return self._hooks[hook]

    def __repr__(self) -> str:
        state = "" if self.complete else f", {len(self._records)} of {self.n_shards} shards committed"
        return f"Dump({str(self.path)!r}, {len(self._hooks)} hooks, {self.n_tokens:,} tokens{state})"

    def __reduce__(self) -> tuple[Any, ...]:
        """A process that is handed a dump (a DataLoader's worker) opens it anew."""
        return open_dump, (self.path, self._framework_name)

    # ---- reading across hooks ----------------------------------------------------------------------------------------

    def contexts(self, hook: str, j: int, k: int = 20, window: int = 32) -> list[Context]:
        """Returns the k tokens at which neuron j is largest, each with the captured tokens around it.

        Args:
            window: tokens of a context: up to half of them before the firing one, the rest after it; fewer at the ends
                of a sequence, beyond which the model saw nothing.

        Raises:
            UnknownHookError: (a ValueError and a KeyError) the hook was not dumped.
            ValueError: a number is out of range, or the hook was dumped as plain rows.
            DumpError: bytes are damaged.
        """
        window = at_least_one("window", window)
        reader = self[hook]
        firing: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        contexts = []
        for token, value in reader.top_tokens(j, k):
            start = token - window // 2
            start, stop, (document, position, token_ids) = self._around(token, start, start + window)
            shard = self._plan_shard(token)
            if shard not in firing:
                firing[shard] = reader._neuron_in(shard, reader._feature(j))
            tokens, found = firing[shard]
            inside = slice(*np.searchsorted(tokens, (start, stop)))
            values = np.zeros(stop - start, np.float32)
            values[tokens[inside] - start] = found[inside]
            here = token - start
            array = self.framework.array
            contexts.append(
                Context(token, value, int(document[here]), int(position[here]), start, array(token_ids), array(values))
            )
        return contexts

    def batches(
        self,
        hooks: str | Sequence[str],
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> Iterator[dict[str, Any]]:
        """Yields every committed token once, shuffled, as {hook: dense [batch_size, n_features]}; the last is shorter.

        The shuffle: the blocks of the dump (4,096 tokens or more) are permuted by `seed`, and each rank takes every
        world_size-th. A rank reads eight blocks at a time and permutes their tokens together with those left over from
        the eight before. So a batch mixes eight places of the dump, at the memory of at most sixteen packed blocks per
        hook (more only if a batch is larger than eight). It depends on the arguments and the dump alone. Ranks get a
        block more or less, so not equally many batches: where all must take the same number of steps
        (DistributedDataParallel), use its `join()`.

        Args:
            hooks: a hook's name or several; their rows belong to the same tokens.
            batch_size: tokens of a batch.
            seed: use another one for every epoch.
            rank, world_size: for data parallel training: the ranks' tokens are disjoint.

        Raises:
            UnknownHookError: (a ValueError and a KeyError) a hook was not dumped.
            ValueError: a number is out of range.
            TypeError: a number is none.
            DumpError: while it is iterated, a block is damaged.
        """
        names = [hooks] if isinstance(hooks, str) else list(hooks)
        return shuffle.batches(
            [self[name] for name in names],
            [(shard, block) for shard, record in self._records.items() for block in range(len(record.blocks))],
            batch_size,
            seed,
            rank,
            world_size,
        )

    def verify(self) -> VerifyReport:
        """Reads every committed byte and checks it: headers, checksums, canonical form, statistics, order of tokens.

        Returns:
            What was read, all of it right; look at `complete` too.

        Raises:
            DumpError: at the first fault, naming file, tensor and offset.
        """
        last = -1, -1
        for record in self._records.values():
            last = verify_tokens_file(TokensFile(self._store, record), last, self._plan.tokens.get("highest_id"))
            for spec in self._plan.hooks:
                verify_hook_file(HookFile(self._store, self._plan, record, spec))
        return VerifyReport(
            complete=self.complete,
            n_shards=len(self._records),
            n_files=len(self._records) * (1 + len(self._hooks)),
            n_tokens=self.n_tokens_committed,
            n_bytes=self.n_bytes,
            nnz={name: self[name].nnz for name in self._hooks if self[name].kind == "neurons"},
        )

    # ---- shards ------------------------------------------------------------------------------------------------------

    def _plan_shard(self, token: int) -> int:
        return int(np.searchsorted(self._plan.token_starts, token, side="right")) - 1

    def _parts(self, tokens: Chosen) -> Iterator[tuple[int, Chosen]]:
        """Shards of ascending tokens, with the tokens in each; DumpError if one is not committed."""
        starts = self._plan.token_starts
        for shard, in_shard in cut(tokens, starts):
            if shard not in self._records:
                raise DumpError(
                    f"tokens {starts[shard]}:{starts[shard + 1]} (shard {shard}) are not committed: the dump is not "
                    "finished; run it again to resume",
                    path=self.path,
                )
            yield shard, in_shard

    def _shard_tokens(self, shard: int) -> tuple[np.ndarray, ...]:
        return self._tokens.get(shard, lambda: self._tokens_file(shard).read())

    def _tokens_file(self, shard: int) -> TokensFile:
        return self._token_files.get(shard, lambda: TokensFile(self._store, self._records[shard]))

    def _hook_file(self, shard: int, spec: HookSpec) -> HookFile:
        self._tokens_file(shard)  # proves that the record's tokens exist before anything is allocated for them
        return self._hook_files.get(
            (shard, spec.name), lambda: HookFile(self._store, self._plan, self._records[shard], spec)
        )

    def _read_tokens(self, tokens: Chosen) -> tuple[np.ndarray, ...]:
        """document, position and token id of ascending tokens."""
        parts = [
            tuple(array[_index(in_shard)] for array in self._shard_tokens(shard))
            for shard, in_shard in self._parts(tokens)
        ]
        if not parts:
            return tuple(np.empty(0, np.int64) for _ in range(3))
        return tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))

    def _around(self, token: int, start: int, stop: int) -> tuple[int, int, tuple[np.ndarray, ...]]:
        """Shrinks [start, stop) to neighbours of a token in its sequence, all in its shard; and reads their tokens."""
        starts, shard = self._plan.token_starts, self._plan_shard(token)
        start, stop = max(start, starts[shard]), min(stop, starts[shard + 1])
        tokens = self._read_tokens(range(start, stop))
        document, position, _ = tokens
        same = document == document[token - start]
        size = self._plan.tokens.get("context_size")
        if isinstance(size, int) and 0 < size < 2**63:  # the document was cut, and the model saw one piece at a time
            same &= position // size == position[token - start] // size
        first = start + int(same.argmax())
        last = start + len(same) - int(same[::-1].argmax())
        return first, last, tuple(array[first - start : last - start] for array in tokens)


class DumpedHook:
    """One hook of a dump, read by token range or by neuron.

    Attributes:
        name, module_path, side, kind, dtype: as in the plan.
        width: features.
        shape: (n_tokens, width) of the whole plan.

    Raises:
        ValueError: `nnz`, `density`, `dropped_share` and what reads by feature, of a hook of rows.
    """

    def __init__(self, dump: Dump, spec: HookSpec) -> None:
        self._dump, self._spec = dump, spec
        self.name, self.module_path, self.side = spec.name, spec.module_path, spec.side
        self.width, self.kind, self.dtype = spec.width, spec.kind, spec.dtype

    @property
    def shape(self) -> tuple[int, int]:
        return self._dump.n_tokens, self.width

    @property
    def nnz(self) -> int:
        """Stored values of the committed tokens."""
        self._neurons_only()
        return sum(record.nnz[self.name] for record in self._dump._records.values())

    @property
    def density(self) -> float:
        """Share of the committed matrix that is stored."""
        return self.nnz / max(1, self._dump.n_tokens_committed * self.width)

    @property
    def dropped_share(self) -> float:
        """Share of the squared norm of the committed rows that a `select` dropped; 0.0 when only zeros were.

        NaN where an activation is NaN or infinite.
        """
        self._neurons_only()
        if not self._dump._plan.lossy:
            return 0.0
        kept = total = 0.0
        for shard in self._dump._records:
            file = self._file(shard)
            kept += float(file.statistics().sum_sq.sum())
            for block in range(len(file.blocks)):
                sq_norm = file.sq_norm(block)
                assert sq_norm is not None, "a lossy dump has the norms"
                total += float(sq_norm.sum())
        return max(1.0 - kept / total, 0.0) if total else 0.0  # in this order a NaN stays

    @property
    def n_bytes(self) -> int:
        """Bytes of the committed files of this hook."""
        return sum(record.hook_files[self.name].bytes for record in self._dump._records.values())

    def __len__(self) -> int:
        return self._dump.n_tokens

    def __repr__(self) -> str:
        return f"DumpedHook({self.name!r}, shape={self.shape}, {self.kind}, {self.dtype})"

    def __getitem__(self, tokens: "int | slice | Sequence[int] | np.ndarray | Any") -> Any:
        """Returns some tokens: an encoding (`EncodedActivations`, `NumpyActivations`), or rows [n, width].

        Args:
            tokens: an index, which gives one row; a slice; or a list, array or tensor of indices, in any order and as
                often as you like, or of bools [n_tokens]. Whole blocks are read, each once, and the last ones kept.

        Raises:
            DumpError: a token is not committed, or the bytes are damaged.
            OutOfRangeError: (a ValueError and an IndexError) an index is not in [-n_tokens, n_tokens).
            TypeError, ValueError: tokens are something else, or bools of another number.
        """
        ascending, places = in_order(chosen_tokens(tokens, len(self), FEATURES))
        framework = self._dump.framework
        parts: list[Any] = []
        norms = [np.empty(0)]
        for shard, in_shard in self._dump._parts(ascending):
            file = self._file(shard)
            for block, in_block in cut(in_shard, block_starts(file.blocks)):
                parts.append(_rows(self._block(shard, block), in_block))
                if (sq_norm := file.sq_norm(block)) is not None:
                    norms.append(sq_norm[_index(in_block)])
        if self.kind == "rows":
            rows = np.concatenate([np.empty((0, self.width), BITS[self.dtype]), *parts])
            return framework.rows(rows if places is None else rows[places], self.dtype)
        # A copy: nothing of a mapped file leaves the reader.
        encoding = _storage.cat(parts or [_empty_encoding(self._spec)])
        sq_norm = np.concatenate(norms) if self._dump._plan.lossy else None
        if places is not None:
            encoding = encoding.take(places)
            sq_norm = None if sq_norm is None else sq_norm[places]
        return framework.encoding(encoding, self._dump._plan.signed_zero, sq_norm)

    def neuron(self, j: int) -> tuple[Any, Any]:
        """Returns the committed tokens (int64 [n], ascending) at which neuron j is stored, and its values there.

        Reads that neuron's column of every block, 256 neurons wide, and nothing else; the neurons of the column that
        are asked for next come from memory.

        Raises:
            OutOfRangeError: (a ValueError and an IndexError) j is not in [-width, width).
            ValueError: the hook was dumped as plain rows.
            DumpError: bytes are damaged.
        """
        j = self._feature(j)
        found = [self._neuron_bits(shard, j) for shard in self._dump._records]
        tokens = np.concatenate([np.empty(0, np.int64), *(tokens for tokens, _ in found)])
        values = np.concatenate([np.empty(0, np.uint8), *(values for _, values in found)])
        return self._dump.framework.array(tokens), self._dump.framework.values(values, self.dtype)

    feature = neuron

    def top_tokens(self, j: int, k: int = 20) -> list[tuple[int, float]]:
        """Returns the k largest stored values of neuron j as (token index, value), largest first.

        Exact; equal values in the order of their tokens; NaN and -infinity do not count. Shards are read in descending
        order of their maximum until none can hold a larger value.

        Raises:
            ValueError: k is below 1; and as `neuron`.
        """
        j = self._feature(j)
        k = at_least_one("k", k)
        maxima = [(float(self._maxima(shard)[j]), shard) for shard in self._dump._records]
        best: list[tuple[float, int]] = []  # a heap of (value, -token): its root is the worst
        for maximum, shard in sorted(maxima, key=lambda item: (-item[0], item[1])):
            # A tie may still win by a lower token.
            if maximum == -np.inf or (len(best) == k and maximum < best[0][0]):
                break
            tokens, values = self._neuron_in(shard, j)
            counted = values > -np.inf
            tokens, values = tokens[counted], values[counted]
            for i in np.lexsort((tokens, -values))[:k].tolist():
                item = (float(values[i]), -int(tokens[i]))
                if len(best) < k:
                    heapq.heappush(best, item)
                elif item > best[0]:
                    heapq.heapreplace(best, item)
        return [(-token, value) for value, token in sorted(best, reverse=True)]

    def feature_stats(self) -> FeatureStats:
        """Returns the statistics of every feature over the committed tokens; no activation is read."""
        self._neurons_only()
        shards = list(self._dump._records)
        if not shards:  # and no file that would prove the width before anything is allocated for it
            return FeatureStats(0, *(np.broadcast_to(array, self.width) for array in new_statistics(1)))
        self._file(shards[0])
        nnz, total, total_sq, maximum = new_statistics(self.width)
        for shard in shards:
            stats = self._file(shard).statistics()
            nnz += stats.nnz
            with np.errstate(invalid="ignore", over="ignore"):  # inf - inf is NaN
                total += stats.sum
                total_sq += stats.sum_sq
            maximum = np.maximum(maximum, stats.max)
        return FeatureStats(self._dump.n_tokens_committed, nnz, total, total_sq, maximum)

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _file(self, shard: int) -> HookFile:
        return self._dump._hook_file(shard, self._spec)

    def _maxima(self, shard: int) -> np.ndarray:
        """The features' maxima in a shard, float32 [width]; kept, for they are asked for of neuron after neuron."""
        return self._dump._maxima.get((shard, self.name), lambda: self._file(shard).statistics().max)

    def _block(self, shard: int, block: int) -> Any:
        """A block, checked: an encoding, or rows; the last ones are kept."""
        self._file(shard).check_whole()
        return self._dump._blocks.get((shard, self.name, block), lambda: self._read_block(shard, block))

    def _read_block(self, shard: int, block: int) -> Any:
        file = self._file(shard)
        return file.rows(block) if self.kind == "rows" else file.encoding(block)

    def _block_tokens(self, shard: int, block: int) -> int:
        return self._dump._records[shard].blocks[block]

    def _neuron_bits(self, shard: int, j: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (numbered in the dump) and values (as bytes) of a neuron in a shard."""
        file = self._file(shard)
        column, feature = divmod(j, COLUMN_WIDTH)
        tokens, values = [np.empty(0, np.int64)], [np.empty(0, np.uint8)]
        start = self._dump._plan.token_starts[shard]
        for block, first in enumerate(block_starts(file.blocks)[:-1]):
            found, bits = self._lists(shard, block, column).neuron(feature)
            tokens.append(found.astype(np.int64) + (start + first))
            values.append(bits)
        return np.concatenate(tokens), np.concatenate(values)

    def _lists(self, shard: int, block: int, column: int) -> "_storage.FeatureLists":
        """A column of a block, neuron by neuron; the last ones are kept, for the next neuron may be a neighbour."""
        return self._dump._lists.get(
            (shard, self.name, block, column), lambda: _storage.FeatureLists(self._file(shard).column(block, column))
        )

    def _neuron_in(self, shard: int, j: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and values of a neuron in a shard, the values as float32."""
        tokens, bits = self._neuron_bits(shard, j)
        return tokens, np.asarray(numpy_framework().values(bits, self.dtype), np.float32)

    def _feature(self, j: int) -> int:
        self._neurons_only()
        return in_range(f"feature of {self.name}", j, self.width)

    def _neurons_only(self) -> None:
        if self.kind != "neurons":
            raise ValueError(f"{self.name} was dumped as plain rows, which are read by tokens only")


class _TokenColumn:
    """Something of every token, read by tokens as a hook is."""

    def __init__(self, dump: Dump, pick: Callable[[tuple[np.ndarray, ...]], np.ndarray]) -> None:
        self._dump, self._pick = dump, pick

    def __len__(self) -> int:
        return self._dump.n_tokens

    def __getitem__(self, tokens: "int | slice | Sequence[int] | np.ndarray | Any") -> Any:
        ascending, places = in_order(chosen_tokens(tokens, len(self), "; [:] reads all, to index further"))
        array = self._pick(self._dump._read_tokens(ascending))
        if places is not None:
            array = array[places]
        if isinstance(tokens, slice) or np.ndim(tokens):
            return self._dump.framework.array(array)
        return int(array[0]) if array.ndim == 1 else self._dump.framework.array(array[0])


def _index(tokens: Chosen) -> slice | np.ndarray:
    """What picks them from an array."""
    return slice(tokens.start, tokens.stop) if isinstance(tokens, range) else tokens


def _rows(block: "_storage.Encoding | np.ndarray", tokens: Chosen) -> "_storage.Encoding | np.ndarray":
    """Tokens of a block, of an encoding or of rows."""
    if isinstance(block, np.ndarray):
        return block[_index(tokens)]
    if not isinstance(tokens, range):
        return block.take(tokens)
    return block if len(tokens) == block.n_tokens else block.slice(tokens.start, tokens.stop)


def _empty_encoding(spec: HookSpec) -> "_storage.Encoding":
    counts = np.empty((spec.n_columns, 0), np.uint8)
    nothing = np.empty(0, np.uint8)
    return _storage.Encoding(
        counts, nothing, nothing, np.empty((spec.n_columns, 0, 2), np.int64), spec.width, spec.dtype
    )


def _block_bytes(block: Any) -> int:
    if isinstance(block, np.ndarray):
        return block.nbytes
    return sum(memoryview(plane).nbytes for plane in (block.counts, block.index, block.values, block.tile_ptr))
