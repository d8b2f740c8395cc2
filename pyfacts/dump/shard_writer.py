"""Writes one shard: a file per hook, a file of tokens, and at the end the record that makes them a part of the dump."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .. import _storage
from . import files, layout
from .codec import Split, codec_of
from .container import SAFETENSORS_ITEM_BYTES, TensorWriter, header_room
from .digest import as_bytes, xxh3
from .layout import HookSpec, TensorSpec
from .plan import FileRecord, Plan, ShardRecord, hook_file_name, record_name, shard_name
from .statistics import Statistics, new_statistics
from .store import Store


class HookWriter:
    """Writes a hook's file of a shard, block by block.

    Args:
        path: the file, which must not exist.
        hook: what it holds.
        plan: the plan; its codec and the like.
        shard: the shard's number.
    """

    def __init__(self, path: Path, hook: HookSpec, plan: Plan, shard: int) -> None:
        self._hook, self._plan = hook, plan
        self._token_start = plan.token_starts[shard]
        n_tokens = plan.token_starts[shard + 1] - self._token_start
        blocks: list[int | None] = [None] * layout.max_blocks(n_tokens)
        tensors = layout.hook_file(hook, blocks, plan.codec, plan.lossy)
        room = header_room(((t.name, t.dtype, len(t.shape)) for t in tensors), self._metadata([n_tokens] * len(blocks)))
        self._file = TensorWriter(path, room)
        self._codec = codec_of(plan.codec)
        self.blocks: list[int] = []
        self.nnz = 0
        self._statistics = new_statistics(hook.width)

    def add_encoding(self, encoding: "_storage.Encoding", sq_norm: np.ndarray | None) -> None:
        """Appends a block of encoded activations; sq_norm float64 [n_tokens] where values were dropped."""
        block, hook = len(self.blocks), self._hook
        occupancy, counts, n_occupied = _storage.split_counts(encoding)
        planes: list[Any] = [as_bytes(plane) for plane in (occupancy, counts, encoding.index, encoding.values)]
        length = column_lengths(encoding, n_occupied)
        starts = np.zeros((hook.n_columns + 1, 4), np.int64)
        np.cumsum(length, axis=0, out=starts[1:])
        pieces: list[list[Any]] = [
            [plane[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
            for plane, bounds in zip(planes, starts.T.tolist(), strict=True)
        ]
        if self._codec is not None:
            pieces = self._packed(pieces)
            np.cumsum([[len(p) for p in column] for column in pieces], axis=1, out=starts[1:].T)
            planes = [b"".join(column) for column in pieces]
        contents: dict[str, Any] = {
            "column_ptr": starts,
            "column_length": length,
            "column_xxh3": np.array([xxh3(*frames) for frames in zip(*pieces, strict=True)], np.uint64),
            **dict(zip(layout.PLANES, planes, strict=True)),
        }
        if self._plan.lossy:
            if sq_norm is None:
                raise AssertionError("a lossy plan needs the squared norm of every input row")
            contents["sq_norm"] = np.ascontiguousarray(sq_norm, np.float64)
            contents["sq_norm_xxh3"] = np.array([xxh3(contents["sq_norm"])], np.uint64)
        specs = layout.neuron_block(hook, block, encoding.n_tokens, self._plan.codec, self._plan.lossy)
        write_tensors(self._file, specs, contents)
        encoding.add_feature_stats(*self._statistics)
        self.nnz += encoding.nnz
        self.blocks.append(encoding.n_tokens)
        self._file.start_writeback()

    def add_rows(self, rows: np.ndarray) -> None:
        """Appends a block of plain rows: the bits [n_tokens, width]."""
        block = len(self.blocks)
        stored: Any = as_bytes(rows)
        if self._codec is not None:
            stored = self._codec.pack(stored, self._hook.item_bytes)
        contents = {"rows_xxh3": np.array([xxh3(stored)], np.uint64), "rows": stored}
        write_tensors(self._file, layout.row_block(self._hook, block, len(rows), self._plan.codec), contents)
        self.blocks.append(len(rows))
        self._file.start_writeback()

    def finish(self) -> tuple[int, str]:
        """Writes statistics and header, durably. Returns the file's bytes and its header's digest."""
        if self._hook.kind == "neurons":
            stored: list[Any] = list(self._statistics)
            if isinstance(self._codec, Split):
                stored = [self._codec.pack(as_bytes(array), array.itemsize) for array in stored]
            contents = dict(zip(Statistics._fields, stored, strict=True))
            contents["xxh3"] = np.array([xxh3(*stored)], np.uint64)
            write_tensors(self._file, layout.statistics(self._hook, self._plan.codec), contents)
        return self._file.finish(self._metadata(self.blocks))

    def close(self) -> None:
        self._file.close()

    def _packed(self, pieces: list[list[Any]]) -> list[list[bytes]]:
        """The pieces of every plane, column by column, through the codec."""
        codec, hook = self._codec, self._hook
        assert codec is not None
        occupancy, counts, index, values = pieces
        widths = map(hook.column_width, range(hook.n_columns))
        packed = codec.pack_all(
            [
                *(codec.parts(piece, 1) for piece in occupancy),
                *(codec.parts(piece, 1) for piece in counts),
                *map(codec.index_parts, index, counts, widths),
                *(codec.parts(piece, hook.item_bytes) for piece in values),
            ]
        )
        return [packed[at : at + hook.n_columns] for at in range(0, len(packed), hook.n_columns)]

    def _metadata(self, blocks: list[int]) -> dict[str, str]:
        return layout.metadata(self._hook, blocks, self._plan.codec, self._plan.signed_zero, self._token_start)


class ShardWriter:
    """One attempt at a shard, in a directory of its own that is nothing until `commit`."""

    def __init__(self, store: Store, plan: Plan, shard: int) -> None:
        self._store, self._plan, self.shard = store, plan, shard
        self._directory = store.new_directory(shard_name(shard))
        self._hooks: dict[str, HookWriter] = {}
        self._tokens: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        try:
            for hook in plan.hooks:
                path = self._directory / f"{hook_file_name(hook.name)}.tmp"
                self._hooks[hook.name] = HookWriter(path, hook, plan, shard)
        except BaseException:
            self.abandon()
            raise

    def __getitem__(self, hook: str) -> HookWriter:
        return self._hooks[hook]

    def add_tokens(self, token_ids: np.ndarray, document: np.ndarray, position: np.ndarray) -> None:
        """Appends captured tokens: int64 [n] each."""
        self._tokens.append((token_ids, document, position))

    def commit(self) -> bool:
        """Makes the shard a part of the dump. Returns False, and leaves nothing, if another worker was first."""
        try:
            won = self._commit()
        except FileNotFoundError:
            if not self._store.exists(record_name(self.shard)):
                raise
            won = False  # and the winner has swept our directory away
        if not won:
            self.abandon()
        return won

    def _commit(self) -> bool:
        hook_files = {}
        for name, writer in self._hooks.items():
            n_bytes, digest = writer.finish()
            hook_files[name] = self._rename(hook_file_name(name), n_bytes, digest)
        tokens_file = self._write_tokens()
        blocks = {tuple(writer.blocks) for writer in self._hooks.values()}
        if len(blocks) != 1:
            raise AssertionError(f"the hooks of shard {self.shard} have different blocks: {blocks}")
        record = ShardRecord(
            shard=self.shard,
            directory=self._directory.name,
            plan_xxh3=self._plan.digest,
            token_start=self._plan.token_starts[self.shard],
            blocks=blocks.pop(),
            tokens_file=tokens_file,
            hook_files=hook_files,
            nnz={h.name: self._hooks[h.name].nnz for h in self._plan.hooks if h.kind == "neurons"},
        )
        if record.n_tokens != self._plan.token_starts[self.shard + 1] - record.token_start:
            raise AssertionError(f"shard {self.shard} holds {record.n_tokens} tokens, the plan gives it others")
        shard_files = [tokens_file.file, *(file.file for file in hook_files.values())]
        return self._store.commit(self._directory, shard_files, record_name(self.shard), record.to_json())

    def abandon(self) -> None:
        """Removes the attempt."""
        for writer in self._hooks.values():
            writer.close()
        files.remove_tree(self._directory)

    def _rename(self, name: str, n_bytes: int, digest: str) -> FileRecord:
        (self._directory / f"{name}.tmp").rename(self._directory / name)
        return FileRecord(name, n_bytes, digest)

    def _write_tokens(self) -> FileRecord:
        token_ids, document, position = (np.concatenate(parts) for parts in zip(*self._tokens, strict=True))
        id_dtype, numpy_dtype = ("I32", "<i4") if self._plan.tokens["highest_id"] < 2**31 else ("I64", "<i8")
        arrays = {"document": document, "position": position, "token_ids": token_ids.astype(numpy_dtype)}
        digests = np.array([xxh3(array) for array in arrays.values()], np.uint64)
        specs = layout.tokens_file(len(token_ids), id_dtype)
        metadata = layout.tokens_metadata(len(token_ids), self._plan.token_starts[self.shard])
        room = header_room(((spec.name, spec.dtype, len(spec.shape)) for spec in specs), metadata)
        file = TensorWriter(self._directory / f"{layout.TOKENS_FILE}.tmp", room)
        try:
            write_tensors(file, specs, arrays | {"xxh3": digests})
            n_bytes, digest = file.finish(metadata)
        finally:
            file.close()
        return self._rename(layout.TOKENS_FILE, n_bytes, digest)


def write_tensors(file: TensorWriter, specs: Iterable[TensorSpec], contents: Mapping[str, Any]) -> None:
    """Writes tensors in the order of their specs, each from the contiguous buffer of its name's last part.

    A size that a spec leaves open is the buffer's.
    """
    for spec in specs:
        name = spec.name.rpartition("/")[2]
        if name == "padding":
            file.pad(spec.name)
            continue
        data = as_bytes(contents[name])
        n_items = len(data) // SAFETENSORS_ITEM_BYTES[spec.dtype]
        file.add(spec.name, spec.dtype, tuple(n_items if n is None else n for n in spec.shape), data)


def column_lengths(encoding: "_storage.Encoding", n_occupied: np.ndarray) -> np.ndarray:
    """int64 [n_columns, 4], the bytes of each column in each plane, uncompressed."""
    item = layout.ITEM_BYTES[encoding.dtype]
    length = np.empty((len(n_occupied), 4), np.int64)
    length[:, 0] = layout.occupancy_bytes(encoding.n_tokens)
    length[:, 1] = n_occupied
    ends = (len(as_bytes(encoding.index)), encoding.nnz)
    for plane, unit in ((0, 1), (1, item)):
        starts = np.append(np.asarray(encoding.tile_ptr)[:, 0, plane], ends[plane])
        length[:, 2 + plane] = np.diff(starts) * unit
    return length
