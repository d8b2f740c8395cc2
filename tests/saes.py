"""A small SAE of random weights, for tests of captured and dumped latents."""

from __future__ import annotations

import torch
from torch import Tensor

import pyfacts

LATENTS = "hook_sae_acts_post"


class TinySae:
    """relu(x @ W_enc + b_enc), or its k largest; `seen` holds what it was given."""

    def __init__(
        self, d_in: int, d_sae: int = 600, k: int | None = 4, dtype: torch.dtype = torch.float32, seed: int = 0
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.W_enc = torch.randn(d_in, d_sae, generator=generator).to(dtype)
        self.b_enc = torch.full((d_sae,), -2.0, dtype=dtype)
        self.d_in, self.d_sae, self.k, self.dtype, self.device = d_in, d_sae, k, dtype, torch.device("cpu")
        self.seen: list[Tensor] = []
        self.moved_to: list[torch.device] = []

    def encode(self, x: Tensor) -> pyfacts.EncodedActivations:
        self.seen.append(x.detach().clone())
        x = x.to(self.dtype)
        if self.k is None:
            return pyfacts.linear_relu_encode(x, self.W_enc.T, self.b_enc)
        return pyfacts.linear_topk_encode(x, self.W_enc.T, self.b_enc, self.k)

    def expected(self, x: Tensor) -> Tensor:
        """The latents by plain PyTorch, dense."""
        latents = torch.relu(x.to(self.dtype) @ self.W_enc + self.b_enc)
        if self.k is None:
            return latents
        kept = latents.topk(self.k, dim=1)
        return torch.zeros_like(latents).scatter_(1, kept.indices, kept.values)

    def tensors(self) -> dict[str, Tensor]:
        return {"W_enc": self.W_enc, "b_enc": self.b_enc}

    def config(self) -> dict[str, object]:
        return {"architecture": "topk", "k": self.k}

    def to(self, device: torch.device) -> TinySae:
        self.moved_to.append(device)
        return self
