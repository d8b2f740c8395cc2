"""From what the model's hooks gave to the blocks of a shard: torch ends here."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _storage
from ..encoding import EncodedActivations, row_sq_norms
from . import layout
from .layout import HookSpec
from .plan import Plan
from .shard_writer import HookWriter
from .store import Store


def is_full(plan: Plan, parts: Mapping[str, list[Any]], n_tokens: int) -> bool:
    """Whether what n_tokens gave is a block.

    Columns are compressed one by one, and a wide SAE's hold an eighth of a value a token: its blocks grow until the
    columns are worth it. The fullest hook decides, so that none holds much more than by MIN_BLOCK_TOKENS alone.
    """
    if n_tokens < layout.MIN_BLOCK_TOKENS:
        return False
    return n_tokens >= layout.CLOSED_BLOCK_TOKENS or any(
        hook.kind == "rows" or sum(part.nnz for part in parts[hook.name]) >= layout.FULL_COLUMN_VALUES * hook.n_columns
        for hook in plan.hooks
    )


def write_hook(store: Store, writer: HookWriter, hook: HookSpec, lossy: bool, parts: list[Any]) -> None:
    """Writes a hook's part of a block, from what consecutive batches gave: encodings, or rows [n, width]."""
    with store.write_errors():
        if hook.kind == "neurons":
            encodings = [storage_encoding(part) for part in parts]
            encoding = encodings[0] if len(encodings) == 1 else _storage.cat(encodings)
            sq_norm = torch.cat([row_sq_norms(part) for part in parts]).cpu().numpy() if lossy else None
            writer.add_encoding(encoding, sq_norm)
        else:
            writer.add_rows(np.concatenate([value_bits(part) for part in parts]))


def storage_encoding(enc: EncodedActivations) -> "_storage.Encoding":
    """The same planes without torch."""
    return _storage.Encoding(
        enc.counts.numpy(),
        enc.index.numpy(),
        value_bits(enc.values),
        enc.tile_ptr.numpy(),
        enc.n_features,
        str(enc.dtype).removeprefix("torch."),
    )


def value_bits(x: Tensor) -> np.ndarray:
    """A tensor's memory as unsigned integers of its item size: NumPy has no bfloat16."""
    return x.contiguous().view(torch.int16 if x.itemsize == 2 else torch.int32).numpy()
