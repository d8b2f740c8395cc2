"""Buffers as bytes, and their checksums."""

from typing import Any

import xxhash


def xxh3(*buffers: Any) -> int:
    """xxh3-64 over the bytes of contiguous buffers, one after another."""
    digest = xxhash.xxh3_64()
    for buffer in buffers:
        digest.update(buffer)
    return digest.intdigest()


def as_bytes(buffer: Any) -> memoryview:
    """A contiguous buffer as bytes."""
    return memoryview(buffer).cast("B") if memoryview(buffer).nbytes else memoryview(b"")
