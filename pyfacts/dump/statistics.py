"""Checksums and per-feature statistics, as the writer stores and the reader checks them."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import xxhash


def new_statistics(width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Per-feature number, sum, sum of squares and maximum of the stored values: nothing yet."""
    return (
        np.zeros(width, np.int64),
        np.zeros(width, np.float64),
        np.zeros(width, np.float64),
        np.full(width, -np.inf, np.float32),
    )


def column_digest(pieces: Iterable[Any]) -> int:
    """xxh3-64 over a column's stored bytes, plane after plane."""
    digest = xxhash.xxh3_64()
    for piece in pieces:
        digest.update(piece)
    return digest.intdigest()


def digest_array(*arrays: Any) -> np.ndarray:
    """xxh3-64 over the bytes of arrays, one after another, as a uint64 [1]."""
    return np.array([column_digest(as_bytes(array) for array in arrays)], np.uint64)


def as_bytes(buffer: Any) -> memoryview:
    """A contiguous buffer as bytes."""
    return memoryview(buffer).cast("B") if memoryview(buffer).nbytes else memoryview(b"")
