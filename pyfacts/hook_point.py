"""What a survey of a model finds: its hook points by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class HookPoint:
    """One place in a model where activations can be read or set.

    Attributes:
        name: as given to `capture`: `blocks.3.mlp.hook_post`, or a module path such as `fc2` or `fc2:output`.
        module_path: the module that is hooked, relative to the model without wrappers such as `torch.compile`'s.
        side: whether the module's input or its output is meant.
        width: the activations' last dimension, None where the module does not tell.
        kind: "neurons" are encoded, "rows" (the residual stream and its like) are kept as they are.
        activation: the name of the MLP's activation function as the config has it, None if there is none.
        stream: whose tokens the rows are: "encoder" or "decoder" in a model that has both, else "" (for a module path
            into another tower, such as a vision encoder's, the name itself).
        per_head: whether TransformerLens may hand them out as [batch, pos, n_heads, d_head]: one row of all heads.
    """

    name: str
    module_path: str
    side: Literal["input", "output"]
    width: int | None
    kind: Literal["neurons", "rows"]
    activation: str | None = None
    stream: str = ""
    per_head: bool = False


@dataclass
class Survey:
    points: dict[str, HookPoint] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)  # a name one would ask for, and why it is not given
    ambiguous: str | None = None  # why there are no names, though there are MLPs


def refusal(name: str, experts: str) -> str:
    """Why a mixture of experts is not captured."""
    return (
        f"{name} is a mixture of experts ({experts} holds many MLPs' weights): each token visits only some of them, so "
        "there is no one row of neurons for a token, and pyfacts does not capture experts. Dense and shared MLPs "
        "beside them, and the residual stream, can be captured (pyfacts.hook_points lists them)."
    )
