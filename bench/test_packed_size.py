"""Bytes per stored value, in memory beside what other forms need, and on disk for a wide SAE. Counted, not timed."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pyfacts
from pyfacts import bench

N_TOKENS, N_FEATURES = 4096, 16384
D_SAE, K, BATCH_TOKENS = 131072, 64, 1024


@pytest.mark.parametrize("density", [0.01, 0.03, 0.1, 0.3, 0.5])
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


class WideSae:
    """An SAE whose latents are drawn beforehand: K different ones for each of N_TOKENS, then those again.

    A block of the dump holds N_TOKENS and is compressed by itself, so the repetition makes nothing smaller.
    """

    d_in, d_sae, device = 1, D_SAE, torch.device("cpu")

    def __init__(self, dtype: torch.dtype, frequency: str) -> None:
        self.dtype = dtype
        generator = torch.Generator().manual_seed(0)
        log_rate = {  # of each latent
            "uniform": torch.zeros(D_SAE),
            "lognormal": 2 * torch.randn(D_SAE, generator=generator),
            "zipf": -torch.arange(1, D_SAE + 1).log()[torch.randperm(D_SAE, generator=generator)],
        }[frequency]
        scale = torch.exp(0.5 * torch.randn(D_SAE, generator=generator))
        batches = []
        for _ in range(N_TOKENS // BATCH_TOKENS):
            # The largest of Gumbel variables, shifted by the rates: K draws without replacement.
            gumbel = torch.rand(BATCH_TOKENS, D_SAE, generator=generator).clamp_(1e-7).log_().neg_().log_().neg_()
            latents = gumbel.add_(log_rate).topk(K, dim=1).indices
            values = torch.randn(BATCH_TOKENS, K, generator=generator).abs() * scale[latents]
            dense = torch.zeros(BATCH_TOKENS, D_SAE, dtype=dtype)
            batches.append(pyfacts.encode(dense.scatter_(1, latents, values.to(dtype))))
        self._batches = itertools.cycle(batches)

    def encode(self, x: Tensor) -> pyfacts.EncodedActivations:
        return next(self._batches)

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def config(self) -> dict[str, Any]:
        return {}

    def to(self, device: torch.device) -> "WideSae":
        return self


@pytest.mark.parametrize("frequency", ["uniform", "lognormal", "zipf"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_bytes_per_latent_on_disk(
    record: Callable[[bench.Row], None], tmp_path: Path, dtype: torch.dtype, frequency: str
) -> None:
    n_tokens = 16 * N_TOKENS  # one shard, as large as by default
    tokens = torch.zeros(n_tokens // 128, 128, dtype=torch.long)
    model = nn.Sequential(nn.Embedding(1, 1), nn.Identity())
    saes = {"1": WideSae(dtype, frequency)}
    latents = pyfacts.dump(model, tokens, tmp_path, saes=saes, batch_size=BATCH_TOKENS // 128)["1.hook_sae_acts_post"]
    record(
        {
            "op": "bytes per latent on disk",
            "dtype": str(dtype).removeprefix("torch."),
            "frequency": frequency,
            "n_tokens": n_tokens,
            "bytes": latents.n_bytes / latents.nnz,
            "statistics": 28 * D_SAE / latents.nnz,
        }
    )
