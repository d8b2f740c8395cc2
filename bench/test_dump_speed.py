"""How fast `pyfacts.dump` writes, and in how much memory, whatever the number of tokens.

The model here computes nothing: its forward hands the activations of 2,048 tokens, made beforehand in the shape of
OPT-125M's twelve layers at 4 % density, to the hooked modules. So the time of a dump is that of pyfacts alone: hooks,
encode, blocks, checksums, statistics, files, fsync. A process of its own is bound to one core, the threads that write
too, and tells its peak resident memory. Most dumps are slower than this: they wait for their model.

As a script it is that process: `python test_dump_speed.py DTYPE N_TOKENS DIRECTORY` prints a row as JSON.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import pyfacts
from pyfacts import bench

N_LAYERS, D_MLP, SEQUENCES, CONTEXT = 12, 3072, 4, 512
BATCH_TOKENS = SEQUENCES * CONTEXT


class Replay(nn.Module):
    """A model whose MLP neurons are given."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Identity() for _ in range(N_LAYERS)])
        self.neurons = [bench.activations(BATCH_TOKENS, D_MLP, 0.04, dtype, seed) for seed in range(N_LAYERS)]

    def forward(self, token_ids: Tensor) -> None:
        for layer, neurons in zip(self.layers, self.neurons, strict=True):
            layer(neurons.view(*token_ids.shape, D_MLP))


@pytest.mark.parametrize("n_tokens", [16384, 131072])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dump(record: Callable[[bench.Row], None], tmp_path: Path, dtype: str, n_tokens: int) -> None:
    command = [sys.executable, __file__, dtype, str(n_tokens), str(tmp_path / "dump")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    record(json.loads(done.stdout))


def dump(dtype: str, n_tokens: int, directory: str) -> bench.Row:
    """Dumps on one core and measures; the first batch of another dump warms up."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    model = Replay(getattr(torch, dtype))
    hooks = [f"layers.{layer}" for layer in range(N_LAYERS)]
    tokens = torch.arange(n_tokens).remainder(50000).view(-1, CONTEXT)

    def write(tokens: Tensor, out: str) -> pyfacts.Dump:
        return pyfacts.dump(model, tokens, out, hooks, codec="none", batch_size=SEQUENCES)

    write(tokens[:SEQUENCES], directory + "-warm-up")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    before = _resident_bytes("VmRSS")
    start, cpu_start = time.perf_counter(), time.process_time()
    d = write(tokens, directory)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    dense_bytes = n_tokens * N_LAYERS * D_MLP * getattr(torch, dtype).itemsize
    return {
        "op": "dump",
        "dtype": dtype,
        "n_tokens": n_tokens,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "gib_per_s": dense_bytes / seconds / 2**30,
        "dense_bytes": dense_bytes,
        "written_bytes": d.n_bytes,
        "peak_bytes": _resident_bytes("VmHWM"),
        "before_bytes": before,
    }


def _resident_bytes(name: str) -> int:
    """VmRSS, resident now, or VmHWM, its peak; unlike ru_maxrss the peak of this program, not of what started it."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, f"/proc/self/status has no {name}"
    return int(found[1]) * 1024


if __name__ == "__main__":
    print(json.dumps(dump(sys.argv[1], int(sys.argv[2]), sys.argv[3])))
