"""Warnings that point at the user's line."""

import sys
import warnings


def warn(message: str) -> None:
    """A UserWarning at the innermost line that is not pyfacts'."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "pyfacts":
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
