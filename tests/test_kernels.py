"""Builds and runs tests/cpp: every kernel table against a naive twin, VBMI2 under emulation; bounds of products."""

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
FLAGS = {
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512vbmi2": EMULATED_VBMI2,
    "avx512bf16": [*AVX512, "-mavx512bf16"],
}
COMPILE = ["g++", "-O2", "-std=c++20", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off"]

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="instruction sets of x86-64"),
]


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """csrc/cpu, compiled."""
    folder = tmp_path_factory.mktemp("objects")
    objects = []
    for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
        objects.append(folder / f"{source.stem}.o")
        subprocess.run([*COMPILE, *FLAGS.get(source.stem, []), "-c", source, "-o", objects[-1]], check=True)
    return objects


def output_of(test: str, objects: list[Path], folder: Path) -> str:
    """What tests/cpp/{test}.cpp prints."""
    program = folder / test
    source = ROOT / f"tests/cpp/{test}.cpp"
    command = [*COMPILE, "-DPYFACTS_VBMI2_EMULATED", source, *objects, "-lpthread", "-o", program]
    subprocess.run(command, check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_every_kernel_table_agrees_with_the_twin(objects: list[Path], tmp_path: Path) -> None:
    assert "scalar" in output_of("kernels_test", objects, tmp_path)


def test_bounds_lie_above_what_they_bound(objects: list[Path], tmp_path: Path) -> None:
    if "no bfloat16" in output_of("bounds_test", objects, tmp_path):
        pytest.skip("this CPU has no bfloat16 products")
