"""Codecs: how the planes of a column, plain rows and statistics are stored. FORMAT.md is the normative text.

Every compressed piece is a zstd frame that declares its content's size; a piece of no bytes has no frame. What is read
back is of the size that was expected, or a CodecError: nothing larger is ever allocated.
"""

import itertools
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import zstandard

from .. import _storage

LEVEL = 1
_SIZE = struct.Struct("<Q")


class CodecError(ValueError):
    """Stored bytes that do not give what they should."""


class Zstd:
    """`zstd`: one frame."""

    def __init__(self) -> None:
        self._compressor = zstandard.ZstdCompressor(level=LEVEL)

    def pack(self, data: Any, item_bytes: int) -> bytes:
        """Packs bytes that are items of item_bytes."""
        return self.pack_all([self.parts(data, item_bytes)])[0]

    def pack_all(self, pieces: Sequence[Sequence[Any]]) -> list[bytes]:
        """Packs pieces, each given as `parts` or `index_parts`.

        In one call, which takes and gives back Python's lock once: the thread that runs the model wants it too.
        """
        parts = [part for piece in pieces for part in piece if len(part)]
        packed = iter(self._compressor.multi_compress_to_buffer(parts) if parts else ())
        frames = ([next(packed).tobytes() if len(part) else b"" for part in piece] for piece in pieces)
        return [_join(piece) for piece in frames]

    def parts(self, data: Any, item_bytes: int) -> Sequence[Any]:
        """What the frames of a piece hold; none for no bytes."""
        return [data] if len(data) else []

    def index_parts(self, index: Any, counts: Any, width: int) -> Sequence[Any]:
        """What the frames of a column's index hold, `width` features wide, whose segments have these counts, none 0."""
        return self.parts(index, 1)

    def unpack(self, stored: memoryview, n_bytes: int, item_bytes: int) -> bytes | memoryview:
        """The n_bytes that were packed."""
        if not len(stored) and not n_bytes:
            return b""
        try:
            claimed = zstandard.frame_content_size(stored)
            if claimed != n_bytes:
                holds = "does not say how many bytes it holds" if claimed < 0 else f"holds {claimed} bytes"
                raise CodecError(f"the frame {holds}, expected {n_bytes}")
            data = zstandard.ZstdDecompressor().decompress(stored, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise CodecError(str(error)) from error
        if len(data) != n_bytes:
            raise CodecError(f"the frame gave {len(data)} bytes, expected {n_bytes}")
        return data

    def unpack_index(self, stored: memoryview, n_bytes: int, counts: Any, width: int) -> bytes | memoryview:
        """The n_bytes of the index."""
        return self.unpack(stored, n_bytes, 1)


class Split(Zstd):
    """`split`: a frame for each byte of the items, and for the gaps and the bitmaps of an index.

    Every frame but the last of a piece has its size before it, 8 bytes.
    """

    def parts(self, data: Any, item_bytes: int) -> Sequence[Any]:
        if item_bytes == 1 or not len(data):
            return super().parts(data, 1)
        return list(_storage.split_items(data, item_bytes))

    def unpack(self, stored: memoryview, n_bytes: int, item_bytes: int) -> bytes | memoryview:
        if item_bytes == 1 or not n_bytes:
            return super().unpack(stored, n_bytes, 1)
        planes = self._cut(stored, [n_bytes // item_bytes] * item_bytes)
        return _storage.join_items(b"".join(planes), item_bytes).data

    def index_parts(self, index: Any, counts: Any, width: int) -> Sequence[Any]:
        return _storage.split_index(counts, index, width) if len(index) else []

    def unpack_index(self, stored: memoryview, n_bytes: int, counts: Any, width: int) -> bytes | memoryview:
        sizes = _storage.index_sizes(counts, width)
        if sum(sizes) != n_bytes:
            raise CodecError(f"the counts claim {sum(sizes)} bytes of index, expected {n_bytes}")
        if not n_bytes:
            return super().unpack(stored, 0, 1)
        gaps, bitmaps = self._cut(stored, sizes)
        return _storage.join_index(counts, gaps, bitmaps, width).data

    def _cut(self, stored: memoryview, sizes: Any) -> Iterator[bytes | memoryview]:
        for n_bytes in sizes[:-1]:
            if len(stored) < _SIZE.size:
                raise CodecError(f"{len(stored)} bytes are left where the size of a frame should stand")
            (frame,) = _SIZE.unpack_from(stored)
            stored = stored[_SIZE.size :]
            if frame > len(stored):
                raise CodecError(f"a frame claims {frame} bytes, {len(stored)} are left")
            yield super().unpack(stored[:frame], n_bytes, 1)
            stored = stored[frame:]
        yield super().unpack(stored, sizes[-1], 1)


def _join(frames: list[bytes]) -> bytes:
    """A piece: its frames, the size before each but the last."""
    sizes = (_SIZE.pack(len(frame)) for frame in frames[:-1])
    return b"".join(itertools.chain.from_iterable(itertools.zip_longest(sizes, frames, fillvalue=b"")))


def codec_of(name: str) -> Zstd | None:
    """The codec of that name; None for `none`, which stores everything as it is."""
    if name == "none":
        return None
    return Split() if name == "split" else Zstd()
