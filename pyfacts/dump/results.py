"""What the reader answers with, beside activations."""

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class FeatureStats:
    """Statistics of every feature over the committed tokens: NumPy arrays [n_features].

    Attributes:
        n_tokens: tokens they are taken over.
        nnz: int64, how often the feature is stored.
        sum, sum_sq: float64, of its stored values and their squares.
        max: float32, the largest stored value, -inf where there is none; NaN does not count.
    """

    n_tokens: int
    nnz: np.ndarray
    sum: np.ndarray
    sum_sq: np.ndarray
    max: np.ndarray

    @property
    def density(self) -> np.ndarray:
        """Share of the tokens at which each feature is stored."""
        return self.nnz / max(1, self.n_tokens)


@dataclass(frozen=True)
class Context:
    """A token at which a neuron fires, and the tokens around it in the same document.

    Attributes:
        token_index: the token's index in the dump.
        value: the neuron's value there.
        document, position: where the token stands in the input.
        start: index in the dump of the first token below; the firing one is number token_index - start.
        token_ids: int64 [n] array.
        values: float32 [n] array, the neuron's value at each of them, 0 where nothing is stored.
    """

    token_index: int
    value: float
    document: int
    position: int
    start: int
    token_ids: Any
    values: Any


@dataclass(frozen=True)
class VerifyReport:
    """What `Dump.verify` has read and found right."""

    complete: bool
    n_shards: int
    n_files: int
    n_tokens: int
    n_bytes: int
    nnz: dict[str, int]
