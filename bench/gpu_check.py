"""`make gpu-check`: on a machine with a GPU, build pyfacts for it, test it, look for memory errors and races, measure.

Uses the Python that runs it and that Python's torch, makes no environment and downloads nothing. Packages that are
missing there travel as wheels in third_party/wheels, which git ignores and `make gpu-wheels` fills. All of it takes at
most nine minutes. Without a GPU there is nothing to do, which is an error only if PYFACTS_REQUIRE_CUDA=1.
"""

import importlib.util
import os
import shutil
import signal
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
SANITIZED_FUSED = "test_the_fused_kernel and (17 or 129 or 590)"  # both kernels
SANITIZER = ["--error-exitcode", "9", "--kernel-name", "kernel_substring=pyfacts"]  # not torch's, which are not ours
MEMCHECK = ["--tool", "memcheck", "--report-api-errors", "no"]  # torch asks for what a driver lacks
LEAST_SANITIZED_S = 60.0  # torch alone takes half of that under a sanitizer

# The fused tests by the kernel that takes them: the cooperative one from d_in 512 on.
COOPERATIVE = "768 or 1024 or 528"


class Check:
    """Runs steps, each in what is left of the time, and remembers how they ended."""

    def __init__(self) -> None:
        self.results: list[tuple[str, str, float]] = []
        self._end = time.monotonic() + LIMIT_S

    def left_s(self) -> float:
        return self._end - time.monotonic()

    def run(self, step: str, command: list[str], limit_s: float, cwd: Path = ROOT / "tests", **env: str) -> str:
        """Runs a command, whose output is shown: "passed", "FAILED", "STOPPED after ..."; or not, at the very end."""
        start = time.monotonic()
        limit_s = min(limit_s, self.left_s())
        if limit_s < 15:
            self.skip(step, "not run: no time was left")
            return "not run"
        print(f"\n==== {step}", flush=True)
        paths = {"PYTHONPATH": os.pathsep.join(filter(None, [str(SITE), os.environ.get("PYTHONPATH")]))}
        code = exit_code(command, limit_s, cwd, os.environ | paths | {"PYTHONUNBUFFERED": "1"} | env)
        outcome = f"STOPPED after {limit_s:.0f} s" if code is None else "FAILED" if code else "passed"
        self.results.append((step, outcome, time.monotonic() - start))
        return outcome

    def skip(self, step: str, why: str) -> None:
        self.results.append((step, why, 0.0))

    def passed(self) -> bool:
        return not any(outcome.startswith(("FAILED", "STOPPED")) for _, outcome, _ in self.results)


def exit_code(command: list[str], limit_s: float, cwd: Path, env: dict[str, str]) -> int | None:
    """None if the command was stopped, with all that it had started: a sanitizer starts the Python that it watches."""
    with subprocess.Popen(command, cwd=cwd, env=env, start_new_session=True) as process:
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def main() -> int:
    if (why := no_gpu()) is not None:
        print(f"gpu-check: nothing to do, {why}.")
        return os.environ.get("PYFACTS_REQUIRE_CUDA") == "1"
    if absent := missing_packages():
        print(
            f"gpu-check: {sys.executable} lacks {', '.join(absent)}, and {WHEELS.relative_to(ROOT)} has no wheels: "
            "fill it with `make gpu-wheels` on a machine that reaches a package index, and bring it along."
        )
        return 2
    check = Check()
    if build(check):
        # From tests/, so that the installed package is imported and not the source tree.
        pytest = [sys.executable, "-m", "pytest", "--tb=short", "--maxfail=20", "-p", "no:cacheprovider"]
        pytest += ["test_cuda.py", "test_cuda_ops.py"]
        cuda = {"PYFACTS_REQUIRE_CUDA": "1"}
        check.run("tests", [*pytest, "-q", "--durations=3", "-k", "not the_fused and not cpu]"], 150, **cuda)
        # One by one, each by its name: should a barrier hang, the rest goes on, and it is known where.
        named = [*pytest, "-v", "-o", "faulthandler_timeout=20"]
        fused = [
            check.run(step, [*named, "-k", tests], 45, **cuda, CUDA_LAUNCH_BLOCKING="1")
            for step, tests in (
                ("fused, cooperative", f"the_fused and ({COOPERATIVE})"),
                ("fused, ping-pong", f"the_fused and not ({COOPERATIVE})"),
            )
        ]
        benchmark = [sys.executable, str(ROOT / "bench" / "gpu.py"), "--limit-s", "120"]
        right = all(outcome == "passed" for outcome in fused)
        check.run("benchmark", benchmark if right else [*benchmark, "--without-fused"], 180)
        sanitize(check, [*pytest, "-q"], hung=any(outcome.startswith("STOPPED") for outcome in fused))
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


def missing_packages() -> list[str]:
    """What the build and the tests need, is not here, and did not travel."""
    if any(WHEELS.glob("*.whl")):
        return []
    needed = ("cutlass_library", "pybind11", "pytest", "scikit_build_core", "xxhash", "zstandard")
    return [name for name in needed if importlib.util.find_spec(name) is None]


def sanitize(check: Check, pytest: list[str], hung: bool) -> None:
    """Memory errors and races, in what is left of the time; not of fused kernels that hang."""
    in_time = check.left_s() > 2 * LEAST_SANITIZED_S  # the probe takes its part
    sanitizer = working_sanitizer() if in_time else None
    for step, tool, tests in (
        ("memcheck, fused", MEMCHECK, SANITIZED_FUSED),
        ("memcheck", MEMCHECK, SANITIZED),
        ("racecheck", ["--tool", "racecheck"], SANITIZED),
    ):
        if not in_time or check.left_s() < LEAST_SANITIZED_S:
            check.skip(step, "not run: no time was left")
        elif sanitizer is None:
            check.skip(step, "not run: no compute-sanitizer that works on this device")
        elif hung and tests == SANITIZED_FUSED:
            check.skip(step, "not run: it hangs")
        else:
            env = {"PYFACTS_REQUIRE_CUDA": "1", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            check.run(step, [sanitizer, *SANITIZER, *tool, *pytest, "-k", tests], 90, **env)


def working_sanitizer() -> str | None:
    """compute-sanitizer, if it is here and takes the device: under some virtual machines it refuses."""
    sanitizer = toolkit("compute-sanitizer")
    if sanitizer is None:
        return None
    probe = [sanitizer, *SANITIZER, *MEMCHECK, sys.executable, "-c", "import torch; torch.zeros(1, device='cuda')"]
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
    if wheels and check.run("wheels", [*pip, *wheels], 60) != "passed":
        return False
    options = ["--no-build-isolation", "-C", "cmake.define.PYFACTS_CUDA=ON", "-C", "build-dir=build/gpu"]
    nvcc = toolkit("nvcc") or "nvcc"
    return check.run("build", [*pip, *options, str(ROOT)], 240, cwd=ROOT, CUDACXX=nvcc) == "passed"


def toolkit(program: str) -> str | None:
    """Where a program of the CUDA toolkit is."""
    return shutil.which(program) or shutil.which(program, path="/usr/local/cuda/bin")


if __name__ == "__main__":
    sys.exit(main())
