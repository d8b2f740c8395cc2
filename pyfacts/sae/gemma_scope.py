"""Gemma Scope's JumpReLU SAEs, whose numbers are used as they stand.

Those of Gemma 2 are in `params.npz`, which does not say where in the model it belongs; its directory's name does, so
`hook_name` is None. Nor does it say that it is a transcoder, of which Gemma Scope has some: a path with their
repository's name is refused. An SAE of the embedding, told by its directory, reads the table's rows, which no module of
a model hands out: a warning says so.

Those of Gemma 3 (Gemma Scope 2) are in `params.safetensors` with a config.json, which tells of both.
"""

import re
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..warn import warn
from .checkpoint import Config, Tensors
from .files import read_npz, read_safetensors
from .fold import folded
from .record import SAE

TRANSCODERS = re.compile(r"gemma-scope[^/]*transcoder")

EMBEDDING = re.compile(r"(^|/)embedding/width_")

HOOK_NAMES = {
    r"model\.layers\.(\d+)\.output": r"blocks.\1.hook_resid_post",
    r"model\.layers\.(\d+)\.post_feedforward_layernorm\.output": r"blocks.\1.hook_mlp_out",
    r"(model\.layers\.\d+\.self_attn\.o_proj)\.input": r"\1",  # a module's path is the hook of its input
}
"""Gemma Scope 2's names of a place in the model, and ours."""


def load_npz(path: Path, dtype: torch.dtype | None) -> SAE:
    if TRANSCODERS.search(str(path.absolute())):
        raise _transcoder(path)
    if EMBEDDING.search(str(path.absolute())):
        warn(
            f"{path}: an SAE of the embedding reads rows of embed_tokens.weight; what Gemma's embedding hands out, and "
            "hooks see, is sqrt(d_model) times those"
        )
    tensors = read_npz(path)
    return _sae(tensors, tensors.matrices(dtype), hook_name=None)


def load_safetensors(path: Path, dtype: torch.dtype | None) -> SAE:
    config = Config.read(path.parent / "config.json")
    if config.text("architecture") != "jump_relu":
        raise config.error("architecture", f"must be 'jump_relu', got {config.text('architecture')!r}")
    place = config.text("hf_hook_point_in") or None
    if config.text("hf_hook_point_out") not in (None, place) or config.flag("affine_connection", False):
        raise _transcoder(path)
    tensors = read_safetensors(path)
    return _sae(tensors, tensors.matrices(dtype, "w_enc", "w_dec"), hook_name=place and _hook_name(place))


def _sae(tensors: Tensors, matrices: tuple[Tensor, Tensor, Tensor, Tensor], hook_name: str | None) -> SAE:
    threshold = tensors.vector("threshold", len(matrices[0]))
    tensors.finish()
    return folded(*matrices, threshold, activation="jumprelu", hook_name=hook_name, source_format="gemma_scope")


def _hook_name(place: str) -> str:
    for pattern, name in HOOK_NAMES.items():
        if match := re.fullmatch(pattern, place):
            return match.expand(name)
    return place


def _transcoder(path: Path) -> CheckpointError:
    return CheckpointError(
        path, None, "is a transcoder's, which predicts another module's output; pyfacts loads autoencoders"
    )
