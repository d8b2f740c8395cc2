"""Sparse autoencoders: encode activations to packed latents, decode them, measure both, and read checkpoints."""

from .load import load_sae
from .metrics import SAEMetrics
from .record import SAE

__all__ = ["SAE", "SAEMetrics", "load_sae"]
