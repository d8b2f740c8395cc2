"""Reading files of tensors: safetensors, npz, and PyTorch's, none of which may run code."""

import pickle
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..errors import CheckpointError
from .checkpoint import Tensors


def read_safetensors(path: Path) -> Tensors:
    try:
        return Tensors(path, safetensors.torch.load_file(path))
    except (safetensors.SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(path, None, f"not readable as safetensors: {error}") from error


def read_npz(path: Path) -> Tensors:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return Tensors(path, {name: torch.from_numpy(arrays[name]) for name in arrays.files})
    except Exception as error:  # zip, zlib and NumPy's header parser each raise their own
        raise CheckpointError(path, None, f"not readable as npz without pickles: {error}") from error


def read_torch(path: Path) -> Tensors:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            path,
            None,
            "holds more than tensors, and pyfacts does not run a checkpoint's code; if you trust it, load it yourself "
            f"and save its state_dict(): {error}",
        ) from error
    except Exception as error:  # whatever the unpickler meets in a damaged file
        raise CheckpointError(path, None, f"not readable with torch.load(weights_only=True): {error}") from error
    if not isinstance(state, Mapping) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise CheckpointError(path, None, f"must be a state_dict of tensors, got {type(state).__name__}")
    return Tensors(path, {str(name): tensor for name, tensor in state.items()})
