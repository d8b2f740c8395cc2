"""`make gpu-check`: on a machine with a GPU, build pyfacts for it, test it, look for memory errors and races, measure.

Uses the Python that runs it and that Python's torch, makes no environment and downloads nothing. Packages that are
missing there travel as wheels in third_party/wheels, which git ignores and `make gpu-wheels` fills. All of it takes at
most nine minutes. Without a GPU there is nothing to do, which is an error only if PYFACTS_REQUIRE_CUDA=1.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "build" / "gpu-check"
WHEELS = ROOT / "third_party" / "wheels"
LIMIT_S = 540.0

# What the sanitizers run: every kernel, few launches. They slow each down many times.
SANITIZED = (
    "(test_a_matrix_in_parts and not cpu and 700) or test_rows_of_any_stride or test_every_count"
    " or (test_sparse_linear_and_to_csr and shape1 and 0.6)"
)
SANITIZED_FUSED = "test_the_fused_kernel and 17"


class Check:
    """Runs steps, each in what is left of the time, and remembers how they ended."""

    def __init__(self) -> None:
        self.results: list[tuple[str, str, float]] = []
        self._end = time.monotonic() + LIMIT_S

    def run(self, step: str, command: list[str], limit_s: float, cwd: Path = ROOT / "tests", **env: str) -> bool:
        """Whether the command succeeded; its output is shown."""
        print(f"\n==== {step}", flush=True)
        start = time.monotonic()
        limit_s = min(limit_s, self._end - start)
        try:
            paths = {"PYTHONPATH": str(SITE), "PYTHONUNBUFFERED": "1"}
            done = subprocess.run(
                command, cwd=cwd, env=os.environ | paths | env, timeout=max(1.0, limit_s), check=False
            )
            outcome = "passed" if done.returncode == 0 else "FAILED"
        except subprocess.TimeoutExpired:
            outcome = f"STOPPED after {limit_s:.0f} s"
        self.results.append((step, outcome, time.monotonic() - start))
        return outcome == "passed"

    def skip(self, step: str, why: str) -> None:
        self.results.append((step, why, 0.0))

    def passed(self) -> bool:
        return not any(outcome.startswith(("FAILED", "STOPPED")) for _, outcome, _ in self.results)


def main() -> int:
    if (why := no_gpu()) is not None:
        print(f"gpu-check: nothing to do, {why}.")
        return os.environ.get("PYFACTS_REQUIRE_CUDA") == "1"
    check = Check()
    if build(check):
        # From tests/, so that the installed package is imported and not the source tree.
        pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_cuda.py", "test_cuda_ops.py"]
        cuda = {"PYFACTS_REQUIRE_CUDA": "1"}
        check.run("tests", [*pytest, "-x", "--durations=3", "-k", "not the_fused and not cpu]"], 150, **cuda)
        # By itself: should a barrier hang, the rest goes on without it.
        fused = check.run("fused", [*pytest, "-x", "-k", "the_fused"], 60, **cuda)
        sanitizer = working_sanitizer()
        for step, tool, tests in (
            ("memcheck", "memcheck", SANITIZED),
            ("racecheck", "racecheck", SANITIZED),
            ("memcheck, fused", "memcheck", SANITIZED_FUSED),
        ):
            if sanitizer is None:
                check.skip(step, "not run: no compute-sanitizer that works on this device")
            elif fused or tests == SANITIZED:
                command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *pytest, "-k", tests]
                if tool == "memcheck":
                    command[3:3] = ["--report-api-errors", "no"]  # torch asks the driver what it may not know
                check.run(step, command, 70, **cuda, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        benchmark = [sys.executable, str(ROOT / "bench" / "gpu.py"), "--limit-s", "120"]
        check.run("benchmark", benchmark if fused else [*benchmark, "--without-fused"], 240)
    print("\n==== gpu-check")
    for step, outcome, seconds in check.results:
        print(f"{step:16} {outcome:40} {seconds:5.0f} s")
    return not check.passed()


def no_gpu() -> str | None:
    """Why nothing can be checked here, or None."""
    try:
        import torch
    except ImportError:
        return f"{sys.executable} has no torch"
    if torch.version.cuda is None:
        return f"the torch of {sys.executable} ({torch.__version__}) is not built for CUDA"
    return None if torch.cuda.is_available() else "torch sees no GPU"


def working_sanitizer() -> str | None:
    """compute-sanitizer, if it is here and takes the device: under some virtual machines it refuses."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        return None
    probe = [sanitizer, "--error-exitcode", "9", sys.executable, "-c", "import torch; torch.zeros(1, device='cuda')"]
    try:
        done = subprocess.run(probe, capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        return None
    return sanitizer if done.returncode == 0 and "not supported" not in done.stdout + done.stderr else None


def build(check: Check) -> bool:
    """Installs the wheels that travelled, and pyfacts with its CUDA kernels, into a folder of their own."""
    shutil.rmtree(SITE, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--upgrade", "--target", str(SITE)]
    wheels = [str(wheel) for wheel in sorted(WHEELS.glob("*.whl"))]
    if wheels and not check.run("wheels", [*pip, *wheels], 60):
        return False
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    options = ["--no-build-isolation", "-C", "cmake.define.PYFACTS_CUDA=ON", "-C", "build-dir=build/gpu"]
    return check.run("build", [*pip, *options, str(ROOT)], 240, cwd=ROOT, CUDACXX=nvcc)


if __name__ == "__main__":
    sys.exit(main())
