"""Dumps that are killed, interrupted, raced or run out of disk: nothing committed is lost, and resuming gives the bytes
of an undisturbed dump."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dump_models
import pytest
import torch
from dump_models import (  # noqa: F401
    ARGUMENTS,
    CONTEXT,
    HOOKS,
    N_SEQUENCES,
    TinyModel,
    committed_bytes,
    hooked,
    one_thread,
    raise_at,
    resume,
    tokens,
)

import pyfacts
from pyfacts.capture import DENSE_ABOVE
from pyfacts.dump import DumpError, DumpInterrupted, arguments, files, open_dump, shard_writer, worker
from pyfacts.dump.run import dump
from pyfacts.dump.store import Directory
from pyfacts.select import topk


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


@pytest.mark.parametrize("point", dump_models.KILL_POINTS)
def test_kill_9_then_resume_gives_the_same_bytes(point, undisturbed, tmp_path):
    out = tmp_path / "out"
    killed = subprocess.run([sys.executable, dump_models.__file__, str(out), point], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    if (out / "dump.json").exists():
        before = open_dump(out)
        assert not before.complete
        before.verify()
    d = resume(out)
    assert d.complete
    assert committed_bytes(out) == undisturbed  # and nothing of the killed attempt is left


def test_an_ablated_model_is_another_one(tmp_path):
    """Its weights are the same, and so would be the plan."""
    model, ids = TinyModel(), tokens(40)
    zeroed = {HOOKS[0]: range(0, 300, 2)}
    with pyfacts.ablate(model, zeroed):
        d = dump(model, ids, tmp_path, names_filter=HOOKS)
        assert dump(model, ids, tmp_path, names_filter=HOOKS).complete  # the same again
    assert d.plan["model"]["ablated"].keys() == {HOOKS[0]}
    with pytest.raises(DumpError, match=r"another dump: model\.ablated\S* is .* there and None here"):
        dump(model, ids, tmp_path, names_filter=HOOKS)
    for indices, value in (({HOOKS[0]: [1]}, 0.0), (zeroed, 1.0), ({HOOKS[1]: range(0, 300, 2)}, 0.0)):
        with pytest.raises(DumpError, match=r"another dump: model\.ablated"), pyfacts.ablate(model, indices, value):
            dump(model, ids, tmp_path, names_filter=HOOKS)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_leave_a_resumable_dump(signum, undisturbed, tmp_path):
    before = signal.getsignal(signum)

    def progress(now):
        if now.tokens_done >= 7000:
            os.kill(os.getpid(), signum)

    with pytest.raises(DumpInterrupted, match=f"{signum.name} .* 1 of 4 shards") as caught:
        resume(tmp_path, progress=progress)
    assert caught.value.signum == signum and signal.getsignal(signum) is before
    assert len(names(tmp_path)) == 3  # the plan, one record, its directory
    assert open_dump(tmp_path).n_tokens_committed == 5120
    seen = []
    resume(tmp_path, progress=seen.append)
    assert seen[0].tokens_resumed == 5120 and seen[-1].tokens_done == seen[-1].tokens_total == N_SEQUENCES * CONTEXT
    assert committed_bytes(tmp_path) == undisturbed


def test_a_signal_that_comes_too_late_goes_to_whom_it_would_have_gone(tmp_path, monkeypatch):
    received = []
    before = signal.signal(signal.SIGTERM, lambda signum, frame: received.append(signum))

    def progress(now):
        if now.shards_done == now.shards_total:
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        assert resume(tmp_path, progress=progress).complete
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_any_exception_leaves_a_resumable_dump(error, undisturbed, tmp_path):
    with pytest.raises(error):
        resume(tmp_path, progress=raise_at(7000, error))
    assert len(names(tmp_path)) == 3
    model = TinyModel()
    dump(model, tokens(N_SEQUENCES), tmp_path, **ARGUMENTS)
    assert model.forwards == (N_SEQUENCES * CONTEXT - 5120) / 128  # the committed shard was not computed again
    assert committed_bytes(tmp_path) == undisturbed


def test_a_finished_dump_is_not_computed_again(tmp_path):
    model = TinyModel()
    dump(model, tokens(100), tmp_path, **ARGUMENTS)
    before, forwards = committed_bytes(tmp_path), model.forwards
    assert dump(model, tokens(100), tmp_path, **ARGUMENTS).complete
    assert model.forwards == forwards and committed_bytes(tmp_path) == before


@pytest.mark.parametrize("damage", ["files", "record"])
def test_a_committed_shard_that_is_gone(damage, undisturbed, tmp_path):
    """It is said what to do, and that helps."""
    resume(tmp_path)
    record = tmp_path / "00001.json"
    if damage == "files":
        shutil.rmtree(tmp_path / json.loads(record.read_text())["directory"])
    else:
        record.write_bytes(record.read_bytes()[:-9])
    message = {"files": "shard 1 was committed, and ", "record": "00001.json: is not valid JSON"}[damage]
    with pytest.raises(DumpError, match=f"{message}.*delete this record"):
        resume(tmp_path)
    record.unlink()
    resume(tmp_path)
    assert committed_bytes(tmp_path) == undisturbed


def test_a_dump_that_fails_gives_the_models_mode_back(tmp_path):
    model = TinyModel().train()
    model.layers[1].eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(KeyboardInterrupt):
        dump(model, tokens(40), tmp_path, **ARGUMENTS, progress=raise_at(1, KeyboardInterrupt))
    assert [module.training for module in model.modules()] == before


def test_a_dump_in_another_thread(undisturbed, tmp_path):
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(resume, tmp_path).result().complete
    assert committed_bytes(tmp_path) == undisturbed


def test_drafts_of_killed_processes_go(undisturbed, tmp_path):
    out = tmp_path / "a" / "b"
    with pytest.raises(KeyboardInterrupt):
        resume(out, progress=raise_at(1, KeyboardInterrupt))
    for name in (".dump.json-0123456789ab", ".probe-0123456789ab"):
        (out / name).write_bytes(b"x")
    resume(out)
    assert committed_bytes(out) == undisturbed


def test_what_a_record_names_is_on_the_disk_before_it(tmp_path, monkeypatch):
    """Files, then their names, then the record; a power cut leaves no record of what is not there."""
    done, fsync, link = [], os.fsync, os.link

    def recorded_fsync(fd):
        fsync(fd)
        path = os.readlink(f"/proc/self/fd/{fd}")
        done.append(path)
        if path.endswith(".json"):
            assert json.loads(Path(path).read_text())
        elif os.path.isfile(path) and ".probe-" not in path:
            assert Path(path).read_bytes()[:8] != bytes(8)  # the header, which is written last

    def recorded_link(source, target):
        if str(target).endswith("00000.json"):
            directory = os.path.dirname(source)
            written = {os.path.join(directory, name) for name in os.listdir(directory)}
            flushed = {path.removesuffix(".tmp") for path in done}
            assert written <= flushed and {directory, str(tmp_path)} <= set(done[-2:])
            done.append("link")
        link(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "link", recorded_link)
    resume(tmp_path)
    assert done[done.index("link") + 1] == str(tmp_path)


def test_without_hard_links_the_first_stays(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).write_text(name)
    target = tmp_path / "00000.json"
    assert files.put_if_absent(tmp_path / "first", target, use_links=False)
    assert not files.put_if_absent(tmp_path / "second", target, use_links=False)
    assert target.read_text() == "first" and list(tmp_path.iterdir()) == [target]


def test_a_shard_whose_files_cannot_be_opened_leaves_nothing(tmp_path, monkeypatch):
    opened = shard_writer.TensorWriter.__init__

    def refused(self, path, header_bytes):
        if path.name.startswith(HOOKS[1]):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        opened(self, path, header_bytes)

    monkeypatch.setattr(shard_writer.TensorWriter, "__init__", refused)
    with pytest.raises(DumpError, match="raise `ulimit -n`"):
        resume(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["dump.json"]


class TestDisk:
    def test_a_full_disk_is_one_clear_error(self, tmp_path):
        full = pytest.raises(DumpError, match="out: cannot be written: the disk is full.*resumes")
        with full, Directory(tmp_path).write_errors():
            raise OSError(errno.ENOSPC, "No space left on device", "out")

    def test_a_disk_that_takes_no_more(self, undisturbed, tmp_path):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)

        def progress(now):
            if now.shards_done >= 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))

        try:
            with pytest.raises(DumpError, match="File too large.*resumes"):
                resume(tmp_path, progress=progress)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        n_shards = len(list(tmp_path.glob("*.json"))) - 1  # one, or another whose commit was on its way
        assert 1 <= n_shards < 4 and len(names(tmp_path)) == 1 + 2 * n_shards
        open_dump(tmp_path).verify()
        resume(tmp_path)
        assert committed_bytes(tmp_path) == undisturbed

    @pytest.mark.parametrize("call", [1, 2, 3, 4, 8, 9, 10])
    def test_an_fsync_error_abandons_the_attempt(self, call, undisturbed, tmp_path, monkeypatch):
        real, calls = os.fsync, []

        def fsync(fd):
            calls.append(fd)
            if len(calls) == call:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            real(fd)

        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(DumpError, match="Input/output error"):
            resume(tmp_path)
        monkeypatch.setattr(os, "fsync", real)
        if (tmp_path / "dump.json").exists():
            open_dump(tmp_path).verify()
        resume(tmp_path)
        assert committed_bytes(tmp_path) == undisturbed

    def test_without_hard_links(self, undisturbed, tmp_path, monkeypatch):
        def link(*_):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))

        monkeypatch.setattr(os, "link", link)
        with pytest.raises(KeyboardInterrupt):
            resume(tmp_path, progress=raise_at(7000, KeyboardInterrupt))
        resume(tmp_path)
        assert committed_bytes(tmp_path) == undisturbed

    def test_out_is_a_file(self, tmp_path):
        (tmp_path / "out").write_text("not a directory")
        with pytest.raises(DumpError, match="out: is a file"):
            resume(tmp_path / "out")

    def test_a_plan_that_cannot_be_written_leaves_nothing(self, tmp_path, monkeypatch):
        def full(fd):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(DumpError, match="the disk is full"):
            resume(tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_the_current_directory_may_change(self, undisturbed, tmp_path, monkeypatch):
        (tmp_path / "other").mkdir()
        monkeypatch.chdir(tmp_path)
        d = resume("out", progress=lambda now: os.chdir(tmp_path / "other"))
        assert d[HOOKS[0]][:].nnz and not list((tmp_path / "other").iterdir())
        assert committed_bytes(tmp_path / "out") == undisturbed

    def test_records_that_go_meanwhile(self, undisturbed, tmp_path):
        def progress(now):
            if now.shards_done >= 1:
                (tmp_path / "00000.json").unlink(missing_ok=True)

        with pytest.raises(DumpError, match="records of committed shards have gone"):
            resume(tmp_path, progress=progress)
        resume(tmp_path)
        assert committed_bytes(tmp_path) == undisturbed


class TestBesideTheForwards:
    """A shard is committed while the next one is computed, and the hooks of a block are written at the same time."""

    FIRST = 5120  # tokens of the first shard

    @pytest.fixture
    def committing(self, monkeypatch):
        """The first commit waits for this event, and raises what is put in its `error`."""
        event = threading.Event()
        event.error = None
        commit = Directory.commit

        def late(self, directory, shard_files, name, data):
            if name == "00000.json":
                assert event.wait(60), "the shard after it did not begin"
                if event.error:
                    raise event.error
            return commit(self, directory, shard_files, name, data)

        monkeypatch.setattr(Directory, "commit", late)
        return event

    def test_the_next_shard_does_not_wait(self, committing, undisturbed, tmp_path):
        done = []

        def progress(now):
            if now.tokens_done > self.FIRST and not committing.is_set():
                done.append(now.shards_done)
                committing.set()

        assert resume(tmp_path, progress=progress).complete
        assert done == [0] and committed_bytes(tmp_path) == undisturbed

    def test_a_commit_that_fails_stops_the_dump(self, committing, undisturbed, tmp_path):
        committing.error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        model = TinyModel()

        def progress(now):
            if now.tokens_done > self.FIRST:
                committing.set()

        with pytest.raises(DumpError, match="the disk is full"):
            dump(model, tokens(N_SEQUENCES), tmp_path, **ARGUMENTS, progress=progress)
        assert model.forwards <= 2 * self.FIRST / 128  # no third shard
        assert names(tmp_path) == ["dump.json"]
        committing.error = None
        resume(tmp_path)
        assert committed_bytes(tmp_path) == undisturbed

    @pytest.mark.parametrize("interrupt", ["SIGTERM", "KeyboardInterrupt"])
    def test_an_interrupt_lets_the_commit_end(self, interrupt, committing, undisturbed, tmp_path):
        def progress(now):
            if now.tokens_done > self.FIRST:
                threading.Timer(0.1, committing.set).start()
                if interrupt == "KeyboardInterrupt":
                    raise KeyboardInterrupt
                os.kill(os.getpid(), signal.SIGTERM)

        expected = KeyboardInterrupt if interrupt == "KeyboardInterrupt" else DumpInterrupted
        with pytest.raises(expected, match=None if expected is KeyboardInterrupt else "1 of 4 shards"):
            resume(tmp_path, progress=progress)
        assert len(names(tmp_path)) == 3 and open_dump(tmp_path).n_tokens_committed == self.FIRST
        resume(tmp_path)
        assert committed_bytes(tmp_path) == undisturbed

    @pytest.mark.parametrize("n_threads", [1, 2, 4])
    def test_the_number_of_cores_changes_no_byte(self, n_threads, undisturbed, tmp_path, monkeypatch):
        monkeypatch.setattr(worker, "cores", lambda: n_threads)
        resume(tmp_path)
        assert committed_bytes(tmp_path) == undisturbed

    def test_hooks_are_written_at_the_same_time(self, tmp_path, monkeypatch):
        monkeypatch.setattr(worker, "cores", lambda: 2)
        both, add = threading.Barrier(2, timeout=60), shard_writer.HookWriter.add_encoding
        monkeypatch.setattr(shard_writer.HookWriter, "add_encoding", lambda *args: both.wait() >= 0 and add(*args))
        assert resume(tmp_path).complete

    def test_one_hook_that_cannot_be_written(self, undisturbed, tmp_path, monkeypatch):
        """The other is still being written when the error comes, and the attempt is removed after that."""
        add = shard_writer.HookWriter.add_encoding

        def fails(self, *args):
            if self._hook.name == HOOKS[0]:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            time.sleep(0.2)
            add(self, *args)

        monkeypatch.setattr(worker, "cores", lambda: 2)
        monkeypatch.setattr(shard_writer.HookWriter, "add_encoding", fails)
        with pytest.raises(DumpError, match="Input/output error"):
            resume(tmp_path)
        assert names(tmp_path) == ["dump.json"]
        monkeypatch.setattr(shard_writer.HookWriter, "add_encoding", add)
        resume(tmp_path)
        assert committed_bytes(tmp_path) == undisturbed

    def test_more_files_than_may_be_open_wait_for_the_commit(self, committing, undisturbed, tmp_path, monkeypatch):
        opened = shard_writer.TensorWriter.__init__
        failed = []

        def limited(self, path, header_bytes):
            if path.parent.name.startswith("00001") and not failed:
                failed.append(path)
                threading.Timer(0.1, committing.set).start()
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            opened(self, path, header_bytes)

        monkeypatch.setattr(shard_writer.TensorWriter, "__init__", limited)
        assert resume(tmp_path).complete
        assert failed and committed_bytes(tmp_path) == undisturbed

    def test_cores_are_shared_with_torchruns_other_processes(self, monkeypatch):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)
        for processes, expected in ((None, 12), ("8", 1), ("5", 2), ("1", 12), ("64", 1)):
            if processes:
                monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
            assert arguments.cores() == expected

    def test_torchruns_number_of_processes_is_no_number(self, tmp_path, monkeypatch):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "many")
        with pytest.raises(ValueError, match="LOCAL_WORLD_SIZE must be an integer, got 'many'"):
            resume(tmp_path / "out")
        assert not (tmp_path / "out").exists()


class TestUnfinished:
    def test_committed_shards_read_and_the_rest_is_named(self, tmp_path):
        with pytest.raises(KeyboardInterrupt):
            resume(tmp_path, rank=1, world_size=2, progress=raise_at(5120 + 1, KeyboardInterrupt))
        d = open_dump(tmp_path)
        assert not d.complete and d.n_tokens == N_SEQUENCES * CONTEXT and d.n_tokens_committed == 5120
        assert "1 of 4" in repr(d)
        expected = hooked(TinyModel(), HOOKS[:1], [(ids,) for ids in tokens(N_SEQUENCES).split(8)])[HOOKS[0]]
        assert torch.equal(d[HOOKS[0]][5120:10240].to_dense(), expected[5120:10240])
        for bad in (slice(5119, 5121), slice(0, 1), slice(10239, 10241)):
            with pytest.raises(DumpError, match=r"tokens \d+:\d+ .*not committed.*resume"):
                d[HOOKS[0]][bad]
        found, _ = d[HOOKS[0]].neuron(9)
        assert torch.equal(found, 5120 + expected[5120:10240, 9].nonzero()[:, 0])
        assert all(5120 <= c.start for c in d.contexts(HOOKS[0], 9, 5))
        assert sum(len(b[HOOKS[0]]) for b in d.batches(HOOKS, 999, 0)) == 5120


class TestDense:
    def model(self):
        model = TinyModel()
        with torch.no_grad():
            for layer in model.layers:
                layer.up.bias.add_(100)
        return model

    def test_a_dense_model_is_refused_with_the_remedy_and_leaves_nothing(self, tmp_path):
        out = tmp_path / "out"
        with pytest.raises(ValueError, match=r"\d+% dense \(layers\.\d\.down: \d+%\).*[kMG]B.*topk.*allow_dense"):
            dump(self.model(), tokens(50), out, names_filter=HOOKS)
        assert not out.exists()

    def test_unless_it_is_allowed_or_selected(self, tmp_path):
        d = dump(self.model(), tokens(50), tmp_path / "dense", names_filter=HOOKS, allow_dense=True)
        assert d[HOOKS[0]].density > DENSE_ABOVE
        assert dump(self.model(), tokens(50), tmp_path / "dense", names_filter=HOOKS).complete  # decided already
        dump(self.model(), tokens(50), tmp_path / "selected", names_filter=HOOKS, select=topk(4))


def test_memory_does_not_grow_with_tokens(tmp_path):
    """Eight shards of many MB each in packed form, and what is resident grows by less than one and a half of them."""
    model, resident = TinyModel(width=4096), []

    def progress(now):
        with open("/proc/self/statm") as file:
            shard = (now.tokens_done - 1) // 4096  # that was computed; its commit may come at any time
            resident.append((shard, int(file.read().split()[1]) * resource.getpagesize()))

    d = dump(model, tokens(8 * 256), tmp_path, names_filter=HOOKS, codec="none", shard_tokens=4096, progress=progress)
    shard_bytes = d.n_bytes / d.n_shards
    assert d.n_shards == 8 and shard_bytes > 10e6
    peaks = [max(size for computed, size in resident if computed == shard) for shard in range(8)]
    assert peaks[-1] - peaks[2] < 1.5 * shard_bytes
