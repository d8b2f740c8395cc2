"""What several messages say alike; without torch, for readers of dumps."""

from collections.abc import Iterable


def some(names: Iterable[str]) -> str:
    """The first five, and how many more there are."""
    listed = list(names)
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")


def human_bytes(n_bytes: float) -> str:
    """Returns a size for people, in decimal units: "12.3 MB"."""
    size = float(n_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
