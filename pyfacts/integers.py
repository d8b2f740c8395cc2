"""Arguments that must be integers; without torch, for readers of dumps."""

import operator


def as_int(name: str, value: object) -> int:
    """An argument as an int; TypeError says its name if it is none, and a bool is none."""
    if not isinstance(value, bool) and hasattr(value, "__index__"):
        return operator.index(value)
    raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}")


def at_least_one(name: str, value: object) -> int:
    """The same; ValueError says its name if it is below 1."""
    number = as_int(name, value)
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}")
    return number
