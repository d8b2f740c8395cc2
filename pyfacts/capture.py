"""`pyfacts.capture`: hook a model, run it as usual, read its activations."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType

import torch
from torch import Tensor, nn

from .attach import SaesByHook, resolve_captured
from .encoding import EncodedActivations, density_of
from .errors import UnknownHookError
from .hook_point import HookPoint
from .models import NamesFilter
from .select import Select
from .stream import ActivationStream, never_fired
from .tokens import Activations, TokenMask, join
from .warn import warn
from .wording import similar

DENSE_ABOVE = 0.55
"""Density from which a capture counts as dense. Not 0.5: a ReLU model with random weights is at 0.5 by symmetry."""


class capture:
    """Captures a model's activations while the context is open.

    The model computes exactly what it would without. Every forward appends to the cache: of each hook, the tokens that
    the attention mask keeps (all, if the model is given none). With gradient checkpointing only the first computation
    counts; so no forward is captured that somebody runs within a backward pass. A model that was compiled runs eagerly
    inside the context. Forwards come one after the other: the tokens of threads that run the model at once are not told
    apart.

    What is captured is on the CPU. From a GPU it travels while the model goes on, packed; a hook waits for none but the
    work before the hook two earlier, and with `select` or `saes` for its own; the first hook for the mask. A forward
    ends when its last has arrived. Up to three layers' neurons lie in buffers of their dense size on the GPU meanwhile.

    Args:
        model: a Hugging Face, TransformerLens or plain model.
        names_filter: None for every MLP's neurons; a name or a list of names from `pyfacts.hook_points(model)`, or
            module paths (`"fc2"` is its input, `"fc2:output"` its output), in which `*` stands for anything; or a
            callable that is asked about each name from `hook_points`. What a module path names counts as neurons: it is
            packed, and `select` applies to it. With `saes`, None is no hook but their latents.
        select: None keeps every value that is not zero, exactly. `pyfacts.topk(k)` and `pyfacts.min_abs(theta)` keep
            less of dense neurons; `dropped_share` of the result says how much they dropped.
        token_mask: which tokens to keep. A tensor [batch, pos] of bools, or of zeros and ones, or a dict of them for
            the streams "encoder" and "decoder", stands instead of the attention mask. A callable is given `input_ids`
            and returns one, for several forwards; of the tokens that it names, those are kept that the attention mask
            keeps too (`lambda ids: ids != tokenizer.bos_token_id`).
        saes: SAEs by the hook whose activations they read: the residual stream (`blocks.3.hook_resid_pre`), an MLP's
            input, neurons or output, or a module path. Each adds its latents [n_tokens, d_sae], under the hook's name
            followed by `.hook_sae_acts_post`, in the SAE's own dtype whatever the model's; what the SAE reads is not
            kept, and `select` does not apply to latents. An SAE is anything that fulfils
            `pyfacts.attach.SparseAutoencoder`; it is moved to the activations' device.

    Returns:
        On entering, an `ActivationCache`.

    Raises:
        ValueError: an unknown hook (with close matches), a mixture of experts' neurons, no recognisable MLPs, an SAE of
            another width than its hook, a select without neurons; from inside the forward, activations of another width
            than the hook's, or a mask that does not fit.
        TypeError: an argument of another type; from inside the forward, activations of an unsupported dtype.
        HookNeverFired: (a ValueError and a RuntimeError) at the end, a hook that saw no activations.
        RuntimeError: this capture is open already.

    Example:
        >>> import pyfacts, torch
        >>> from transformers import OPTConfig, OPTForCausalLM
        >>> config = OPTConfig(vocab_size=10, hidden_size=8, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2)
        >>> model = OPTForCausalLM(config)
        >>> with pyfacts.capture(model) as cache:
        ...     _ = model(torch.tensor([[4, 5, 6]]))
        >>> cache["blocks.1.mlp.hook_post"].shape
        torch.Size([3, 32])
    """

    def __init__(
        self,
        model: nn.Module,
        names_filter: NamesFilter = None,
        select: Select | None = None,
        token_mask: TokenMask = None,
        saes: SaesByHook | None = None,
    ) -> None:
        points, latents = resolve_captured(model, names_filter, saes)
        self._points = [*points, *latents]
        self._select = select
        self._new_stream = functools.partial(
            ActivationStream, model, points, select, token_mask, on_forward=self._append, saes=latents
        )
        self._new_stream()  # complains about the arguments before the with

    def __enter__(self) -> ActivationCache:
        if hasattr(self, "_stream"):
            raise RuntimeError("this capture is open already: make another one with pyfacts.capture(...)")
        self._cache = ActivationCache(self._points)
        self._warned = self._select is not None
        stream = self._new_stream()
        stream.__enter__()
        self._stream = stream
        return self._cache

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        stream, cache = self._stream, self._cache
        del self._stream
        try:
            stream.__exit__(exc_type, exc, traceback)
        finally:
            del self._cache
        silent = [point.name for point in self._points if not cache.n_forwards(point.name)]
        if silent and exc_type is None:
            raise never_fired(silent)

    def _append(self, parts: dict[str, Activations], positions: dict[str, Tensor]) -> None:
        self._cache._append(parts, positions)
        if not self._warned:
            self._warned = warn_if_dense(parts.values())


class ActivationCache(Mapping[str, Activations]):
    """What a capture caught: a read-only mapping from hook name to activations.

    `cache[name]` is an `EncodedActivations` [n_tokens, width], or for the residual stream and its like a tensor of
    rows. Several forwards are appended in order; nothing is copied until it is asked for.
    """

    def __init__(self, points: Sequence[HookPoint]) -> None:
        self._points = {point.name: point for point in points}
        self._parts: dict[str, list[Activations]] = {name: [] for name in self._points}
        self._positions: dict[str, list[Tensor]] = {name: [] for name in self._points}

    def _append(self, parts: dict[str, Activations], positions: dict[str, Tensor]) -> None:
        for name, part in parts.items():
            self._parts[name].append(part)
            self._positions[name].append(positions[self._points[name].stream])

    def __getitem__(self, name: str) -> Activations:
        """The activations of one hook, all forwards of it.

        Raises:
            UnknownHookError: (a ValueError and a KeyError) the hook was not captured.
            KeyError: it has not fired yet.
            ValueError: its forwards were of several dtypes.
        """
        parts = self._find(name, self._parts)
        if not parts:
            raise KeyError(f"{name} has not fired yet")
        if len(parts) > 1:
            parts[:] = [join(parts)]
        return parts[0]

    @property
    def positions(self) -> Tensor:
        """int64 [n_tokens, 2] on the CPU: the (sequence, position) of each row, the same for all hooks.

        Sequences are numbered on from forward to forward, in the order of the batch. Positions count the columns of the
        batch, padding included, from 0, or from the length of the key-value cache that the forward was given; such a
        forward that continues another (`generate`) belongs to the same sequences: to the same rows of the batch,
        between which a beam search moves its beams. Where a cache is cut back (assisted decoding rejects tokens), the
        next forward begins new sequences.

        Raises:
            ValueError: the hooks saw different tokens (an encoder's and a decoder's); use `positions_of`.
        """
        first, *others = self._positions.items()
        for name, positions in others:
            if [id(p) for p in positions] != [id(p) for p in first[1]]:
                raise ValueError(
                    f"{first[0]} and {name} have tokens of their own (an encoder's and a decoder's, or layers that not "
                    "every forward reaches): use cache.positions_of(name)"
                )
        return self.positions_of(first[0])

    def positions_of(self, name: str) -> Tensor:
        """int64 [n_tokens, 2]: the (sequence, position) of each row of one hook; see `positions`."""
        positions = self._find(name, self._positions)
        return torch.cat(positions) if positions else torch.empty(0, 2, dtype=torch.int64, device="cpu")

    def n_forwards(self, name: str) -> int:
        """How many forwards a hook has fired in; raises UnknownHookError if it was not captured."""
        return len(self._find(name, self._positions))

    def _find(self, name: str, where: dict[str, list]) -> list:
        if name not in where:
            raise UnknownHookError(
                f"{name!r} was not captured; what was ({len(where)}) is such as {similar(name, where)}"
            )
        return where[name]

    def __contains__(self, name: object) -> bool:
        return name in self._parts

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def __repr__(self) -> str:
        lines = [f"ActivationCache of {len(self)} hook{'' if len(self) == 1 else 's'}"]
        for name, parts in self._parts.items():
            tokens = sum(len(part) for part in parts)
            n_bytes = sum(part.nbytes for part in parts)
            encoded = [part for part in parts if isinstance(part, EncodedActivations)]
            shown = f"density {density_of(encoded):.2%}" if encoded else "rows" if parts else "nothing yet"
            width = parts[0].shape[1] if parts else self._points[name].width
            lines.append(f"  {name}: [{tokens}, {width}], {shown}, {n_bytes:,} bytes")
        return "\n".join(lines)


def warn_if_dense(parts: Iterable[Activations]) -> bool:
    """Warn, with the remedy, if encoded activations are dense: packing finds no zeros to leave out.

    Args:
        parts: encodings; tensors of rows among them do not count.

    Returns:
        Whether it warned.
    """
    density = density_of(part for part in parts if isinstance(part, EncodedActivations))
    if density <= DENSE_ABOVE:
        return False
    warn(
        f"the captured neurons are {density:.0%} dense, so packing saves next to nothing (GELU and SiLU have no exact "
        "zeros). Keep less with select=pyfacts.topk(k) or select=pyfacts.min_abs(theta), or capture the latents of an "
        "SAE"
    )
    return True
