"""The tokens of one forward pass: how many there are, which are wanted, and where they stand.

A `Forward` knows the `Tokens` of each stream (an encoder and a decoder have their own) and what each hook has `Taken`.
Shapes: a stream has [batch, length] tokens; a hook is handed [batch, length, width], or [batch * length, width] (OPT),
or chunks of either, and gives rows [n_wanted, width] in the order of (sequence, position).
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .drain import Activations, Drain, Draining
from .encoding import cat
from .hook_point import HookPoint

TokenMask = Tensor | Mapping[str, Tensor] | Callable[[Tensor], Tensor] | None


@dataclass
class Forward:
    """One forward pass: whose it is (None if nothing around the blocks was called), its tokens, what was taken."""

    owner: nn.Module | None
    tokens: dict[str, Tokens] = field(default_factory=dict)
    taken: dict[str, Taken] = field(default_factory=dict)
    drain: Drain = field(default_factory=Drain)

    def has_all(self, name: str) -> bool:
        taken = self.taken.get(name)
        return taken is not None and taken.seen == self.tokens[taken.stream].n_tokens

    def complete(self, points: Sequence[HookPoint]) -> bool:
        return len(self.taken) == len(points) and all(self.has_all(point.name) for point in points)


@dataclass
class Taken:
    """What one hook was handed in one forward: usually one part; several where the feed-forward is chunked."""

    stream: str
    parts: list[Activations | Draining] = field(default_factory=list)
    counts: list[list[int]] = field(default_factory=list)  # of parts that split sequences: chosen tokens of each
    seen: int = 0

    def join(self, name: str, tokens: Tokens) -> Activations:
        """One part with its rows in the order of (sequence, position)."""
        if self.seen != tokens.n_tokens:
            raise ValueError(
                f"{name} was handed {self.seen} rows in one forward of {tokens.batch} x {tokens.length} tokens: its "
                "module does not see one row per token, so rows cannot be told apart"
            )
        parts = [part.finish() if isinstance(part, Draining) else part for part in self.parts]
        if len(parts) == 1:
            return parts[0]
        if not self.counts:
            return join(parts)
        ends = [list(itertools.accumulate(counts, initial=0)) for counts in self.counts]
        return join(
            [part[end[s] : end[s + 1]] for s in range(tokens.batch) for part, end in zip(parts, ends, strict=True)]
        )


@dataclass(frozen=True)
class End:
    """Where a forward ended: the first of its sequences, how many, the position after its last, and its cache."""

    first: int
    batch: int
    position: int
    cache: Callable[[], Any]  # a weak reference; gives None where it is gone, or the forward did not tell


class Ends:
    """Where the forwards of a stream have ended: the last one, and the last of each key-value cache that is alive."""

    def __init__(self) -> None:
        self._n_sequences = 0
        self._ends: list[End] = []

    def first_sequence(self, tokens: Tokens) -> int:
        """Notes a forward. Returns the number of its first sequence, which may be that of one that it continues."""
        before = self._before(tokens)
        if before is not None and (before.batch, before.position) == (tokens.batch, tokens.past):
            first = before.first
        else:
            first = self._n_sequences
            self._n_sequences += tokens.batch
        left = tokens.cache if tokens.cache_left is None else tokens.cache_left
        self._ends = [end for end in self._ends if (cache := end.cache()) is not None and cache is not left]
        reference = (lambda: None) if left is None else weakref.ref(left)
        self._ends.append(End(first, tokens.batch, tokens.past + tokens.length, reference))
        return first

    def _before(self, tokens: Tokens) -> End | None:
        """The forward that has left the cache that this one was given: its own, else perhaps the last one."""
        if not tokens.past or not self._ends:
            return None
        last = self._ends[-1]
        if tokens.cache is None:
            return last
        known = (end for end in self._ends if end.cache() is tokens.cache)
        return next(known, last if last.cache() is None else None)


@dataclass
class Tokens:
    """The tokens of one stream in one forward, as far as they are known."""

    batch: int = -1
    length: int = -1
    ids: Tensor | None = None
    told: bool = False  # batch and length are those of ids or embeddings
    attention_mask: Tensor | None = None
    past: int = 0
    cache: Any = None  # what holds the keys and values, if it is an object that stays from forward to forward
    cache_left: Any = None  # the same at the end
    mask: Tensor | None = None  # bool [batch, length] of the tokens wanted; None for all
    settled: bool = False
    _indices: dict[torch.device, Tensor] = field(default_factory=dict)

    @property
    def n_tokens(self) -> int:
        return self.batch * self.length

    def learn(self, bound: dict[str, Any], prefix: str, args: tuple[Any, ...], outermost: bool) -> None:
        """Take from a module's arguments what no module around it has told yet."""
        if self.batch < 0:
            ids = bound.get(f"{prefix}input_ids")
            if ids is None and not prefix and args and "input_ids" not in bound:
                ids = args[0]  # a model of another make: its first argument, if that looks like token ids
            embeds = bound.get(f"{prefix}inputs_embeds")
            if isinstance(ids, Tensor) and ids.dim() == 2 and not ids.is_floating_point():
                self.ids, (self.batch, self.length), self.told = ids, ids.shape, True
            elif isinstance(embeds, Tensor) and embeds.dim() == 3:
                (self.batch, self.length), self.told = embeds.shape[:2], True
        mask = bound.get(f"{prefix}attention_mask")
        if isinstance(mask, Mapping):  # one for each kind of layer
            mask = mask.get("full_attention", next(iter(mask.values()), None))
        # `generate` gives a static cache's model a mask [batch, 1, query, key]; inside a model those are common, and
        # may be anything.
        if self.attention_mask is None and isinstance(mask, Tensor) and mask.dim() in ((2, 4) if outermost else (2,)):
            self.attention_mask = mask

    def by_sequence(self, x: Tensor, positions_first: Literal["", "torch", "model"], name: str) -> Tensor:
        """Activations [pos, batch, width] as [batch, pos, width]; the shape tells, or else `models.positions_first`."""
        if x.dim() != 3:
            return x
        shape, expected = tuple(x.shape[:2]), (self.batch, self.length)
        if shape[0] != shape[1] and shape in (expected, expected[::-1]):
            return x if shape == expected else x.transpose(0, 1)
        if positions_first == "torch" and self.told and shape == expected:
            raise ValueError(
                f"{name}: there are as many sequences as positions ({shape[0]}), and with layers that are not "
                "batch_first the ids may be [batch, pos] or [pos, batch]: give another number of sequences"
            )
        return x.transpose(0, 1) if positions_first else x

    def settle(self, x: Tensor, token_mask: TokenMask, point: HookPoint) -> None:
        """Fix, at the first activations, how many tokens there are and which are wanted."""
        if self.settled:
            return
        if self.batch < 0:  # no ids were seen: [batch, pos, width], or [batch, width] with one position each
            self.batch = x.shape[0] if x.dim() > 1 else 1
            self.length = x.shape[1:-1].numel() if x.dim() > 2 else 1
        self.mask = self._mask(token_mask, point)
        if self.mask is not None and bool(self.mask.all()):
            self.mask = None
        self.settled = True

    def _mask(self, token_mask: TokenMask, point: HookPoint) -> Tensor | None:
        if isinstance(token_mask, Mapping):
            token_mask = token_mask.get(point.stream)
        shape = (self.batch, self.length)
        attended = None
        if callable(token_mask) and not isinstance(token_mask, Tensor):
            if self.ids is None:
                raise ValueError(f"{point.name}: token_mask is a callable of input_ids, but this forward has none")
            attended = self._attended(point)
            token_mask = token_mask(self.ids)
            if not isinstance(token_mask, Tensor):
                raise TypeError(f"token_mask must return a bool tensor [batch, pos], got {type(token_mask).__name__}")
        if token_mask is not None:
            if tuple(token_mask.shape) not in (shape, shape[:1] if self.length == 1 else shape):
                hint = ' (pass {"encoder": ..., "decoder": ...} if they differ)' if point.stream else ""
                raise ValueError(
                    f"token_mask has shape {tuple(token_mask.shape)}, but the tokens of {point.name} are "
                    f"[batch, pos] = {list(shape)}{hint}"
                )
            wanted = _as_bools(token_mask.detach()).reshape(shape)
            return wanted if attended is None else wanted & attended.to(wanted.device)
        return self._attended(point)

    def _attended(self, point: HookPoint) -> Tensor | None:
        """bool [batch, length] of the tokens that the attention mask keeps; None without one."""
        mask = self.attention_mask
        if mask is None:
            return None
        rows, last = mask.shape[0], self.past + self.length
        if mask.dim() == 4 and rows in (1, self.batch) and mask.shape[2] == self.length <= mask.shape[3]:
            # Padding attends not even to itself. Of a window that is shorter than what came before, the last are the
            # forward's own.
            end = min(last, mask.shape[3])
            itself = mask[:, 0, :, end - self.length : end].diagonal(dim1=1, dim2=2)
            return (itself if itself.dtype == torch.bool else itself == 0).expand(self.batch, -1)
        if mask.dim() == 2 and rows == self.batch and mask.shape[1] in (self.length, last):
            return mask[:, -self.length :] != 0
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}, but the tokens of {point.name} are "
            f"[batch, pos] = {[self.batch, self.length]} after {self.past} cached: pass token_mask= to say which to "
            "capture"
        )

    def choose(self, x: Tensor, taken: Taken, name: str) -> tuple[Tensor, bool]:
        """The wanted rows of x as [n, width], and whether they are x's own memory."""
        rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
        start, taken.seen = taken.seen, taken.seen + rows.shape[0]
        if taken.seen > self.n_tokens:
            raise ValueError(
                f"{name} was handed {taken.seen} rows (activations of shape {tuple(x.shape)} at last), but the forward "
                f"has {self.batch} x {self.length} tokens: its module runs more than once, or has not one row per token"
            )
        if rows.shape[0] == self.n_tokens:
            if x.dim() > 2 and x.shape[0] not in (1, self.batch):
                raise ValueError(
                    f"{name} was handed activations of shape {tuple(x.shape)}, but the forward's tokens are [batch, "
                    f"pos] = {[self.batch, self.length]}: its module takes them in another order, which pyfacts does "
                    "not know"
                )
            if self.mask is None:
                return rows, True
            if rows.device not in self._indices:
                self._indices[rows.device] = self.mask.flatten().nonzero().squeeze(1).to(rows.device)
            return rows.index_select(0, self._indices[rows.device]), False
        # A chunk: some positions of every sequence (BERT's chunked feed-forward), or some rows of a flat matrix.
        wanted = self._all() if self.mask is None else self.mask
        if x.dim() == 3 and x.shape[0] == self.batch:
            first = start // self.batch
            wanted = wanted[:, first : first + x.shape[1]]
            taken.counts.append(wanted.sum(1).tolist())
        else:
            wanted = wanted.flatten()[start : taken.seen]
        return rows.index_select(0, wanted.flatten().nonzero().squeeze(1).to(rows.device)), False

    def positions(self, ends: Ends) -> Tensor:
        """(sequence, position) int64 [n, 2] of the wanted tokens.

        A forward that continues another from its cache (`generate`) belongs to the same sequences.
        """
        first = ends.first_sequence(self)
        grid = self._all() if self.mask is None else self.mask.cpu()
        return grid.nonzero() + torch.tensor([first, self.past], device="cpu")

    def _all(self) -> Tensor:
        return torch.ones(self.batch, self.length, dtype=torch.bool, device="cpu")


def _as_bools(mask: Tensor) -> Tensor:
    """A token mask, which holds bools, or zeros and ones: an additive mask, or ids, would be taken for its reverse."""
    wanted = mask != 0
    if mask.dtype != torch.bool and not torch.equal(wanted.to(mask.dtype), mask):
        raise ValueError(f"token_mask must hold bools, or zeros and ones, got {mask.dtype} with other values")
    return wanted


def join(parts: Sequence[Activations]) -> Activations:
    """Stack encodings, or tensors of rows, by token."""
    if len({part.dtype for part in parts}) > 1:
        raise ValueError(
            f"rows of {parts[0].dtype} and of another dtype cannot be joined: capture such forwards one by one"
        )
    if isinstance(parts[0], Tensor):
        return parts[0] if len(parts) == 1 else torch.cat(parts)  # type: ignore[arg-type]
    return cat(parts)  # type: ignore[arg-type]


def cache_of(values: Any) -> Any:
    """The key-value cache among a forward's arguments or in what it returns; transformers 5.24 renamed it."""
    get = values.get if isinstance(values, Mapping) else functools.partial(getattr, values)
    return next((cache for name in ("past_key_values", "cache") if (cache := get(name, None)) is not None), None)


def stays(cache: Any) -> bool:
    """Whether a key-value cache is an object that stays the same from forward to forward, and no tuple of tensors."""
    return hasattr(cache, "get_seq_length") or hasattr(cache, "entries")


def packs_sequences(cache: Any) -> bool:
    """Whether a cache is that of continuous batching, whose rows hold many sequences."""
    return type(cache).__name__ == "PagedAttentionCache"


def past_length(cache: Any) -> int:
    """How many tokens a key-value cache holds already; 0 of anything else."""
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    entries = getattr(cache, "entries", None)  # TransformerLens'
    if entries:
        return int(entries[0].past_keys.shape[1])
    if isinstance(cache, tuple | list) and cache and isinstance(cache[0], tuple | list) and cache[0]:
        return int(cache[0][0].shape[-2]) if isinstance(cache[0][0], Tensor) else 0
    return 0
