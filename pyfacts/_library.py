"""Loads the compiled ops, so that `torch.ops.pyfacts` exists."""

import importlib.util

import torch


def load() -> None:
    """Loads `_C` into this process.

    Raises:
        ImportError: the library is missing (pyfacts was not built), or PYFACTS_ISA names an instruction set that this
            CPU does not run.
    """
    spec = importlib.util.find_spec("pyfacts._C")
    if spec is None or spec.origin is None:
        raise ImportError(
            "pyfacts._C is not built: run `pip install --no-build-isolation .` in the source tree, and start Python "
            "outside of it (or install with `-e`)"
        )
    torch.ops.load_library(spec.origin)
    if error := torch.ops.pyfacts.isa_error():
        raise ImportError(error)
