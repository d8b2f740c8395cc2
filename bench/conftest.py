"""What the benchmarks share: cases measured round by round beside their peers, and the figures printed at the end."""

import contextlib
import ctypes
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from pyfacts import bench, ops

ROWS = pytest.StashKey[list[bench.Row]]()
SLOW_PEERS = ("torch.nonzero", "to_sparse_csr")  # 10 to 100 times as long: fewer rounds


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--figures", type=Path, help="write the figures to this JSON file (bench/run.py does)")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    config.stash[ROWS] = []


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[[bench.Row], None]:
    """Adds a row to the figures."""
    return lambda row: request.config.stash[ROWS].append(row | {"isa": ops.isa()})


@pytest.fixture
def compare(benchmark, record) -> Callable[..., None]:
    """Measures a case, its peers before every round, and records the row."""

    def run(case: bench.Case, rounds: int = 7) -> None:
        taken: dict[str, list[float]] = {name: [] for name in case.peers}

        def time_peers() -> None:
            for name, call in case.peers.items():
                if name not in SLOW_PEERS or len(taken[name]) < 4:
                    taken[name].append(bench.seconds(call))

        benchmark.group = case.name
        benchmark.pedantic(case.call, setup=time_peers, rounds=rounds, warmup_rounds=1)
        if benchmark.enabled:
            row = bench.row(case, benchmark.stats.stats.data, {name: times[1:] for name, times in taken.items()})
            benchmark.extra_info |= row
            record(row)

    return run


@pytest.fixture
def reused_memory() -> Iterator[None]:
    """Lets glibc keep freed blocks, and gives it 1 GiB that has been touched, as in a process that has run for a while.

    By default every tensor above 32 MB comes fresh from the kernel, and its first touch costs more than the copy: a
    page fault for each 4 KiB, or, where a hypervisor lends memory lazily, far more. Only without them can what returns
    a new tensor stand beside `memcpy` into an old one.
    """
    with contextlib.ExitStack() as restore:
        libc = ctypes.CDLL(None)
        if not hasattr(libc, "mallopt"):
            pytest.skip("glibc only")
        trim_threshold, mmap_max = -1, -4
        for option, kept, default in ((mmap_max, 0, 65536), (trim_threshold, -1, 128 << 10)):
            libc.mallopt(option, kept)
            restore.callback(libc.mallopt, option, default)
        restore.callback(libc.malloc_trim, 0)
        torch.empty(1 << 30, dtype=torch.uint8).fill_(0)
        yield


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    if timed := [row for row in rows if "ms" in row]:
        terminalreporter.section(f"beside the peers, {ops.isa()}")
        terminalreporter.write_line(bench.table(timed))
    for row in rows:
        if "ms" not in row:
            terminalreporter.write_line(", ".join(f"{key} {value}" for key, value in row.items()))
    if path := config.getoption("--figures"):
        path.write_text(json.dumps(rows))
