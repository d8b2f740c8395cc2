"""Dumps against plain PyTorch hooks: what goes in comes out, by token, by neuron, by value, shuffled."""

import contextlib
import json
import math
import os
import pickle
import shutil
import struct
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from dump_models import (  # noqa: F401
    CONTEXT,
    HOOKS,
    VOCAB,
    WIDTH,
    TinyModel,
    committed_bytes,
    hooked,
    one_thread,
    raise_at,
    resume,
    tokens,
)
from safetensors import safe_open
from tiny_models import opt
from torch import nn

import pyfacts
from pyfacts.dump import DumpError, layout, open_dump, reader, run, shuffle
from pyfacts.dump.run import dump
from pyfacts.select import min_abs, topk

N_SEQUENCES = 700  # three shards of 5,000 tokens and more, of two blocks each


@pytest.fixture(scope="module")
def model():
    return TinyModel()


@pytest.fixture(scope="module")
def ids():
    return tokens(N_SEQUENCES)


@pytest.fixture(scope="module")
def dense(model, ids):
    return hooked(model, HOOKS, [(batch,) for batch in ids.split(8)])


@pytest.fixture(scope="module", params=["none", "zstd", "split"])
def dumped(request, model, ids, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param) / "out"
    return dump(model, ids, out, names_filter=HOOKS, codec=request.param, shard_tokens=5000)


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.int16), b.view(torch.int16))


class TestReading:
    def test_every_range_has_the_models_bits(self, dumped, dense):
        n = N_SEQUENCES * CONTEXT
        assert dumped.n_tokens == n and dumped.complete and dumped.hook_names == HOOKS
        # Across shards, across blocks, at their edges, empty, negative, open.
        edges = [(0, 1), (4095, 4097), (4992, 5008), (5, 5), (n - 1, n)]
        for bounds in [(0, n), *edges, (-7, None), (None, 3), (90, 10**9)]:
            part = slice(*bounds)
            for hook in HOOKS:
                assert same_bits(dumped[hook][part].to_dense(), dense[hook][part])

    def test_a_range_is_what_encode_makes_of_it(self, dumped, dense):
        ours, theirs = dumped[HOOKS[1]][4000:6000], pyfacts.encode(dense[HOOKS[1]][4000:6000])
        assert all(torch.equal(a, b) for a, b in zip(ours.planes, theirs.planes, strict=True))

    def test_chosen_tokens(self, dumped, dense, ids):
        """In any order and more than once, of several shards and blocks; exactly what encode makes of those rows."""
        n = N_SEQUENCES * CONTEXT
        edges = [0, 4095, 4096, 5119, 5120, n - 1]
        shuffled = np.random.default_rng(0).permutation(n)
        for chosen in ([5000, 0, -n, 4096, 4096], [], [7], shuffled, slice(None, None, -977), np.isin(shuffled, edges)):
            rows = torch.from_numpy(np.arange(n)[chosen].copy())
            for hook in HOOKS:
                ours, theirs = dumped[hook][chosen], pyfacts.encode(dense[hook][rows])
                assert all(torch.equal(a, b) for a, b in zip(ours.planes, theirs.planes, strict=True))
            assert torch.equal(dumped.token_ids[chosen], ids.reshape(-1)[rows])
            assert torch.equal(dumped.positions[chosen], torch.stack([rows // CONTEXT, rows % CONTEXT], 1))

    def test_one_token(self, dumped, dense):
        assert same_bits(dumped[HOOKS[0]][-3].to_dense(), dense[HOOKS[0]][-3:-2])

    def test_range_errors(self, dumped):
        n = dumped.n_tokens
        for bad in (n, -n - 1):
            with pytest.raises(IndexError, match=str(n)):
                dumped[HOOKS[0]][bad]
            with pytest.raises(IndexError):
                dumped.token_ids[bad]
        for bad in ([1, n], np.array([-n - 1])):
            with pytest.raises(IndexError, match=f"out of range: there are {n}"):
                dumped[HOOKS[0]][bad]
        with pytest.raises(ValueError, match=rf"must be \[{n}\]"):
            dumped.positions[[True, False]]
        with pytest.raises(TypeError, match="token must be an int"):
            dumped[HOOKS[0]]["1"]
        with pytest.raises(KeyError, match=r"layers\.1\.down"):
            dumped["layers.2.down"]
        for bad in (WIDTH, -WIDTH - 1):
            with pytest.raises(IndexError, match=str(WIDTH)):
                dumped[HOOKS[0]].neuron(bad)

    def test_tokens_and_positions(self, dumped, ids):
        assert torch.equal(dumped.token_ids[:], ids.reshape(-1))
        assert dumped.token_ids[-1] == int(ids[-1, -1])
        rows = torch.arange(N_SEQUENCES).repeat_interleave(CONTEXT)
        columns = torch.arange(CONTEXT).repeat(N_SEQUENCES)
        assert torch.equal(dumped.positions[4990:5010], torch.stack([rows, columns], 1)[4990:5010])
        assert dumped.positions[17].tolist() == [1, 1]

    def test_neurons(self, dumped, dense):
        for j in (0, 255, 256, WIDTH - 1, -1):
            found, values = dumped[HOOKS[0]].neuron(j)
            column = dense[HOOKS[0]][:, j]
            assert torch.equal(found, column.nonzero()[:, 0])
            assert same_bits(values, column[found])

    @pytest.mark.parametrize("k", [1, 20, 10**6])
    def test_top_tokens_are_the_largest_and_ties_the_first(self, dumped, dense, k):
        for j in (3, 256):
            column = dense[HOOKS[1]][:, j].float()
            expected = sorted(((i, v) for i, v in enumerate(column.tolist()) if v), key=lambda p: (-p[1], p[0]))[:k]
            assert dumped[HOOKS[1]].top_tokens(j, k) == expected

    @pytest.mark.parametrize("shard_tokens", [1, 100])
    def test_top_tokens_of_negative_and_infinite_values(self, shard_tokens, tmp_path):
        """In however many shards."""

        class Table(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.embed, self.down = torch.nn.Embedding(4, 1), torch.nn.Linear(1, 1)
                self.embed.weight.data[:] = torch.tensor([[5.0], [-math.inf], [3.0], [-2.0]])

            def forward(self, ids):
                return self.down(self.embed(ids))

        ids = torch.arange(4)[:, None]
        d = dump(Table(), ids, tmp_path, "down", batch_size=1, shard_tokens=shard_tokens, allow_dense=True)
        assert d["down"].top_tokens(0) == [(0, 5.0), (2, 3.0), (3, -2.0)]
        assert list(d) == ["down"]

    def test_statistics_are_read_once_for_all_neurons(self, dumped, monkeypatch):
        """Also of a dump of more shards than files stay open."""
        monkeypatch.setattr(reader, "OPEN_FILES", 1)
        read = []
        real = reader.HookFile.statistics
        monkeypatch.setattr(reader.HookFile, "statistics", lambda self: read.append(self) or real(self))
        hook = open_dump(dumped.path)[HOOKS[0]]
        for j in range(5):
            assert hook.top_tokens(j, 3) == dumped[HOOKS[0]].top_tokens(j, 3)
        assert len([file for file in read if file.hook.name == HOOKS[0]]) <= 2 * dumped.n_shards

    @pytest.mark.parametrize("framework", ["torch", "numpy"])
    def test_another_process_opens_it_anew(self, dumped, framework):
        d = open_dump(dumped.path, framework)
        there = pickle.loads(pickle.dumps(d))
        assert there.framework is not d.framework and there[HOOKS[0]].top_tokens(3) == d[HOOKS[0]].top_tokens(3)
        assert type(there.token_ids[:3]) is type(d.token_ids[:3])
        assert pickle.loads(pickle.dumps(d[HOOKS[1]])).top_tokens(3) == d[HOOKS[1]].top_tokens(3)

    def test_statistics(self, dumped, dense):
        for hook in HOOKS:
            x, stats = dense[hook].double(), dumped[hook].feature_stats()
            assert np.array_equal(stats.nnz, (x != 0).sum(0))
            assert np.allclose(stats.sum, x.sum(0), rtol=1e-12) and np.allclose(stats.sum_sq, (x**2).sum(0), rtol=1e-12)
            stored = torch.where(x != 0, x, -torch.inf)
            assert np.array_equal(stats.max, stored.amax(0))
            assert dumped[hook].nnz == int((x != 0).sum())
            assert dumped[hook].density == pytest.approx((x != 0).double().mean().item())

    def test_contexts(self, dumped, dense, ids):
        contexts = dumped.contexts(HOOKS[0], 7, k=30, window=9)
        column = dense[HOOKS[0]][:, 7].float()
        assert [(c.token_index, c.value) for c in contexts] == dumped[HOOKS[0]].top_tokens(7, 30)
        for c in contexts:
            low = max(c.token_index - 4, c.document * CONTEXT)
            high = min(c.token_index + 5, (c.document + 1) * CONTEXT)
            assert c.start == low and (c.document, c.position) == divmod(c.token_index, CONTEXT)
            assert torch.equal(c.token_ids, ids.reshape(-1)[low:high])
            assert torch.equal(c.values, column[low:high])

    @pytest.mark.parametrize("text", [False, True])
    def test_contexts_end_with_what_the_model_saw(self, text, tmp_path, monkeypatch):
        """Of a document that was cut, one piece: as told, or, for text, what the model takes."""
        monkeypatch.setattr(run, "default_context", lambda module: 5)
        words = [[str(i) for i in range(k, k + 10)] for k in (0, 20)]
        given = [" ".join(document) for document in words] if text else [list(map(int, document)) for document in words]
        d = dump(
            TinyModel(),
            given,
            tmp_path,
            names_filter=HOOKS,
            context_size=None if text else 5,
            tokenizer=lambda texts: {"input_ids": [list(map(int, document.split())) for document in texts]},
        )
        assert d.plan["tokens"]["context_size"] == 5
        contexts = d.contexts(HOOKS[0], 7, k=100, window=12)
        assert contexts
        for c in contexts:
            piece = c.position - c.position % 5
            assert set(c.token_ids.tolist()) <= {20 * c.document + piece + i for i in range(5)}
            assert c.start == max(c.token_index - 6, 10 * c.document + piece)

    def test_verify(self, dumped):
        report = dumped.verify()
        assert (report.complete, report.n_shards, report.n_files, report.n_tokens) == (True, 3, 9, dumped.n_tokens)
        on_disk = sum(f.stat().st_size for f in dumped.path.rglob("*.safetensors"))
        assert report.n_bytes == on_disk == dumped.n_bytes

    def test_safetensors_opens_the_files(self, dumped, dense):
        for path in dumped.path.rglob("*.safetensors"):
            with safe_open(path, "pt") as file:
                metadata = file.metadata()
                assert metadata["version"] == "1"
                for name in file.keys():  # noqa: SIM118  no mapping
                    file.get_tensor(name)
                if metadata.get("hook") == HOOKS[0] and metadata["token_start"] == "0" and metadata["codec"] == "none":
                    block = int(metadata["block_tokens"].split(",")[0])
                    expected = pyfacts.encode(dense[HOOKS[0]][:block])
                    assert torch.equal(file.get_tensor("0/index"), expected.index)
                    assert same_bits(file.get_tensor("0/values"), expected.values)

    def test_tensors_lie_aligned_behind_a_padded_header(self, dumped):
        for path in dumped.path.rglob("*.safetensors"):
            data = path.read_bytes()
            (n,) = struct.unpack("<Q", data[:8])
            header = json.loads(data[8 : 8 + n])
            assert n % 8 == 0 and data[8 + n - 1 : 8 + n] in (b" ", b"}")
            for name, entry in header.items():
                if name != "__metadata__" and entry["dtype"] != "U8":
                    assert (8 + n + entry["data_offsets"][0]) % 4 == 0
                    assert entry["dtype"] not in ("I64", "F64", "U64") or entry["data_offsets"][0] % 8 == 0


class TestBatches:
    @pytest.mark.parametrize("batch_size", [1000, 7777])
    def test_every_token_once_in_random_order_and_hooks_agree(self, dumped, dense, batch_size):
        batches = list(dumped.batches(HOOKS, batch_size, seed=3))
        assert all(len(b[HOOKS[0]]) == batch_size for b in batches[:-1])
        rows = {hook: torch.cat([b[hook] for b in batches]) for hook in HOOKS}
        both = torch.cat([rows[hook] for hook in HOOKS], 1).view(torch.int16)
        expected = torch.cat([dense[hook] for hook in HOOKS], 1).view(torch.int16)
        assert not torch.equal(both[:1000], expected[:1000])
        order = np.lexsort(both.numpy().T), np.lexsort(expected.numpy().T)
        assert np.array_equal(both.numpy()[order[0]], expected.numpy()[order[1]])

    @pytest.mark.parametrize(("seed", "error"), [(None, TypeError), (1.0, TypeError), (-1, ValueError)])
    def test_a_seed_is_a_number(self, dumped, seed, error):
        with pytest.raises(error, match="seed must be"):
            dumped.batches(HOOKS, 100, seed)

    def test_deterministic_by_seed_and_disjoint_by_rank(self, dumped):
        one = [b[HOOKS[0]] for b in dumped.batches(HOOKS[0], 500, seed=1)]
        again = [b[HOOKS[0]] for b in dumped.batches(HOOKS[0], 500, seed=1)]
        other = [b[HOOKS[0]] for b in dumped.batches(HOOKS[0], 500, seed=2)]
        assert all(map(same_bits, one, again)) and not same_bits(one[0], other[0])
        parts = [torch.cat([b[HOOKS[0]] for b in dumped.batches(HOOKS[0], 500, 1, r, 4)]) for r in range(4)]
        assert sum(map(len, parts)) == dumped.n_tokens
        a, b = torch.cat(parts).view(torch.int16).numpy(), torch.cat(one).view(torch.int16).numpy()
        assert np.array_equal(a[np.lexsort(a.T)], b[np.lexsort(b.T)])

    @pytest.mark.parametrize("batch_size", [100, 900, 1100])
    def test_memory_of_sixteen_blocks(self, dumped, monkeypatch, batch_size):
        """Tokens that a batch had no room for are the first of the next ones, so that their blocks can go."""
        monkeypatch.setattr(shuffle, "MIXED_BLOCKS", 1)  # of four or five
        held = []
        gather = shuffle._gather
        monkeypatch.setattr(
            shuffle, "_gather", lambda hooks, loaded, picked: held.append(len(loaded)) or gather(hooks, loaded, picked)
        )
        assert sum(len(batch[HOOKS[0]]) for batch in dumped.batches(HOOKS, batch_size, seed=0)) == dumped.n_tokens
        assert 1 <= max(held) <= 2

    def test_bad_arguments(self, dumped):
        for arguments in ((0, 0), (10, 0, 2, 2), (10, 0, -1, 2)):
            with pytest.raises(ValueError):
                dumped.batches(HOOKS, *arguments)


class TestThreads:
    def test_one_dump_for_several(self, tmp_path, dense, ids):
        """More shards than stay open, so that every cache turns over."""
        d = dump(TinyModel(), ids, tmp_path, names_filter=HOOKS, shard_tokens=128)
        assert d.n_shards > reader.OPEN_FILES
        tokens_read = np.random.default_rng(0).integers(0, d.n_tokens, 3000).tolist()
        with ThreadPoolExecutor(8) as threads:
            rows = list(threads.map(lambda i: d[HOOKS[i % 2]][i], tokens_read))
        for i, row in zip(tokens_read, rows, strict=True):
            assert same_bits(row.to_dense(), dense[HOOKS[i % 2]][i : i + 1])
        for cache in (d._token_files, d._hook_files, d._blocks):
            assert cache._used == sum(size for _, size in cache._values.values())

    def test_many_small_shards_keep_few_files_open(self, tmp_path, model, ids):
        small = {"batch_size": 4, "shard_tokens": 64}
        d = dump(TinyModel(), ids, tmp_path, names_filter=HOOKS, codec="none", **small)
        before = len(os.listdir("/proc/self/fd"))
        expected = hooked(model, HOOKS[:1], [(batch,) for batch in ids.split(4)])
        assert same_bits(d[HOOKS[0]][:].to_dense(), expected[HOOKS[0]])
        assert len(os.listdir("/proc/self/fd")) - before <= 2 * reader.OPEN_FILES < d.n_shards


class TestNeuronTouchesItsColumnOnly:
    def test_other_columns_may_be_rubbish(self, dumped, dense, tmp_path):
        """Every byte of column 0 is overwritten: column 1 still reads, column 0 is an error."""
        root = tmp_path / "copy"
        shutil.copytree(dumped.path, root)
        for path in root.rglob("layers.0.down.safetensors"):
            data = bytearray(path.read_bytes())
            (n,) = struct.unpack("<Q", data[:8])
            header = json.loads(data[8 : 8 + n])
            starts = {name: 8 + n + e["data_offsets"][0] for name, e in header.items() if name != "__metadata__"}
            for block in range(header["__metadata__"]["block_tokens"].count(",") + 1):
                at = starts[f"{block}/column_ptr"]
                ends = np.frombuffer(data, np.int64, 4, at + 32)
                for plane, end in zip(layout.PLANES, ends.tolist(), strict=True):
                    begin = starts[f"{block}/{plane}"]
                    data[begin : begin + end] = bytes(255 - b for b in data[begin : begin + end])
            path.write_bytes(data)
        damaged = open_dump(root)
        found, values = damaged[HOOKS[0]].neuron(299)
        assert torch.equal(found, dense[HOOKS[0]][:, 299].nonzero()[:, 0])
        assert same_bits(values, dense[HOOKS[0]][found, 299])
        with pytest.raises(DumpError, match=r"layers\.0\.down\.safetensors.*column 0"):
            damaged[HOOKS[0]].neuron(0)
        with pytest.raises(DumpError):
            damaged[HOOKS[0]][0:10]
        with pytest.raises(DumpError):
            damaged.verify()


class TestNumpy:
    def test_without_torch(self, dumped, dense, tmp_path):
        np.save(tmp_path / "dense.npy", dense[HOOKS[0]].float().numpy())
        program = """
import sys
sys.modules["torch"] = None
import numpy as np, pyfacts.dump
d = pyfacts.dump.open_dump(sys.argv[1], framework="numpy")
dense = np.load(sys.argv[2])
h = d["layers.0.down"]
assert np.array_equal(h[100:9000].to_dense(), dense[100:9000]) and h[0:1].values.dtype == np.float32
assert np.array_equal(h[[9000, 100]].to_dense(), dense[[9000, 100]])
j = 256 + int((dense[:, 256:] > 0).sum(0).argmax())
t, v = h.neuron(j)
assert np.array_equal(t, dense[:, j].nonzero()[0]) and np.array_equal(v, dense[t, j])
assert h.top_tokens(j, 1)[0][1] == dense[:, j].max()
assert sum(len(b["layers.0.down"]) for b in d.batches(["layers.0.down"], 999, 0)) == len(dense)
assert d.token_ids[0:5].shape == (5,) and d.positions[0:5].shape == (5, 2)
d.verify()
assert d.contexts("layers.0.down", j, 2)
for wrong in (lambda: pyfacts.open_dump(sys.argv[1]), lambda: pyfacts.capture):
    try:
        wrong()
    except (ImportError, AttributeError) as error:
        assert "torch is not installed" in str(error)
    else:
        raise AssertionError
print("fine")
"""
        arguments = [sys.executable, "-c", program, str(dumped.path), str(tmp_path / "dense.npy")]
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
        assert done.stdout == "fine\n", done.stderr


class TestDtypesAndSelect:
    @pytest.mark.parametrize("codec", ["none", "zstd", "split"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_dtypes(self, dtype, codec, tmp_path):
        model, ids = TinyModel(dtype=dtype), tokens(20)
        d = dump(model, ids, tmp_path, names_filter=HOOKS, codec=codec)
        expected = hooked(model, HOOKS, [(batch,) for batch in ids.split(8)])
        assert torch.equal(d[HOOKS[1]][:].to_dense(), expected[HOOKS[1]])
        d.verify()

    @pytest.mark.parametrize("codec", ["none", "zstd", "split"])
    def test_select_is_recorded_with_what_it_dropped(self, model, ids, dense, codec, tmp_path):
        select = topk(5)
        d = dump(model, ids[:100], tmp_path, names_filter=HOOKS, select=select, codec=codec, shard_tokens=500)
        expected = select.encode(dense[HOOKS[0]][:1600])
        enc = d[HOOKS[0]][100:1500]
        assert torch.equal(enc.to_dense(), expected[100:1500].to_dense())
        assert torch.allclose(enc.sq_norm, expected.sq_norm[100:1500], rtol=1e-12)
        assert 0 < enc.dropped_share == pytest.approx(expected[100:1500].dropped_share, rel=1e-9)
        assert torch.equal(d[HOOKS[0]][[1200, 130, 100]].sq_norm, enc.sq_norm[[1100, 30, 0]])
        assert d.plan["select"] == {"kind": "topk", "k": 5}
        d.verify()

    def test_what_json_lacks_in_a_select(self, model, ids, tmp_path):
        """An infinite threshold drops a feature; a select of one's own may describe itself by tuples."""

        class Range(min_abs):
            def describe(self):
                return {"kind": "range", "range": (0.1, float("inf"))}

        theta = torch.zeros(WIDTH)
        theta[7] = float("inf")
        for name, select in (("a", min_abs(theta)), ("b", Range(0.1))):
            for _ in range(2):  # the second one reads the plan
                d = dump(model, ids[:20], tmp_path / name, names_filter=HOOKS, select=select)
        assert open_dump(tmp_path / "a")[HOOKS[0]].neuron(7)[1].numel() == 0
        assert d.plan["select"] == {"kind": "range", "range": [0.1, "inf"]}

        class Vague(min_abs):
            def describe(self):
                return {"kind": "vague", "theta": torch.ones(3)}

        with pytest.raises(TypeError, match="a dump's plan holds JSON: tensor"):
            dump(model, ids[:20], tmp_path / "c", names_filter=HOOKS, select=Vague(0.1))

    def test_zeros_with_a_sign_are_refused(self, model, ids, tmp_path):
        """Committed, they could not be read back."""

        class Signed(topk):
            def encode(self, x):
                return pyfacts.encode(x, signed_zero=True)

        with pytest.raises(ValueError, match="packed with signed_zero=True"):
            dump(model, ids[:20], tmp_path, names_filter=HOOKS, select=Signed(3))


class TestHuggingFace:
    @pytest.mark.parametrize("codec", ["none", "zstd", "split"])
    def test_opt_with_padding_rows_and_a_mask(self, codec, tmp_path):
        from tiny_models import opt

        model = opt().train()
        generator = torch.Generator().manual_seed(0)
        lengths = torch.randint(1, 30, (41,), generator=generator).tolist()
        sequences = [torch.randint(2, 50, (n,), generator=generator).tolist() for n in lengths]
        mask = [[i > 0 for i in range(n)] for n in lengths]  # skip the first token, as one skips BOS
        hooks = ["blocks.0.mlp.hook_post", "blocks.1.hook_resid_pre"]
        d = dump(
            model, sequences, tmp_path, names_filter=hooks, token_mask=mask, batch_size=4, shard_tokens=100, codec=codec
        )
        batches, kept = [], []
        for i in range(0, len(sequences), 4):
            rows = sequences[i : i + 4]
            longest = max(map(len, rows))
            batch = {
                "input_ids": torch.tensor([row + [0] * (longest - len(row)) for row in rows]),
                "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
            }
            if batch["attention_mask"].all():
                del batch["attention_mask"]
            batches.append(batch)
            kept.append(torch.tensor([[0 < p < len(row) for p in range(longest)] for row in rows]).reshape(-1))
        paths = ["model.decoder.layers.0.fc2", "model.decoder.layers.1"]
        expected = {path: x[torch.cat(kept)] for path, x in hooked(model, paths, batches).items()}
        assert model.training
        assert torch.equal(d[hooks[0]][:].to_dense(), expected[paths[0]])
        assert torch.equal(d[hooks[1]][:], expected[paths[1]])
        assert torch.equal(d[hooks[1]][7:31], expected[paths[1]][7:31]) and d[hooks[1]][3:3].shape == (0, 16)
        assert torch.equal(d[hooks[1]][[300, 7, 7]], expected[paths[1]][[300, 7, 7]])
        assert d.token_ids[:].tolist() == [t for row in sequences for t in row[1:]]
        assert d.positions[:].tolist() == [[i, p] for i, n in enumerate(lengths) for p in range(1, n)]
        d.verify()
        with pytest.raises(ValueError, match="rows"):
            d[hooks[1]].neuron(0)

    def test_the_forward_stops_after_the_last_hook(self, ids, tmp_path):
        model, heads = TinyModel(), []
        model.head.register_forward_hook(lambda *_: heads.append(1))
        dump(model, ids[:24], tmp_path, names_filter=HOOKS)
        assert model.forwards == 3 and not heads

    def test_a_module_that_runs_again_after_the_last_hook(self, ids, tmp_path):
        """By another name or in a loop; and if the model catches what is said of it."""

        class Looped(nn.Module):
            def __init__(self, tied, times):
                super().__init__()
                tiny = TinyModel()
                self.embed, self.times = tiny.embed, times
                self.core = nn.Sequential(*(tiny.layers[0], tiny.layers[0 if tied else 1]))

            def forward(self, ids):
                x = self.embed(ids)
                with contextlib.suppress(ValueError):
                    for _ in range(self.times):
                        x = self.core(x)

        for model, names in (
            (Looped(tied=True, times=1), ["core.1.down"]),
            (Looped(tied=True, times=1), ["core.0.down", "core.1.down"]),
            (Looped(tied=False, times=2), ["core.1.down"]),
        ):
            with pytest.raises(ValueError, match="its module runs more than once"):
                dump(model, ids[:24], tmp_path, names_filter=names)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("kind", ["M2M100", "Marian", "Pegasus"])
    def test_an_encoder_whose_decoder_cannot_run(self, kind, tmp_path):
        """What fails behind the last hook does not matter."""
        import transformers

        sizes = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
        config = getattr(transformers, f"{kind}Config")(
            vocab_size=64, encoder_attention_heads=2, decoder_attention_heads=2, pad_token_id=1, **sizes
        )
        name = "MarianMTModel" if kind == "Marian" else f"{kind}ForConditionalGeneration"
        model, hook = getattr(transformers, name)(config), "encoder_blocks.1.mlp.hook_post"
        d = dump(model, tokens(16), tmp_path, hook, allow_dense=True)
        path = d[hook].module_path
        expected = hooked(
            model.model.encoder, [path.removeprefix("model.encoder.")], [(b,) for b in tokens(16).split(8)]
        )
        assert torch.equal(d[hook][:].to_dense(), *expected.values())

    def test_later_layers_that_were_not_loaded(self, ids, tmp_path):
        model = TinyModel()
        model.layers[1].to("meta")
        d = dump(model, ids[:24], tmp_path, names_filter=HOOKS[0])
        assert d[HOOKS[0]].nnz > 0

    def test_the_head_of_a_model_is_not_run(self, tmp_path):
        """Nor that of one in a wrapper: logits are large."""
        from tiny_models import opt

        class Wrapper(nn.Module):
            def __init__(self):
                super().__init__()
                self.wrapped = opt(vocab_size=64)

            def forward(self, input_ids):
                return self.wrapped(input_ids=input_ids)

        heads = []
        for model, hook in (
            (opt(vocab_size=64), "blocks.0.mlp.hook_post"),
            (Wrapper(), "wrapped.model.decoder.layers.0.fc2"),
        ):
            getattr(model, "wrapped", model).lm_head.register_forward_hook(lambda *_: heads.append(1))
            dump(model, tokens(8), tmp_path / hook, hook, allow_dense=True)
        assert not heads

    def test_forwards_of_others_are_not_looked_at(self, model, ids, tmp_path):
        """Of another thread, or between two of the dump's own."""
        clean = dump(model, ids[:80], tmp_path / "clean", names_filter=HOOKS)

        def run_elsewhere(*_):
            if threading.current_thread() is threading.main_thread():
                thread = threading.Thread(target=model, args=(ids[80:90],))
                thread.start()
                thread.join()

        handle = model.embed.register_forward_hook(run_elsewhere)
        dump(model, ids[:80], tmp_path / "busy", names_filter=HOOKS, progress=lambda now: model(ids[:1]))
        handle.remove()
        assert committed_bytes(tmp_path / "busy") == committed_bytes(clean.path)


def test_same_plan_same_bytes(model, ids, tmp_path):
    for name in "ab":
        dump(model, ids[:400], tmp_path / name, names_filter=HOOKS, shard_tokens=5000)
    assert committed_bytes(tmp_path / "a") == committed_bytes(tmp_path / "b")


def test_umask_is_honoured(model, ids, tmp_path):
    import os

    previous = os.umask(0o027)
    try:
        d = dump(model, ids[:8], tmp_path / "out", names_filter=HOOKS)
    finally:
        os.umask(previous)
    for path in [d.path, *d.path.rglob("*")]:
        assert path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640), path


def test_open_what_is_no_dump(tmp_path):
    with pytest.raises(DumpError, match=r"dump\.json"):
        open_dump(tmp_path)
    with pytest.raises(DumpError, match="no dump"):
        open_dump(Path("nowhere"))
    with pytest.raises(ValueError, match="framework"):
        open_dump(tmp_path, framework="jax")


def test_a_hook_called_tokens(tmp_path):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.tokens = nn.Embedding(64, 4), nn.Linear(4, 4)

        def forward(self, ids):
            return self.tokens(self.embed(ids))

    d = dump(Named(), tokens(4), tmp_path, "tokens", allow_dense=True)
    assert d["tokens"].nnz and torch.equal(d.token_ids[:], tokens(4).reshape(-1))
    d.verify()


@pytest.mark.parametrize("highest", [2**31 - 1, 2**31, 2**40])
def test_token_ids_beyond_32_bits(highest, tmp_path):
    class Hashed(TinyModel):
        def forward(self, ids):
            return super().forward(ids % VOCAB)

    ids = tokens(4)
    ids[1, 3] = highest
    d = dump(Hashed(), ids, tmp_path, names_filter=HOOKS)
    assert torch.equal(d.token_ids[:], ids.reshape(-1))
    d.verify()


def test_a_dropped_share_of_what_is_not_finite(tmp_path):
    class Infinite(TinyModel):
        def forward(self, ids):
            self.layers[0].down(torch.full((*ids.shape, 300), torch.inf, dtype=torch.bfloat16))

    d = dump(Infinite(), tokens(4), tmp_path, HOOKS[0], select=topk(2))
    assert np.isnan(d[HOOKS[0]].dropped_share) and np.isnan(d[HOOKS[0]][:].dropped_share)


def test_the_density_of_what_is_committed(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        resume(tmp_path, rank=1, world_size=2, progress=raise_at(5120 + 1, KeyboardInterrupt))
    hook = open_dump(tmp_path)[HOOKS[0]]
    assert hook.density == pytest.approx(hook[5120:10240].density)


def test_no_cache_is_kept(tmp_path):
    model, seen = opt(), []
    model.register_forward_pre_hook(lambda m, a, kw: seen.append(kw.get("use_cache")), with_kwargs=True)
    dump(model, [[5] * 7], tmp_path, allow_dense=True)
    assert seen == [False]


def test_a_model_by_its_name_keeps_its_dtype(tmp_path):
    opt().bfloat16().save_pretrained(tmp_path / "model")
    d = dump(tmp_path / "model", [[5] * 7], tmp_path / "out", allow_dense=True)
    assert d.plan["model"]["dtype"] == "bfloat16"
