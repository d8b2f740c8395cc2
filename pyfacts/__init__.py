"""pyfacts captures what a transformer's MLPs know: their neurons, exact, packed, dumped and read back."""

import importlib.util

from .dump.errors import DumpError, DumpInterrupted
from .dump.reader import Dump, open_dump
from .errors import OutOfRangeError

__version__ = "0.1.0"

__all__ = ["Dump", "DumpError", "DumpInterrupted", "OutOfRangeError", "open_dump"]

# A dump can be read with NumPy alone, so torch may be missing.
if importlib.util.find_spec("torch") is not None:
    from .ablate import ablate
    from .capture import ActivationCache, HookNeverFired, capture
    from .dump.run import dump
    from .encoding import EncodedActivations, cat, encode, linear_relu_encode
    from .models import HookPoint, hook_points
    from .select import min_abs, topk

    __all__ += [
        "ActivationCache",
        "EncodedActivations",
        "HookNeverFired",
        "HookPoint",
        "ablate",
        "capture",
        "cat",
        "dump",
        "encode",
        "hook_points",
        "linear_relu_encode",
        "min_abs",
        "topk",
    ]
