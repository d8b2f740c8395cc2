"""Errors that callers may want to catch by name."""


class OutOfRangeError(IndexError, ValueError):
    """A token or feature index beyond the matrix: an IndexError for iteration, a ValueError for argument checks."""


class UnknownHookError(KeyError, ValueError):
    """A hook that is not there: a KeyError of a mapping, a ValueError of an argument."""

    def __str__(self) -> str:
        return self.args[0]  # KeyError would show the message in quotes
