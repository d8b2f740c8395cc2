"""Where the neurons of a Hugging Face model are, and of any that is built like one.

The model is walked once for its stack of blocks, the outermost list of modules that hold an MLP each; what
`pyfacts.blocks` finds in each block is named after TransformerLens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from .blocks import ORDER, BlockSurvey, is_attention, out_width, survey_block
from .hook_point import HookPoint
from .survey import Survey, refusal

OTHER_TOWERS = re.compile(r"vision|visual|image|video_tower|video_model|audio|speech|perceiver|protein|\bmtp\b")
"""Stacks whose path has one of these are not the language model's, and are left out where there is another stack."""


@dataclass
class _Stack:
    path: str
    blocks: dict[int, tuple[str, BlockSurvey]]  # index -> (path, what is in it)
    overlooked: dict[int, str]  # index -> path of a module that is a down-projection in other blocks

    @property
    def example(self) -> str:
        path, found = next(iter(self.blocks.values()))
        return f"{path}.{found.mlps[0].down}" if found.mlps else path


def survey(model: nn.Module) -> Survey:
    """What is found in a model that is built of lists of blocks."""
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
        for index, path in stack.overlooked.items():
            name = f"{prefix}.{index}.mlp.hook_post"
            result.overlooked.append(name)
            result.refused[name] = (
                f"{name}: {path} is not recognised as what it is in other blocks (a module around a Linear should have "
                f"its in_features and out_features, or keep it as base_layer); name the module, names_filter={path!r}"
            )
    return result


def _stacks(model: nn.Module) -> Iterator[_Stack]:
    """The outermost lists of blocks: module lists whose members hold an MLP (or experts) each, and not several."""
    inside: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or any(path.startswith(outer) for outer in inside):
            continue
        blocks: dict[int, tuple[str, BlockSurvey]] = {}
        others: dict[int, tuple[str, BlockSurvey]] = {}
        for name, child in module.named_children():
            block_path = f"{path}.{name}" if path else name
            while isinstance(getattr(child, "_orig_mod", None), nn.Module):  # a block that is compiled by itself
                child, block_path = child._orig_mod, f"{block_path}._orig_mod"  # type: ignore[assignment]
            found = survey_block(child)
            if name.isdigit():
                (blocks if found.mlps or found.experts else others)[int(name)] = (block_path, found)
        if _has_attentions_beside(model, path):  # XLM's feed-forwards: the stream passes around them
            blocks = {index: (where, found.without_the_stream()) for index, (where, found) in blocks.items()}
        if blocks and all(len(_plain_mlps(found)) <= 1 for _, found in blocks.values()):
            inside.append(f"{path}." if path else "")
            downs = {mlp.down for _, found in blocks.values() for mlp in found.mlps}
            named = ((index, f"{where}.{down}") for index, (where, _) in others.items() for down in downs)
            yield _Stack(path, blocks, {index: down for index, down in named if _has(model, down)})


def _has(model: nn.Module, path: str) -> bool:
    try:
        return model.get_submodule(path) is not None
    except AttributeError:
        return False


def _has_attentions_beside(model: nn.Module, path: str) -> bool:
    """Whether a list of attentions stands beside a list of modules, which then are no whole blocks."""
    parent = model.get_submodule(path.rpartition(".")[0])
    return any(isinstance(child, nn.ModuleList) and is_attention(name) for name, child in parent.named_children())


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
