"""Errors of dumps."""

import os
import signal


class DumpError(RuntimeError):
    """A dump cannot be written or read: the message names the file and, for bad data, the tensor and the byte offset.

    Example:
        >>> str(DumpError("3 bytes are missing", path="out/00000.json"))
        'out/00000.json: 3 bytes are missing'
    """

    def __init__(
        self,
        message: str,
        *,
        path: str | os.PathLike[str] | None = None,
        tensor: str | None = None,
        offset: int | None = None,
    ) -> None:
        self.what = message
        self.path = None if path is None else os.fspath(path)
        self.tensor = tensor
        self.offset = offset
        where = "" if path is None else f"{self.path}: "
        if tensor is not None:
            where += f"tensor {tensor!r}: "
        if offset is not None:
            where = f"{where.removesuffix(': ')} at byte {offset}: "
        super().__init__(where + message)


class DumpInterrupted(RuntimeError):
    """A signal stopped a dump between two batches. What was committed is safe; the same call resumes.

    Attributes:
        signum: the signal that was received.
        shards_done, shards_total: how many shards are committed, and how many there will be.
    """

    def __init__(self, signum: int, shards_done: int, shards_total: int) -> None:
        self.signum, self.shards_done, self.shards_total = signum, shards_done, shards_total
        super().__init__(
            f"{signal.Signals(signum).name} stopped the dump with {shards_done} of {shards_total} shards committed; "
            "the same call resumes it"
        )

    def __reduce__(self) -> tuple:
        return type(self), (self.signum, self.shards_done, self.shards_total), vars(self)
