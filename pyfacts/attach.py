"""SAEs attached to a model's hooks: what one is, and the hook point at which its latents are captured.

The latents of an SAE at `blocks.3.hook_resid_pre` are called `blocks.3.hook_resid_pre.hook_sae_acts_post`, as SAELens'
`HookedSAETransformer` calls them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from .encoding import EncodedActivations
from .hook_point import HookPoint
from .models import Names, NamesFilter
from .warn import warn

LATENTS = "hook_sae_acts_post"

Self = TypeVar("Self", bound="SparseAutoencoder")


@runtime_checkable
class SparseAutoencoder(Protocol):
    """The encoder's half of an SAE: what `capture(saes=...)` and `dump(saes=...)` take.

    Example:
        >>> import pyfacts, torch
        >>> class TopK:
        ...     d_in, d_sae, dtype, device = 8, 512, torch.float32, torch.device("cpu")
        ...     W_enc = torch.randn(8, 512)
        ...     def encode(self, x):
        ...         return pyfacts.linear_topk_encode(x.to(self.dtype), self.W_enc.T, None, k=4)
        ...     def tensors(self):
        ...         return {"W_enc": self.W_enc}
        ...     def config(self):
        ...         return {"architecture": "topk", "k": 4}
        ...     def to(self, device):
        ...         return self
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Linear(8, 3))
        >>> with pyfacts.capture(model, saes={"1": TopK()}) as cache:
        ...     _ = model(torch.randn(6, 3))
        >>> cache["1.hook_sae_acts_post"].shape
        torch.Size([6, 512])
    """

    @property
    def d_in(self) -> int:
        """Width of what it reads."""

    @property
    def d_sae(self) -> int:
        """Number of latents."""

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in, and the dtype of the latents."""

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""

    def encode(self, x: Tensor, /) -> EncodedActivations:
        """The latents [n_tokens, d_sae] of x [n_tokens, d_in], of any dtype; x is the model's and must not change."""

    def tensors(self) -> dict[str, Tensor]:
        """Its weights by name. With `config`, they identify it: a dump resumes only with the same SAE."""

    def config(self) -> dict[str, Any]:
        """What else decides the latents, as JSON values."""

    def to(self: Self, device: torch.device, /) -> Self:
        """The SAE on another device."""


SaesByHook = Mapping[str, SparseAutoencoder]


def resolve_captured(
    model: nn.Module, names_filter: NamesFilter, saes: SaesByHook | None
) -> tuple[list[HookPoint], dict[HookPoint, SparseAutoencoder]]:
    """The hooks of a capture, and those of its SAEs' latents.

    Args:
        model: the model.
        names_filter: see `resolve_hooks`; but None is no hook if there are SAEs.
        saes: SAEs by the name of the hook whose activations they read.

    Returns:
        The hooks that `names_filter` names, and {hook of the latents: SAE}.

    Raises:
        ValueError: an unknown hook (with close matches), an SAE of another width than its hook, or latents that
            `names_filter` names too (a `HookedSAETransformer` has hooks of that name).
        TypeError: `saes` is no mapping from names to SAEs.
    """
    names = Names(model)
    latents = attach(names, saes) if saes else {}
    points = names.chosen(names_filter) if names_filter is not None or not latents else []
    if twice := {point.name for point in points} & {point.name for point in latents}:
        raise ValueError(f"{min(twice)} is named by names_filter and captured from saes: leave one of them out")
    return points, latents


def attach(names: Names, saes: SaesByHook) -> dict[HookPoint, SparseAutoencoder]:
    """The hooks of the SAEs' latents, each with its SAE, in the order of `saes`; raises as `resolve_captured` does."""
    if not isinstance(saes, Mapping):
        raise TypeError(f"saes must be a dict from hook names to SAEs, got {type(saes).__name__}")
    attached = {}
    for name, sae in saes.items():
        if isinstance(sae, type) or not isinstance(sae, SparseAutoencoder):
            raise TypeError(
                f"the SAE at {name!r} must have d_in, d_sae, dtype, device, encode, tensors, config and to, got "
                f"{sae!r:.80}. Save another library's SAE with that, and load it with pyfacts.load_sae(path)"
            )
        point = names.one(name)
        if point.width is not None and point.width != sae.d_in:
            raise ValueError(
                f"the SAE at {name} reads d_in = {sae.d_in}, but that hook's width is {point.width}: it was trained on "
                "another hook or another model"
            )
        _warn_if_elsewhere(names, point, sae)
        _warn_of_side(names, point)
        latents = replace(point, name=f"{name}.{LATENTS}", width=sae.d_sae, kind="neurons", activation=None)
        attached[latents] = sae
    return attached


def _warn_if_elsewhere(names: Names, point: HookPoint, sae: SparseAutoencoder) -> None:
    """Warn if the SAE's own hook is another one of this model: in the residual stream all widths are the same."""
    own = getattr(sae, "hook_name", None)
    if not isinstance(own, str):
        return
    try:
        trained_on = names.one(own)
    except ValueError:  # named as in another library
        return
    if not names.same(trained_on, point):
        warn(f"the SAE at {point.name} was trained on {own}, as its checkpoint says")


def _warn_of_side(names: Names, point: HookPoint) -> None:
    """Warn of the path of a block or an MLP, whose input and output are equally wide, without saying which is meant."""
    if point.name in names.points or point.name != point.module_path or point.width is not None:
        return
    if any(True for _ in names.model.get_submodule(point.module_path).children()):
        warn(
            f"the SAE at {point.name} reads that module's input; other libraries' hooks on a module are on its output. "
            f"Say {point.name}:input or {point.name}:output"
        )


def encode_latents(point: HookPoint, sae: SparseAutoencoder, x: Tensor) -> EncodedActivations:
    """The latents of x [n_tokens, d_in] in the SAE's own dtype, whatever autocast the model runs under; checked."""
    with torch.autocast(x.device.type, enabled=False):
        latents = sae.encode(x)
    if not isinstance(latents, EncodedActivations):
        raise TypeError(f"{point.name}: the SAE's encode gave {type(latents).__name__}, not EncodedActivations")
    if latents.shape != (x.shape[0], sae.d_sae):
        raise ValueError(
            f"{point.name}: the SAE gave latents {tuple(latents.shape)} for {x.shape[0]} tokens and d_sae = {sae.d_sae}"
        )
    return latents
