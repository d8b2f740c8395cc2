"""Makes the figures: runs every benchmark, writes bench/results/<machine>.json, bench/RESULTS.md and README's table.

python bench/run.py             # half an hour, on a machine that does nothing else
python bench/run.py --render    # the tables from the committed figures, without measuring
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tables

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
RUNS = 3

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--render", action="store_true", help="only write the tables anew from bench/results")
    if not parser.parse_args().render:
        figures = {"machine": machine(), "rows": measure()}
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{slug(figures['machine'])}.json"
        path.write_text(json.dumps(rounded(figures), indent=1) + "\n")
        print(f"wrote {path.relative_to(ROOT)}")
    for path, text in tables.documents(ROOT).items():
        path.write_text(text)
        print(f"wrote {path.relative_to(ROOT)}")


def measure() -> list[Row]:
    """The rows of every benchmark, and of encode and decode once more with AVX2.

    Each file has processes of its own: where memory comes to lie can double the time of a case for as long as a process
    lives, so it is measured in three and the run in the middle is kept.
    """
    touch_memory()
    rows = run_pytest("bench/test_packed_size.py")  # counted, not timed
    for name in ("encode_decode", "capture_cost", "linear", "dump_speed", "dump_read"):
        rows += in_the_middle([run_pytest(f"bench/test_{name}.py") for _ in range(RUNS)])
    if rows[0]["isa"].startswith("avx512"):
        selected = ("bench/test_encode_decode.py", "-k", "not odd and not fresh")
        rows += in_the_middle([run_pytest(*selected, PYFACTS_ISA="avx2") for _ in range(RUNS)])
    return rows


def touch_memory() -> None:
    """A virtual machine's memory costs eight times as much the first time that it is written since it started."""
    np.ones(int(0.9 * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")), np.uint8)


def in_the_middle(runs: Sequence[list[Row]]) -> list[Row]:
    """Of each case the run that is neither the fastest nor the slowest, beside its first peer or by its rate."""

    def speed(row: Row) -> float:
        return next(iter(row["peers"].values()))["ratio"] if "peers" in row else row["gib_per_s"]

    return [sorted(case, key=speed)[len(case) // 2] for case in zip(*runs, strict=True)]


def run_pytest(*arguments: str, **environment: str) -> list[Row]:
    with tempfile.TemporaryDirectory() as directory:
        figures = Path(directory) / "figures.json"
        command = [sys.executable, "-m", "pytest", *arguments, "--benchmark-enable", "--benchmark-quiet"]
        command += [
            "-p",
            "no:cacheprovider",
            "-q",
            "-W",
            "ignore:Sparse CSR",
            f"--figures={figures}",
            f"--basetemp={directory}/tmp",
        ]
        subprocess.run(command, cwd=ROOT, env=os.environ | environment, check=True)
        return json.loads(figures.read_text())


def machine() -> Row:
    """What the figures depend on."""
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        fields = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", info.read_text(), re.MULTILINE))
        family = ", ".join(f"{key} {fields[key]}" for key in ("cpu family", "model", "stepping") if key in fields)
        cpu = f"{fields.get('model name', cpu)} ({family})" if family else fields.get("model name", cpu)
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "isa": subprocess.check_output(
            [sys.executable, "-c", "from pyfacts import ops; print(ops.isa())"], text=True, cwd=ROOT / "bench"
        ).strip(),
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "date": datetime.date.today().isoformat(),
        "processes": RUNS,
    }


def slug(machine: Row) -> str:
    name = re.sub(r"\((R|TM)\)|cpu|stepping \d+|[(),@]|CPU|Processor", " ", machine["cpu"])
    return re.sub(r"[^a-z0-9.]+", "-", f"{name} {machine['isa']}".lower()).strip("-")


def rounded(value: Any) -> Any:
    """Four digits, so that the file can be read and its changes too."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


if __name__ == "__main__":
    main()
