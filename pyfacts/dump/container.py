"""The safetensors container: a writer that streams, and a reader that trusts nothing.

    u64 little-endian   header bytes, n
    n bytes             JSON {"name": {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {str: str}},
                        padded with spaces
    the rest            the tensors, one after another, without gaps

The header's size is reserved when a file is begun and the header is written last, so that tensors of unknown sizes can
stream. A `padding` tensor of zeros ends every group of tensors that is not a multiple of 8 bytes, since the format
allows no gaps: so every typed tensor lies aligned. The `safetensors` library opens the files; this reader is separate
because it reads single columns of a tensor and checks more.
"""

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from .errors import DumpError
from .store import Source

ALIGNMENT = 8
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library

# BF16 has no NumPy dtype: it is read as its bits.
NUMPY_DTYPES = {
    "U8": "<u1",
    "BF16": "<u2",
    "F16": "<f2",
    "I32": "<i4",
    "F32": "<f4",
    "I64": "<i8",
    "U64": "<u8",
    "F64": "<f8",
}
SAFETENSORS_ITEM_BYTES = {name: int(dtype[2:]) for name, dtype in NUMPY_DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Dtype, shape and place of a tensor; offsets count from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


def _header_json(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    for name, info in tensors.items():
        header[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [info.begin, info.end]}
    return json.dumps(header, separators=(",", ":")).encode()


def header_room(tensors: Iterable[tuple[str, str, int]], metadata: Mapping[str, str]) -> int:
    """Returns header bytes that hold (name, dtype, number of dimensions) whatever the sizes turn out to be."""
    large = 10**18
    infos = {name: TensorInfo(dtype, (large,) * dims, large, large) for name, dtype, dims in tensors}
    return -(-len(_header_json(infos, metadata)) // ALIGNMENT) * ALIGNMENT


class TensorWriter:
    """Streams tensors into a new safetensors file.

    Args:
        path: the file, which must not exist.
        header_bytes: room for the header, from `header_room`.
    """

    def __init__(self, path: Path, header_bytes: int) -> None:
        self._file = open(path, "xb")  # closed by finish() or close()
        self._header_bytes = header_bytes
        self._tensors: dict[str, TensorInfo] = {}
        self._offset = 0
        self._written_back = 0
        self._file.write(bytes(8 + header_bytes))

    def add(self, name: str, dtype: str, shape: tuple[int, ...], data: bytes | memoryview) -> None:
        """Appends a tensor."""
        if len(data) != math.prod(shape) * SAFETENSORS_ITEM_BYTES[dtype] or name in self._tensors:
            raise AssertionError(f"{name}: {len(data)} bytes for {dtype} {shape}, or written twice")
        self._file.write(data)
        begin, self._offset = self._offset, self._offset + len(data)
        self._tensors[name] = TensorInfo(dtype, shape, begin, self._offset)

    def pad(self, name: str) -> None:
        """Appends a tensor of 0 to 7 zeros, so that the next one lies aligned."""
        n = -self._offset % ALIGNMENT
        self.add(name, "U8", (n,), bytes(n))

    def start_writeback(self) -> None:
        """Lets the disk begin with what has been added, so that the flush at the end does not wait for all of it."""
        self._file.flush()
        begin, self._written_back = self._written_back, 8 + self._header_bytes + self._offset
        if hasattr(os, "posix_fadvise"):
            # Linux begins to write what is dirty of these pages and, being dirty, they stay in memory.
            os.posix_fadvise(self._file.fileno(), begin, self._written_back - begin, os.POSIX_FADV_DONTNEED)

    def finish(self, metadata: Mapping[str, str]) -> tuple[int, str]:
        """Writes the header and makes the file durable. Returns its size and the xxh3-64 of its header in hex."""
        header = _header_json(self._tensors, metadata)
        if len(header) > self._header_bytes:
            raise AssertionError(f"the header takes {len(header)} bytes, {self._header_bytes} were reserved")
        head = struct.pack("<Q", self._header_bytes) + header.ljust(self._header_bytes, b" ")
        self._file.seek(0)
        self._file.write(head)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return len(head) + self._offset, xxhash.xxh3_64_hexdigest(head)

    def close(self) -> None:
        """Gives the file up, whatever state it is in."""
        try:
            self._file.close()
        except OSError:  # a full disk refuses the last buffer again
            pass


class TensorFile:
    """A safetensors file whose header has been checked.

    Args:
        source: its bytes.
        n_bytes: the size that the file must have, or None.
        header_xxh3: the hex digest that its header must have, or None.

    Raises:
        DumpError: its size is another, or its header breaks a rule.
    """

    def __init__(self, source: Source, n_bytes: int | None = None, header_xxh3: str | None = None) -> None:
        self._source, self.path, self.n_bytes = source, source.path, source.n_bytes
        if n_bytes is not None and self.n_bytes != n_bytes:
            raise DumpError(f"the file has {self.n_bytes} bytes, its commit record says {n_bytes}", path=self.path)
        if self.n_bytes < 8:
            raise DumpError(f"the file has {self.n_bytes} bytes, too few for a safetensors header", path=self.path)
        (header_bytes,) = struct.unpack("<Q", source.read(0, 8))
        if header_bytes > min(self.n_bytes - 8, MAX_HEADER_BYTES):
            raise DumpError(
                f"the header claims {header_bytes} bytes of a file of {self.n_bytes}", path=self.path, offset=0
            )
        self._data_start = 8 + header_bytes
        head = bytes(source.read(0, self._data_start))
        if header_xxh3 is not None and xxhash.xxh3_64_hexdigest(head) != header_xxh3:
            raise DumpError("the header's checksum differs from its commit record", path=self.path, offset=0)
        self.tensors, self.metadata = _parse_header(head[8:], self.n_bytes - self._data_start, self.path)

    def info(self, name: str, dtype: str, shape: tuple[int | None, ...]) -> TensorInfo:
        """Returns a tensor's place after checking its dtype and shape (None: any size)."""
        info = self.tensors.get(name)
        if info is None:
            raise DumpError("the tensor is missing", path=self.path, tensor=name)
        fits = len(info.shape) == len(shape) and all(b in (a, None) for a, b in zip(info.shape, shape, strict=True))
        if info.dtype != dtype or not fits:
            expected = ", ".join("n" if size is None else str(size) for size in shape)
            raise DumpError(
                f"the header says {info.dtype} {list(info.shape)}, expected {dtype} [{expected}]",
                path=self.path,
                tensor=name,
            )
        return info

    def offset(self, name: str, byte: int = 0) -> int:
        """Returns where a byte of a tensor lies in the file, for messages."""
        return self._data_start + self.tensors[name].begin + byte

    def bytes(self, name: str, begin: int = 0, end: int | None = None) -> memoryview:
        """Returns bytes [begin, end) of a tensor; the caller has checked the range."""
        info = self.tensors[name]
        start = self._data_start + info.begin
        stop = info.nbytes if end is None else end
        if not 0 <= begin <= stop <= info.nbytes:
            raise DumpError(f"bytes {begin}:{stop} of {info.nbytes} were asked for", path=self.path, tensor=name)
        return self._source.read(start + begin, start + stop)

    def check_whole(self) -> None:
        """DumpError if the file has become shorter than it was, where that would harm what was read of it."""
        self._source.check_whole()

    def check_padding(self) -> None:
        """Reads every `padding` tensor, which nothing else does: DumpError unless it is 0 to 7 zeros."""
        for name in self.tensors:
            if name.rpartition("/")[2] == "padding":
                padding = self.bytes(name)
                if padding.nbytes >= ALIGNMENT or any(padding):
                    raise DumpError(
                        f"must be 0 to 7 zeros, has {padding.nbytes} bytes: {padding[:ALIGNMENT].hex(' ')}",
                        path=self.path,
                        tensor=name,
                        offset=self.offset(name),
                    )

    def array(self, name: str, dtype: str, shape: tuple[int | None, ...]) -> np.ndarray:
        """Returns a copy of a tensor (BF16 as its bits, u2) after checking its dtype and shape."""
        info = self.info(name, dtype, shape)
        return np.frombuffer(self.bytes(name), NUMPY_DTYPES[dtype]).reshape(info.shape).copy()


def parse_json(data: bytes, path: str) -> dict[str, Any]:
    """Parses a JSON object strictly: UTF-8, no duplicate keys, no NaN, no bottomless nesting; else DumpError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a key occurs twice")
        return result

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON number")

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise DumpError(f"is not valid JSON: {error}", path=path) from error
    if not isinstance(value, dict):
        raise DumpError("holds no JSON object", path=path)
    return value


def is_size(value: Any) -> bool:
    """Whether a JSON value is an integer that a file offset can hold."""
    return type(value) is int and 0 <= value < 2**63


def _parse_header(data: bytes, data_bytes: int, path: str) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Checks a header the way the safetensors library does, and that typed tensors are aligned."""
    if not data.startswith(b"{"):
        raise DumpError("the header does not begin with '{'", path=path, offset=8)
    header = parse_json(data, path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise DumpError("__metadata__ must map strings to strings", path=path, offset=8)
    tensors: dict[str, TensorInfo] = {}
    for name, entry in header.items():
        info = _parse_tensor(entry)
        if isinstance(info, str):
            raise DumpError(info, path=path, tensor=name)
        tensors[name] = info
    offset = 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin != offset:
            raise DumpError(f"begins at {info.begin}, the tensor before it ends at {offset}", path=path, tensor=name)
        if info.nbytes and info.begin % SAFETENSORS_ITEM_BYTES[info.dtype]:
            raise DumpError(f"{info.dtype} begins at {info.begin}, not aligned", path=path, tensor=name)
        offset = info.end
    if offset != data_bytes:
        raise DumpError(f"the tensors end at {offset}, the data at {data_bytes}", path=path)
    return tensors, metadata


def _parse_tensor(entry: Any) -> TensorInfo | str:
    """Returns the tensor that a header entry describes, or what is wrong with it."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        return "the header entry must have dtype, shape and data_offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in SAFETENSORS_ITEM_BYTES:
        return f"unknown dtype {dtype!r}"
    if not isinstance(shape, list) or not all(is_size(n) for n in shape) or len(shape) > 8:
        return f"shape {shape!r} is no list of sizes"
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(is_size(n) for n in offsets):
        return f"data_offsets {offsets!r} is no pair of sizes"
    n_bytes = math.prod(shape) * SAFETENSORS_ITEM_BYTES[dtype]  # Python's integers do not overflow
    if offsets[1] - offsets[0] != n_bytes:
        return f"data_offsets {offsets} hold {offsets[1] - offsets[0]} bytes, {dtype} {shape} takes {n_bytes}"
    return TensorInfo(dtype, tuple(shape), offsets[0], offsets[1])
