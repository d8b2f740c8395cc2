"""What the reader answers with, beside activations."""

from collections.abc import Callable
from dataclasses import dataclass
from os.path import commonprefix
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
    """A token at which a neuron fires, and the tokens around it in the same sequence.

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

    def text(self, tokenizer: Any) -> tuple[str, str, str]:
        """The tokens as text: what comes before the firing one, its own, and what comes after.

        They are decoded together. One by one, many tokenizers drop a token's leading space, show the mark of a piece of
        a word, or find no character in its bytes. A character of several tokens is that of the firing one.

        Args:
            tokenizer: has `decode(list of ids) -> str`, as those of transformers.

        Example:
            >>> from types import SimpleNamespace
            >>> tokenizer = SimpleNamespace(decode=lambda ids: " ".join(f"t{i}" for i in ids))
            >>> Context(12, 1.5, 0, 2, start=10, token_ids=np.array([7, 8, 9]), values=None).text(tokenizer)
            ('t7 t8', ' t9', '')
        """
        decode: Callable[[list[int]], str] = tokenizer.decode
        ids, at = [int(i) for i in self.token_ids], self.token_index - self.start
        whole = decode(ids)
        begin, end = (len(commonprefix([decode(ids[:n]), whole])) for n in (at, at + 1))
        if begin == end and decode([ids[at]]):
            end += 1
        return whole[:begin], whole[begin:end], whole[end:]


@dataclass(frozen=True)
class VerifyReport:
    """What `Dump.verify` has read and found right."""

    complete: bool
    n_shards: int
    n_files: int
    n_tokens: int
    n_bytes: int
    nnz: dict[str, int]
