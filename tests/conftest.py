"""Shared by tests: dtypes, shapes around every boundary of the format, an undisturbed dump."""

import os

import dump_models
import pytest
import torch

from pyfacts import cuda

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# Columns are 256 wide and tiles 128 tokens long; the index turns from positions to a bitmap at ceil(w / 8).
WIDTHS = [1, 7, 8, 9, 255, 256, 257, 511, 513]
LENGTHS = [0, 1, 127, 128, 129, 300]

# With PYFACTS_REQUIRE_CUDA=1 tests that need a GPU fail where there is none.
needs_cuda = pytest.mark.skipif(
    not (torch.cuda.is_available() and cuda.available()) and os.environ.get("PYFACTS_REQUIRE_CUDA") != "1",
    reason="needs a GPU, and pyfacts built for it (make cuda)",
)


def sparse(n_tokens: int, n_features: int, density: float, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Half-normal values at a density, zero elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n_tokens, n_features, generator=generator).abs() + 1e-3
    return (values * (torch.rand(n_tokens, n_features, generator=generator) < density)).to(dtype)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, bytes]:
    """What a dump of `TinyModel` leaves on the disk if nothing happens to it."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    dump_models.resume(out)
    return dump_models.committed_bytes(out)
