"""Loads the compiled ops, so that `torch.ops.pyfacts` exists: `_C`, and `_cuda` if it was built and torch has CUDA."""

import importlib.util
from pathlib import Path

import torch

BUILD_CUDA = (
    "`pip install --no-build-isolation -C cmake.define.PYFACTS_CUDA=ON .` in the source tree (it needs nvcc and "
    "nvidia-cutlass)"
)

_loaded: set[str] = set()


def load() -> None:
    """Loads `_C` into this process, and `_cuda` if it is there and torch can use it."""
    path = find("_C")
    assert path is not None, "it is built with _storage, which pyfacts has looked for"
    load_library(path)
    cuda = find("_cuda")
    if cuda is not None and torch.version.cuda is not None:
        load_library(cuda)


def find(name: str) -> Path | None:
    """Returns where a compiled part of pyfacts is, or None."""
    spec = importlib.util.find_spec(f"pyfacts.{name}")
    return None if spec is None or spec.origin is None else Path(spec.origin)


def load_library(path: Path) -> None:
    """Loads a library of ops."""
    torch.ops.load_library(path)
    _loaded.add(path.name.partition(".")[0])


def has_cuda() -> bool:
    """Whether the CUDA kernels are loaded."""
    return "_cuda" in _loaded
