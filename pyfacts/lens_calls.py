"""How TransformerLens' models are called, in Hugging Face's words.

They take strings where others take ids, have names of their own for masks and caches, and call their `forward`
themselves (`run_with_hooks`, `generate`), where no hook of torch's tells that a forward begins.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

NAMES = {
    "decoder_input": "decoder_input_ids",
    "one_zero_attention_mask": "attention_mask",
    "past_kv_cache": "past_key_values",
    "tokens": "input_ids",
}


def arguments(model: nn.Module, bound: dict[str, Any]) -> dict[str, Any]:
    """A forward's arguments by the names that Hugging Face has for them; text as the model itself tokenises it."""
    named = {NAMES[name]: value for name, value in bound.items() if name in NAMES and value is not None} | {
        name: value for name, value in bound.items() if name not in NAMES and value is not None
    }
    given = named.get("input")
    if isinstance(given, Tensor) and given.is_floating_point():
        named["inputs_embeds"] = given
    elif isinstance(given, Tensor):
        named["input_ids"] = given if given.dim() > 1 else given[None]
    elif isinstance(given, str | list):
        ids, mask = _tokenised(model, given, {k: named[k] for k in ("prepend_bos", "padding_side") if k in named})
        named = {"attention_mask": mask} | named | {"input_ids": ids}
    return named


def _tokenised(model: Any, given: str | list[str], options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The ids [batch, pos] that a model makes of text, and which of them are not padding."""
    ids = model.to_tokens(given, **options)
    if isinstance(ids, tuple):  # an encoder's come with their mask
        return ids[0], ids[-1]
    mask = torch.zeros_like(ids)
    for text, row, kept in zip([given] if isinstance(given, str) else given, ids, mask, strict=True):
        alone = model.to_tokens(text, **options)[0]
        n = len(alone)
        kept[slice(n) if torch.equal(row[:n], alone) else slice(len(row) - n, None)] = 1
    return ids, mask


def around_forward(
    module: nn.Module, begin: Callable[..., None], end: Callable[[nn.Module, Any, Any], None]
) -> Callable[[], None]:
    """Call `begin(module, args, kwargs)` and `end(module, args, output)` around each forward, however it is called.

    `end` is called with None, and the exception at hand, if the forward raises an Exception.

    Returns:
        A function that puts the module's own `forward` back.
    """
    forward, own = module.forward, module.__dict__.get("forward")

    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        begin(module, args, kwargs)
        try:
            output = forward(*args, **kwargs)
        except Exception:
            end(module, args, None)
            raise
        end(module, args, output)
        return output

    def restore() -> None:
        if own is None:
            del module.forward
        else:
            module.forward = own

    module.forward = call
    return restore
