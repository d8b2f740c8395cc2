"""The GPU benchmark's code, run on the CPU with tiny shapes: that it runs and says what it should, not what it says."""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import gpu  # noqa: E402
import gpu_check  # noqa: E402

TIMER = gpu.Timer("cpu", 1)


def check(rows: Iterator[dict[str, Any]], *what: str) -> None:
    found = {row["what"]: row["value"] for row in rows}
    assert set(what) <= set(found)
    assert all(value > 0 for value in found.values())


def test_every_section_runs() -> None:
    rate = gpu.rates(TIMER, 64)
    up = gpu.up_projection(TIMER, (130, 16, 300), 0.1, rate["mm_flop_per_s"])
    check(up, "two steps", "two steps, h too ÷ _addmm_activation", "two steps: share of the rate of products")
    packing = gpu.packing(TIMER, (130, 300), 0.1, rate["copy_bytes_per_s"])
    check(packing, "encode: rate ÷ a copy's", "decode: rate ÷ a copy's", "encode ÷ to_sparse_csr")
    sae = gpu.sae(TIMER, (20, 16, 300), 0.05, 2)
    check(sae, "relu, two steps ÷ relu(linear)", "topk 2 ÷ topk(relu(linear))", "sparse_linear ÷ dense mm")


@pytest.mark.filterwarnings("ignore:the captured neurons are")
def test_the_captured_model_fires_at_its_density() -> None:
    rows = list(gpu.capture(TIMER, gpu.opt(2, 64, 4, "cpu"), 2, 16))
    check(iter(rows), "bytes to the host ÷ dense", "capture ÷ forward")
    density = float(rows[0]["case"].rsplit(", ", 1)[1].rstrip("%"))
    assert 1 < density < 10


def test_a_step_that_is_stopped_leaves_nothing_running(tmp_path: Path) -> None:
    """Not even what the command itself has started."""
    command = ["sh", "-c", "sleep 60 & echo $! > child; wait"]
    assert gpu_check.exit_code(command, 1.0, tmp_path, dict(os.environ)) is None
    child = int((tmp_path / "child").read_text())
    for _ in range(50):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.1)
    os.kill(child, 9)
    pytest.fail("the child is still there")


@pytest.mark.parametrize("code", [0, 9])
def test_a_step_gives_its_exit_code(code: int, tmp_path: Path) -> None:
    assert gpu_check.exit_code(["sh", "-c", f"exit {code}"], 30.0, tmp_path, dict(os.environ)) == code
