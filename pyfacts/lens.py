"""Where the neurons of a TransformerLens model are: the names exist there already, as those of its own hooks."""

from __future__ import annotations

import re
from typing import Literal

from torch import nn

from .blocks import ORDER, in_width, survey_block
from .hook_point import HookPoint
from .survey import Survey, refusal

NEURONS = re.compile(r"^(?P<block>(?:\w+\.)*?(?:(?:encoder_|decoder_)?blocks|encoder|decoder)\.\d+)\.mlp\.hook_post$")

HEADS = re.compile(r"\.hook_([qkvz]|result)$")

ATTENTION_PATTERNS = (".hook_pattern", ".hook_attn_scores")
"""Hooks of [batch, head, query, key]."""

EXPERTS = re.compile(r"^\w*blocks\.\d+\.mlp\.experts$")


def is_lens(module: nn.Module) -> bool:
    """Whether a module is a model of TransformerLens."""
    return hasattr(module, "hook_dict")


def named_hooks(model: nn.Module) -> dict[str, nn.Module]:
    """A TransformerLens model's HookPoint modules by every name they have; empty for any other model."""
    hooks = dict(getattr(model, "hook_dict", None) or {})
    if not hooks:
        hooks = {path: module for path, module in model.named_modules() if path.rpartition(".")[2].startswith("hook_")}
    # SAELens puts an SAE in a hook's place, and its bridges leave out the names that are second names.
    hooks |= {path: module for path, module in model.named_modules() if f"{path}.hook_sae_input" in hooks}
    add_second_names = getattr(model, "_add_aliases_to_hooks", None)
    if callable(add_second_names):
        add_second_names(hooks)
    return hooks if is_lens(model) or any(NEURONS.match(name) for name in hooks) else {}


def survey(model: nn.Module, hooks: dict[str, nn.Module]) -> Survey:
    """What is found in a model with these hooks."""
    blocks = {match["block"]: None for match in map(NEURONS.match, hooks) if match}
    blocks |= {path.removesuffix(".mlp.experts"): None for path, _ in model.named_modules() if EXPERTS.match(path)}
    both_sides = len({block.rpartition(".")[0] for block in blocks}) > 1
    cfg = getattr(model, "cfg", None)
    paths = {id(module): path for path, module in reversed(list(model.named_modules()))}
    result = Survey()
    for block in sorted(blocks, key=lambda name: ("decoder" in name, _natural(name))):
        stream = re.sub(r"_?blocks$", "", block.rpartition(".")[0]) if both_sides else ""
        experts = survey_block(model.get_submodule(block)).experts
        for short in ORDER:
            name = f"{block}.{short}"
            module = hooks.get(name)
            side = side_of(module)
            if short == "mlp.hook_in" and name in hooks and _is_bypassed(model, block):
                module = hooks.get(f"{block}.mlp.in.hook_in")
            if (module is None and short == "hook_mlp_in") or _is_switched_off(module, cfg):
                norm = _mlp_norm(model, block, hooks)
                if norm is not None:
                    module, side = norm, "input"
                else:  # what a bridge's MLP reads is what its first layer reads
                    module = hooks.get(f"{block}.mlp.in.hook_in") if _is_bypassed(model, block) else None
            if module is None or id(module) not in paths:
                continue
            neurons = short == "mlp.hook_post"
            if neurons and experts:  # the name is there, and may hand out the mixture's output
                continue
            result.points[name] = HookPoint(
                name,
                paths[id(module)],
                side,
                _width(model, paths[id(module)], cfg, neurons),
                "neurons" if neurons else "rows",
                getattr(cfg, "act_fn", None) if neurons else None,
                stream,
            )
        if experts:
            name = f"{block}.mlp.hook_post"
            result.refused[name] = refusal(name, f"{block}.{experts[0]}")
    return result


def side_of(hook: nn.Module | None) -> Literal["input", "output"]:
    """A hook hands on what it is given; an SAE in its place is given what the model computed."""
    return "input" if hasattr(hook, "hook_sae_input") else "output"


def per_head(name: str) -> bool:
    """Whether HookedTransformer hands out [batch, pos, n_heads, d_head] there."""
    return HEADS.search(name) is not None


def _width(model: nn.Module, hook_path: str, cfg: object, neurons: bool) -> int | None:
    """The width of a hook: of neurons, from the down-projection; the config's `d_mlp` can be a guess."""
    width = getattr(cfg, "d_mlp" if neurons else "d_model", None)
    if neurons:
        holder = model.get_submodule(hook_path.rpartition(".")[0])
        if "W_out" in holder._parameters:  # HookedTransformer: [d_mlp, d_model]
            width = holder._parameters["W_out"].shape[0]  # type: ignore[union-attr]
        elif isinstance(getattr(holder, "_original_component", None), nn.Module):
            width = in_width(holder._original_component) or width  # type: ignore[arg-type]
    return width if isinstance(width, int) else None


def _is_switched_off(hook: nn.Module | None, cfg: object) -> bool:
    """Whether this is the `hook_mlp_in` that TransformerLens calls only if the config's `use_hook_mlp_in` is set."""
    if hook is None or getattr(cfg, "use_hook_mlp_in", True):
        return False
    return str(getattr(hook, "name", "")).endswith("hook_mlp_in")


def _is_bypassed(model: nn.Module, block: str) -> bool:
    """Whether a bridge's MLP wraps nothing (OPT's lies in the block itself), so that its own hooks are not called."""
    mlp = getattr(model.get_submodule(block), "mlp", None)
    return hasattr(mlp, "_original_component") and getattr(mlp, "name", "") is None


def _mlp_norm(model: nn.Module, block: str, hooks: dict[str, nn.Module]) -> nn.Module | None:
    """The norm in front of the MLP: its input is `hook_mlp_in`, whether or not TransformerLens copies it out.

    None where `ln2` comes after the MLP, as BERT's and OPT-350M's does.
    """
    module = model.get_submodule(block)
    norm, bridged = getattr(module, "ln2", None), getattr(module, "_original_component", None)
    behind = (
        f"{block}.hook_normalized_resid_post" in hooks
        or str(getattr(norm, "name", "")).startswith("output.")
        or getattr(bridged, "do_layer_norm_before", True) is False
    )
    return norm if isinstance(norm, nn.Module) and not behind else None


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
