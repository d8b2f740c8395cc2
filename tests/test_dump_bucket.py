"""Dumps in an object store: an S3 server on loopback, spoken to as anybody's S3 is."""

import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import dump_models
import numpy as np
import pytest
import s3fs
import torch
from dump_models import ARGUMENTS, HOOKS, N_SEQUENCES, TinyModel, committed_bytes, one_thread, tokens  # noqa: F401
from moto.server import ThreadedMotoServer

from pyfacts.dump import DumpError, DumpInterrupted, bucket, open_dump
from pyfacts.dump.bucket import Bucket, RemoteFile
from pyfacts.dump.run import dump
from pyfacts.dump.store import Directory, open_store


@pytest.fixture(scope="module")
def server():
    """A server, and the environment that leads to it."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "loopback")
        s3fs.S3FileSystem().mkdir("dumps")
        yield server
    server.stop()


@pytest.fixture(autouse=True)
def clients_of_their_own():
    """A client remembers its server."""
    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def address(server, request):
    return f"s3://dumps/{request.node.name}/out"


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """The same dump in a directory."""
    root = tmp_path_factory.mktemp("local") / "out"
    return dump(TinyModel(), tokens(N_SEQUENCES), root, **ARGUMENTS)


def stored(address: str, to: Path) -> dict[str, bytes]:
    """What `committed_bytes` says of all that is stored at an address."""
    shutil.rmtree(to, ignore_errors=True)
    s3fs.S3FileSystem().get(address, str(to), recursive=True)
    return committed_bytes(to)


def resume(address, **changes):
    return dump(TinyModel(), tokens(N_SEQUENCES), address, **ARGUMENTS | changes)


def test_the_bytes_are_those_of_a_directory(address, local, tmp_path):
    d = resume(address)
    assert d.complete and d.path == address
    assert stored(address, tmp_path / "copy") == committed_bytes(Path(local.path))


def test_it_reads_as_a_directory_does(address, local):
    resume(address)
    d = open_dump(address)
    assert d.verify() == local.verify() and repr(address) in repr(d)
    assert torch.equal(d.token_ids[100:9000], local.token_ids[100:9000])
    for hook in HOOKS:
        assert torch.equal(d[hook][4000:11000].to_dense(), local[hook][4000:11000].to_dense())
        assert d[hook].top_tokens(7) == local[hook].top_tokens(7)
        assert all(map(torch.equal, d[hook].neuron(299), local[hook].neuron(299)))
        assert np.array_equal(d[hook].feature_stats().max, local[hook].feature_stats().max)
    pairs = zip(d.batches(HOOKS, 1000, seed=1), local.batches(HOOKS, 1000, seed=1), strict=True)
    assert all(torch.equal(a[hook], b[hook]) for a, b in pairs for hook in HOOKS)
    assert open_dump(address, framework="numpy")[HOOKS[0]][0:5].nnz == local[HOOKS[0]][0:5].nnz


@pytest.mark.parametrize("codec", ["none", "split"])
def test_codecs_and_rows(server, codec, tmp_path):
    address = f"s3://dumps/codec-{codec}"
    arguments = {"names_filter": [HOOKS[0], "layers.1.down:output"], "codec": codec, "batch_size": 8}
    here, there = (dump(TinyModel(), tokens(40), out, **arguments) for out in (tmp_path / "out", address))
    there.verify()
    for hook in there.hook_names:
        a, b = here[hook][3:400], there[hook][3:400]
        assert torch.equal(*(x if isinstance(x, torch.Tensor) else x.to_dense() for x in (a, b)))


def test_a_neuron_fetches_a_part_of_the_file(address, monkeypatch):
    model = TinyModel(width=256 * 40, dtype=torch.float32)
    d = dump(model, tokens(400), address, [HOOKS[0]], codec="none", batch_size=50)
    n_bytes = d[HOOKS[0]].n_bytes
    fetched = []
    fetch = Bucket.fetch
    monkeypatch.setattr(Bucket, "fetch", lambda *args: fetched.append(args[3] - args[2]) or fetch(*args))
    open_dump(address)[HOOKS[0]].neuron(5000)
    assert 0 < sum(fetched) < n_bytes / 4


def test_two_shards_at_most_lie_in_the_temporary_directory(address, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    shards = []
    resume(address, progress=lambda now: shards.append({path.name[:5] for path in tmp_path.glob("*/*")}))
    assert set().union(*shards) == {"00000", "00001", "00002", "00003"} and max(map(len, shards)) <= 2
    assert not list(tmp_path.iterdir())


def test_a_temporary_directory_that_was_cleaned(address, local, tmp_path, monkeypatch):
    """What is gone cannot be committed."""
    commit = Bucket.commit

    def cleaned(self, directory, *args):
        monkeypatch.setattr(Bucket, "commit", commit)
        (directory / "tokens.safetensors").unlink()
        return commit(self, directory, *args)

    monkeypatch.setattr(Bucket, "commit", cleaned)
    with pytest.raises(DumpError, match="No such file.*tokens.safetensors"):
        resume(address)
    assert open_dump(address).n_tokens_committed == 0
    resume(address)
    assert stored(address, tmp_path) == committed_bytes(Path(local.path))


def test_an_interrupted_dump_goes_on(address, local, tmp_path):
    def progress(now):
        if now.tokens_done >= 7000:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(DumpInterrupted):
        resume(address, progress=progress)
    assert open_dump(address).n_tokens_committed == 5120
    assert resume(address).complete
    assert stored(address, tmp_path / "copy") == committed_bytes(Path(local.path))


@pytest.mark.parametrize("point", ["first batch", "mid shard", "before the headers"])
def test_kill_9_then_resume(server, point, local, tmp_path):
    address = f"s3://dumps/killed {point}"
    command = [sys.executable, dump_models.__file__, address, point]
    spool = {"TMPDIR": str(tmp_path)}  # where the killed process leaves its shard
    killed = subprocess.run(command, capture_output=True, check=False, env=os.environ | spool)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    resume(address)
    assert stored(address, tmp_path / "copy") == committed_bytes(Path(local.path))


def test_what_was_uploaded_without_its_record_is_no_part_and_goes(address, local, tmp_path, monkeypatch):
    create = Bucket.create

    def dies(self, name, data):
        if name == "00001.json":
            raise KeyboardInterrupt
        return create(self, name, data)

    monkeypatch.setattr(Bucket, "create", dies)
    with pytest.raises(KeyboardInterrupt):
        resume(address)
    monkeypatch.undo()
    assert any(name.startswith("00001-") for name in open_store(address).names())
    assert open_dump(address).n_tokens_committed == 5120
    resume(address)
    assert stored(address, tmp_path / "copy") == committed_bytes(Path(local.path))


def test_an_attempt_that_loses_removes_what_it_uploaded(address, local, tmp_path, monkeypatch):
    """Another worker commits the shard while this one uploads."""
    commit = Bucket.commit

    def late(self, directory, shard_files, name, data):
        monkeypatch.setattr(Bucket, "commit", commit)
        resume(address)
        return commit(self, directory, shard_files, name, data)

    monkeypatch.setattr(Bucket, "commit", late)
    assert resume(address).complete
    assert stored(address, tmp_path / "copy") == committed_bytes(Path(local.path))


def test_processes_share_the_work(address, local, tmp_path):
    environments = [os.environ | {"RANK": str(rank), "WORLD_SIZE": "3"} for rank in range(3)]
    command = [sys.executable, dump_models.__file__, address, "never"]
    workers = [subprocess.Popen(command, env=env, stderr=subprocess.PIPE) for env in environments]
    for worker in workers:
        _, errors = worker.communicate()
        assert worker.returncode == 0, errors.decode()
    assert stored(address, tmp_path / "copy") == committed_bytes(Path(local.path))


def test_a_name_is_created_once(address):
    first, second = open_store(address), open_store(address)
    assert first.creates_once and first.create("00000.json", b"ours")
    assert not second.create("00000.json", b"theirs") and first.read("00000.json") == b"ours"
    assert first.create("00000.json", b"ours")  # the answer to the first call was lost
    assert first.names() == {"00000.json"}  # no probe stays


def test_a_probe_that_another_worker_sweeps_away(address, monkeypatch):
    """After the store has refused to create it a second time, and before it is read."""
    read = s3fs.S3FileSystem._cat_file

    async def swept(self, path, **kwargs):
        if ".probe-" in path:
            await self._rm_file(path)
        return await read(self, path, **kwargs)

    monkeypatch.setattr(s3fs.S3FileSystem, "_cat_file", swept)
    assert open_store(address).creates_once


ORPHAN = "00000-0123456789ab"


def test_where_names_can_be_created_twice_nothing_is_swept(address, local, tmp_path, monkeypatch):
    create = s3fs.S3FileSystem._pipe_file

    async def forgetful(self, path, data, mode="overwrite", **kwargs):
        await create(self, path, data, **kwargs)

    monkeypatch.setattr(s3fs.S3FileSystem, "_pipe_file", forgetful)
    assert not open_store(address).creates_once
    s3fs.S3FileSystem().pipe_file(f"{address}/{ORPHAN}/x", b"x")
    resume(address).verify()
    assert ORPHAN in open_store(address).names()


def test_a_sweep_takes_nothing_else(server, local, tmp_path):
    """Neither beside the dump nor in it, whatever its own name looks like."""
    address = "s3://dumps/00000-0123456789ab"
    others = ["s3://dumps/00001-0123456789ab", f"{address}/notes-1/a", f"{address}/00001-short/a", f"{address}/a"]
    fs = s3fs.S3FileSystem()
    for other in (*others, f"{address}/{ORPHAN}/x", f"{address}/.probe-left"):
        fs.pipe_file(other, b"x")
    resume(address).verify()
    assert all(map(fs.exists, others))
    assert not fs.exists(f"{address}/{ORPHAN}/x") and not fs.exists(f"{address}/.probe-left")
    assert stored(address, tmp_path / "copy").items() >= committed_bytes(Path(local.path)).items()


def test_an_answer_that_is_lost(address, monkeypatch):
    """The request succeeded, and its repetition is refused."""
    create = s3fs.S3FileSystem._pipe_file

    async def lost(self, *args, **kwargs):
        await create(self, *args, **kwargs)
        raise OSError("the connection was lost")

    monkeypatch.setattr(s3fs.S3FileSystem, "_pipe_file", lost)
    assert open_store(address).create("00000.json", b"ours")
    assert not open_store(address).create("00000.json", b"theirs")


def test_damage_and_absence_are_dump_errors(address, server):
    with pytest.raises(DumpError, match="there is no dump.json"):
        open_dump(address)
    with pytest.raises(DumpError, match="s3://no-such-bucket/x: cannot be written"):
        resume("s3://no-such-bucket/x")
    resume(address)
    fs = s3fs.S3FileSystem()
    (file,) = (path for path in fs.find(address) if "/00002-" in path and "layers.0" in path)
    data = fs.cat_file(file)
    fs.pipe_file(file, data[:-10])
    with pytest.raises(DumpError, match=f"s3://{file}: the file has {len(data) - 10} bytes"):
        open_dump(address).verify()
    fs.pipe_file(file, data[:-10] + bytes(10))
    with pytest.raises(DumpError, match="layers.0"):
        open_dump(address).verify()
    fs.rm_file(file)
    with pytest.raises(DumpError, match=f"s3://{file}: cannot be read"):
        open_dump(address).verify()


def test_a_server_that_is_gone(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    for call in (lambda: open_dump("s3://dumps/x"), lambda: resume("s3://dumps/x")):
        with pytest.raises(DumpError, match="cannot be"):
            call()


def test_addresses():
    store = open_store("file:///tmp/x")
    assert isinstance(store, Directory) and store.address == Path("/tmp/x")
    with pytest.raises(ValueError, match="nowhere"):
        open_store("nowhere://x/y")


def test_the_command_line(address):
    resume(address)
    run = lambda *arguments: subprocess.run(  # noqa: E731
        [sys.executable, "-m", "pyfacts", *arguments], capture_output=True, text=True, check=False
    )
    done = run("verify", address)
    assert done.returncode == 0 and f"{address}: 16,000 tokens" in done.stdout, done.stderr
    assert address in run("info", address).stdout


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_processes_read_it(address, method):
    """As a DataLoader's do; a forked one has the files that its parent had opened."""
    d = resume(address)
    expected = d.token_ids[:3].tolist()
    loader = torch.utils.data.DataLoader([d], num_workers=1, collate_fn=first_tokens, multiprocessing_context=method)
    assert list(loader) == [expected]


def first_tokens(dumps):
    dumps[0][HOOKS[0]][5000:9000]
    return dumps[0].token_ids[:3].tolist()


def test_what_another_process_stores_is_seen(address):
    """fsspec would remember the first listing."""
    store = open_store(address)
    other = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
    other.pipe_file(f"{address}/dump.json", b"x")
    assert store.names() == {"dump.json"}
    other.pipe_file(f"{address}/00000.json", b"x")
    assert store.names() == {"dump.json", "00000.json"} and store.exists("00000.json")


class Served:
    """A bucket of one file, or of its first bytes."""

    def __init__(self, data, cut=None):
        self.data, self.cut = data, cut

    def where(self, name):
        return name

    def fetch(self, name, begin, end):
        return self.data[begin:end][: self.cut]


def test_ranges_in_and_across_what_is_kept(monkeypatch):
    monkeypatch.setattr(bucket, "READ_AHEAD_BYTES", 16)
    data = bytes(range(100))
    file = RemoteFile(Served(data), "x", len(data))
    for begin, end in ((0, 4), (4, 16), (10, 20), (12, 26), (0, 3), (50, 90), (52, 60), (98, 100), (99, 100), (7, 7)):
        assert bytes(file.read(begin, end)) == data[begin:end]


def test_an_answer_that_is_cut():
    with pytest.raises(DumpError, match="3 of 100 bytes came"):
        RemoteFile(Served(bytes(100), cut=3), "x", 100).read(0, 50)


def test_where_names_can_be_created_twice_a_loser_leaves_its_files(tmp_path, monkeypatch):
    """The record that stands in the end may be ours after all."""
    store = Bucket("memory://dumps/loser")
    directory = tmp_path / "00000-0123456789ab"
    directory.mkdir()
    (directory / "tokens.safetensors").write_bytes(b"x")
    monkeypatch.setattr(Bucket, "create", lambda self, name, data: False)
    assert not store.creates_once and not store.commit(directory, ["tokens.safetensors"], "00000.json", b"{}")
    assert store.exists(f"{directory.name}/tokens.safetensors") and not directory.exists()
