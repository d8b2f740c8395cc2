"""Several workers of one dump: they share its shards, and none undoes what another has done."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from dump_models import CONTEXT, N_SEQUENCES, committed_bytes, one_thread, resume  # noqa: F401

from pyfacts.dump import arguments, files, open_dump, shard_writer

SLOW_DUMP = """
import sys, time
from dump_models import *
from pyfacts.dump.run import dump

class SlowModel(TinyModel):
    def forward(self, ids):
        with open(sys.argv[2], "ab") as log:
            log.write(b".")
        time.sleep(0.02)
        return super().forward(ids)

dump(SlowModel(), tokens(N_SEQUENCES), sys.argv[1], **ARGUMENTS | {"shard_tokens": 1024})
"""


def test_a_shard_that_another_worker_commits_meanwhile(undisturbed, tmp_path):
    """The other worker finishes everything while this one is in its second shard."""
    helped = []

    def progress(now):
        if now.tokens_done >= 7000 and not helped:
            helped.append(True)
            resume(tmp_path)

    resume(tmp_path, progress=progress)
    assert helped and committed_bytes(tmp_path) == undisturbed


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_rank_begins_with_its_own_shards_and_helps(rank, undisturbed, tmp_path):
    seen = []

    def progress(now):
        records = {path.name[:5] for path in tmp_path.glob("0*.json")}
        seen.extend(sorted(records - set(seen)))

    resume(tmp_path, rank=rank, world_size=3, progress=progress)
    assert int(seen[0]) == rank and committed_bytes(tmp_path) == undisturbed


def test_what_another_worker_has_begun_comes_last(undisturbed, tmp_path):
    """Also where processes have no numbers, so that all shards are everybody's."""
    (tmp_path / "00000-66e49e3fe6d7").mkdir()
    (tmp_path / "00002-66e49e3fe6d8").mkdir()
    seen = []

    def progress(now):
        seen.extend(sorted({path.name[:5] for path in tmp_path.glob("0*.json")} - set(seen)))

    resume(tmp_path, progress=progress)
    assert seen[0] == "00001" and set(seen[-2:]) == {"00000", "00002"}
    assert committed_bytes(tmp_path) == undisturbed


def test_processes_without_numbers_share_the_work(tmp_path):
    """Two that took the same shards would run every forward twice."""
    out, log = tmp_path / "out", tmp_path / "forwards"
    command = [sys.executable, "-c", SLOW_DUMP, out, log]
    workers = [subprocess.Popen(command, cwd=Path(__file__).parent) for _ in range(2)]
    assert [worker.wait(120) for worker in workers] == [0, 0]
    assert open_dump(out).complete
    assert log.stat().st_size < 1.4 * N_SEQUENCES * CONTEXT / 128


@pytest.mark.parametrize("method", ["__init__", "commit", "_write_tokens", "_rename"])
def test_a_worker_that_is_done_sweeps_while_another_writes(method, undisturbed, tmp_path, monkeypatch):
    """The other worker finishes everything, and removes what is left of this one's attempt."""
    real = getattr(shard_writer.ShardWriter, method)

    def late(*args, **kwargs):
        monkeypatch.setattr(shard_writer.ShardWriter, method, real)
        if method != "__init__":
            resume(tmp_path)
            return real(*args, **kwargs)
        make = files.make_unique_directory

        def swept(*where):
            directory = make(*where)
            monkeypatch.setattr(files, "make_unique_directory", make)
            resume(tmp_path)
            return directory

        monkeypatch.setattr(files, "make_unique_directory", swept)
        return real(*args, **kwargs)

    monkeypatch.setattr(shard_writer.ShardWriter, method, late)
    seen = []
    assert resume(tmp_path, progress=seen.append).complete
    assert seen[-1].tokens_done == seen[-1].tokens_total and committed_bytes(tmp_path) == undisturbed


@pytest.mark.parametrize("repeated", [False, True])
def test_a_worker_that_is_done_sweeps_between_our_link_and_unlink(repeated, undisturbed, tmp_path, monkeypatch):
    """It sees our record, and takes its draft for a remnant. We have won nevertheless, also where NFS has repeated
    the link."""
    link = os.link

    def swept(source, target):
        link(source, target)
        if Path(target).name == "00003.json":
            monkeypatch.setattr(os, "link", link)
            assert resume(tmp_path).complete
            if repeated:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))

    monkeypatch.setattr(os, "link", swept)
    assert resume(tmp_path).complete
    assert committed_bytes(tmp_path) == undisturbed


def test_what_failed_in_a_shard_that_another_worker_commits(undisturbed, tmp_path, monkeypatch):
    """Its error does not stop the next shard."""
    add, helped = shard_writer.HookWriter.add_encoding, []

    def fails(self, *args):
        if helped and self._token_start == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        add(self, *args)

    def progress(now):
        if now.tokens_done >= 4000 and not helped:
            resume(tmp_path)
            (tmp_path / "00002.json").unlink()
            helped.append(True)

    monkeypatch.setattr(shard_writer.HookWriter, "add_encoding", fails)
    assert resume(tmp_path, progress=progress).complete
    assert helped and committed_bytes(tmp_path) == undisturbed


def test_a_probe_that_is_swept_away(tmp_path, monkeypatch):
    link = os.link

    def swept(probe, *args):
        monkeypatch.setattr(os, "link", link)
        os.unlink(probe)
        return link(probe, *args)

    monkeypatch.setattr(os, "link", swept)
    assert files.has_hard_links(tmp_path)
    assert not list(tmp_path.iterdir())


def test_ranks_from_the_environment(tmp_path, monkeypatch):
    rank_of_process = arguments.rank_of_process
    assert rank_of_process(None, None) == (0, 1)
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert rank_of_process(None, None) == (3, 4)
    array = {"ID": "7", "MIN": "5", "STEP": "2", "COUNT": "3"}
    for name, value in array.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    assert rank_of_process(None, None) == (4 * 1 + 3, 4 * 3)
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert rank_of_process(None, None) == (1, 3)
    for name, value in {"ID": "5", "MIN": "0", "MAX": "5", "STEP": "1", "COUNT": "3"}.items():  # --array=0,1,5
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    assert rank_of_process(None, None) == (5, 6)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert rank_of_process(None, None) == (5 * 2 + 1, 6 * 2)
    monkeypatch.delenv("SLURM_ARRAY_TASK_COUNT")
    assert rank_of_process(None, None) == (1, 2)
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ValueError, match="WORLD_SIZE must be an integer, got 'two'"):
        rank_of_process(None, None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, world_size in ((2, 2), (-1, 2), (0, None), (None, 2)):
        with pytest.raises(ValueError, match="world_size"):
            resume(tmp_path / "out", rank=rank, world_size=world_size)
