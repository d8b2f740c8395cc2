"""What `dump` makes of its arguments: the model, the hooks, the worker's number, and how the model is called."""

import inspect
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import _library, cuda
from ..attach import SaesByHook, SparseAutoencoder, resolve_captured
from ..hook_point import HookPoint
from ..models import NamesFilter, unwrap
from ..scalars import as_int
from ..warn import warn
from .documents import tokenizer_of
from .plan import hook_file_name

MAX_DEFAULT_CONTEXT = 2048
MAX_FILE_NAME = 255 - len(".tmp")  # while it is written


def load_model(model: Any) -> tuple[nn.Module, str | None]:
    """Returns the module, and its Hugging Face name or directory, if that was given: then it is on `default_device()`.

    Raises:
        TypeError: model is neither.
        ValueError: it is damaged, or does not fit the device.
    """
    if isinstance(model, nn.Module):
        return model, None
    if not isinstance(model, str | os.PathLike):
        raise TypeError(f"model must be an nn.Module or a Hugging Face name or directory, got {type(model).__name__}")
    name = os.path.expanduser(os.fspath(model))
    if (isinstance(model, os.PathLike) or name.startswith((".", "/"))) and not os.path.exists(name):
        raise ValueError(f"model directory {name} does not exist")  # it would be looked up as a name on the hub
    import transformers

    config = transformers.AutoConfig.from_pretrained(name)
    causal = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
    try:
        module = auto.from_pretrained(name, dtype="auto")
    except (OSError, ValueError, ImportError):
        raise
    except Exception as error:  # what its weights' readers raise at a damaged file is anything
        raise ValueError(f"{name} cannot be loaded: {type(error).__name__}: {error}") from error
    device = default_device()
    try:
        return module.to(device), name
    except torch.OutOfMemoryError:
        raise ValueError(
            f"{name} does not fit {device} alone: load it yourself, such as with device_map='auto', and give the "
            "module to pyfacts.dump"
        ) from None


def default_device() -> torch.device:
    """The GPU of this process's number on its machine, or the CPU if there is none or pyfacts has no kernels for it."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if not cuda.available():
        warn(
            f"the model runs on the CPU though there is a GPU, for which this pyfacts has no kernels: run "
            f"{_library.BUILD_CUDA}"
        )
        return torch.device("cpu")
    variable = next((name for name in ("LOCAL_RANK", "SLURM_LOCALID") if os.environ.get(name)), None)
    number = 0 if variable is None else _number_of(variable)
    return torch.device("cuda", number % torch.cuda.device_count())


def load_tokenizer(tokenizer: Any, model: nn.Module, name: str | None) -> Any:
    """The tokenizer that was given, or the one of the model's name or directory."""
    if tokenizer is not None:
        return tokenizer
    name = name or getattr(getattr(model, "config", None), "_name_or_path", None)
    if not name:
        raise ValueError("tokens: text needs a tokenizer; give `tokenizer=`, or the model by its name or directory")
    return tokenizer_of(name)


def dumped_points(
    model: nn.Module, names_filter: NamesFilter, saes: SaesByHook | None
) -> tuple[list[HookPoint], dict[HookPoint, SparseAutoencoder]]:
    """The hooks that a filter names and those of SAEs' latents; all must read one stream of tokens."""
    points, latents = resolve_captured(model, names_filter, saes)
    decoders = [point.name for point in (*points, *latents) if point.stream == "decoder"]
    if decoders:
        raise ValueError(
            f"{decoders[0]} belongs to a decoder that reads tokens of its own, and a dump has one stream of tokens: "
            "name the encoder's hooks, or use pyfacts.capture"
        )
    for point in (*points, *latents):
        if len(hook_file_name(point.name)) > MAX_FILE_NAME:
            raise ValueError(
                f"{point.name} is too long: its file's name would have {len(hook_file_name(point.name))} bytes, and "
                f"may have {MAX_FILE_NAME}"
            )
    return points, latents


def max_context(model: nn.Module) -> int | None:
    """The longest sequence that the model's config allows; None if it names no limit."""
    config = getattr(model, "config", None) or getattr(model, "cfg", None)
    limits = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "n_ctx"))
    limit = min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=None)
    return None if limit is None else limit - _positions_before_the_first(model)


def _positions_before_the_first(model: nn.Module) -> int:
    """RoBERTa and its like count positions on from padding's, so that the last ones of the table have no token."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "position_embeddings" and getattr(module, "padding_idx", None) is not None:
            return module.padding_idx + 1
    return 0


def default_context(model: nn.Module) -> int:
    """The longest sequence that text is cut into unasked."""
    return min(MAX_DEFAULT_CONTEXT, max_context(model) or MAX_DEFAULT_CONTEXT)


def check_lengths(model: nn.Module, longest: int) -> None:
    """Raises ValueError if a sequence is longer than the model takes: it would fail, or go on without meaning."""
    limit = max_context(model)
    if hasattr(getattr(model, "config", None), "relative_attention_num_buckets"):
        return  # T5: distances, not positions; the limit is the length of what it was trained on
    if limit is not None and longest > limit:
        raise ValueError(
            f"a sequence has {longest:,} tokens, and the model takes {limit:,} positions: cut sequences with "
            f"context_size={limit} (--context-size {limit}) or less"
        )


def check_vocabulary(model: nn.Module, highest_id: int) -> None:
    """Raises ValueError if the model has no embedding for a token id: a GPU would only say that it failed."""
    try:
        embeddings = unwrap(model).get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return
    n_ids = getattr(embeddings, "num_embeddings", None)
    if isinstance(n_ids, int) and highest_id >= n_ids:
        raise ValueError(
            f"tokens: the token id {highest_id} is beyond the model's vocabulary of {n_ids}; was the text tokenised "
            "for another model?"
        )


def rank_of_process(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """This process's number and how many there are, from the arguments, torchrun or Slurm."""
    if rank is None and world_size is None:
        rank, world_size = _place_in_array()
        for number, count in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
            if number in os.environ and count in os.environ:  # of each element of an array, if there is one
                rank, world_size = rank * _number_of(count) + _number_of(number), world_size * _number_of(count)
                break
    if rank is not None and world_size is not None:
        rank, world_size = as_int("rank", rank), as_int("world_size", world_size)
    if rank is None or world_size is None or not 0 <= rank < world_size:
        raise ValueError(f"rank and world_size go together, with 0 <= rank < world_size; got {rank} and {world_size}")
    return rank, world_size


def _place_in_array() -> tuple[int, int]:
    """Of a Slurm array, which may leave numbers out (`--array=0,1,5`): whose they were, others help with."""
    if "SLURM_ARRAY_TASK_COUNT" not in os.environ:
        return 0, 1
    count = _number_of("SLURM_ARRAY_TASK_COUNT")
    first, step = _number_of("SLURM_ARRAY_TASK_MIN", 0), max(1, _number_of("SLURM_ARRAY_TASK_STEP", 1))
    last = _number_of("SLURM_ARRAY_TASK_MAX", first + (count - 1) * step)
    return (_number_of("SLURM_ARRAY_TASK_ID") - first) // step, (last - first) // step + 1


def cores() -> int:
    """How many cores this process may use, beside others that torchrun has started on the machine."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable // max(1, _number_of("LOCAL_WORLD_SIZE", 1)))


def model_inputs(
    model: nn.Module, ids: np.ndarray, attention: np.ndarray | None
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """What to call the model with: `input_ids` where it has them, else the ids first."""
    parameters = inspect.signature(unwrap(model).forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    loaded = (
        parameter.device for parameter in model.parameters() if not parameter.is_meta
    )  # what is offloaded is meta
    device = next(loaded, torch.device("cpu"))
    input_ids = torch.from_numpy(ids).to(device)
    kwargs: dict[str, Any] = {}
    if attention is not None:
        if "attention_mask" not in parameters and not takes_any:
            raise ValueError(
                "the sequences of a batch differ in length, and the model takes no attention_mask: give sequences of "
                "one length, or batch_size=1"
            )
        kwargs["attention_mask"] = torch.from_numpy(attention).long().to(device)
    if "use_cache" in parameters:
        kwargs["use_cache"] = False
    if "input_ids" in parameters:
        return (), {"input_ids": input_ids, **kwargs}
    return (input_ids,), kwargs


def _number_of(variable: str, default: int | None = None) -> int:
    """An integer of the environment."""
    text = os.environ.get(variable)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        found = "it is not set" if text is None else f"got {text!r}"
        raise ValueError(f"the environment's {variable} must be an integer, {found}") from None
