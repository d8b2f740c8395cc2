"""Dumps: activations of a model on disk, written by `pyfacts.dump` and read by `pyfacts.open_dump`.

FORMAT.md describes the bytes. Reading needs NumPy, xxhash and zstandard; only writing needs torch.
"""

from .errors import DumpError, DumpInterrupted
from .reader import Dump, DumpedHook, open_dump
from .results import Context, FeatureStats, VerifyReport

__all__ = [
    "Context",
    "Dump",
    "DumpError",
    "DumpInterrupted",
    "DumpedHook",
    "FeatureStats",
    "VerifyReport",
    "open_dump",
]
