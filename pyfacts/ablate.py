"""`pyfacts.ablate`: set neurons to a value while a model runs."""

from __future__ import annotations

import contextlib
import math
import operator
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from .hook_point import HookPoint
from .models import Names
from .scalars import as_float
from .stream import add_hook, eager, never_fired
from .wording import some

Values: TypeAlias = Tensor | Sequence[float] | np.ndarray


@dataclass(eq=False)
class Ablation:
    """What an `ablate` that is open sets at a module, and whether a forward has come there since."""

    side: str
    features: Tensor
    value: float | Tensor
    reached: bool = False

    def values(self) -> Tensor:
        """float64 [n_features] on the CPU."""
        if isinstance(self.value, Tensor):
            return self.value.detach().cpu().double()
        return torch.full(self.features.shape, self.value, dtype=torch.float64, device="cpu")


_open: weakref.WeakKeyDictionary[nn.Module, list[Ablation]] = weakref.WeakKeyDictionary()


def open_ablations(model: nn.Module) -> dict[str, list[Ablation]]:
    """What is set in a model now, by the path of the module, in the order in which it is set."""
    return {path: list(_open[module]) for path, module in model.named_modules() if _open.get(module)}


def excuse_ablations(model: nn.Module) -> None:
    """Of a model that need not run at all: no ablation that is open now has to be reached."""
    for ablations in open_ablations(model).values():
        for ablation in ablations:
            ablation.reached = True


class ablate(contextlib.ContextDecorator):
    """Sets neurons, or dimensions of the residual stream, to a value while the context is open; it may be opened again.

    Works on a copy of the activations, so the model's own tensors stay whole, and gradients flow through the rest. With
    gradient checkpointing, call `backward` inside the context: it runs the model again. A hook sees what the hooks
    added before it left: a `capture` opened inside an `ablate` sees the ablated values, one opened around it sees those
    of the layer as they were.

    Args:
        model: the model, as for `pyfacts.capture`.
        indices: for each hook (a name from `pyfacts.hook_points(model)` or a module path) the features to set, each in
            [0, width).
        value: what they are set to: a number, or a tensor, list or array [n_indices] with one for each feature, such as
            their means; for all hooks, or as {hook: value}.

    Raises:
        ValueError: an unknown hook, an index out of range, values for other hooks or another number of features, a hook
            that reads the residual stream on its way into a sublayer, where setting it would not change the stream
            (`hook_resid_mid`), one whose module other hooks share, or one in whose place SAELens put an SAE.
        TypeError: indices are not integers, or values are not numbers.
        HookNeverFired: (a ValueError and a RuntimeError) at the end, a hook that no forward reached.

    Example:
        >>> import pyfacts, torch
        >>> from transformers import OPTConfig, OPTForCausalLM
        >>> config = OPTConfig(vocab_size=10, hidden_size=8, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2)
        >>> model = OPTForCausalLM(config)
        >>> with pyfacts.ablate(model, {"blocks.1.mlp.hook_post": [5, 17]}):
        ...     with pyfacts.capture(model, "blocks.1.mlp.hook_post") as cache:
        ...         _ = model(torch.tensor([[4, 5, 6]]))
        >>> cache["blocks.1.mlp.hook_post"].neuron(5)[1].numel()
        0
    """

    def __init__(
        self,
        model: nn.Module,
        indices: Mapping[str, Iterable[int] | Tensor],
        value: float | Values | Mapping[str, float | Values] = 0.0,
    ) -> None:
        if not isinstance(indices, Mapping):
            raise TypeError(f"indices must be a dict of hook name to feature indices, got {type(indices).__name__}")
        if not indices:
            raise ValueError("indices is empty: name at least one hook and its features")
        values = value if isinstance(value, Mapping) else dict.fromkeys(indices, value)
        if values.keys() != indices.keys():
            apart = some(sorted(map(str, values.keys() ^ indices.keys())))
            raise ValueError(f"value must have the hooks of indices, and {apart} is in one of them only")
        names = Names(model)
        self._settings: list[tuple[HookPoint, nn.Module, Ablation]] = []
        for point in [names.one(name) for name in indices]:
            _check_settable(names, point)
            features = _features(point, indices[point.name])
            ablation = Ablation(point.side, features, _values(point, features, values[point.name]))
            self._settings.append((point, names.model.get_submodule(point.module_path), ablation))
        # For each time that it is open: what closes it, and what is set by it, by hook.
        self._entered: list[tuple[contextlib.ExitStack, dict[str, Ablation]]] = []

    def __enter__(self) -> None:
        opened = {}
        with contextlib.ExitStack() as exit_stack:
            exit_stack.enter_context(eager())
            for point, module, setting in self._settings:
                ablation = opened[point.name] = replace(setting)
                exit_stack.callback(add_hook(module, point.side, _setter(point, ablation)))
                _open.setdefault(module, []).append(ablation)
                exit_stack.callback(_open[module].remove, ablation)
            self._entered.append((exit_stack.pop_all(), opened))

    def __exit__(
        self, exc_type: type[BaseException] | None, exc_value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        exit_stack, opened = self._entered.pop()
        exit_stack.close()
        silent = [name for name, ablation in opened.items() if not ablation.reached]
        if silent and exc_type is None:
            raise never_fired(silent)


def _features(point: HookPoint, indices: Iterable[int] | Tensor) -> Tensor:
    """The indices as int64 [n], each within the hook's width."""
    if isinstance(indices, Tensor):
        if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
            raise TypeError(f"{point.name}: indices must be integers, got a tensor of {indices.dtype}")
        indices = indices.flatten().tolist()
    try:
        indices = list(indices)
        if any(isinstance(i, bool) for i in indices):
            raise TypeError
        features = [operator.index(i) for i in indices]
    except TypeError:
        raise TypeError(f"{point.name}: indices must be a list of integers, got {indices!r}") from None
    _check_range(point.name, features, point.width)
    return torch.tensor(features, dtype=torch.int64, device="cpu")


def _values(point: HookPoint, features: Tensor, value: float | Values) -> float | Tensor:
    if isinstance(value, Sequence | np.ndarray) and not isinstance(value, str):
        numbers = value.tolist() if isinstance(value, np.ndarray) else value
        each = [as_float(f"{point.name}: each value", number) for number in numbers]
        value = torch.tensor(each, dtype=torch.float64, device="cpu")
    if not isinstance(value, Tensor) or value.dim() == 0:
        return as_float(
            f"{point.name}: value", value.item() if isinstance(value, Tensor) else value, "a number or a tensor"
        )
    if value.is_complex() or value.dtype == torch.bool or value.is_nested or value.layout != torch.strided:
        raise TypeError(f"{point.name}: values must be real numbers, got a {value.layout} tensor of {value.dtype}")
    if value.shape != features.shape:
        raise ValueError(
            f"{point.name}: {len(features)} features take [{len(features)}] values, got {list(value.shape)}"
        )
    if len(features.unique()) < len(features):
        raise ValueError(f"{point.name}: a feature is named twice, and each has a value of its own")
    return value


def _check_range(name: str, features: list[int], width: int | None) -> None:
    wrong = [i for i in features if i < 0 or (width is not None and i >= width)]
    if wrong:
        known = f"[0, {width})" if width is not None else "0 or more"
        raise ValueError(f"{name}: feature index {wrong[0]} is out of range, expected {known}")


def _setter(point: HookPoint, ablation: Ablation) -> Callable[[Any], Tensor]:
    features, value = ablation.features, ablation.value
    largest = max((abs(v) for v in ablation.values().tolist() if math.isfinite(v)), default=0.0)

    def set_features(x: Any) -> Tensor:
        ablation.reached = True
        if not isinstance(x, Tensor) or x.is_nested:
            what = "a nested tensor" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{point.name}: {point.module_path} is handed {what}, not a tensor with a row per token")
        shape, x = x.shape, point.flat(x)
        if point.width is not None and x.shape[-1] != point.width:
            raise ValueError(f"{point.name}: activations of width {x.shape[-1]}, but the hook's width is {point.width}")
        if point.width is None:
            _check_range(point.name, features.tolist(), x.shape[-1])
        if x.is_floating_point() and largest > torch.finfo(x.dtype).max:
            raise ValueError(f"{point.name}: a value of {largest:g} is beyond {x.dtype}, the dtype of the activations")
        if isinstance(value, Tensor):
            return x.index_copy(-1, features.to(x.device), value.to(x).expand(*x.shape[:-1], -1)).view(shape)
        return x.index_fill(-1, features.to(x.device), value).view(shape)

    return set_features


def _check_settable(names: Names, point: HookPoint) -> None:
    """Refuse to set what the model does not go on with, and the stream where too few would read it, or too many."""
    if hasattr(names.model.get_submodule(point.module_path), "hook_sae_input"):
        raise ValueError(
            f"an SAE stands at {point.name}, and the model goes on with what that makes of the activations: ablate its "
            f"latents ({point.module_path}.hook_sae_acts_post), or take it off first"
        )
    if point.name in names.points and (shared := names.sharing(point)):
        raise ValueError(
            f"{point.name} and {some(shared)} are one module, and setting one would set all: name the module, "
            f"{point.module_path!r}, if that is meant"
        )
    if point.kind != "rows" or point.side != "input":
        return
    block, _, short = point.name.rpartition(".")
    if short.startswith("hook_resid_mid"):
        raise ValueError(
            f"{point.name} is read where it enters {point.module_path}; set there, the change would not reach the rest "
            "of the stream. Set hook_resid_pre, hook_attn_out or hook_mlp_in instead"
        )
    block_input = names.points.get(f"{block}.hook_resid_pre") if short == "hook_mlp_in" else None
    if block_input is not None and block_input.module_path == point.module_path:
        raise ValueError(
            f"{point.name} is the input of the whole block {point.module_path}, attention included. Set hook_resid_pre "
            "for both, or mlp.hook_in for the MLP alone"
        )
