"""Builds and runs tests/cpp/kernels_test.cpp: every kernel table against a naive twin, VBMI2 under emulation."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
AVX2 = ["-mavx2", "-mbmi", "-mbmi2", "-mlzcnt", "-mpopcnt", "-mf16c", "-mfma"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
# VBMI2's few instructions come from the header, so that this file runs on any CPU with AVX-512.
EMULATED_VBMI2 = [*AVX512, "-include", str(ROOT / "tests/cpp/vbmi2_emulation.h")]
FLAGS = {"avx2": AVX2, "avx512": AVX512, "avx512vbmi2": EMULATED_VBMI2}


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="instruction sets of x86-64")
def test_every_kernel_table_agrees_with_the_twin(tmp_path: Path) -> None:
    compile_ = ["g++", "-O2", "-std=c++20", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off"]
    objects = []
    for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
        objects.append(tmp_path / f"{source.stem}.o")
        subprocess.run([*compile_, *FLAGS.get(source.stem, []), "-c", source, "-o", objects[-1]], check=True)
    program = tmp_path / "kernels_test"
    test = ROOT / "tests/cpp/kernels_test.cpp"
    command = [*compile_, "-DPYFACTS_VBMI2_EMULATED", test, *objects, "-lpthread", "-o", program]
    subprocess.run(command, check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "scalar" in done.stdout
