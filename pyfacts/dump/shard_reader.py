"""Reads one committed shard: checks what it reads, then hands out encodings, rows and statistics. No torch here."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, NoReturn

import numpy as np

from .. import _storage
from . import layout
from .arrays import BITS
from .codec import CodecError, Split, codec_of
from .container import NUMPY_DTYPES, SAFETENSORS_ITEM_BYTES, TensorFile, is_size
from .digest import xxh3
from .errors import DumpError
from .layout import PLANES, HookSpec, TensorSpec
from .plan import Plan, ShardRecord
from .statistics import Statistics, new_statistics
from .store import Store

MAPPED_BYTES = 1 << 20  # smaller blocks are copied: each that is mapped keeps a file open


class HookFile:
    """A hook's file of a shard. Its header is checked when it is opened, the rest when it is read.

    Raises:
        DumpError: the file or what was read of it is not what the format and the record say.
    """

    def __init__(self, store: Store, plan: Plan, record: ShardRecord, hook: HookSpec) -> None:
        entry = record.hook_files[hook.name]
        self.hook, self.blocks = hook, record.blocks
        self._n_tokens, self._nnz = record.n_tokens, record.nnz.get(hook.name, 0)
        self._codec, self._signed_zero = codec_of(plan.codec), plan.signed_zero
        self._lossy = plan.lossy and hook.kind == "neurons"
        source = store.open(f"{record.directory}/{entry.file}")
        self._file = TensorFile(source, entry.bytes, entry.header_xxh3)
        expected = layout.metadata(hook, list(record.blocks), plan.codec, plan.signed_zero, record.token_start)
        _check_contents(self._file, layout.hook_file(hook, list(record.blocks), plan.codec, plan.lossy), expected)
        self._pointers: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        self._statistics: Statistics | None = None

    def encoding(self, block: int) -> "_storage.Encoding":
        """Returns a block, all columns, checked. With codec "none" index and values of a large one, in a directory, are
        the mapped file's bytes: `check_whole` before each use."""
        return self._columns(block, 0, self.hook.n_columns, self.hook.width)

    def column(self, block: int, column: int) -> "_storage.Encoding":
        """Returns one column of a block, checked; no byte of another column is read."""
        return self._columns(block, column, column + 1, self.hook.column_width(column))

    def rows(self, block: int) -> np.ndarray:
        """Returns a block of plain rows [n_tokens, width]; bfloat16 as its bits."""
        name = f"{block}/rows"
        stored = self._file.bytes(name)
        self._check_digest(f"{name}_xxh3", name, xxh3(stored))
        shape = (self.blocks[block], self.hook.width)
        if self._codec is not None:
            item = self.hook.item_bytes
            with self._located(name, 0):
                stored = memoryview(self._codec.unpack(stored, shape[0] * shape[1] * item, item))
        return np.frombuffer(stored, BITS[self.hook.dtype]).reshape(shape)

    def sq_norm(self, block: int) -> np.ndarray | None:
        """Returns the squared norms [n_tokens] of a block's rows before values were dropped; None if none were."""
        if not self._lossy:
            return None
        name = f"{block}/sq_norm"
        array = self._file.array(name, "F64", (self.blocks[block],))
        self._check_digest(f"{name}_xxh3", name, xxh3(array))
        return array

    def check_whole(self) -> None:
        """DumpError if a mapped file has been cut: what was read of it would kill the process."""
        self._file.check_whole()

    def statistics(self) -> Statistics:
        """Returns those of every feature over the shard."""
        if self._statistics is None:
            names = [name for name, _ in layout.STATISTICS]
            stored = [self._file.bytes(name) for name in names]
            self._check_digest("feature/xxh3", names[0], xxh3(*stored))
            arrays = []
            for (name, dtype), data in zip(layout.STATISTICS, stored, strict=True):
                if isinstance(self._codec, Split):
                    item = SAFETENSORS_ITEM_BYTES[dtype]
                    with self._located(name, 0):
                        data = memoryview(self._codec.unpack(data, self.hook.width * item, item))
                arrays.append(np.frombuffer(data, NUMPY_DTYPES[dtype]).copy())
            self._statistics = self._plausible(Statistics(*arrays))
        return self._statistics

    def _plausible(self, stats: Statistics) -> Statistics:
        """The statistics, which no value has been compared with: verify() does that."""
        for name, bad, what in (
            ("feature/nnz", (stats.nnz < 0) | (stats.nnz > self._n_tokens), f"values in {self._n_tokens} tokens"),
            ("feature/max", np.isnan(stats.max), "as its largest value"),
        ):
            if bad.any():
                feature, array = int(bad.argmax()), getattr(stats, name.partition("/")[2])
                raise DumpError(
                    f"feature {feature} cannot have {array[feature]} {what}",
                    path=self._file.path,
                    tensor=name,
                    offset=self._file.offset(name),
                )
        if (nnz := int(stats.nnz.sum())) != self._nnz:
            raise DumpError(
                f"adds up to {nnz} values, the commit record says {self._nnz}",
                path=self._file.path,
                tensor="feature/nnz",
                offset=self._file.offset("feature/nnz"),
            )
        return stats

    def _columns(self, block: int, begin: int, end: int, n_features: int) -> "_storage.Encoding":
        """Columns [begin, end) of a block, which hold n_features."""
        starts, lengths, digests = self._block_pointers(block)
        names = [f"{block}/{plane}" for plane in PLANES]
        # Contiguous for the columns; then each column's own bytes.
        stored = [self._file.bytes(n, int(starts[begin, p]), int(starts[end, p])) for p, n in enumerate(names)]
        cuts = (starts[begin : end + 1] - starts[begin]).T.tolist()
        frames = [
            [plane[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
            for plane, bounds in zip(stored, cuts, strict=True)
        ]
        for c, column in enumerate(zip(*frames, strict=True)):
            if xxh3(*column) != int(digests[begin + c]):
                # One digest covers the column's bytes in all four planes.
                ranges = [
                    f"{name} at {self._file.offset(name, int(starts[begin + c, p]))} ({len(column[p])})"
                    for p, name in enumerate(names)
                ]
                raise DumpError(
                    f"the bytes of column {begin + c} do not fit their checksum; the damage is in one of (with the "
                    f"byte in the file, and bytes) {', '.join(ranges)}, or in the checksum",
                    path=self._file.path,
                    tensor=f"{block}/column_xxh3",
                    offset=self._file.offset(f"{block}/column_xxh3", 8 * (begin + c)),
                )
        if self._codec is None and sum(piece.nbytes for piece in stored) < MAPPED_BYTES:
            stored = [memoryview(bytes(piece)) for piece in stored]
        elif self._codec is not None:
            columns = [
                self._unpacked(block, begin + c, column, starts[begin + c].tolist(), lengths[begin + c].tolist())
                for c, column in enumerate(zip(*frames, strict=True))
            ]
            stored = [memoryview(b"".join(pieces)) for pieces in zip(*columns, strict=True)]
        try:
            occupancy, counts, index, values = stored
            return _storage.join_block(
                occupancy,
                counts,
                index,
                values,
                np.ascontiguousarray(lengths[begin:end]),
                self.blocks[block],
                n_features,
                self.hook.dtype,
                self._signed_zero,
            )
        except _storage.Fault as fault:
            what, plane, column, token = fault.args
            p = PLANES.index(plane)
            where = f" (column {begin + column}" + (f", token {token})" if token >= 0 else ")") if column >= 0 else ""
            offset = self._file.offset(names[p], int(starts[begin + max(column, 0), p]))
            raise DumpError(what + where, path=self._file.path, tensor=names[p], offset=offset) from None
        except (MemoryError, ValueError) as error:
            raise DumpError(f"block {block} cannot be read: {error}", path=self._file.path) from error

    def _block_pointers(self, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """column_ptr, column_length and column_xxh3 of a block: pointers ascend to the planes' ends, lengths are such
        as the block's tokens and columns allow."""
        if block in self._pointers:
            return self._pointers[block]
        hook, n_tokens = self.hook, self.blocks[block]
        c = hook.n_columns
        starts = self._file.array(f"{block}/column_ptr", "I64", (c + 1, 4))
        lengths = self._file.array(f"{block}/column_length", "I64", (c, 4))
        digests = self._file.array(f"{block}/column_xxh3", "U64", (c,))

        def fail(tensor: str, row: int, what: str) -> NoReturn:
            offset = self._file.offset(f"{block}/{tensor}", row * 32)
            raise DumpError(f"row {row}: {what}", path=self._file.path, tensor=f"{block}/{tensor}", offset=offset)

        ends = [self._file.tensors[f"{block}/{plane}"].nbytes for plane in PLANES]
        bad = (starts < 0) | (starts > ends)  # before any difference, which could overflow
        bad[1:] |= starts[1:] < starts[:-1]
        bad[0] |= starts[0] != 0
        bad[-1] |= starts[-1] != ends
        if bad.any():
            row = int(bad.any(1).argmax())
            fail("column_ptr", row, f"{starts[row].tolist()} do not ascend to {ends}")
        widths = np.minimum(layout.COLUMN_WIDTH, hook.width - layout.COLUMN_WIDTH * np.arange(c))
        limits = np.empty((c, 4), np.int64)  # cannot overflow: a block has less than 2^31 tokens
        limits[:, 0] = layout.occupancy_bytes(n_tokens)
        limits[:, 1] = n_tokens
        limits[:, 2] = n_tokens * -(-widths // 8)
        limits[:, 3] = n_tokens * widths * hook.item_bytes
        bad = (lengths < 0) | (lengths > limits)
        bad[:, 0] |= lengths[:, 0] != layout.occupancy_bytes(n_tokens)
        bad[:, 3] |= lengths[:, 3] % hook.item_bytes != 0
        stored = np.diff(starts, axis=0)
        # What is stored raw is as long as it is; a frame stands exactly where there are bytes.
        bad |= stored != lengths if self._codec is None else (stored == 0) != (lengths == 0)
        if bad.any():
            row = int(bad.any(1).argmax())
            p = int(bad[row].argmax())
            held = f"{stored[row, p]} stored bytes of {PLANES[p]} for {lengths[row, p]}"
            fail("column_length", row, f"{held} cannot be, of {n_tokens} tokens at most {limits[row, p]}")
        self._pointers[block] = starts, lengths, digests
        return self._pointers[block]

    def _unpacked(
        self, block: int, column: int, stored: Sequence[memoryview], starts: list[int], lengths: list[int]
    ) -> list[bytes | memoryview]:
        """The four planes of a column, through the codec."""
        codec = self._codec
        assert codec is not None
        pieces: list[bytes | memoryview] = []
        for plane, piece, start, n_bytes in zip(PLANES, stored, starts, lengths, strict=True):
            with self._located(f"{block}/{plane}", start):
                if plane == "index":
                    pieces.append(codec.unpack_index(piece, n_bytes, pieces[1], self.hook.column_width(column)))
                else:
                    pieces.append(codec.unpack(piece, n_bytes, self.hook.item_bytes if plane == "values" else 1))
        return pieces

    @contextmanager
    def _located(self, tensor: str, byte: int) -> Iterator[None]:
        """Says where the stored bytes lie that a codec refuses."""
        try:
            yield
        except (CodecError, MemoryError) as error:
            offset = self._file.offset(tensor, byte)
            raise DumpError(str(error), path=self._file.path, tensor=tensor, offset=offset) from error

    def _check_digest(self, name: str, of: str, actual: int) -> None:
        _check_digest(self._file, name, of, int(self._file.array(name, "U64", (1,))[0]), actual)


class TokensFile:
    """A shard's file of tokens. That it holds n_tokens is checked when it is opened, the rest when it is read.

    So a record cannot claim more tokens than there are bytes for, and what is allocated for them is bounded by files.
    """

    def __init__(self, store: Store, record: ShardRecord) -> None:
        entry = record.tokens_file
        source = store.open(f"{record.directory}/{entry.file}")
        self._n_tokens = n_tokens = record.n_tokens
        self._file = TensorFile(source, entry.bytes, entry.header_xxh3)
        info = self._file.tensors.get("token_ids")
        self._id_dtype = "I64" if info is not None and info.dtype == "I64" else "I32"
        expected = layout.tokens_metadata(n_tokens, record.token_start)
        _check_contents(self._file, layout.tokens_file(n_tokens, self._id_dtype), expected)

    def read(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns document, position and token id of every token, int64 [n_tokens] each."""
        self._file.check_padding()
        digests = self._file.array("xxh3", "U64", (3,))
        arrays = []
        for i, name in enumerate(("document", "position", "token_ids")):
            dtype = self._id_dtype if name == "token_ids" else "I64"
            array = self._file.array(name, dtype, (self._n_tokens,))
            _check_digest(self._file, "xxh3", name, int(digests[i]), xxh3(array))
            arrays.append(array.astype(np.int64, copy=False))
        return arrays[0], arrays[1], arrays[2]


def verify_tokens_file(file: TokensFile, last: tuple[int, int], highest_id: Any) -> tuple[int, int]:
    """Reads everything; checks that tokens ascend by document and position, and that their ids can be; DumpError.

    Args:
        last: document and position of the token before, or -1.
        highest_id: the plan's, which may be anything.

    Returns:
        Document and position of the last token.
    """
    document, position, token_ids = file.read()
    document_before, position_before = (
        np.append(at, array[:-1]) for at, array in zip(last, (document, position), strict=True)
    )
    repeats = (document == document_before) & (position <= position_before)
    highest = highest_id if is_size(highest_id) else 2**63 - 1
    for name, array, bad, rule in (
        ("document", document, (document < 0) | (document < document_before), "documents are 0 or more, and ascend"),
        ("position", position, (position < 0) | repeats, "positions are 0 or more, and ascend within a document"),
        ("token_ids", token_ids, (token_ids < 0) | (token_ids > highest), f"ids are 0 to {highest}"),
    ):
        if bad.any():
            token = int(bad.argmax())
            raise DumpError(
                f"{array[token]} cannot be that of the shard's token {token}: {rule}",
                path=file._file.path,
                tensor=name,
                offset=file._file.offset(name),
            )
    return int(document[-1]), int(position[-1])


def verify_hook_file(file: HookFile) -> None:
    """Reads everything and compares the statistics and norms with the values; DumpError."""
    file._file.check_padding()
    if file.hook.kind == "rows":
        for block in range(len(file.blocks)):
            file.rows(block)
        return
    actual = new_statistics(file.hook.width)
    for block in range(len(file.blocks)):
        file.encoding(block).add_feature_stats(*actual)
        norms = file.sq_norm(block)
        if norms is not None and (norms < 0).any():
            raise DumpError("a norm is negative", path=file._file.path, tensor=f"{block}/sq_norm")
    for (name, _), stored, computed in zip(layout.STATISTICS, file.statistics(), actual, strict=True):
        same = (stored == computed) | (np.isnan(stored) & np.isnan(computed))
        if not same.all():
            feature = int((~same).argmax())
            raise DumpError(
                f"feature {feature} has {stored[feature]}, the stored values give {computed[feature]}",
                path=file._file.path,
                tensor=name,
                offset=file._file.offset(name),
            )


def block_starts(blocks: tuple[int, ...]) -> list[int]:
    """Where each block begins in its shard, and where the last one ends."""
    return list(accumulate(blocks, initial=0))


def _check_digest(file: TensorFile, name: str, of: str, expected: int, actual: int) -> None:
    if expected != actual:
        message = f"its bytes do not fit their checksum in {name}"
        raise DumpError(message, path=file.path, tensor=of, offset=file.offset(of))


def _check_contents(file: TensorFile, expected: Iterable[TensorSpec], metadata: dict[str, str]) -> None:
    """The file holds exactly the expected tensors, and its metadata says what the plan and the record say."""
    if file.metadata != metadata:
        key = next(k for k in (*metadata, *file.metadata) if file.metadata.get(k) != metadata.get(k))
        raise DumpError(
            f"__metadata__ says {key} = {file.metadata.get(key)!r:.80}, plan and commit record say "
            f"{metadata.get(key)!r:.80}",
            path=file.path,
        )
    names = set()
    for spec in expected:
        names.add(spec.name)
        file.info(spec.name, spec.dtype, spec.shape)
    if extra := file.tensors.keys() - names:
        raise DumpError("the format has no such tensor", path=file.path, tensor=min(extra))
