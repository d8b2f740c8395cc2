"""Damaged and hostile dumps: a reader gives the right answer or a DumpError that names the file, and nothing else."""

import contextlib
import json
import os
import random
import shutil
import struct
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tiny_models as tiny
import xxhash
import zstandard
from dump_models import HOOKS, TinyModel, tokens
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_dump_golden import GOLDEN, make

from pyfacts.dump import plan as plan_module
from pyfacts.dump import shard_reader
from pyfacts.dump.container import TensorFile
from pyfacts.dump.digest import xxh3
from pyfacts.dump.errors import DumpError
from pyfacts.dump.layout import PLANES
from pyfacts.dump.reader import open_dump
from pyfacts.dump.run import dump
from pyfacts.dump.store import Directory

FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
CODECS = pytest.mark.parametrize("codec", make.CODECS)


@pytest.fixture
def golden(codec, tmp_path):
    return Path(shutil.copytree(GOLDEN / f"v1-{codec}", tmp_path / "dump"))


def read_all(root: Path, *, compare: bool) -> None:
    """Reads a dump in every way; what it says must be right, unless it says DumpError."""
    d = open_dump(root, framework="numpy")
    for hook in make.HOOKS:
        reader, bits = d[hook.name], make.content(hook)
        if compare:
            # Bits decide: NaN payloads are part of the content.
            got = reader[:] if hook.kind == "rows" else reader[:].to_dense()
            wide = bits.astype(np.uint32) << 16 if hook.dtype == "bfloat16" else bits
            assert np.array_equal(np.ascontiguousarray(got).view(wide.dtype), wide)
        else:
            reader[:]
        if hook.kind == "neurons":
            for j in (0, hook.width - 1):
                tokens, _ = reader.neuron(j)
                assert not compare or np.array_equal(tokens, bits[:, j].nonzero()[0])
                reader.top_tokens(j, 3)
            stats = reader.feature_stats()
            assert not compare or np.array_equal(stats.nnz, (bits != 0).sum(0))
            d.contexts(hook.name, 1, 2)
    ids, document, position = make.token_columns()
    assert not compare or np.array_equal(d.token_ids[:], ids)
    assert not compare or np.array_equal(d.positions[:], np.stack([document, position], 1))
    assert sum(len(b[make.HOOKS[0].name]) for b in d.batches([h.name for h in make.HOOKS], 10, 0)) == 33
    d.verify()


def survives(root: Path, *, compare: bool = True) -> bool:
    """Whether the dump reads without an error."""
    try:
        read_all(root, compare=compare)
    except DumpError as error:
        assert error.path is not None and str(error.path) in str(error)
        return False
    return True


def files_of(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


# ---- damage: nobody has adjusted a checksum --------------------------------------------------------------------------


@CODECS
def test_undamaged(codec, golden):
    assert survives(golden)


@CODECS
@FUZZ
@given(where=st.integers(0, 1 << 30), file=st.integers(0, 100), flip=st.integers(1, 255))
def test_flipped_bytes(codec, golden, where, file, flip):
    path = files_of(golden)[file % len(files_of(golden))]
    original = path.read_bytes()
    damaged = bytearray(original)
    damaged[where % len(damaged)] ^= flip
    path.write_bytes(damaged)
    try:
        survives(golden)
    finally:
        path.write_bytes(original)


@CODECS
def test_a_flip_in_every_tensor_is_noticed_by_verify(codec, golden):
    """No byte is left unchecked."""
    for path in golden.rglob("*.safetensors"):
        original = path.read_bytes()
        (n,) = struct.unpack("<Q", original[:8])
        for name, entry in json.loads(original[8 : 8 + n]).items():
            if name == "__metadata__" or entry["data_offsets"][0] == entry["data_offsets"][1]:
                continue
            for offset in (entry["data_offsets"][0], entry["data_offsets"][1] - 1):
                damaged = bytearray(original)
                damaged[8 + n + offset] ^= 0x10
                path.write_bytes(damaged)
                with pytest.raises(DumpError, match=path.name):
                    open_dump(golden, framework="numpy").verify()
        path.write_bytes(original)


@CODECS
def test_truncated_extended_and_missing_files(codec, golden):
    for path in files_of(golden):
        original = path.read_bytes()
        for n in (0, 1, 7, 8, 9, len(original) // 2, len(original) - 2):  # 1 is the line feed of a JSON file
            path.write_bytes(original[:n])
            assert not survives(golden), (path, n)
        path.write_bytes(original + b"\0")
        assert not survives(golden), path
        path.unlink()
        if path.name[:5].isdigit() and path.suffix == ".json":  # a dump of which this shard was never committed
            assert not open_dump(golden, framework="numpy").complete
        else:
            assert not survives(golden), path
        path.mkdir()
        assert not survives(golden), path
        path.rmdir()
        path.write_bytes(original)
    assert survives(golden)


@CODECS
def test_cut_after_it_was_mapped(codec, golden):
    d = open_dump(golden, framework="numpy")
    name = make.HOOKS[0].name
    d[name].feature_stats()  # opens and maps
    for path in golden.rglob("blocks.0.mlp.hook_post.safetensors"):
        os.truncate(path, 4096)
    with pytest.raises(DumpError, match="cut from"):
        d[name][:]


def test_cut_after_it_was_read(tmp_path, monkeypatch):
    """A block is kept as the mapped file, if it is large; reading it again would kill the process."""
    monkeypatch.setattr(shard_reader, "MAPPED_BYTES", 0)
    d = dump(TinyModel(), tokens(400), tmp_path, names_filter=HOOKS, codec="none")
    d[HOOKS[0]][:100]
    for path in tmp_path.rglob(f"{HOOKS[0]}.safetensors"):
        os.truncate(path, 4096)
    with pytest.raises(DumpError, match="cut from"):
        d[HOOKS[0]][:100]


def test_cut_between_two_batches(tmp_path, monkeypatch):
    """Batches hold their blocks for long, so they may not be the file's bytes; plain rows nor encodings."""
    monkeypatch.setattr(shard_reader, "MAPPED_BYTES", 0)
    hooks = ["blocks.0.hook_resid_pre", "blocks.0.mlp.hook_post"]
    d = dump(
        tiny.opt(),
        np.random.default_rng(0).integers(3, tiny.VOCAB, (100, 16)),
        tmp_path,
        names_filter=hooks,
        codec="none",
    )
    batches = d.batches(hooks, 100, seed=0)
    first = next(batches)
    for path in tmp_path.rglob("blocks*.safetensors"):
        os.truncate(path, 4096)
    assert sum(len(batch[hooks[0]]) for batch in [first, *batches]) == d.n_tokens == 1600


def test_a_damaged_column_is_named(tmp_path):
    root = Path(shutil.copytree(GOLDEN / "v1-none", tmp_path / "dump"))
    path = next(root.glob("00001-*")) / "blocks.0.mlp.hook_post.safetensors"
    file = TensorFile(Directory(root).open(f"{path.parent.name}/{path.name}"))
    offset = file.offset("0/index", 3)
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)
    with pytest.raises(DumpError) as caught:
        open_dump(root, framework="numpy").verify()
    assert caught.value.path == str(path) and caught.value.offset is not None and caught.value.tensor is not None
    assert "column 0" in str(caught.value)


# ---- malice: every checksum is right ---------------------------------------------------------------------------------


class Forger:
    """Changes a file's header or tensors and signs it anew, up to the commit record."""

    def __init__(self, root: Path, hook: int = 0, shard: int = 0) -> None:
        self.record_path = root / f"{shard:05d}.json"
        self.root, self.hook = root, make.HOOKS[hook]
        self.record = json.loads(self.record_path.read_text())
        self.entry = self.record["hook_files"][self.hook.name]
        self.path = root / self.record["directory"] / self.entry["file"]
        data = self.path.read_bytes()
        self.original = data, self.record_path.read_bytes()
        (n,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + n])
        self.metadata = header.pop("__metadata__")
        self.dtypes = {name: entry["dtype"] for name, entry in header.items()}
        self.shapes = {name: entry["shape"] for name, entry in header.items()}
        self.tensors = {
            name: bytearray(data[8 + n + entry["data_offsets"][0] : 8 + n + entry["data_offsets"][1]])
            for name, entry in header.items()
        }

    def replace(self, name: str, begin: int, end: int, data: bytes) -> None:
        """Replaces bytes of a U8 tensor by others, fewer or more; its block's padding follows."""
        self.tensors[name][begin:end] = data
        padding = name.split("/")[0] + "/padding"
        before = sum(len(self.tensors[n]) for n in list(self.tensors)[: list(self.tensors).index(padding)])
        self.tensors[padding] = bytearray(-before % 8)
        for changed in (name, padding):
            self.shapes[changed] = [len(self.tensors[changed])]

    def header(self) -> dict:
        result, offset = {"__metadata__": self.metadata}, 0
        for name, data in self.tensors.items():
            offsets = [offset, offset + len(data)]
            result[name] = {"dtype": self.dtypes[name], "shape": self.shapes[name], "data_offsets": offsets}
            offset += len(data)
        return json.loads(json.dumps(result))

    def sign(self, header: bytes | None = None) -> None:
        for block in (0, 1):
            if f"{block}/column_ptr" in self.tensors:
                self._sign_columns(block)
        if "feature/nnz" in self.tensors:
            stats = [self.tensors[f"feature/{name}"] for name in ("nnz", "sum", "sum_sq", "max")]
            self.tensors["feature/xxh3"][:] = xxh3(*stats).to_bytes(8, "little")
        head = header if header is not None else json.dumps(self.header()).encode()
        head = struct.pack("<Q", len(head)) + head
        data = b"".join(self.tensors.values())
        self.path.write_bytes(head + data)
        self.entry |= {"bytes": len(head) + len(data), "header_xxh3": xxhash.xxh3_64_hexdigest(head)}
        self.sign_record()

    def sign_record(self) -> None:
        self.record.pop("xxh3")
        self.record["xxh3"] = plan_module._digest(self.record)
        self.record_path.write_text(json.dumps(self.record))

    def restore(self) -> None:
        self.path.write_bytes(self.original[0])
        self.record_path.write_bytes(self.original[1])

    def _sign_columns(self, block: int) -> None:
        starts = np.frombuffer(bytes(self.tensors[f"{block}/column_ptr"]), np.int64).reshape(-1, 4)
        for c in range(len(starts) - 1):
            frames = []
            for p, plane in enumerate(PLANES):
                begin, end = starts[c, p], starts[c + 1, p]
                tensor = self.tensors[f"{block}/{plane}"]
                if not 0 <= begin <= end <= len(tensor):
                    return
                frames.append(tensor[begin:end])
            self.tensors[f"{block}/column_xxh3"][8 * c : 8 * c + 8] = xxh3(*frames).to_bytes(8, "little")


@CODECS
def test_the_forger_forges(codec, golden):
    """Signing an unchanged file gives a dump that reads, so what follows is refused for its content."""
    Forger(golden).sign()
    assert survives(golden)


@CODECS
@pytest.mark.parametrize(
    "name", ["occupancy", "counts", "index", "values", "column_ptr", "column_length", "sq_norm", "feature"]
)
def test_forged_planes_never_crash(codec, name, golden):
    """Bytes of each plane change under right checksums: refused, or a dump of other content, but never more."""
    if name == "sq_norm" and codec == "none":
        pytest.skip("a lossless dump has none")
    rng = random.Random(name)
    refused = 0
    for _ in range(60):
        forger = Forger(golden, hook=rng.randrange(2), shard=rng.randrange(2))
        tensor = forger.tensors[f"feature/{rng.choice(['nnz', 'max'])}" if name == "feature" else f"0/{name}"]
        for _ in range(rng.choice([1, 1, 2, 8])):
            tensor[rng.randrange(len(tensor))] = rng.choice([0, 1, 127, 128, 254, 255, rng.randrange(256)])
        forger.sign()
        refused += not survives(golden, compare=False)
        forger.restore()
    assert refused > 0


def set_int64(tensor: bytearray, index: int, value: int) -> None:
    tensor[8 * index : 8 * index + 8] = struct.pack("<q", value)


class TestWhatIsWrongIsSaid:
    """One forgery per rule."""

    @pytest.mark.parametrize(
        ("tensor", "index", "value", "message"),
        [
            ("0/column_ptr", 0, 1, "ascend"),
            ("0/column_ptr", 4, -1, "ascend"),
            ("0/column_ptr", 5, 1 << 62, "ascend"),
            ("0/column_ptr", 8, 3, "ascend"),
            ("0/column_length", 0, 3, "cannot be"),
            ("0/column_length", 1, -1, "cannot be"),
            ("0/column_length", 2, 1 << 62, "cannot be"),
            ("0/column_length", 3, 1 << 40, "cannot be"),
            ("feature/nnz", 7, 9999, "feature 7"),
        ],
    )
    @CODECS
    def test_integers(self, codec, golden, tensor, index, value, message):
        forger = Forger(golden)
        set_int64(forger.tensors[tensor], index, value)
        forger.sign()
        if codec == "split" and tensor == "feature/nnz":
            message = tensor  # compressed: the change is one of a frame
        with pytest.raises(DumpError, match=message) as caught:
            open_dump(golden, framework="numpy").verify()
        assert caught.value.tensor == tensor

    @pytest.mark.parametrize("codec", ["none"])
    @pytest.mark.parametrize(
        ("tensor", "at", "value", "message"),
        [
            ("nnz", 7, struct.pack("<q", -1), "feature 7 cannot have -1 values in 20 tokens"),
            ("nnz", 7, struct.pack("<q", 21), "feature 7 cannot have 21 values in 20 tokens"),
            ("nnz", 7, struct.pack("<q", 19), "adds up to .* values, the commit record says"),
            ("max", 9, struct.pack("<f", float("nan")), "feature 9 cannot have nan as its largest value"),
        ],
    )
    def test_statistics_that_cannot_be(self, codec, golden, tensor, at, value, message):
        """Noticed where they are read by themselves, which is not to read the values."""
        forger = Forger(golden)
        forger.tensors[f"feature/{tensor}"][len(value) * at : len(value) * (at + 1)] = value
        forger.sign()
        hook = open_dump(golden, framework="numpy")[forger.hook.name]
        for read in (hook.feature_stats, lambda: hook.top_tokens(3)):
            with pytest.raises(DumpError, match=f"feature/{tensor}.*: {message}"):
                read()

    @pytest.mark.parametrize("codec", ["none"])
    @pytest.mark.parametrize(
        ("column", "token", "value", "message"),
        [
            ("document", 0, -1, "document.*: -1"),
            ("document", 3, 1, "document.*: 0"),
            ("document", 19, 9, "00001.*document.*: 3"),
            ("position", 0, -1, "position.*: -1"),
            ("position", 4, 3, "position.*: 3"),
            ("token_ids", 5, -1, "token_ids.*: -1"),
            ("token_ids", 5, 50, "token_ids.*: 50"),
        ],
    )
    def test_tokens_that_cannot_be(self, codec, golden, column, token, value, message):
        """Tokens 0 to 5 are document 0, and ids are up to 49."""
        path = next(golden.glob("00000-*")) / "tokens.safetensors"
        data = bytearray(path.read_bytes())
        file = TensorFile(Directory(golden).open(f"{path.parent.name}/{path.name}"))
        info = file.tensors[column]
        item = "<i" if info.dtype == "I32" else "<q"
        struct.pack_into(item, data, file.offset(column, token * struct.calcsize(item)), value)
        names = ("document", "position", "token_ids")
        begins = [file.offset(name) for name in names]
        digests = [xxh3(data[b : b + file.tensors[n].nbytes]) for n, b in zip(names, begins, strict=True)]
        struct.pack_into("<3Q", data, file.offset("xxh3"), *digests)
        path.write_bytes(data)
        with pytest.raises(DumpError, match=rf"{message} cannot be that of the shard's token \d"):
            open_dump(golden, framework="numpy").verify()

    @pytest.mark.parametrize("codec", ["zstd"])
    def test_a_negative_norm(self, codec, golden):
        forger = Forger(golden)
        forger.tensors["0/sq_norm"][:8] = struct.pack("<d", -1.0)
        forger.tensors["0/sq_norm_xxh3"][:] = xxh3(forger.tensors["0/sq_norm"]).to_bytes(8, "little")
        forger.sign()
        with pytest.raises(DumpError, match="0/sq_norm.*: a norm is negative"):
            open_dump(golden, framework="numpy").verify()

    def forged_plane(self, root: Path, plane: str, change) -> str:
        """Applies change(array) to a plane of block 0 (shard 1, hook 0: 13 tokens, columns of 256 and 44)."""
        forger = Forger(root, shard=1)
        change(np.frombuffer(forger.tensors[f"0/{plane}"], np.uint8))
        forger.sign()
        with pytest.raises(DumpError) as caught:
            open_dump(root, framework="numpy").verify()
        assert caught.value.tensor is not None and caught.value.tensor.startswith("0/")
        return str(caught.value)

    @pytest.mark.parametrize("codec", ["none"])
    @pytest.mark.parametrize(
        ("plane", "change", "message"),
        [
            ("occupancy", lambda a: a.__setitem__(1, 0xFF), "beyond the last token"),
            ("occupancy", lambda a: a.__setitem__(0, 0), "more counts than"),
            ("counts", lambda a: a.__setitem__(0, 0), "count of 0"),
            ("counts", lambda a: a.__setitem__(-1, 200), "exceeds the column's width"),
            ("values", lambda a: a.__setitem__(slice(0, 2), 0), "zero"),
            ("values", lambda a: a.__setitem__(slice(0, 2), [0, 0x80]), "zero"),
        ],
    )
    def test_planes(self, codec, golden, plane, change, message):
        assert message in self.forged_plane(golden, plane, change)

    @pytest.mark.parametrize("codec", ["none"])
    def test_index(self, codec, golden):
        assert "index" in self.forged_plane(golden, "index", lambda a: a.__setitem__(slice(None), 255))

    @pytest.mark.parametrize("codec", ["zstd"])
    @pytest.mark.parametrize("kind", ["the same", "bomb", "two frames", "one frame more", "no size", "no frame", "cut"])
    def test_frames(self, codec, golden, kind):
        """Column 1 of the index is replaced by something else that is no frame of its length."""
        forger = Forger(golden)
        starts = np.frombuffer(bytes(forger.tensors["0/column_ptr"]), np.int64).reshape(-1, 4)
        begin, end = int(starts[1, 2]), int(starts[2, 2])
        frame = bytes(forger.tensors["0/index"][begin:end])
        content = zstandard.decompress(frame)
        forged = {
            "the same": frame,
            "bomb": zstandard.compress(bytes(1 << 24)),
            "two frames": zstandard.compress(content[1:]) + zstandard.compress(content[:1]),
            "one frame more": frame + frame,
            "no size": zstandard.ZstdCompressor(write_content_size=False).compress(content),
            "no frame": content,
            "cut": frame[:-1],
        }[kind]
        forger.replace("0/index", begin, end, forged)
        set_int64(forger.tensors["0/column_ptr"], 10, begin + len(forged))
        forger.sign()
        if kind == "the same":
            assert survives(golden)
            return
        with pytest.raises(DumpError, match=r"byte \d+: .*(frame|unused|size|ecompress)") as caught:
            open_dump(golden, framework="numpy").verify()
        assert caught.value.tensor == "0/index"

    @CODECS
    def test_headers(self, codec, golden):
        def header_of(change) -> bytes:
            header = forger.header()
            change(header)
            return json.dumps(header).encode()

        forger = Forger(golden)
        good = json.dumps(forger.header()).encode()
        deep = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
        hostile = {
            "begin with": b" " + good,
            "JSON": good[:-1],
            "nesting|recursion|JSON": deep,
            "twice": good[:-1] + b', "0/index": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}',
            "NaN": good[:-1] + b', "x": NaN}',
            "utf-8|JSON": good.replace(b"0/index", b"0/\xff\xffdex"),
            "unknown dtype": header_of(lambda h: h["0/index"].update(dtype="U4")),
            "takes": header_of(lambda h: h["0/index"].update(shape=[1 << 62, 1 << 62])),
            "no list of sizes": header_of(lambda h: h["0/index"].update(shape=[-1])),
            "no list": header_of(lambda h: h["0/index"].update(shape=[True])),
            "no pair": header_of(lambda h: h["0/index"].update(data_offsets=[0])),
            "holds?": header_of(lambda h: h["0/index"].update(data_offsets=[9, 3])),
            "missing": header_of(lambda h: h.update({"1/index2": h.pop("1/index")})),
            "before it ends": header_of(
                lambda h: h["0/column_ptr"].update(data_offsets=[o + 8 for o in h["0/column_ptr"]["data_offsets"]])
            ),
            "must have": header_of(lambda h: h.update({"x": {"dtype": "U8"}})),
            "no such tensor": header_of(
                lambda h: h.update({"x": h["0/column_ptr"] | {"shape": [0, 4], "data_offsets": [0, 0]}})
            ),
            "__metadata__": header_of(lambda h: h["__metadata__"].update(signed_zero="true")),
            "map strings": header_of(lambda h: h["__metadata__"].update(signed_zero=1)),
        }
        for message, header in hostile.items():
            forger.sign(header)
            with pytest.raises(DumpError, match=rf"blocks\.0\.mlp.*({message})"):
                open_dump(golden, framework="numpy").verify()
            forger.restore()
        data = forger.original[0]
        for length in (0, 1, len(data), 1 << 40, (1 << 64) - 1):
            forger.path.write_bytes(struct.pack("<Q", length) + data[8:])
            forger.entry["header_xxh3"] = xxhash.xxh3_64_hexdigest(
                forger.path.read_bytes()[: 8 + min(length, len(data))]
            )
            forger.sign_record()
            assert not survives(golden)


@contextlib.contextmanager
def little_memory():
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()


SAE = {"d_in": 8, "d_sae": 300, "config": {"k": 4}, "weights_xxh3": "0" * 32}


class TestRecords:
    @pytest.mark.parametrize("codec", ["none"])
    @pytest.mark.parametrize(
        "name", ["../elsewhere", "/etc", "..", "", "a/b", "a\\b", "a\0b", "\x1b[31m", "\ud800", 7, None, "x" * 5000]
    )
    @pytest.mark.parametrize("field", ["directory", "tokens_file", "hook_files"])
    def test_names_stay_inside(self, codec, golden, name, field):
        forger = Forger(golden)
        entry = forger.record if field == "directory" else forger.record["tokens_file"]
        entry = forger.entry if field == "hook_files" else entry
        entry["directory" if field == "directory" else "file"] = name
        forger.sign_record()
        assert not survives(golden)

    @pytest.mark.parametrize("codec", ["none"])
    @pytest.mark.parametrize("what", ["directory", "file", "record", "plan", "pipe"])
    def test_links_stay_inside(self, codec, golden, what, tmp_path):
        forger = Forger(golden)
        target = {
            "directory": forger.path.parent,
            "file": forger.path,
            "record": forger.record_path,
            "plan": golden / "dump.json",
            "pipe": forger.path,
        }[what]
        target.rename(tmp_path / "elsewhere")
        if what == "pipe":
            os.mkfifo(target)
        else:
            target.symlink_to(tmp_path / "elsewhere")
        with pytest.raises(DumpError, match="out of the dump|regular file"):
            read_all(golden, compare=True)

    @CODECS
    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("blocks", [20]),
            ("blocks", [19, 1]),
            ("blocks", [-1, 21]),
            ("blocks", [20, 0]),
            ("blocks", [1 << 62, 20 - (1 << 62)]),
            ("blocks", "20"),
            ("shard", 1),
            ("token_start", 1),
            ("token_start", True),
            ("nnz", {}),
            ("nnz", {hook.name: 1 for hook in make.HOOKS[:2]}),
            ("hook_files", {}),
            ("tokens_file", {"file": "tokens.safetensors", "bytes": 1 << 63, "header_xxh3": "0" * 16}),
            ("plan_xxh3", "0" * 16),
            ("version", 2),
        ],
    )
    def test_signed_lies(self, codec, golden, key, value):
        forger = Forger(golden)
        forger.record[key] = value
        forger.sign_record()
        with pytest.raises(DumpError):
            open_dump(golden, framework="numpy").verify()

    @pytest.mark.parametrize("codec", ["none"])
    def test_unsigned_changes_are_noticed(self, codec, golden):
        for path in (golden / "00000.json", golden / "dump.json"):
            original = path.read_text()
            path.write_text(original.replace('"blocks.0.mlp.hook_post"', '"blocks.9.mlp.hook_post"'))
            with pytest.raises(DumpError, match=f"{path.name}: .*altered"):
                open_dump(golden)
            path.write_text(original)

    @pytest.mark.parametrize("codec", ["none"])
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda p: p.update(version=2), "version 2"),
            (lambda p: p.update(format="x"), "format"),
            (lambda p: p.update(codec="gzip"), "gzip"),
            (lambda p: p.update(hooks=[]), "hook"),
            (lambda p: p["hooks"].append(p["hooks"][0]), "twice"),
            (lambda p: p["hooks"][0].update(width=0), "width"),
            (lambda p: p["hooks"][0].update(width=1 << 40), "width 1099511627776, not 1 to"),
            (lambda p: p["hooks"][0].update(kind="x"), "kind 'x'; this pyfacts reads neurons, rows"),
            (lambda p: p["hooks"][0].update(note=1), r"'hooks\[0\].note' is 1, where this format has no such key"),
            (lambda p: p.update(note="x"), "'note' is 'x', where this format has no such key"),
            (lambda p: p.update(note=None), "'note' is None, where this format has no such key"),
            (lambda p: p["shards"].update(note=None), "'shards.note' is None, where this format has no such key"),
            (lambda p: p.update(version=True), "'version' is True, where this format has 1"),
            (lambda p: p["hooks"][0].update(dtype="int8"), "int8"),
            (lambda p: p["shards"].update(tokens=[0, 5, 5]), "ascend"),
            (lambda p: p["shards"].update(tokens=[0, 1, 2, 3]), "different numbers"),
            (lambda p: p.update(signed_zero=1), "signed_zero"),
            (lambda p: p.pop("select"), "'select' is missing"),
            (lambda p: p.update(saes=None), "'saes'"),
            (lambda p: p.update(saes={}), "'saes'"),
            (lambda p: p.update(saes={"blocks.7.hook_resid_pre.hook_sae_acts_post": SAE}), "encoded hooks"),
            (lambda p: p.update(saes={make.HOOKS[2].name: SAE}), "encoded hooks"),
            (lambda p: p.update(saes={make.HOOKS[0].name: []}), "must have d_in"),
            (lambda p: p.update(saes={make.HOOKS[0].name: SAE | {"path": "/etc"}}), "must have d_in"),
            (lambda p: p.update(saes={make.HOOKS[0].name: SAE | {"d_in": 0}}), "d_in 0"),
            (lambda p: p.update(saes={make.HOOKS[0].name: SAE | {"d_in": True}}), "d_in True"),
            (lambda p: p.update(saes={make.HOOKS[0].name: SAE | {"d_sae": 299}}), "d_sae 299.* width 300"),
            (lambda p: p.update(saes={make.HOOKS[0].name: SAE | {"d_sae": "300"}}), "d_sae '300'"),
            (lambda p: p.update(saes={make.HOOKS[0].name: SAE | {"config": "topk"}}), "config"),
            (lambda p: p.update(saes={make.HOOKS[0].name: SAE | {"weights_xxh3": "0" * 31 + "g"}}), "xxh3-128"),
            (lambda p: p.update(saes={make.HOOKS[0].name: SAE | {"weights_xxh3": 7}}), "xxh3-128"),
        ],
    )
    def test_plans(self, codec, golden, change, message):
        value = json.loads((golden / "dump.json").read_text())
        change(value)
        value["xxh3"] = plan_module._digest({k: v for k, v in value.items() if k != "xxh3"})
        (golden / "dump.json").write_text(json.dumps(value))
        with pytest.raises(DumpError, match=rf"dump\.json: .*{message}"):
            open_dump(golden)

    @pytest.mark.parametrize("codec", ["none"])
    def test_a_sound_sae_is_read(self, codec, golden):
        """What the forgeries of `saes` begin with is accepted, so each is refused for its change."""
        value = json.loads((golden / "dump.json").read_text())
        value["saes"] = {make.HOOKS[0].name: SAE, make.HOOKS[1].name: SAE | {"d_sae": 17, "weights_xxh3": None}}
        value["xxh3"] = plan_module._digest({k: v for k, v in value.items() if k != "xxh3"})
        (golden / "dump.json").write_text(json.dumps(value))
        for record in golden.glob("0*.json"):
            record.unlink()
        assert open_dump(golden, framework="numpy").plan["saes"] == value["saes"]

    @pytest.mark.parametrize("codec", ["none"])
    @pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"a": 1, "a": 2}', "\ud800", '{"x": ' + "9" * 5000 + "}"])
    def test_json(self, codec, golden, text):
        for name in ("dump.json", "00001.json"):
            original = (golden / name).read_bytes()
            (golden / name).write_bytes(text.encode("utf-8", "surrogatepass"))
            with pytest.raises(DumpError, match=name):
                open_dump(golden)
            (golden / name).write_bytes(original)

    @pytest.mark.parametrize("codec", ["zstd"])
    def test_features_are_bounded_by_the_hooks_file(self, codec, golden):
        value = json.loads((golden / "dump.json").read_text())
        value["hooks"][0]["width"] = (1 << 31) - 1
        value["xxh3"] = plan_module._digest({k: v for k, v in value.items() if k != "xxh3"})
        (golden / "dump.json").write_text(json.dumps(value))
        for shard in (0, 1):
            forger = Forger(golden, shard=shard)
            forger.record["plan_xxh3"] = value["xxh3"]
            forger.sign_record()
        with little_memory():
            hook = open_dump(golden, framework="numpy")[make.HOOKS[0].name]
            for read in (hook.feature_stats, lambda: hook[0:10], lambda: hook.neuron(0), lambda: hook.top_tokens(0)):
                with pytest.raises(DumpError, match="n_features = '300', plan and commit record say '2147483647'"):
                    read()
            for record in golden.glob("0*.json"):
                record.unlink()
            stats = open_dump(golden, framework="numpy")[make.HOOKS[0].name].feature_stats()
            assert stats.nnz.shape == stats.max.shape == ((1 << 31) - 1,) and stats.nnz[7] == 0

    @pytest.mark.parametrize("codec", ["zstd"])
    def test_tokens_are_bounded_by_the_tokens_file(self, codec, golden):
        """Plan and record agree on 2^31 - 1 tokens: refused before anything of that size is allocated."""
        value = json.loads((golden / "dump.json").read_text())
        n = (1 << 31) - 1
        value["shards"]["tokens"] = [0, n, n + 13]
        value["xxh3"] = plan_module._digest({k: v for k, v in value.items() if k != "xxh3"})
        (golden / "dump.json").write_text(json.dumps(value))
        (golden / "00001.json").unlink()
        forger = Forger(golden)
        forger.record |= {"plan_xxh3": value["xxh3"], "blocks": [n]}
        forger.sign_record()
        with little_memory():
            d = open_dump(golden, framework="numpy")
            for read in (d.verify, lambda: d[make.HOOKS[0].name][0:10], lambda: d[make.HOOKS[0].name].neuron(0)):
                with pytest.raises(DumpError, match=r"tokens\.safetensors"):
                    read()


def test_a_neighbour_of_a_longer_name_is_not_inside(tmp_path):
    dump(TinyModel(), tokens(20), tmp_path / "out", names_filter=HOOKS)
    (tmp_path / "out-of-reach").mkdir()
    (tmp_path / "out/00000.json").rename(tmp_path / "out-of-reach/record")
    (tmp_path / "out/00000.json").symlink_to(tmp_path / "out-of-reach/record")
    with pytest.raises(DumpError, match="out of the dump"):
        open_dump(tmp_path / "out")


def test_nothing_is_unpickled():
    """The reader's modules name no pickle."""
    folder = Path(sys.modules["pyfacts.dump.reader"].__file__).parent
    for path in folder.glob("*.py"):
        assert "import pickle" not in path.read_text() and "torch.load" not in path.read_text(), path
