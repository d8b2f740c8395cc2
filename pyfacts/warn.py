"""Warnings that point at the user's line."""

import sys
import warnings

BETWEEN = ("pyfacts", "torch", "transformers", "transformer_lens", "accelerate")
"""Whose frames may lie between a user's line and the warning: hooks are called by the model's."""


def warn(message: str) -> None:
    """A UserWarning at the innermost line that is not one of theirs."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in BETWEEN:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
