"""The codecs: what is packed comes back, `split` is smaller, and foreign bytes are refused."""

import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_dump_golden import TestFormatDocument

import pyfacts
from pyfacts import _storage
from pyfacts.dump.blocks import storage_encoding
from pyfacts.dump.codec import CodecError, codec_of
from pyfacts.dump.digest import as_bytes

NAMES = pytest.mark.parametrize("name", ["zstd", "split"])


@NAMES
@pytest.mark.parametrize("item_bytes", [1, 2, 4, 8])
@settings(max_examples=50, deadline=None)
@given(data=st.binary(max_size=200))
def test_items(name, item_bytes, data):
    codec = codec_of(name)
    data = data[: len(data) // item_bytes * item_bytes]
    assert bytes(codec.unpack(memoryview(codec.pack(data, item_bytes)), len(data), item_bytes)) == data


def index_of(sets: list[set[int]], width: int) -> tuple[bytes, bytes]:
    """Counts and index of segments, by FORMAT.md's table."""
    counts, index = [], b""
    for positions in sets:
        counts.append(min(len(positions), 255))
        if len(positions) <= -(-width // 8):
            index += bytes(sorted(positions))
        else:
            index += np.packbits([p in positions for p in range(width)], bitorder="little").tobytes()
    return bytes(counts), index


@NAMES
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_index(name, data):
    width = data.draw(st.sampled_from([1, 7, 8, 9, 200, 255, 256]))
    sets = data.draw(st.lists(st.sets(st.integers(0, width - 1), min_size=1), max_size=6))
    codec, (counts, index) = codec_of(name), index_of(sets, width)
    (packed,) = codec.pack_all([codec.index_parts(index, counts, width)])
    assert bytes(codec.unpack_index(memoryview(packed), len(index), counts, width)) == index


def test_the_documents_example():
    document = TestFormatDocument()
    encoding = storage_encoding(pyfacts.encode(document.matrix()))
    _, counts, _ = _storage.split_counts(encoding)
    gaps, bitmaps = _storage.split_index(counts, encoding.index, 10)
    assert gaps.tobytes() == document.example("gaps") and bitmaps.tobytes() == document.example("bitmaps")
    for byte, plane in enumerate(_storage.split_items(encoding.values, 2)):
        assert plane.tobytes() == document.example(f"values, byte {byte}")


def test_split_is_smaller():
    """At 10 % density positions take 8 bits as they are and 4.7 as gaps; a value's exponent takes 3 of 8 bits."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4096, 256, generator=generator).abs() * (torch.rand(4096, 256, generator=generator) < 0.1)
    encoding = storage_encoding(pyfacts.encode(x.bfloat16()))
    _, counts, _ = _storage.split_counts(encoding)
    index, values = as_bytes(encoding.index), as_bytes(encoding.values)
    sizes = {}
    for name in ("zstd", "split"):
        codec = codec_of(name)
        sizes[name] = sum(map(len, codec.pack_all([codec.index_parts(index, counts, 256), codec.parts(values, 2)])))
    assert sizes["split"] < 0.8 * sizes["zstd"]


def test_foreign_bytes_are_refused():
    codec = codec_of("split")
    packed = codec.pack(bytes(range(100)), 4)
    (first,) = struct.unpack_from("<Q", packed)
    for stored, message in (
        (packed[:5], "should stand"),
        (struct.pack("<Q", 1 << 40) + packed[8:], "are left"),
        (struct.pack("<Q", first - 1) + packed[8:], "expected|ecompress"),
        (packed[:-1], "ecompress"),
        (packed + b"\0", "ecompress|unused|extra"),
    ):
        with pytest.raises(CodecError, match=message):
            codec.unpack(memoryview(stored), 100, 4)
    with pytest.raises(CodecError, match="expected 26"):
        codec.unpack(memoryview(packed), 104, 4)
    with pytest.raises(CodecError, match="the counts claim 3 bytes"):
        codec.unpack_index(memoryview(b"x"), 4, bytes([1, 2]), 256)
    for call in (
        lambda: _storage.split_items(b"123", 2),
        lambda: _storage.join_items(b"123", 3),
        lambda: _storage.split_index(b"\1", b"", 256),
        lambda: _storage.join_index(b"\1", b"", b"", 256),
        lambda: _storage.index_sizes(b"\1", 257),
    ):
        with pytest.raises(ValueError, match="expected|must be"):
            call()
