"""Where a model's neurons are: hook names, after TransformerLens, for Hugging Face, TransformerLens and plain models.

`pyfacts.stacks` and `pyfacts.lens` find what a model has; here it is asked for by name, by pattern or by function.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import torch
from torch import nn

from . import lens, stacks
from .blocks import holds_experts, in_width, is_attention, out_width
from .hook_point import HookPoint
from .survey import refusal
from .warn import warn
from .wording import some

NamesFilter = str | Iterable[str] | Callable[[str], bool] | None

CROSS_ATTENDED = re.compile(
    r"(EncDecAttention|encoder_attn|cross_?att\w*)(\.\w+)*\.((hook_)?[kv]|k_proj|v_proj|key|value)(\.hook_(in|out))?$"
)
"""What a decoder computes of the encoder's states: T5's, BART's, BERT's, TransformerLens'."""

POSITIONS_FIRST = {
    ("modeling_fsmt", "EncoderLayer"),
    ("modeling_fsmt", "DecoderLayer"),
    ("modeling_xlnet", "XLNetLayer"),
}
"""Hugging Face's layers that take [pos, batch, d_model], by the last part of their module's name, and their own."""


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
    names = Names(model)
    if not names.points:
        raise ValueError(names.nothing())
    return names.points


def resolve_hooks(model: nn.Module, names_filter: NamesFilter = None) -> list[HookPoint]:
    """The hooks that a `names_filter` names.

    Args:
        model: the model.
        names_filter: None for every MLP's neurons; a name or a list of names, each from `hook_points` or a module path
            (`"fc2"` for its input, `"fc2:output"` for its output). With a `*`, which stands for anything, it names all
            that it matches of `hook_points`; only if that is nothing, of a TransformerLens model's other hooks and of
            module paths. Or a callable that is asked about every name from `hook_points` (and, for a warning, about
            TransformerLens' other hooks).

    Returns:
        The hooks, each once, in the order of the list given or else of the forward pass.

    Raises:
        ValueError: an unknown name (the message lists close matches), a mixture of experts' neurons, or no hook at all.
        TypeError: `names_filter` is something else.
    """
    return Names(model).chosen(names_filter)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile`'s and data-parallel wrappers."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a model that is a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("a torch.jit module runs past the hooks of Python: give the module that it was made of")
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and list(model._modules) == ["module"]:
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def positions_first(model: nn.Module, module_path: str) -> Literal["", "torch", "model"]:
    """Whether a module is, or is in, one that takes [pos, batch, d_model], and whose convention that is.

    "torch": nn.TransformerEncoder's and its like without batch_first, where the model's ids may be [pos, batch] too;
    "model": that of a Hugging Face model, whose ids are [batch, pos]; "" if nothing says so.
    """
    parts = module_path.split(".") if module_path else []
    for depth in range(len(parts) + 1):
        module = model.get_submodule(".".join(parts[:depth]))
        if isinstance(module, nn.TransformerEncoder | nn.TransformerDecoder):
            module = module.layers[0]
        if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
            attention = getattr(module, "self_attn", None)
            return "torch" if isinstance(attention, nn.MultiheadAttention) and not attention.batch_first else ""
        if (type(module).__module__.rpartition(".")[2], type(module).__name__) in POSITIONS_FIRST:
            return "model"
    return ""


class Names:
    """The hooks of one model, by name. What is asked for and not there is a ValueError that says what is."""

    def __init__(self, model: nn.Module) -> None:
        self.model = unwrap(model)
        self._lens_hooks = lens.named_hooks(self.model)
        found = lens.survey(self.model, self._lens_hooks) if self._lens_hooks else stacks.survey(self.model)
        self.points = found.points
        self._refused, self._overlooked, self._ambiguous = found.refused, found.overlooked, found.ambiguous

    # ---- several -----------------------------------------------------------------------------------------------------

    def chosen(self, names_filter: NamesFilter) -> list[HookPoint]:
        """See `resolve_hooks`."""
        if names_filter is None:
            return self.neurons()
        if callable(names_filter):
            return self.accepted_by(names_filter)
        names = [names_filter] if isinstance(names_filter, str) else names_filter
        if isinstance(names, Mapping):
            raise TypeError("names_filter must be a list of names, got a dict; SAEs by their hooks are given as saes=")
        if not isinstance(names, Iterable):
            raise TypeError(
                f"names_filter must be None, a str, a list of str or a callable, got {type(names).__name__}"
            )
        chosen: dict[str, HookPoint] = {}
        for name in names:
            for match in self.matching(name) if isinstance(name, str) and "*" in name else [name]:
                chosen[match] = self.one(match)
        if not chosen:
            raise ValueError("names_filter is empty: name at least one hook, or pass None for every MLP's neurons")
        return list(chosen.values())

    def neurons(self) -> list[HookPoint]:
        """Every MLP's neurons."""
        neurons = [point for point in self.points.values() if point.kind == "neurons"]
        if not neurons:
            raise ValueError(self.nothing())
        if self._overlooked:
            warn(f"{len(self._overlooked)} of the model's blocks are left out. {self._refused[self._overlooked[0]]}")
        return neurons

    def accepted_by(self, accepts: Callable[[str], bool]) -> list[HookPoint]:
        """The listed hooks whose names a function accepts; a warning tells what else of TransformerLens' it accepts."""
        if not self.points:
            raise ValueError(self.nothing())
        chosen = [point for name, point in self.points.items() if accepts(name)]
        refused = [name for name in self._refused if _accepts(accepts, name)]
        if refused and not chosen:
            raise ValueError(self._refused[refused[0]])
        if refused:
            warn(self._refused[refused[0]])
        captured = {id(self.model.get_submodule(point.module_path)) for point in chosen}
        others = [
            name
            for name, hook in self._lens_hooks.items()
            if name not in (*self.points, *self._refused)
            and id(hook) not in captured
            and not self._has_no_rows(name)
            and _accepts(accepts, name)
        ]
        hint = f"It accepts {some(others)} too, which are not listed: give the names that you want in a list"
        if not chosen:
            raise ValueError(
                f"names_filter chose none of the model's {len(self.points)} hooks: {some(self.points)}"
                + (f". {hint}" if others else "")
            )
        if others:
            warn(f"names_filter chose {len(chosen)} of the hooks that pyfacts.hook_points lists. {hint}")
        return chosen

    def matching(self, pattern: str) -> list[str]:
        """The names that a pattern matches: of those listed, or else of TransformerLens' other hooks and of modules."""
        fits = re.compile(".*".join(map(re.escape, pattern.split("*")))).fullmatch
        listed, refused = ([name for name in names if fits(name)] for names in (self.points, self._refused))
        if listed and refused:
            warn(self._refused[refused[0]])
        if listed or refused:
            return listed or refused
        _, colon, side = pattern.partition(":")
        paths = dict(self.model.named_modules(remove_duplicate=False))
        modules = {name: m for name, m in (paths | self._lens_hooks).items() if name and not self._has_no_rows(name)}
        found = [name for name in modules if fits(f"{name}{colon}{side}")]
        found = [name for name in found if name not in paths or self._experts_around(name) is None] or found
        shortest: dict[int, str] = {}
        for name in sorted(found, key=len):
            shortest.setdefault(id(modules[name]), name)
        if not found:
            known = some(self.points or modules) or "none"
            raise ValueError(f"{pattern!r} matches no hook and no module's path; there are: {known}")
        return [f"{name}{colon}{side}" for name in found if name == shortest[id(modules[name])]]

    def same(self, a: HookPoint, b: HookPoint) -> bool:
        """Whether two hooks are one place; the stream behind a block is the stream in front of the next."""

        def place(point: HookPoint) -> tuple[str, str]:
            for name, end in self.points.items():
                block, _, short = name.rpartition(".")
                if short == "hook_resid_post" and (end.module_path, end.side) == (point.module_path, point.side):
                    stack, _, index = block.rpartition(".")
                    point = self.points.get(f"{stack}.{int(index) + 1}.hook_resid_pre", point)
            return point.module_path, point.side

        return place(a) == place(b)

    def sharing(self, point: HookPoint) -> list[str]:
        """Other hooks at the same side of the same module, under another path: layers that share it."""
        module = self.model.get_submodule(point.module_path)
        others = (p for p in self.points.values() if p.side == point.side and p.module_path != point.module_path)
        return [other.name for other in others if self.model.get_submodule(other.module_path) is module]

    # ---- one ---------------------------------------------------------------------------------------------------------

    def one(self, name: str) -> HookPoint:
        """A hook that is listed, another one of TransformerLens', or a module's input or output."""
        if not isinstance(name, str):
            raise TypeError(f"hooks are named by str, got {name!r} of type {type(name).__name__}")
        if name in self.points:
            return self.points[name]
        if name in self._refused:
            raise ValueError(self._refused[name])
        return self._of_lens(name) or self._of_a_module(name)

    def _of_lens(self, name: str) -> HookPoint | None:
        hook = self._lens_hooks.get(name)
        path = None if hook is None else next((path for path, m in self.model.named_modules() if m is hook), None)
        if hook is None or path is None:
            return None
        self._refuse_experts(path, name)
        kind: Literal["neurons", "rows"] = "neurons" if name.endswith(("acts_post", "mlp.hook_pre")) else "rows"
        return HookPoint(
            name, path, lens.side_of(hook), None, kind, stream=self._stream(path, name), per_head=lens.per_head(name)
        )

    def _of_a_module(self, name: str) -> HookPoint:
        path, _, side = name.partition(":")
        try:
            module = self.model.get_submodule(path)
        except AttributeError:
            raise ValueError(self._unknown(name)) from None
        if not path or side not in ("", "input", "output"):
            raise ValueError(
                f'{name!r} is no hook: a module path is "path" or "path:input" for its input, "path:output"'
            )
        self._refuse_experts(path, name)
        width = out_width(module) if side == "output" else in_width(module)
        stream, per_head = self._stream(path, name), bool(self._lens_hooks) and lens.per_head(path)
        return HookPoint(
            name, path, "output" if side == "output" else "input", width, "neurons", None, stream, per_head
        )

    def _stream(self, path: str, name: str) -> str:
        """Whose tokens a module is handed that is not listed."""
        streams = {point.stream for point in self.points.values()} - {""}
        stream = next((s for s in sorted(streams) if any(s in part for part in path.split("."))), "")
        head = getattr(self.model, "get_output_embeddings", None)
        if "decoder" in streams and not stream and callable(head) and self.model.get_submodule(path) is head():
            stream = "decoder"
        if stream == "decoder" and CROSS_ATTENDED.search(path):
            return "encoder"
        # Patches of an image, say, or what stands beside encoder and decoder: rows that may be nobody's tokens.
        if self.points and (stacks.OTHER_TOWERS.search(path) or (streams and not stream)):
            return name
        return stream

    def _refuse_experts(self, path: str, name: str) -> None:
        if (experts := self._experts_around(path)) is not None:
            raise ValueError(refusal(name, experts))

    def _experts_around(self, path: str) -> str | None:
        """The mixture of experts that a module is, or lies in."""
        parts = path.split(".")
        for depth in range(1, len(parts) + 1):
            outer = ".".join(parts[:depth])
            if parts[depth - 1] == "experts":
                return outer
            if not is_attention(outer) and holds_experts(self.model.get_submodule(outer)):
                return outer
        return None

    def _has_no_rows(self, name: str) -> bool:
        """Whether this is a pattern of attention in TransformerLens, which has no row a token."""
        return bool(self._lens_hooks) and name.endswith(lens.ATTENTION_PATTERNS)

    # ---- what to say -------------------------------------------------------------------------------------------------

    def nothing(self) -> str:
        """Why there are no neurons."""
        if self._ambiguous or self._refused:
            return self._ambiguous or next(iter(self._refused.values()))
        linear = [path for path, module in self.model.named_modules() if path and isinstance(module, torch.nn.Linear)]
        example = linear[-1] if linear else "path.to.module"
        return (
            f"pyfacts recognises no MLP blocks in this {type(self.model).__name__}. Any module can be captured by its "
            f'path: names_filter="{example}" takes its input, "{example}:output" its output.'
        )

    def _unknown(self, name: str) -> str:
        known = [*self.points, *(path for path, _ in self.model.named_modules() if path)]
        if "*" in name:
            hint = "Patterns are for names_filter; here each hook is named by itself."
        elif close := difflib.get_close_matches(name, known, n=5, cutoff=0.6):
            hint = f"Close matches: {', '.join(close)}."
        else:
            hint = f"Known are {some(self.points or known)}."
        return f"unknown hook {name!r}: neither a name from pyfacts.hook_points(model) nor the path of a module. {hint}"


def _accepts(accepts: Callable[[str], bool], name: str) -> bool:
    """Whether a function accepts a name that is not listed; one that fails does not know it."""
    try:
        return bool(accepts(name))
    except Exception:
        return False
