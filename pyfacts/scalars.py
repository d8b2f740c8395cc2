"""Arguments that must be numbers; without torch, for readers of dumps."""

import numbers
import operator
from typing import Any

from .errors import OutOfRangeError


def as_int(name: str, value: Any) -> int:
    """An argument as an int; TypeError says its name if it is none, and a bool is none."""
    try:
        if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {value!r:.80} of type {type(value).__name__}") from None


def at_least_one(name: str, value: Any) -> int:
    """The same; ValueError says its name if it is below 1."""
    number = as_int(name, value)
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}")
    return number


def in_range(name: str, value: Any, n: int) -> int:
    """An index into n things, from the end if it is negative; OutOfRangeError says its name if it is beyond them."""
    index = as_int(name, value)
    if not -n <= index < n:
        raise OutOfRangeError(f"{name} {index} is out of range: there are {n}")
    return index % n


def as_float(name: str, value: Any, expected: str = "a number") -> float:
    """An argument as a float, NumPy's numbers too; TypeError says its name if it is no real number, and a bool is none.

    A tensor is none either, lest a GPU be waited for unseen.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be {expected}, got {value!r:.80} of type {type(value).__name__}")
    return float(value)
