"""The GPU benchmark's code, run on the CPU with tiny shapes: that it runs and says what it should, not what it says."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import gpu  # noqa: E402

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
    check(sae, "relu ÷ relu(linear)", "topk 2 ÷ topk(relu(linear))", "sparse_linear ÷ dense mm")


@pytest.mark.filterwarnings("ignore:the captured neurons are")
def test_the_captured_model_fires_at_its_density() -> None:
    rows = list(gpu.capture(TIMER, gpu.opt(2, 64, 4, "cpu"), 2, 16))
    check(iter(rows), "bytes to the host ÷ dense", "capture ÷ forward")
    density = float(rows[0]["case"].rsplit(", ", 1)[1].rstrip("%"))
    assert 1 < density < 10
