"""Where a dump lies: a directory, or a prefix of an object store.

Names are those of FORMAT.md: `dump.json`, `00000.json`, `00000-66e49e3fe6d7/tokens.safetensors`. A shard is written in
a local directory and becomes readable in one step, when its record appears.
"""

import contextlib
import errno
import mmap
import os
import re
import stat
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

from . import files
from .errors import DumpError

MAX_JSON_BYTES = 1 << 30
_FULL = {errno.ENOSPC, errno.EDQUOT}
_TOO_MANY = {errno.EMFILE, errno.ENFILE}


class Source(Protocol):
    """The bytes of one file.

    Attributes:
        path: the file, for messages.
        n_bytes: its size.
    """

    path: str
    n_bytes: int

    def read(self, begin: int, end: int) -> memoryview:
        """Bytes [begin, end), which lie within the file; DumpError if they have gone."""

    def check_whole(self) -> None:
        """DumpError if what was read has gone."""


class Store(ABC):
    """A dump's files.

    Attributes:
        address: what `open_dump` takes.
        spool: a local directory for what is written, within `writing`.
    """

    address: str | Path
    spool: Path

    def where(self, name: str) -> str:
        """A file's path or address, for messages."""
        return f"{self.address}/{name}"

    # ---- reading -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def names(self) -> set[str]:
        """The files and directories at the top; none if there is nothing."""

    @abstractmethod
    def exists(self, name: str) -> bool: ...

    @abstractmethod
    def read(self, name: str) -> bytes:
        """A small file, whole; DumpError if that cannot be."""

    def read_all(self, names: Sequence[str]) -> Iterable[tuple[str, bytes]]:
        """Small files by name, as `read`."""
        return ((name, self.read(name)) for name in names)

    @abstractmethod
    def open(self, name: str) -> Source:
        """A large file; DumpError if that cannot be."""

    # ---- writing -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def writing(self) -> contextlib.AbstractContextManager[None]:
        """Makes the store ready to be written; leaves nothing if the body fails before it has written anything."""

    @property
    @abstractmethod
    def creates_once(self) -> bool:
        """Whether of two that create the same name always one alone succeeds; tried when it is asked for first."""

    def new_directory(self, prefix: str) -> Path:
        """A local directory of a unique name, for the files of one shard."""
        return files.make_unique_directory(self.spool, prefix)

    @abstractmethod
    def create(self, name: str, data: bytes) -> bool:
        """Puts a file there unless its name is taken. Returns whether it is ours."""

    @abstractmethod
    def commit(self, directory: Path, shard_files: Sequence[str], name: str, data: bytes) -> bool:
        """Makes the files of a `new_directory` durable and readable under its name, then creates their record."""

    @abstractmethod
    def sweep(self, committed: Mapping[str, tuple[str, Collection[str]]]) -> None:
        """Removes what killed processes left behind: drafts, other directories of these shards, other files in theirs.

        Args:
            committed: by the shards' names, their directories and what belongs there.
        """

    @contextlib.contextmanager
    def write_errors(self) -> Iterator[None]:
        """Turns what the disk or the store says into a DumpError."""
        try:
            yield
        except OSError as error:
            full = error.errno in _FULL
            reason = "the disk is full" if full else str(error)
            if error.errno in _TOO_MANY:
                reason += " (a shard has one for each hook: raise `ulimit -n`, or dump fewer hooks at once)"
            raise DumpError(
                f"cannot be written: {reason}. Shards that are committed are intact; the same call resumes",
                path=error.filename or (self.spool if full else self.address),
            ) from error


class Directory(Store):
    """A directory of a file system, which several machines may share."""

    def __init__(self, root: Path) -> None:
        self.root = self.spool = self.address = root

    def names(self) -> set[str]:
        try:
            return set(os.listdir(self.root))
        except (FileNotFoundError, NotADirectoryError):
            return set()
        except OSError as error:
            raise DumpError(f"cannot be read: {error.strerror}", path=self.root) from error

    def exists(self, name: str) -> bool:
        return (self.root / name).exists()

    def read(self, name: str) -> bytes:
        path = self.root / name
        try:
            with open(self._descriptor(name), "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size > MAX_JSON_BYTES:
                    raise DumpError(f"has {size} bytes, more than any plan or record", path=path)
                return file.read(size)
        except OSError as error:
            raise DumpError(f"cannot be read: {error}", path=path) from error

    def open(self, name: str) -> "MappedFile":
        return MappedFile(self._descriptor(name), self.where(name))

    def _descriptor(self, name: str) -> int:
        """A file descriptor of a regular file that lies in the directory, links resolved; DumpError if it does not."""
        path = self.root / name
        try:
            real, root = os.path.realpath(path, strict=True), os.path.realpath(self.root)
            if os.path.commonpath([real, root]) != root:
                raise DumpError(f"leads out of the dump, to {real}", path=path)
            fd = os.open(real, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would block for ever
        except OSError as error:
            raise DumpError(f"cannot be opened: {error.strerror}", path=path) from error
        except ValueError as error:
            raise DumpError(f"cannot be opened: {error}", path=path) from error
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise DumpError("is not a regular file", path=path)
        return fd

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        made = not self.root.exists()
        if not (made or self.root.is_dir()):
            raise DumpError("is a file, and a dump is a directory: give another name", path=self.root)
        with self.write_errors():
            self.root.mkdir(parents=True, exist_ok=True)
        try:
            yield
        except BaseException:
            if made:
                with contextlib.suppress(OSError):
                    self.root.rmdir()
            raise

    @cached_property
    def creates_once(self) -> bool:
        return files.has_hard_links(self.root)

    def create(self, name: str, data: bytes) -> bool:
        draft = self.root / files.unique_name(f".{name}")
        files.write_durably(draft, data)
        return files.put_if_absent(draft, self.root / name, use_links=self.creates_once)

    def commit(self, directory: Path, shard_files: Sequence[str], name: str, data: bytes) -> bool:
        draft = directory / "record.json"
        files.write_durably(draft, data)
        files.fsync_directory(directory)
        files.fsync_directory(self.root)
        return files.put_if_absent(draft, self.root / name, use_links=self.creates_once)

    def sweep(self, committed: Mapping[str, tuple[str, Collection[str]]]) -> None:
        for name in self.names():
            path, shard = self.root / name, attempted_shard(name)
            if shard in committed and name != committed[shard][0]:
                files.remove_tree(path)
            elif name.startswith((".dump.json-", ".probe-")):
                path.unlink(missing_ok=True)
        for directory, kept in committed.values():
            for file in (self.root / directory).iterdir():
                if file.name not in kept:
                    file.unlink(missing_ok=True)


class MappedFile:
    """A `Source` in memory, as far as it is read."""

    def __init__(self, descriptor: int, path: str) -> None:
        self.path = path
        try:
            self.n_bytes = os.fstat(descriptor).st_size
            if self.n_bytes:  # an empty file cannot be mapped
                self._map = mmap.mmap(descriptor, self.n_bytes, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise DumpError(f"cannot be mapped: {error}", path=path) from error
        finally:
            os.close(descriptor)

    def read(self, begin: int, end: int) -> memoryview:
        self.check_whole()
        return memoryview(self._map)[begin:end]

    def check_whole(self) -> None:
        if self._map.size() < self.n_bytes:  # reading beyond the end of a mapped file kills the process
            raise DumpError(f"the file was cut from {self.n_bytes} to {self._map.size()} bytes", path=self.path)


def attempted_shard(directory: str) -> str:
    """The shard that a directory was made for, by its name; "" of another name."""
    found = re.fullmatch("([0-9]{5,})-[0-9a-f]{12}", directory)
    return found[1] if found else ""


def open_store(path: str | os.PathLike[str]) -> Store:
    """The store of a directory, or of an address that fsspec knows (`s3://bucket/dump`)."""
    address = os.fspath(path)
    if not address:
        raise ValueError("the dump's directory or address is empty; '.' is the current directory")
    if isinstance(path, Path) and re.match("(s3a?|gc?s|az|abfss?|adl|hdfs|memory|https?):/[^/]", address):
        raise ValueError(f"{address} was an address before pathlib took one of its slashes: give it as a str")
    if "://" not in address or address.startswith("file:///"):
        # Absolute, for the current directory may become another.
        return Directory(Path(os.path.expanduser(address.removeprefix("file://"))).absolute())
    from .bucket import Bucket

    return Bucket(address)
