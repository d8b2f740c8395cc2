"""The record of one place in a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor


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

    def flat(self, x: Tensor) -> Tensor:
        """The activations with a row a token, where they may be those of heads."""
        return x.flatten(2) if self.per_head and x.dim() == 4 else x
