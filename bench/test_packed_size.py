"""Bytes per stored value, in memory beside what other forms need, and on disk by codec. Counted, not timed."""

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pyfacts
from pyfacts import bench

DENSITIES = [0.01, 0.03, 0.1, 0.3, 0.5]
CODECS = ["zstd", "split"]
N_TOKENS, N_FEATURES = 4096, 16384
D_SAE, K = 131072, 64
BATCH_TOKENS, SHARD_TOKENS = 1024, 65536


@pytest.mark.parametrize("density", DENSITIES)
def test_bytes_per_value(record: Callable[[bench.Row], None], density: float) -> None:
    encoded = pyfacts.encode(bench.activations(N_TOKENS, N_FEATURES, density, torch.bfloat16))
    n, size, item = encoded.nnz, encoded.shape.numel(), encoded.dtype.itemsize
    forms = {
        "dense": size * item,
        "COO, int64 (to_sparse)": n * (8 + 8 + item),
        "CSR, int64 (to_sparse_csr)": n * (8 + item) + 8 * (N_TOKENS + 1),
        "bitmap and values": size // 8 + n * item,
        "pyfacts": encoded.nbytes,
    }
    record(
        {"op": "bytes per value", "density": density, "forms": {form: size / n for form, size in forms.items()}},
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_bound(record: Callable[[bench.Row], None], dtype: torch.dtype) -> None:
    encoded = pyfacts.encode(torch.ones(N_TOKENS, N_FEATURES, dtype=dtype))
    bound = encoded.nbytes / (N_TOKENS * N_FEATURES * dtype.itemsize)
    record({"op": "bound", "dtype": str(dtype).removeprefix("torch."), "of_dense": bound})


class Replay:
    """An SAE whose latents were made beforehand: BATCH_TOKENS of each batch, over and over.

    They fill a block of the dump, which is compressed by itself: the repetition makes nothing smaller.
    """

    d_in, device = 1, torch.device("cpu")

    def __init__(self, batches: list[pyfacts.EncodedActivations]) -> None:
        self.d_sae, self.dtype = batches[0].n_features, batches[0].dtype
        self._batches = itertools.cycle(batches)

    def encode(self, x: Tensor) -> pyfacts.EncodedActivations:
        return next(self._batches)

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def config(self) -> dict[str, Any]:
        return {}

    def to(self, device: torch.device) -> "Replay":
        return self


def dumped(batches: list[pyfacts.EncodedActivations], codec: str, directory: Path) -> Any:
    """The hook of a dump of one shard."""
    tokens = torch.zeros(SHARD_TOKENS // 128, 128, dtype=torch.long)
    model = nn.Sequential(nn.Embedding(1, 1), nn.Identity())
    saes: dict[str, Any] = {"1": Replay(batches)}
    dump = pyfacts.dump(model, tokens, directory, saes=saes, codec=codec, batch_size=8, allow_dense=True)
    return dump["1.hook_sae_acts_post"]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("density", DENSITIES)
def test_bytes_per_value_on_disk(
    record: Callable[[bench.Row], None], tmp_path: Path, density: float, codec: str
) -> None:
    """Neurons in bfloat16, with all that the file holds."""
    h = bench.activations(N_TOKENS, 4096, density, torch.bfloat16)
    neurons = dumped([pyfacts.encode(rows) for rows in h.split(BATCH_TOKENS)], codec, tmp_path)
    record(
        {
            "op": "bytes per value on disk",
            "codec": codec,
            "density": density,
            "n_tokens": SHARD_TOKENS,
            "bytes": neurons.n_bytes / neurons.nnz,
        }
    )


@functools.cache
def drawn_latents(frequency: str) -> list[pyfacts.EncodedActivations]:
    """K different latents for each of four blocks of N_TOKENS, float32."""
    generator = torch.Generator().manual_seed(0)
    log_rate = {  # of each latent
        "uniform": torch.zeros(D_SAE),
        "lognormal": 2 * torch.randn(D_SAE, generator=generator),
        "zipf": -torch.arange(1, D_SAE + 1).log()[torch.randperm(D_SAE, generator=generator)],
    }[frequency]
    scale = torch.exp(0.5 * torch.randn(D_SAE, generator=generator))
    batches = []
    for _ in range(4 * N_TOKENS // BATCH_TOKENS):
        # The largest of Gumbel variables, shifted by the rates: K draws without replacement.
        gumbel = torch.rand(BATCH_TOKENS, D_SAE, generator=generator).clamp_(1e-7).log_().neg_().log_().neg_()
        latents = gumbel.add_(log_rate).topk(K, dim=1).indices
        values = torch.randn(BATCH_TOKENS, K, generator=generator).abs() * scale[latents]
        batches.append(pyfacts.encode(torch.zeros(BATCH_TOKENS, D_SAE).scatter_(1, latents, values)))
    return batches


@pytest.mark.parametrize("frequency", ["uniform", "lognormal", "zipf"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("codec", CODECS)
def test_bytes_per_latent_on_disk(
    record: Callable[[bench.Row], None], tmp_path: Path, codec: str, dtype: torch.dtype, frequency: str
) -> None:
    batches = drawn_latents(frequency)
    if dtype != torch.float32:
        batches = [pyfacts.encode(batch.to_dense().to(dtype)) for batch in batches]
    latents = dumped(batches, codec, tmp_path)
    record(
        {
            "op": "bytes per latent on disk",
            "codec": codec,
            "dtype": str(dtype).removeprefix("torch."),
            "frequency": frequency,
            "n_tokens": SHARD_TOKENS,
            "bytes": latents.n_bytes / latents.nnz,
        }
    )
