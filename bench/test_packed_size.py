"""Bytes per stored value in memory, beside what other forms need for the same values. Counted, not timed."""

from collections.abc import Callable

import pytest
import torch

import pyfacts
from pyfacts import bench

N_TOKENS, N_FEATURES = 4096, 16384


@pytest.mark.parametrize("density", [0.01, 0.03, 0.1, 0.3, 0.5])
def test_bytes_per_value(record: Callable[[bench.Row], None], density: float) -> None:
    encoded = pyfacts.encode(bench.activations(N_TOKENS, N_FEATURES, density, torch.bfloat16))
    n, size, item = encoded.nnz, encoded.shape.numel(), encoded.dtype.itemsize
    forms = {
        "dense": size * item,
        "COO, int64 (to_sparse)": n * (8 + 8 + item),
        "CSR, int64 (to_sparse_csr)": n * (8 + item) + 8 * (N_TOKENS + 1),
        "bitmap and values": size // 8 + n * item,
        "pyfacts": encoded.nbytes,
    }
    record(
        {"op": "bytes per value", "density": density, "forms": {form: size / n for form, size in forms.items()}},
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_bound(record: Callable[[bench.Row], None], dtype: torch.dtype) -> None:
    encoded = pyfacts.encode(torch.ones(N_TOKENS, N_FEATURES, dtype=dtype))
    bound = encoded.nbytes / (N_TOKENS * N_FEATURES * dtype.itemsize)
    record({"op": "bound", "dtype": str(dtype).removeprefix("torch."), "of_dense": bound})
