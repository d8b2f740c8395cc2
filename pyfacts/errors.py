"""Errors that callers may want to catch by name."""

import os


class OutOfRangeError(IndexError, ValueError):
    """A token or feature index beyond the matrix: an IndexError for iteration, a ValueError for argument checks."""


class UnknownHookError(KeyError, ValueError):
    """A hook that is not there: a KeyError of a mapping, a ValueError of an argument."""

    def __str__(self) -> str:
        return self.args[0]  # KeyError would show the message in quotes


class HookNeverFired(ValueError, RuntimeError):
    """A hook that was asked for saw no activations."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or cannot be used exactly: the message names the file and the field.

    Example:
        >>> str(CheckpointError("sae/cfg.json", "k", "must be 1 to 64, got 0"))
        "sae/cfg.json: 'k' must be 1 to 64, got 0"
    """

    def __init__(self, path: str | os.PathLike[str], field: str | None, message: str) -> None:
        self.path = os.fspath(path)
        self.field = field
        self.what = message
        super().__init__(f"{self.path}: " + (message if field is None else f"{field!r} {message}"))

    def __reduce__(self) -> tuple:
        return type(self), (self.path, self.field, self.what), vars(self)
