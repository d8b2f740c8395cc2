"""pyfacts captures what a transformer's MLPs know: their neurons, exact, packed, dumped and read back."""

import importlib.util
from typing import NoReturn

if importlib.util.find_spec("pyfacts._storage") is None:
    raise ImportError(
        f"pyfacts in {__path__[0]} is not built. If that is its source tree, run `pip install --no-build-isolation .` "
        "there and start Python elsewhere, where it finds what was installed; or install with `-e`"
    )

from . import _storage

if _storage.isa_error():  # PYFACTS_ISA names what this CPU does not run
    raise ImportError(_storage.isa_error())

from .dump.errors import DumpError, DumpInterrupted
from .dump.reader import Dump, open_dump
from .errors import CheckpointError, HookNeverFired, OutOfRangeError, UnknownHookError

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "Dump",
    "DumpError",
    "DumpInterrupted",
    "HookNeverFired",
    "OutOfRangeError",
    "UnknownHookError",
    "open_dump",
]

# A dump can be read with NumPy alone, so torch may be missing.
if importlib.util.find_spec("torch") is not None:
    from .ablate import ablate
    from .capture import ActivationCache, capture
    from .dump.run import dump
    from .encoding import EncodedActivations, cat, encode
    from .hook_point import HookPoint
    from .linear import (
        gated_relu_encode,
        linear_batch_topk_encode,
        linear_relu_encode,
        linear_topk_encode,
        sparse_linear,
    )
    from .models import hook_points
    from .sae import SAE, load_sae
    from .select import min_abs, topk

    __all__ += [
        "ActivationCache",
        "EncodedActivations",
        "HookPoint",
        "SAE",
        "ablate",
        "capture",
        "cat",
        "dump",
        "encode",
        "gated_relu_encode",
        "hook_points",
        "linear_batch_topk_encode",
        "linear_relu_encode",
        "linear_topk_encode",
        "load_sae",
        "min_abs",
        "sparse_linear",
        "topk",
    ]

else:

    def __getattr__(name: str) -> NoReturn:
        raise AttributeError(f"module 'pyfacts' has no attribute {name!r} where torch is not installed")
