"""How TransformerLens' models are called, in Hugging Face's words: they take text where others take ids, and have names
of their own for masks and caches."""

from typing import Any

import torch
from torch import Tensor

NAMES = {
    "decoder_input": "decoder_input_ids",
    "one_zero_attention_mask": "attention_mask",
    "past_kv_cache": "past_key_values",
    "tokens": "input_ids",
}


def arguments(model: Any, bound: dict[str, Any]) -> dict[str, Any]:
    """A forward's arguments by the names that Hugging Face has for them; text as the model itself tokenises it."""
    cfg = getattr(model, "cfg", None)
    if getattr(cfg, "is_audio_model", False) or getattr(cfg, "is_visual_model", False):
        return {}  # the tokens are made of what is given, and a mask is of that
    given = bound.get("input")
    named = {NAMES[name]: value for name, value in bound.items() if name in NAMES and value is not None} | {
        name: value for name, value in bound.items() if name not in NAMES and value is not None
    }
    if isinstance(given, Tensor) and given.is_floating_point():
        named["inputs_embeds"] = given
    elif isinstance(given, Tensor):
        named["input_ids"] = given if given.dim() > 1 else given[None]
    elif isinstance(given, str | list):
        ids, mask = _tokenised(model, given, {k: named[k] for k in ("prepend_bos", "padding_side") if k in named})
        named = {"attention_mask": mask} | named | {"input_ids": ids}
    return named


def _tokenised(model: Any, text: str | list[str], options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The ids [batch, pos] that a model makes of text, and which of them are not padding."""
    ids = model.to_tokens(text, **options)
    if isinstance(ids, tuple):  # an encoder's come with their mask
        return ids[0], ids[-1]
    tokenizer = model.tokenizer
    if len(ids) == 1 or tokenizer.pad_token_id is None:
        return ids, torch.ones_like(ids)
    side, prepend_bos = options.get("padding_side"), options.get("prepend_bos")
    side = side if side in ("left", "right") else tokenizer.padding_side
    prepend_bos = prepend_bos if isinstance(prepend_bos, bool) else getattr(model.cfg, "default_prepend_bos", True)
    padding = (ids == tokenizer.pad_token_id).long()
    padding = padding.cumprod(1) if side == "left" else padding.flip(1).cumprod(1).flip(1)
    if prepend_bos and tokenizer.bos_token_id == tokenizer.pad_token_id:  # GPT-2's: one of them begins the text
        first = padding.sum(1) - 1 if side == "left" else torch.zeros_like(padding[:, 0])
        padding.scatter_(1, first.clamp(min=0)[:, None], 0)
    return ids, 1 - padding
