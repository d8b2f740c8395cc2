"""EleutherAI sparsify's directories: cfg.json and sae.safetensors, a TopK SAE on x - b_dec.

Transcoders are refused: they predict another module's output, which `decode` and `metrics` know nothing of.
"""

from pathlib import Path

import torch

from .checkpoint import Config
from .files import read_safetensors
from .fold import folded, project
from .record import SAE


def load(path: Path, dtype: torch.dtype | None) -> SAE:
    config = Config.read(path.parent / "cfg.json")
    _refuse(config)
    tensors = read_safetensors(path)
    d_sae, d_in = tensors.matrix_shape("encoder.weight")
    _check_sizes(config, d_in, d_sae)
    k = config.integer("k", 32, at_most=d_sae)

    dtype = dtype or tensors.dtype("encoder.weight")
    weight = tensors.rows("encoder.weight", (d_sae, d_in), dtype)
    W_dec = tensors.rows("W_dec", (d_sae, d_in), dtype)
    bias = tensors.vector("encoder.bias", d_sae)
    b_dec = tensors.vector("b_dec", d_in)
    tensors.finish()
    b_enc = bias - project(weight, b_dec)
    return folded(weight, b_enc, W_dec, b_dec, activation="topk", k=k, source_format="sparsify")


def _refuse(config: Config) -> None:
    config.expect("activation", "topk", "pyfacts selects the k largest latents, not one of each of k groups")
    config.expect("transcode", False, "a transcoder predicts another module's output; pyfacts loads autoencoders")
    config.expect("skip_connection", False, "the latents alone do not give the output; pyfacts loads autoencoders")
    config.expect("signed", False, "pyfacts selects the k largest latents, not those of largest magnitude")


def _check_sizes(config: Config, d_in: int, d_sae: int) -> None:
    config.expect("d_in", d_in, "encoder.weight is as wide as that")
    num_latents = config.get("num_latents") or d_in * config.integer("expansion_factor", 32)
    if num_latents != d_sae:
        raise config.error("num_latents", f"(or d_in * expansion_factor) is {num_latents}, encoder.weight has {d_sae}")
