"""Which tokens `enc[...]` and `dump[hook][...]` name, and where those lie; without torch, for readers of dumps."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np

from .errors import OutOfRangeError
from .scalars import in_range

# Consecutive tokens, or int64 [n] in any order.
Chosen: TypeAlias = range | np.ndarray

FEATURES = "; neuron(j) reads a feature"


def chosen_tokens(tokens: Any, n_tokens: int, hint: str = "") -> Chosen:
    """The tokens that an index, a slice, or a list, array or tensor of indices or bools names.

    Args:
        hint: ends the message of a TypeError.
    """
    if isinstance(tokens, slice):
        named = range(n_tokens)[tokens]
        return range(named.start, max(named.start, named.stop)) if named.step == 1 else np.array(named, np.int64)
    if isinstance(tokens, str | tuple) or not hasattr(tokens, "__len__") or getattr(tokens, "ndim", 1) == 0:
        try:
            token = in_range("token", tokens, n_tokens)
        except TypeError as error:
            raise TypeError(f"{error}; a slice, or a list, array or tensor of ints or bools will do{hint}") from None
        return range(token, token + 1)
    try:
        indices = tokens.detach().cpu().numpy() if hasattr(tokens, "detach") else np.asarray(tokens)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"tokens must be integers or bools [n], got {tokens!r:.80}") from error
    if indices.dtype == np.bool_:
        if indices.shape != (n_tokens,):
            raise ValueError(f"bools that choose tokens must be [{n_tokens}], got shape {indices.shape}")
        return indices.nonzero()[0]
    if indices.dtype == np.uint8 and hasattr(tokens, "detach"):
        raise TypeError("tokens must be integers or bools [n]; torch takes uint8 for a mask: give .bool(), or .long()")
    if indices.ndim != 1 or (len(indices) and indices.dtype.kind not in "iu"):
        raise TypeError(f"tokens must be integers or bools [n], got {indices.dtype} of shape {indices.shape}")
    if wrong := indices[(indices < -n_tokens) | (indices >= n_tokens)].tolist():
        raise OutOfRangeError(f"token {wrong[0]} is out of range: there are {n_tokens}")
    indices = indices.astype(np.int64)
    return np.where(indices < 0, indices + n_tokens, indices)


def in_order(tokens: Chosen) -> tuple[Chosen, np.ndarray | None]:
    """The tokens, ascending, and where each of those that were asked for is among them; None if they were ascending."""
    if isinstance(tokens, range) or (tokens[1:] >= tokens[:-1]).all():
        return tokens, None
    order = np.argsort(tokens, kind="stable")
    places = np.empty_like(order)
    places[order] = np.arange(len(order))
    return tokens[order], places


def cut(tokens: Chosen, bounds: Sequence[int]) -> Iterator[tuple[int, Chosen]]:
    """Ascending tokens by the part they lie in: each i with any in [bounds[i], bounds[i + 1]), and those from there."""
    while len(tokens):
        i = bisect_right(bounds, tokens[0]) - 1
        first, n = bounds[i], bisect_left(tokens, bounds[i + 1])
        here, tokens = tokens[:n], tokens[n:]
        yield i, range(here.start - first, here.stop - first) if isinstance(here, range) else here - first
