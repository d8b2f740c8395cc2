"""What can be known of the fused CUDA kernel without a GPU: all but the product.

Its epilogue runs lane by lane like the other kernels (tests/cuda_emulation/fused.cpp), on products that are given.
Where the tensor cores leave a product, and the arithmetic that the toolkit's headers bring, are checked by a program of
their own (accumulators.cu), which needs nvcc and the headers of CUTLASS.
"""

import ctypes
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import bits, encode
from test_cuda_emulation import COMPILER, FLAGS, Arena, canonical, pointer
from test_cuda_emulation import emulator as emulator  # a fixture

ROOT = Path(__file__).parent.parent
CUDA_HOME = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
NVCC = shutil.which("nvcc") or shutil.which(str(CUDA_HOME / "bin" / "nvcc"))
ACTIVATIONS = ["relu", "relu2", "jumprelu"]
HALVES = [torch.bfloat16, torch.float16]


def cutlass_include() -> str | None:
    """CUTLASS_INCLUDE_DIR, or where the nvidia-cutlass package keeps its headers."""
    spec = importlib.util.find_spec("cutlass_library")
    packaged = [Path(folder, "source", "include") for folder in (spec and spec.submodule_search_locations) or []]
    given = [Path(os.environ[name]) for name in ("CUTLASS_INCLUDE_DIR",) if name in os.environ]
    return next((str(path) for path in given + packaged if (path / "cutlass" / "cutlass.h").is_file()), None)


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.skipif(cutlass_include() is None, reason="needs the headers of CUTLASS (pip install nvidia-cutlass)")
def test_accumulators_and_activations(tmp_path: Path) -> None:
    program = tmp_path / "accumulators"
    source = ROOT / "tests/cuda_emulation/accumulators.cu"
    flags = ["-std=c++17", "-O1", "-DNDEBUG", "-arch=sm_90a", "--expt-relaxed-constexpr"]
    subprocess.run([NVCC, *flags, "-isystem", cutlass_include(), source, "-o", program], check=True)
    result = subprocess.run([program], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and result.stdout.endswith("\nright\n"), result.stdout


@pytest.fixture(scope="session")
def epilogue(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if COMPILER is None:
        pytest.skip("needs a C++ compiler")
    library = tmp_path_factory.mktemp("cuda") / "fused.so"
    subprocess.run([COMPILER, *FLAGS, ROOT / "tests/cuda_emulation/fused.cpp", "-o", library], check=True)
    return ctypes.CDLL(str(library))


def expected(
    product: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    threshold: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """By PyTorch: the sum in float32, rounded once; the activation in the dtype, without -0.0."""
    z = (product if bias is None else product + bias.float()).to(dtype)
    h = torch.where(z > 0, z, torch.where(z.isnan(), z, torch.zeros((), dtype=dtype)))
    if activation == "relu2":
        return (h.float() * h.float()).to(dtype)
    if threshold is not None:
        return torch.where(h <= threshold, torch.zeros((), dtype=dtype), h)
    return h


def one_nan(pattern: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """These bits with a single NaN: which one a conversion yields is nobody's promise."""
    infinity = 0x7F80 if dtype == torch.bfloat16 else 0x7C00
    return np.where((pattern & 0x7FFF) > infinity, 0x7FFF, pattern)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("n_tokens, n_features", [(1, 8), (7, 264), (64, 256), (65, 512), (137, 1000)])
def test_epilogue(
    emulator: ctypes.CDLL, epilogue: ctypes.CDLL, dtype: torch.dtype, activation: str, n_tokens: int, n_features: int
) -> None:
    generator = torch.Generator().manual_seed(n_tokens)
    for mean, with_bias, with_dense in (
        (-1.9, True, False),
        (-1.3, True, True),
        (0.0, False, True),
        (5.0, True, False),
    ):
        product = torch.randn(n_tokens, n_features, generator=generator)
        bias = torch.randn(n_features, generator=generator).mul(0.1).add(mean).to(dtype)
        threshold = torch.randn(n_features, generator=generator).to(dtype) if activation == "jumprelu" else None
        for value in (torch.nan, torch.inf, -torch.inf, -0.0, 1e-30, 1e30, 0.9999999):
            product[torch.rand(product.shape, generator=generator) < 0.01] = value
        bias[::7] = -0.0
        h = expected(product, bias if with_bias else None, activation, threshold, dtype)

        arena = Arena(dtype, n_tokens, n_features)
        stride = n_features + 8
        dense = np.full((n_tokens, stride), 0xA5A5, np.uint16)
        epilogue.emulated_pack_product(
            ctypes.byref(arena),
            ctypes.c_void_p(product.data_ptr()),
            ACTIVATIONS.index(activation),
            ctypes.c_void_p(bias.data_ptr() if with_bias else None),
            ctypes.c_void_p(None if threshold is None else threshold.data_ptr()),
            pointer(dense) if with_dense else None,
            ctypes.c_int64(stride),
            n_tokens,
        )
        planes = canonical(emulator, arena, dtype)
        assert planes is not None
        counts, index, values, tile_ptr = encode(h)
        np.testing.assert_array_equal(planes[0], counts)
        np.testing.assert_array_equal(planes[1], index)
        np.testing.assert_array_equal(one_nan(planes[2], dtype), one_nan(values, dtype))
        np.testing.assert_array_equal(planes[3], tile_ptr)
        if with_dense:
            np.testing.assert_array_equal(one_nan(dense[:, :n_features], dtype), one_nan(bits(h), dtype))
        assert (dense[:, n_features if with_dense else 0 :] == 0xA5A5).all()
