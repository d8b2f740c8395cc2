"""Where a model's neurons are: hook names, after TransformerLens, for Hugging Face, TransformerLens and plain models.

`hook_points` walks a model once, finds its stack of blocks (the outermost list of modules that hold an MLP each) and
names what `pyfacts.blocks` finds in each block. TransformerLens models carry the names already, as modules.
"""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import nn

from . import lens
from .blocks import ORDER, BlockSurvey, holds_experts, in_width, is_attention, out_width, survey_block
from .hook_point import HookPoint, Survey, refusal

NamesFilter = str | Iterable[str] | Callable[[str], bool] | None


def hook_points(model: nn.Module) -> dict[str, HookPoint]:
    """List what can be captured from a model by name, in the order of a forward pass.

    For every block `i`: `blocks.{i}.mlp.hook_post`, the MLP's neurons `[n_tokens, d_mlp]` (the input of the
    down-projection), and, as far as the architecture has a module that carries them, the rows `[n_tokens, d_model]`:

    - `hook_resid_pre` and `hook_resid_post`: the block's input and output.
    - `hook_attn_out` and `hook_mlp_out`: what attention and the MLP add to the residual stream, after the norms that
      Gemma has behind them. Dropout behind them is not seen (there is none in eval mode).
    - `hook_resid_mid` = `hook_resid_pre` + `hook_attn_out`. Models whose attention and MLP run side by side (Phi,
      GPT-NeoX by default) have none. T5's decoder has `hook_cross_attn_out` and `hook_resid_mid_cross` as well.
    - `hook_mlp_in`: the residual stream as it enters the MLP's branch, before the norm; `mlp.hook_in`: what the MLP
      itself reads, after that norm. Where the norm follows the sum (BERT), the two are the same.

    Encoder-decoder models have `encoder_blocks.{i}` and `decoder_blocks.{i}`. In a mixture of experts the dense and the
    shared MLPs are listed (`blocks.{i}.mlp.shared_expert.hook_post`), the experts are not: a token visits only some.

    Args:
        model: a Hugging Face, TransformerLens or plain model; wrappers such as `torch.compile`'s are looked through.

    Returns:
        The hooks by name.

    Raises:
        ValueError: no stack of blocks with MLPs is recognised (any module can still be captured by its path).

    Example:
        >>> from transformers import OPTConfig, OPTForCausalLM
        >>> config = OPTConfig(vocab_size=10, hidden_size=8, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2)
        >>> hook_points(OPTForCausalLM(config))["blocks.1.mlp.hook_post"].module_path
        'model.decoder.layers.1.fc2'
    """
    survey = _survey(unwrap(model))
    if not survey.points:
        raise ValueError(survey.ambiguous or _no_mlps(model))
    return survey.points


def resolve_hooks(model: nn.Module, names_filter: NamesFilter = None) -> list[HookPoint]:
    """The hooks that a `names_filter` names.

    Args:
        model: the model.
        names_filter: None for every MLP's neurons; a name or a list of names, each from `hook_points` or a module path
            (`"fc2"` for its input, `"fc2:output"` for its output), in which `*` stands for anything; or a callable that
            is asked about every name from `hook_points`.

    Returns:
        The hooks, each once, in the order of the list given or else of the forward pass.

    Raises:
        ValueError: an unknown name (the message lists close matches), a mixture of experts' neurons, or no hook at all.
        TypeError: `names_filter` is something else.
    """
    if names_filter is None:
        return _all_neurons(model)
    if callable(names_filter):
        return _accepted(model, names_filter)
    names = [names_filter] if isinstance(names_filter, str) else names_filter
    if not isinstance(names, Iterable):
        raise TypeError(f"names_filter must be None, a str, a list of str or a callable, got {type(names).__name__}")
    chosen = resolve_names(model, names, patterns=True)
    if not chosen:
        raise ValueError("names_filter is empty: name at least one hook, or pass None for every MLP's neurons")
    return chosen


def resolve_names(model: nn.Module, names: Iterable[str], patterns: bool = False) -> list[HookPoint]:
    """The hooks of these names, each once; raises as `resolve_hooks` does."""
    model = unwrap(model)
    survey = _survey(model)
    chosen: dict[str, HookPoint] = {}
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"names_filter must hold hook names as str, got {name!r} of type {type(name).__name__}")
        for match in _matches(model, survey, name) if patterns and "*" in name else [name]:
            chosen[match] = _resolve(model, survey, match)
    return list(chosen.values())


def same_activations(model: nn.Module, a: HookPoint, b: HookPoint) -> bool:
    """Whether two hooks are one place in the model; the stream behind a block is the stream in front of the next."""
    points = _survey(unwrap(model)).points

    def place(point: HookPoint) -> tuple[str, str]:
        for name, end in points.items():
            block, _, short = name.rpartition(".")
            if short == "hook_resid_post" and (end.module_path, end.side) == (point.module_path, point.side):
                stack, _, index = block.rpartition(".")
                point = points.get(f"{stack}.{int(index) + 1}.hook_resid_pre", point)
        return point.module_path, point.side

    return place(a) == place(b)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile`'s and data-parallel wrappers."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a model that is a torch.nn.Module, got {type(model).__name__}")
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and list(model._modules) == ["module"]:
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _survey(model: nn.Module) -> Survey:
    lens_hooks = lens.named_hooks(model)
    return lens.survey(model, lens_hooks) if lens_hooks else _survey_blocks(model)


# --- Hugging Face and models built like them -------------------------------------------------------------------------

OTHER_TOWERS = re.compile(r"vision|visual|image|audio|speech|\bmtp\b")
"""Stacks whose path has one of these are not the language model's, and are left out where there is another stack."""


@dataclass
class _Stack:
    path: str
    blocks: dict[int, tuple[str, BlockSurvey]]  # index -> (path, what is in it)

    @property
    def example(self) -> str:
        path, found = next(iter(self.blocks.values()))
        return f"{path}.{found.mlps[0].down}" if found.mlps else path


def _survey_blocks(model: nn.Module) -> Survey:
    stacks = list(_stacks(model))
    stacks = [stack for stack in stacks if not OTHER_TOWERS.search(stack.path)] or stacks
    result = Survey()
    prefixes = _prefixes(stacks)
    if prefixes is None:
        result.ambiguous = (
            f"the model has {len(stacks)} stacks of blocks ({', '.join(s.path or 'the model itself' for s in stacks)}) "
            'and pyfacts cannot tell which is meant: name module paths, such as names_filter="'
            f'{stacks[0].example}"'
        )
        return result
    for prefix, stack in prefixes:
        activation = _activation(model, stack.path)
        for index, (path, found) in stack.blocks.items():
            _name_block(model, f"{prefix}.{index}", path, found, activation, result)
    return result


def _stacks(model: nn.Module) -> Iterator[_Stack]:
    """The outermost lists of blocks: module lists whose members hold an MLP (or experts) each, and not several."""
    inside: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or any(path.startswith(outer) for outer in inside):
            continue
        blocks = {}
        for name, child in module.named_children():
            block_path = f"{path}.{name}" if path else name
            while isinstance(getattr(child, "_orig_mod", None), nn.Module):  # a block that is compiled by itself
                child, block_path = child._orig_mod, f"{block_path}._orig_mod"  # type: ignore[assignment]
            found = survey_block(child)
            if (found.mlps or found.experts) and name.isdigit():
                blocks[int(name)] = (block_path, found)
        if blocks and all(len(_plain_mlps(found)) <= 1 for _, found in blocks.values()):
            inside.append(f"{path}." if path else "")
            yield _Stack(path, blocks)


def _plain_mlps(found: BlockSurvey) -> list[str]:
    """The holders of dense MLPs that do not lie in one module with experts (those are the shared ones)."""
    mixtures = {path.rpartition(".")[0] for path in found.experts}
    return [mlp.holder for mlp in found.mlps if not any(m and mlp.holder.startswith(f"{m}.") for m in mixtures)]


def _prefixes(stacks: list[_Stack]) -> list[tuple[str, _Stack]] | None:
    """What the hooks of each stack begin with; None if that cannot be told."""
    if len(stacks) <= 1:
        return [("blocks", stack) for stack in stacks]
    sides = {next((side for side in ("decoder", "encoder") if side in stack.path), ""): stack for stack in stacks}
    if len(stacks) != 2 or sides.keys() != {"encoder", "decoder"}:
        return None
    return [(f"{side}_blocks", sides[side]) for side in ("encoder", "decoder")]


def _name_block(
    model: nn.Module, prefix: str, path: str, found: BlockSurvey, activation: str | None, result: Survey
) -> None:
    stream = prefix.partition("_blocks")[0] if "_blocks" in prefix else ""
    d_model = _d_model(model, path, found)
    plain = _plain_mlps(found)
    neurons = {}
    for mlp in found.mlps:
        inner_path = mlp.holder.partition(".")[2]
        short = "mlp.hook_post" if mlp.holder in plain else f"mlp.{inner_path}.hook_post"
        neurons[short] = HookPoint(
            f"{prefix}.{short}", f"{path}.{mlp.down}", "input", mlp.width, "neurons", activation, stream
        )
    for short in ORDER:
        if short == "mlp.hook_post":
            result.points.update((point.name, point) for point in neurons.values())
        elif short in found.rows:
            module, _, side = found.rows[short].partition(":")
            full_path = f"{path}.{module}" if module else path
            name = f"{prefix}.{short}"
            result.points[name] = HookPoint(
                name, full_path, "output" if side else "input", d_model, "rows", None, stream
            )
    if found.experts and "mlp.hook_post" not in neurons:
        beside = f" The shared MLP beside them is {', '.join(p.name for p in neurons.values())}." if neurons else ""
        name = f"{prefix}.mlp.hook_post"
        result.refused[name] = refusal(name, f"{path}.{found.experts[0]}") + beside


def _d_model(model: nn.Module, path: str, found: BlockSurvey) -> int | None:
    if found.mlps:
        return out_width(model.get_submodule(f"{path}.{found.mlps[0].down}"))
    config = _config(model, path)
    size = getattr(config, "hidden_size", None) or getattr(config, "d_model", None)
    return size if isinstance(size, int) else None


def _config(model: nn.Module, path: str) -> object:
    """The config nearest to a module: a multimodal model's language model has one of its own."""
    parts = path.split(".")
    for depth in range(len(parts), -1, -1):
        config = getattr(model.get_submodule(".".join(parts[:depth])), "config", None)
        if config is not None:
            return config
    return None


def _activation(model: nn.Module, path: str) -> str | None:
    config = _config(model, path)
    for key in ("activation_function", "hidden_activation", "hidden_act", "dense_act_fn", "activation"):
        value = getattr(config, key, None)
        if value is not None:
            return value if isinstance(value, str) else getattr(value, "__name__", type(value).__name__)
    return None


_CROSS_ATTENDED = re.compile(r"(EncDecAttention|encoder_attn|cross_?att\w*)(\.\w+)*\.(k|v|k_proj|v_proj|key|value)$")
"""What a decoder computes of the encoder's states: T5's, BART's, BERT's."""


# --- many names ------------------------------------------------------------------------------------------------------


def _all_neurons(model: nn.Module) -> list[HookPoint]:
    survey = _survey(unwrap(model))
    neurons = [point for point in survey.points.values() if point.kind == "neurons"]
    if not neurons:
        raise ValueError(survey.ambiguous or next(iter(survey.refused.values()), None) or _no_mlps(model))
    return neurons


def _accepted(model: nn.Module, accepts: Callable[[str], bool]) -> list[HookPoint]:
    points = hook_points(model)
    chosen = [point for name, point in points.items() if accepts(name)]
    if not chosen:
        raise ValueError(f"names_filter chose none of the model's {len(points)} hooks: {_some(points)}")
    model = unwrap(model)
    captured = {id(model.get_submodule(point.module_path)) for point in chosen}
    missed = [
        name
        for name, hook in lens.named_hooks(model).items()
        if name not in points and id(hook) not in captured and accepts(name)
    ]
    if missed:
        warnings.warn(
            f"names_filter accepts {len(missed)} more hooks of TransformerLens', which pyfacts.hook_points does not "
            f"list, and which are not captured: {_some(missed)}. A list of names can have them",
            stacklevel=4,
        )
    return chosen


def _matches(model: nn.Module, survey: Survey, pattern: str) -> list[str]:
    """The names that a pattern matches: of those listed, or else a TransformerLens model's other hooks, or modules."""
    path, colon, side = pattern.partition(":")
    paths = [f"{p}{colon}{side}" for p, _ in model.named_modules() if p and fnmatchcase(p, path)]
    for names in (survey.points, survey.refused, lens.named_hooks(model), paths):
        if found := [name for name in names if fnmatchcase(name, pattern)]:
            return found
    known = survey.points or [p for p, _ in model.named_modules() if p]
    raise ValueError(f"{pattern!r} matches no hook of the model: neither {_some(known)} nor a module's path")


# --- one name --------------------------------------------------------------------------------------------------------


def _resolve(model: nn.Module, survey: Survey, name: str) -> HookPoint:
    if name in survey.points:
        return survey.points[name]
    if name in survey.refused:
        raise ValueError(survey.refused[name])
    lens_hook = lens.named_hooks(model).get(name)
    path, _, side = name.partition(":")
    if lens_hook is not None:
        paths = {id(module): module_path for module_path, module in model.named_modules()}
        if id(lens_hook) in paths:
            _refuse_experts(model, paths[id(lens_hook)], name)
            kind: Literal["neurons", "rows"] = "neurons" if name.endswith(("acts_post", "mlp.hook_pre")) else "rows"
            per_head = lens.HEADS.search(name) is not None
            return HookPoint(name, paths[id(lens_hook)], lens.side_of(lens_hook), None, kind, per_head=per_head)
    try:
        module = model.get_submodule(path)
    except AttributeError:
        raise ValueError(_unknown(model, survey, name)) from None
    if not path or side not in ("", "input", "output"):
        raise ValueError(f'{name!r} is no hook: a module path is "path" or "path:input" for its input, "path:output"')
    _refuse_experts(model, path, name)
    streams = {point.stream for point in survey.points.values()} - {""}
    stream = next((s for s in sorted(streams) if any(s in part for part in path.split("."))), "")
    head = getattr(model, "get_output_embeddings", None)
    if "decoder" in streams and not stream and callable(head) and module is head():
        stream = "decoder"
    if stream == "decoder" and _CROSS_ATTENDED.search(path):
        stream = "encoder"
    # Patches of an image, say, or what stands beside encoder and decoder: rows that may be nobody's tokens.
    if survey.points and (OTHER_TOWERS.search(path) or (streams and not stream)):
        stream = name
    if side == "output":
        return HookPoint(name, path, "output", out_width(module), "neurons", None, stream)
    return HookPoint(name, path, "input", in_width(module), "neurons", None, stream)


def _refuse_experts(model: nn.Module, path: str, name: str) -> None:
    parts = path.split(".")
    for depth in range(1, len(parts) + 1):
        outer = ".".join(parts[:depth])
        if parts[depth - 1] == "experts" or (not is_attention(outer) and holds_experts(model.get_submodule(outer))):
            raise ValueError(refusal(name, outer))


def _unknown(model: nn.Module, survey: Survey, name: str) -> str:
    known = [*survey.points, *(path for path, _ in model.named_modules() if path)]
    close = difflib.get_close_matches(name, known, n=5, cutoff=0.6)
    hint = f"Close matches: {', '.join(close)}." if close else f"Known are {_some(survey.points or known)}."
    return f"unknown hook {name!r}: neither a name from pyfacts.hook_points(model) nor the path of a module. {hint}"


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")


def _no_mlps(model: nn.Module) -> str:
    linear = [p for p, m in unwrap(model).named_modules() if p and isinstance(m, torch.nn.Linear)]
    example = linear[-1] if linear else "path.to.module"
    return (
        f"pyfacts recognises no MLP blocks in this {type(unwrap(model)).__name__}. Any module can be captured by its "
        f'path: names_filter="{example}" takes its input, "{example}:output" its output.'
    )
