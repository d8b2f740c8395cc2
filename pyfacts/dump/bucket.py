"""A dump in an object store (S3, Google Cloud Storage, Azure, ...), through fsspec.

Shards are written to a local temporary directory and uploaded when they are whole; their record follows, created only
if there is none. Reading fetches the ranges that are asked for.
"""

import contextlib
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from . import files
from .errors import DumpError
from .store import MAX_JSON_BYTES, Store, attempted_shard

UPLOADS_AT_ONCE = 4  # a client may hold 100 MB of each in memory, of one large file 500 MB
READ_AHEAD_BYTES = 1 << 18  # a block's pointers and digests are read with what stands beside them

# Whose clients create a name by one conditional request. Others look first and then write.
_CONDITIONAL = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az"}


class Bucket(Store):
    """A prefix of an object store.

    Args:
        address: such as `s3://bucket/dump`. Credentials and endpoints are what the store's own tools use.

    Raises:
        ValueError: fsspec does not know the protocol.
        ImportError: it knows which package to install for it.
    """

    def __init__(self, address: str) -> None:
        from fsspec.core import url_to_fs

        self.address: str = address.rstrip("/")
        _, self._root = url_to_fs(self.address)

    @property
    def _fs(self) -> Any:
        """fsspec keeps one a process, which a fork must not share. A listing that is remembered would not show what
        other workers do."""
        from fsspec.core import url_to_fs

        return url_to_fs(self.address, use_listings_cache=False)[0]

    def names(self) -> set[str]:
        with self._reading():
            try:
                found = self._fs.ls(self._root, detail=False)
            except FileNotFoundError:
                return set()
        return {path.rstrip("/").rpartition("/")[2] for path in found}

    def exists(self, name: str) -> bool:
        with self._reading(name):
            return bool(self._fs.exists(self._path(name)))

    def read(self, name: str) -> bytes:
        ((_, data),) = self.read_all([name])
        return data

    def read_all(self, names: Sequence[str]) -> Iterable[tuple[str, bytes]]:
        """Many at a time, where one after another would wait for each."""
        with self._reading():
            found = self._fs.cat_ranges([self._path(name) for name in names], 0, MAX_JSON_BYTES + 1, on_error="return")
        for name, data in zip(names, found, strict=True):
            if isinstance(data, Exception):
                raise DumpError(f"cannot be read: {data}", path=self.where(name)) from data
            if len(data) > MAX_JSON_BYTES:
                raise DumpError("has more bytes than any plan or record", path=self.where(name))
            yield name, data

    def open(self, name: str) -> "RemoteFile":
        with self._reading(name):
            return RemoteFile(self, name, int(self._fs.info(self._path(name))["size"]))

    def fetch(self, name: str, begin: int, end: int) -> bytes:
        """Bytes [begin, end) of a file."""
        with self._reading(name, begin):
            return bytes(self._fs.cat_file(self._path(name), start=begin, end=end))

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        with tempfile.TemporaryDirectory(prefix="pyfacts-") as spool:
            self.spool = Path(spool)
            yield

    @cached_property
    def creates_once(self) -> bool:
        protocols = self._fs.protocol
        if _CONDITIONAL.isdisjoint([protocols] if isinstance(protocols, str) else protocols):
            return False
        probe = files.unique_name(".probe")
        try:
            return self.create(probe, b"first") and not self.create(probe, b"second")
        except FileExistsError:
            return True  # refused, and gone before it could be read: another worker has swept it away
        finally:
            self._remove(self._path(probe))

    def create(self, name: str, data: bytes) -> bool:
        with _as_os_error():
            try:
                self._fs.pipe_file(self._path(name), data, mode="create")
            except Exception as error:
                # Refused, which each store says in its own way; or the answer was lost. What is there tells.
                try:
                    return bool(self._fs.cat_file(self._path(name)) == data)
                except FileNotFoundError:
                    raise error from None
        return True

    def commit(self, directory: Path, shard_files: Sequence[str], name: str, data: bytes) -> bool:
        if self.exists(name):
            return False
        uploaded = [self._path(f"{directory.name}/{file}") for file in shard_files]
        with _as_os_error():
            # By their names, not by what is found: somebody may have cleaned the temporary directory.
            self._fs.put([str(directory / file) for file in shard_files], uploaded, batch_size=UPLOADS_AT_ONCE)
        won = self.create(name, data)
        files.remove_tree(directory)
        if not won and self.creates_once:
            # Only so is it sure that no record will name what was uploaded; other failures leave that to `sweep`.
            for path in uploaded:
                self._remove(path)
        return won

    def sweep(self, committed: Mapping[str, tuple[str, Collection[str]]]) -> None:
        with _as_os_error():
            paths = list(self._fs.find(self._root))
        for path in paths:
            directory, _, file = path.removeprefix(f"{self._root}/").rpartition("/")
            shard = attempted_shard(directory)
            if shard in committed:
                name, kept = committed[shard]
                if directory != name or file not in kept:
                    self._remove(path)
            elif not directory and file.startswith(".probe-"):
                self._remove(path)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _remove(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError), _as_os_error():  # somebody else may have
            self._fs.rm_file(path)

    @contextlib.contextmanager
    def _reading(self, name: str = "", offset: int | None = None) -> Iterator[None]:
        try:
            with _as_os_error():
                yield
        except OSError as error:
            raise DumpError(f"cannot be read: {error}", path=self.where(name).rstrip("/"), offset=offset) from error


class RemoteFile:
    """A `Source` whose ranges are fetched; what stands behind a short one is kept for the next."""

    def __init__(self, bucket: Bucket, name: str, n_bytes: int) -> None:
        self.path, self.n_bytes = bucket.where(name), n_bytes
        self._bucket, self._name = bucket, name
        self._window = 0, b""  # where it begins, and its bytes

    def read(self, begin: int, end: int) -> memoryview:
        at, data = self._window
        if not at <= begin <= end <= at + len(data):
            short = end - begin < READ_AHEAD_BYTES
            at, stop = begin, min(begin + READ_AHEAD_BYTES, self.n_bytes) if short else end
            data = self._bucket.fetch(self._name, begin, stop)
            if len(data) != stop - begin:
                raise DumpError(f"{len(data)} of {stop - begin} bytes came", path=self.path, offset=begin)
            if short:
                self._window = at, data
        return memoryview(data)[begin - at : end - at]

    def check_whole(self) -> None:
        pass  # what was fetched stays


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    """Each store's client has errors of its own."""
    try:
        yield
    except (OSError, DumpError):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error
