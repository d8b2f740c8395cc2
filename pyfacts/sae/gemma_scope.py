"""Gemma Scope's `params.npz`: a JumpReLU SAE whose numbers are used as they stand.

The file does not say where in Gemma it belongs; its directory's name does, so `hook_name` is None. Nor does it say that
it is a transcoder, of which Gemma Scope has some: a path with their repository's name is refused. An SAE of the
embedding, told by its directory, reads the table's rows, which no module of a model hands out: a warning says so.
"""

import re
from pathlib import Path

import torch

from ..errors import CheckpointError
from ..warn import warn
from .files import read_npz
from .fold import folded
from .record import SAE

TRANSCODERS = re.compile(r"gemma-scope[^/]*transcoder")

EMBEDDING = re.compile(r"(^|/)embedding/width_")


def load(path: Path, dtype: torch.dtype | None) -> SAE:
    if TRANSCODERS.search(str(path.absolute())):
        raise CheckpointError(
            path, None, "is a transcoder's, which predicts another module's output; pyfacts loads autoencoders"
        )
    if EMBEDDING.search(str(path.absolute())):
        warn(
            f"{path}: an SAE of the embedding reads rows of embed_tokens.weight; what Gemma's embedding hands out, and "
            "hooks see, is sqrt(d_model) times those"
        )
    tensors = read_npz(path)
    d_in, d_sae = tensors.matrix_shape("W_enc")
    dtype = dtype or tensors.dtype("W_enc")
    weight = tensors.rows("W_enc", (d_in, d_sae), dtype, transpose=True)
    W_dec = tensors.rows("W_dec", (d_sae, d_in), dtype)
    b_enc = tensors.vector("b_enc", d_sae)
    b_dec = tensors.vector("b_dec", d_in)
    threshold = tensors.vector("threshold", d_sae)
    tensors.finish()
    return folded(weight, b_enc, W_dec, b_dec, threshold, activation="jumprelu", source_format="gemma_scope")
