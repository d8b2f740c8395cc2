"""What the reader hands out, as torch tensors or as NumPy arrays."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import _storage
from ..scalars import in_range
from .layout import ITEM_BYTES

BITS = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}


@dataclass(frozen=True, eq=False)
class NumpyActivations:
    """An encoding without torch; the planes are those of `pyfacts.EncodedActivations`.

    Attributes:
        counts: uint8 [C, n_tokens].
        index: uint8 [index_bytes].
        bits: the values [nnz], bfloat16 as uint16.
        tile_ptr: int64 [C, R, 2].
        n_features: features.
        dtype: "float32", "bfloat16" or "float16".
        signed_zero: whether -0.0 is stored.
        sq_norm: float64 [n_tokens], squared norms of the rows before values were dropped, or None.
    """

    counts: np.ndarray
    index: np.ndarray
    bits: np.ndarray
    tile_ptr: np.ndarray
    n_features: int
    dtype: str
    signed_zero: bool = False
    sq_norm: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.counts.shape[1], self.n_features

    @property
    def nnz(self) -> int:
        return len(self.bits)

    @property
    def density(self) -> float:
        return self.nnz / max(1, self.shape[0] * self.n_features)

    @property
    def nbytes(self) -> int:
        return self.counts.nbytes + self.index.nbytes + self.bits.nbytes + self.tile_ptr.nbytes

    @property
    def values(self) -> np.ndarray:
        """The values [nnz], bfloat16 as float32."""
        return _floats(self.bits, self.dtype)

    def to_dense(self) -> np.ndarray:
        """Returns the matrix [n_tokens, n_features], bfloat16 as float32."""
        out = np.empty(self.shape, BITS[self.dtype])
        self._encoding().decode(out, self.signed_zero)
        return _floats(out, self.dtype)

    def neuron(self, j: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the tokens (int64 [n], ascending) at which feature j is stored, and its values there."""
        tokens, values = self._encoding().neuron(in_range("feature", j, self.n_features))
        return tokens, _floats(values.view(BITS[self.dtype]), self.dtype)

    def _encoding(self) -> "_storage.Encoding":
        return _storage.Encoding(self.counts, self.index, self.bits, self.tile_ptr, self.n_features, self.dtype)

    def __len__(self) -> int:
        return self.counts.shape[1]

    def __repr__(self) -> str:
        return f"NumpyActivations(shape={self.shape}, dtype={self.dtype}, density={self.density:.2%})"


@dataclass(frozen=True)
class Framework:
    """How arrays leave the reader.

    Attributes:
        array: any array as it is.
        values: (bytes u8 [n], dtype name) -> values.
        rows: (bits [n, width], dtype name) -> rows.
        encoding: (encoding, signed_zero, sq_norm) -> what `d[hook][a:b]` returns.
    """

    array: Callable[[np.ndarray], Any]
    values: Callable[[np.ndarray, str], Any]
    rows: Callable[[np.ndarray, str], Any]
    encoding: Callable[["_storage.Encoding", bool, np.ndarray | None], Any]


def numpy_framework() -> Framework:
    """NumPy; bfloat16 becomes float32."""

    def encoding(enc: "_storage.Encoding", signed_zero: bool, sq_norm: np.ndarray | None) -> NumpyActivations:
        bits = np.asarray(enc.values).view(BITS[enc.dtype])
        return NumpyActivations(
            enc.counts, enc.index, bits, enc.tile_ptr, enc.n_features, enc.dtype, signed_zero, sq_norm
        )

    return Framework(
        array=lambda array: array,
        values=lambda values, dtype: _floats(values.view(BITS[dtype]), dtype),
        rows=_floats,
        encoding=encoding,
    )


def torch_framework() -> Framework:
    """Torch, which is imported here and nowhere above."""
    import torch

    from ..encoding import EncodedActivations

    dtypes = {name: getattr(torch, name) for name in BITS}

    def rows(bits: np.ndarray, dtype: str) -> torch.Tensor:
        # Equal item sizes: torch views an empty array as nothing else, and uint16 not everywhere.
        return torch.from_numpy(bits.view(np.int16 if ITEM_BYTES[dtype] == 2 else np.int32)).view(dtypes[dtype])

    def encoding(enc: "_storage.Encoding", signed_zero: bool, sq_norm: np.ndarray | None) -> EncodedActivations:
        return EncodedActivations(
            torch.from_numpy(enc.counts),
            torch.from_numpy(enc.index),
            rows(enc.values, enc.dtype),
            torch.from_numpy(enc.tile_ptr),
            enc.n_features,
            signed_zero,
            None if sq_norm is None else torch.from_numpy(sq_norm),
        )

    return Framework(array=torch.from_numpy, values=rows, rows=rows, encoding=encoding)


def _floats(bits: np.ndarray, dtype: str) -> np.ndarray:
    """Values from their bits: bfloat16 is the upper half of a float32."""
    if dtype != "bfloat16":
        return bits
    return (bits.astype(np.uint32) << 16).view(np.float32)


FRAMEWORKS: dict[str, Callable[[], Framework]] = {"torch": torch_framework, "numpy": numpy_framework}
