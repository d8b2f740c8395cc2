"""Durable files: unique directories, fsync, and put-if-absent.

Nothing that a reader may see is ever half-written: files become durable inside a directory of a unique name, and a
record that names the directory appears under its final name in one step, for one writer only.
"""

import contextlib
import errno
import os
import secrets
import shutil
from pathlib import Path

# What os.link says where a file system has no hard links.
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV, errno.EINVAL}


def unique_name(prefix: str) -> str:
    """Returns `prefix` and 12 random hexadecimal digits."""
    return f"{prefix}-{secrets.token_hex(6)}"


def make_unique_directory(parent: Path, prefix: str) -> Path:
    """Makes a directory that nobody else writes to. Its mode is what the umask leaves of 0o777."""
    directory = parent / unique_name(prefix)
    directory.mkdir()
    return directory


def fsync_directory(directory: Path) -> None:
    """Makes the names in a directory durable."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_durably(path: Path, data: bytes) -> None:
    """Writes a new file and its bytes to the disk; OSError if it exists, or the disk refuses (nothing is left)."""
    with open(path, "xb") as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            path.unlink(missing_ok=True)
            raise


def has_hard_links(directory: Path) -> bool:
    """Tries whether the file system of `directory` makes hard links."""
    probe, link = directory / unique_name(".probe"), directory / unique_name(".probe")
    write_durably(probe, b"")
    try:
        os.link(probe, link)
    except FileNotFoundError:  # a worker that is done has swept it away
        return has_hard_links(directory)
    except OSError as error:
        if error.errno in _NO_LINKS:
            return False
        raise
    else:
        link.unlink(missing_ok=True)
        return True
    finally:
        probe.unlink(missing_ok=True)


def put_if_absent(source: Path, target: Path, *, use_links: bool) -> bool:
    """Gives a durable file its final name unless somebody was first; `source` is gone afterwards.

    With hard links this is exact. A link that fails with EEXIST may still be ours, because NFS repeats a call whose
    answer was lost: then both names are one inode. As soon as the link is there, a worker that is done may sweep
    `source` away. Without hard links two writers that find no target may both rename; each candidate is whole, and the
    last one stands.

    Returns:
        Whether `target` is now the file that was `source`.
    """
    try:
        if use_links:
            ours = os.stat(source)
            try:
                os.link(source, target)
                won = True
            except FileExistsError:
                won = os.path.samestat(ours, os.stat(target))
            source.unlink(missing_ok=True)
        else:
            won = not target.exists()
            if won:
                os.rename(source, target)
            else:
                source.unlink()
    except FileNotFoundError:
        # The winner swept our directory away.
        if not target.exists():
            raise
        return False
    if won:
        fsync_directory(target.parent)
    return won


def remove_tree(directory: Path) -> None:
    """Removes a directory of our own; what cannot be removed stays and is ignored by readers."""
    with contextlib.suppress(OSError):
        shutil.rmtree(directory)
