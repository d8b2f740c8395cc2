"""A checkpoint's two halves, fields of a JSON file and tensors by name; every loader reads through these.

Nothing here trusts the file: what is missing, surplus, of another shape or kind is a `CheckpointError`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..encoding import DTYPES
from ..errors import CheckpointError


class Config:
    """Fields of a JSON object."""

    def __init__(self, path: Path, fields: dict[str, Any]) -> None:
        self.path = path
        self._fields = fields

    @classmethod
    def read(cls, path: Path) -> "Config":
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise FileNotFoundError(f"{path} is missing: the weights beside it cannot be read without it") from None
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(path, None, f"not readable as JSON: {error}") from error
        if not isinstance(fields, dict):
            raise CheckpointError(path, None, f"must be a JSON object, got {type(fields).__name__}")
        return cls(path, fields)

    def get(self, field: str, default: Any = None) -> Any:
        """The field as it stands; null counts as absent."""
        value = self._fields.get(field)
        return default if value is None else value

    def section(self, field: str) -> "Config":
        fields = self.get(field, {})
        if not isinstance(fields, dict):
            raise self.error(field, f"must be an object, got {fields!r}")
        return Config(self.path, fields)

    def integer(self, field: str, default: int | None = None, at_most: int | None = None) -> int:
        value = self.get(field, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.error(field, f"must be a positive integer, got {value!r}")
        if at_most is not None and value > at_most:
            raise self.error(field, f"must be 1 to {at_most}, got {value}")
        return value

    def flag(self, field: str, default: bool) -> bool:
        value = self.get(field, default)
        if not isinstance(value, bool):
            raise self.error(field, f"must be true or false, got {value!r}")
        return value

    def text(self, field: str) -> str | None:
        value = self.get(field)
        if value is not None and not isinstance(value, str):
            raise self.error(field, f"must be a string, got {value!r}")
        return value

    def expect(self, field: str, value: Any, why: str) -> None:
        """Refuses a field that is there and is not `value`."""
        found = self.get(field, value)
        if found != value:
            raise self.error(field, f"must be {value!r}, got {found!r}: {why}")

    def error(self, field: str, message: str) -> CheckpointError:
        return CheckpointError(self.path, field, message)


class Tensors:
    """Tensors of a file, each taken once, so that what is left over can be told."""

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        self.path = path
        self._left = dict(tensors)
        self._names = sorted(tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def names(self) -> set[str]:
        return set(self._left)

    def matrix_shape(self, name: str) -> tuple[int, int]:
        tensor = self._existing(name)
        if tensor.dim() != 2 or 0 in tensor.shape:
            raise self.error(name, f"must be a matrix that is not empty, got {list(tensor.shape)}")
        return tensor.shape[0], tensor.shape[1]

    def dtype(self, name: str) -> torch.dtype:
        """The dtype to load in when none is asked for: the tensor's, or float32 if kernels do not have it."""
        dtype = self._existing(name).dtype
        return dtype if dtype in DTYPES else torch.float32

    def rows(self, name: str, shape: tuple[int, int], dtype: torch.dtype, transpose: bool = False) -> Tensor:
        """Takes a matrix of that shape in the file, into memory of its own, row by row (transposed first)."""
        matrix = self._take(name, shape, floating=True)
        matrix = matrix.T if transpose else matrix
        return torch.empty(matrix.shape, dtype=dtype, device=matrix.device).copy_(matrix)

    def matrices(
        self, dtype: torch.dtype | None, W_enc: str = "W_enc", W_dec: str = "W_dec"
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Takes an SAE's weight [d_sae, d_in] (W_enc transposed), b_enc, W_dec and b_dec."""
        d_in, d_sae = self.matrix_shape(W_enc)
        dtype = dtype or self.dtype(W_enc)
        weight = self.rows(W_enc, (d_in, d_sae), dtype, transpose=True)
        decoder = self.rows(W_dec, (d_sae, d_in), dtype)
        return weight, self.vector("b_enc", d_sae), decoder, self.vector("b_dec", d_in)

    def vector(self, name: str, n: int) -> Tensor:
        """Takes a vector [n] as float64."""
        vector = self._take(name, (n,), floating=True).double()
        if vector.isnan().any():
            raise self.error(name, f"must not be NaN, and element {int(vector.isnan().nonzero()[0])} is")
        return vector

    def number(self, name: str) -> float:
        number = self._take(name, (), floating=True).double().item()
        if number != number:
            raise self.error(name, "must not be NaN")
        return number

    def integer(self, name: str) -> int:
        return int(self._take(name, (), floating=False).item())

    def integers(self, name: str) -> list[int]:
        """Takes a vector of any length."""
        return self._take(name, (self._existing(name).numel(),), floating=False).tolist()

    def finish(self) -> None:
        """Refuses what nobody took: it would change the numbers, or the file is not what it was taken for."""
        if self._left:
            raise CheckpointError(self.path, None, f"holds tensors that do not belong there: {sorted(self._left)}")

    def error(self, name: str, message: str) -> CheckpointError:
        return CheckpointError(self.path, name, message)

    def _existing(self, name: str) -> Tensor:
        if name not in self._left:
            raise self.error(name, f"is missing; the file holds {self._names}")
        return self._left[name]

    def _take(self, name: str, shape: tuple[int, ...], floating: bool) -> Tensor:
        tensor = self._existing(name)
        if tuple(tensor.shape) != shape:
            raise self.error(name, f"must be {list(shape)}, got {list(tensor.shape)}")
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise self.error(name, f"must be a dense CPU tensor, got {tensor.layout} on {tensor.device}")
        if tensor.is_complex() or tensor.dtype == torch.bool or tensor.is_floating_point() != floating:
            raise self.error(name, f"must hold {'floats' if floating else 'integers'}, got {tensor.dtype}")
        return self._left.pop(name).detach()
