"""How fast a dump is read back, beside the dense matrix memory-mapped from a file; on one core, both in the page cache.

65,536 tokens of 16,384 neurons at 3 %, codec `zstd`: shuffled batches for training, neurons one by one, and ranges of
tokens. Where the files are not in memory yet, the dense matrix waits for 20 times the bytes of a range of tokens, and
for 4 KiB a token where a neuron has 2 or 4 bytes.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pyfacts
from pyfacts import bench

N_TOKENS, N_FEATURES, DENSITY, CONTEXT, BATCH = 65536, 16384, 0.03, 512, 4096
BITS = {torch.bfloat16: np.int16, torch.float32: np.int32}
HOOK = "0"


class Replay(nn.Sequential):
    """A model whose neurons are given, the same for every batch of tokens."""

    def __init__(self, neurons: Tensor) -> None:
        super().__init__(nn.Identity())
        self.neurons = neurons

    def forward(self, token_ids: Tensor) -> None:
        self[0](self.neurons.view(*token_ids.shape, N_FEATURES))


@pytest.fixture(scope="module", params=BITS, ids=str)
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[pyfacts.Dump, np.ndarray]:
    """A dump, and the bits of the dense matrix [N_TOKENS, N_FEATURES] in a mapped file."""
    directory, dtype = tmp_path_factory.mktemp("read"), request.param
    neurons = bench.activations(BATCH, N_FEATURES, DENSITY, dtype)
    tokens = torch.zeros(N_TOKENS // CONTEXT, CONTEXT, dtype=torch.long)
    dump = pyfacts.dump(Replay(neurons), tokens, directory / "dump", HOOK, batch_size=BATCH // CONTEXT)
    file = directory / "dense.npy"
    dense = np.lib.format.open_memmap(file, "w+", BITS[dtype], (N_TOKENS, N_FEATURES))
    for start in range(0, N_TOKENS, BATCH):
        dense[start : start + BATCH] = neurons.view(torch.int16 if dtype.itemsize == 2 else torch.int32).numpy()
    del dense
    return dump, np.load(file, mmap_mode="r")


def case(
    stored: tuple[pyfacts.Dump, np.ndarray], op: str, call: bench.Call, peer: bench.Call, n_values: int
) -> bench.Case:
    """`n_values` of the dense matrix are asked for, and moved once."""
    dump, dense = stored
    dtype = dump[HOOK].dtype
    facts = {"op": f"read {op}", "dtype": dtype, "density": DENSITY, "shape": [N_TOKENS, N_FEATURES]}
    n_bytes = n_values * dense.itemsize
    return bench.Case(f"read {op}, {dtype}", call, {"memory-mapped dense matrix": peer}, n_bytes, n_bytes, facts)


def test_batches(compare: Callable[..., None], stored: tuple[pyfacts.Dump, np.ndarray]) -> None:
    """All tokens once, as dense batches in a random order."""
    dump, dense = stored
    order = np.random.default_rng(0).permutation(N_TOKENS)

    def ours() -> None:
        for _ in dump.batches(HOOK, BATCH, seed=0):
            pass

    def peer() -> None:
        for start in range(0, N_TOKENS, BATCH):
            torch.from_numpy(dense[order[start : start + BATCH]])

    compare(case(stored, "batches", ours, peer, N_TOKENS * N_FEATURES), rounds=5)


@pytest.mark.parametrize(("op", "step"), [("far neurons", 256), ("neighbouring neurons", 1)])
def test_neurons(compare: Callable[..., None], stored: tuple[pyfacts.Dump, np.ndarray], op: str, step: int) -> None:
    """Where 64 neurons fire, and how much, one after another; of as many columns, or of one."""
    dump, dense = stored
    neurons = range(0, 64 * step, step)

    def ours() -> None:
        reader = pyfacts.open_dump(dump.path)[HOOK]  # nothing is kept from the last round
        for j in neurons:
            reader.neuron(j)

    def peer() -> None:
        for j in neurons:
            column = torch.from_numpy(dense[:, j].copy())
            tokens = column.nonzero().squeeze(1)
            column[tokens]

    compare(case(stored, op, ours, peer, 64 * N_TOKENS), rounds=5)


def test_tokens(compare: Callable[..., None], stored: tuple[pyfacts.Dump, np.ndarray]) -> None:
    """Ranges of 4,096 tokens, packed; the dense ones as they are."""
    dump, dense = stored
    starts = range(0, N_TOKENS, BATCH)

    def ours() -> None:
        reader = pyfacts.open_dump(dump.path)[HOOK]
        for start in starts:
            reader[start : start + BATCH]

    def peer() -> None:
        for start in starts:
            torch.from_numpy(dense[start : start + BATCH].copy())

    compare(case(stored, "tokens", ours, peer, N_TOKENS * N_FEATURES), rounds=5)
