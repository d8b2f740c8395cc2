"""What is found in a model: its hook points by name, and what it must not be asked for."""

from dataclasses import dataclass, field

from .hook_point import HookPoint


@dataclass
class Survey:
    """What was found."""

    points: dict[str, HookPoint] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)  # a name one would ask for, and why it is not given
    overlooked: list[str] = field(default_factory=list)  # of those, blocks that should have neurons as others do
    ambiguous: str | None = None  # why there are no names, though there are MLPs


def refusal(name: str, experts: str) -> str:
    """Why a mixture of experts is not captured."""
    return (
        f"{name} is a mixture of experts ({experts} holds many MLPs' weights): each token visits only some of them, so "
        "there is no one row of neurons for a token, and pyfacts does not capture experts. Dense and shared MLPs "
        "beside them, and the residual stream, can be captured (pyfacts.hook_points lists them)."
    )
