"""What can be known of the fused CUDA kernel without a GPU: where its registers go, and what it makes of every number.

tests/cuda_emulation/accumulators.cu says how. It needs nvcc and the headers of CUTLASS.
"""

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CUDA_HOME = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
NVCC = shutil.which("nvcc") or shutil.which(str(CUDA_HOME / "bin" / "nvcc"))


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
