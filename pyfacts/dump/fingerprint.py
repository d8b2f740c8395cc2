"""What identifies a model and its SAEs in a plan: configuration and a hash of the weights under canonical names."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xxhash
from torch import nn

from ..ablate import Ablation, open_ablations
from ..attach import SparseAutoencoder
from ..models import unwrap
from .digest import as_bytes

# What torch.compile, DataParallel and FSDP put into parameter names.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Differs between copies of one model.
_VOLATILE_CONFIG = ("_name_or_path", "transformers_version", "_attn_implementation_autoset", "_commit_hash")


def describe_model(model: nn.Module, name: str | None = None) -> dict[str, Any]:
    """Returns the plan's entry for a model: name, class, revision, config, attention, dtype, hash of the weights.

    `weights_xxh3` is None where the weights are sharded over processes or not in memory: a resume then relies on the
    rest. Where neurons are ablated, `ablated` has a hash of what is set, by module. What hooks of others change is not
    known.
    """
    ablated = {path: _ablations_xxh3(there) for path, there in open_ablations(unwrap(model)).items()}
    config = getattr(unwrap(model), "config", None)
    values = _config_values(config)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    return {
        "name": name or values.get("_name_or_path") or None,
        "class": type(unwrap(model)).__name__,
        "revision": getattr(config, "_commit_hash", None),
        "config": {key: value for key, value in values.items() if key not in _VOLATILE_CONFIG} or None,
        "attention": getattr(config, "_attn_implementation", None),
        "dtype": str(dtype).removeprefix("torch."),
        "weights_xxh3": weights_xxh3(model.state_dict()),
        **({"ablated": ablated} if ablated else {}),
    }


def describe_sae(sae: SparseAutoencoder) -> dict[str, Any]:
    """Returns the plan's entry for an SAE: widths, config, hash of the weights."""
    return {
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "config": plain(sae.config()),
        "weights_xxh3": weights_xxh3(sae.tensors()),
    }


def weights_xxh3(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """Hashes names, dtypes, shapes and bytes of weights and buffers (xxh3-128, hex); None if not all are here."""
    digest = xxhash.xxh3_128()
    for name, own in sorted((_WRAPPERS.sub("", own), own) for own in tensors):
        tensor = tensors[own]
        if not isinstance(tensor, torch.Tensor):
            continue
        if tensor.is_meta or hasattr(tensor, "device_mesh") or tensor.layout != torch.strided or tensor.is_quantized:
            return None
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        data = tensor.detach().cpu().contiguous()
        digest.update(as_bytes(data.reshape(-1).view(torch.uint8).numpy() if data.numel() else b""))
    return digest.hexdigest()


def _ablations_xxh3(ablations: Sequence[Ablation]) -> str:
    digest = xxhash.xxh3_128()
    for ablation in ablations:
        features, order = ablation.features.sort()
        digest.update(f"{ablation.side} {len(features)}\n".encode())
        digest.update(as_bytes(features.numpy()))
        digest.update(as_bytes(ablation.values()[order].numpy()))
    return digest.hexdigest()


def _config_values(config: Any) -> dict[str, Any]:
    """A model's configuration as plain JSON values."""
    if config is None:
        return {}
    values = config.to_dict() if hasattr(config, "to_dict") else getattr(config, "__dict__", {})
    return dict(plain(values, lenient=True)) if isinstance(values, Mapping) else {}


def plain(value: Any, lenient: bool = False) -> Any:
    """A value as JSON has it: dtypes, devices and numbers that JSON lacks become text.

    Args:
        lenient: what else JSON lacks becomes the name of its type, for models' configs hold anything; two such values
            then pass for one.

    Raises:
        TypeError: it holds something else.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item, lenient) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, lenient) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return json.loads(json.dumps(value))
    if isinstance(value, np.generic):
        return plain(value.item(), lenient)
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, torch.dtype | torch.device):
        return str(value)
    if not lenient:
        raise TypeError(f"a dump's plan holds JSON: {value!r:.80} of type {type(value).__name__} cannot be recorded")
    return type(value).__name__
