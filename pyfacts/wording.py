"""What several messages say alike; without torch, for readers of dumps."""

import difflib
from collections.abc import Collection, Iterable


def some(names: Iterable[str]) -> str:
    """The first five, and how many more there are."""
    listed = list(names)
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")


def similar(name: object, names: Collection[str]) -> str:
    """Three of some names: those most like a name that is not among them, or the first."""
    return ", ".join(difflib.get_close_matches(str(name), names, n=3, cutoff=0.5) or list(names)[:3])


def human_bytes(n_bytes: float) -> str:
    """Returns a size for people, in decimal units: "12.3 MB"."""
    size = float(n_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
