"""Golden dumps: what version 1 has written is read bit for bit, and version 1 writes the same bytes."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from dump_models import committed_bytes

import pyfacts
from pyfacts.dump import layout
from pyfacts.dump.reader import open_dump

GOLDEN = Path(__file__).parent / "golden"
spec = importlib.util.spec_from_file_location("make_golden", GOLDEN / "make.py")
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)


@pytest.mark.parametrize("codec", make.CODECS)
def test_read_bit_for_bit(codec):
    d = open_dump(GOLDEN / f"v1-{codec}")
    assert d.complete and d.verify().n_tokens == 33
    ids, document, position = make.token_columns()
    assert np.array_equal(d.token_ids[:], ids)
    assert np.array_equal(d.positions[:], np.stack([document, position], 1))
    for hook in make.HOOKS:
        bits = make.content(hook)
        signed = np.int16 if bits.itemsize == 2 else np.int32
        got = d[hook.name][:]
        dense = got if hook.kind == "rows" else got.to_dense()
        assert str(dense.dtype) == f"torch.{hook.dtype}"
        assert np.array_equal(dense.view(torch.int16 if bits.itemsize == 2 else torch.int32), bits.view(signed))
        if hook.kind == "neurons":
            if codec == "none":
                assert got.sq_norm is None
            else:
                assert np.array_equal(got.sq_norm, make.norms(hook))
            for j in (0, hook.width - 1):
                tokens, values = d[hook.name].neuron(j)
                assert np.array_equal(tokens, bits[:, j].nonzero()[0])
                values = values.view(torch.int16 if bits.itemsize == 2 else torch.int32)
                assert np.array_equal(values, bits[tokens, j].view(signed))


def test_written_to_the_same_bytes(tmp_path):
    make.write(tmp_path / "again", "none")
    again, golden = committed_bytes(tmp_path / "again"), committed_bytes(GOLDEN / "v1-none")
    assert again.keys() == golden.keys()
    for name in golden:
        assert again[name] == golden[name], name


@pytest.mark.parametrize("codec", ["zstd", "split"])
def test_a_codec_keeps_the_planes(codec):
    """zstd's bytes may change with its version: the planes inside may not."""
    packed, plain = (open_dump(GOLDEN / f"v1-{name}") for name in (codec, "none"))
    for hook in make.HOOKS[:2]:
        for a, b in zip(packed[hook.name][:].planes, plain[hook.name][:].planes, strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


class TestFormatDocument:
    """FORMAT.md's worked example, derived anew."""

    text = (Path(__file__).parents[1] / "FORMAT.md").read_text()

    def example(self, name: str) -> bytes:
        (found,) = re.findall(rf"^    {re.escape(name)} +((?:[0-9a-f]{{2}} ?)+)", self.text, re.MULTILINE)
        return bytes.fromhex(found)

    def matrix(self) -> torch.Tensor:
        """The matrix that the document describes in words: 3 tokens, 10 features, bfloat16."""
        x = torch.zeros(3, 10, dtype=torch.bfloat16)
        x[0, 1], x[0, 8] = 1.0, -2.0
        x[2, 0], x[2, 3], x[2, 9] = 0.5, float("nan"), 3.0
        return x

    def test_in_memory(self):
        enc = pyfacts.encode(self.matrix())
        for name, plane in zip(("counts", "index", "values", "tile_ptr"), enc.planes, strict=True):
            assert plane.contiguous().view(torch.uint8).numpy().tobytes() == self.example(name), name

    def test_on_disk(self):
        from pyfacts import _storage
        from pyfacts.dump.blocks import storage_encoding
        from pyfacts.dump.digest import xxh3

        encoding = storage_encoding(pyfacts.encode(self.matrix()))
        occupancy, counts, _ = _storage.split_counts(encoding)
        assert occupancy.tobytes() == self.example("occupancy")
        assert counts.tobytes() == self.example("occupied counts")
        stored = [occupancy, counts, encoding.index, encoding.values.tobytes()]
        assert xxh3(*stored).to_bytes(8, "little") == self.example("column_xxh3")

    def test_constants(self):
        for constant in (
            f"version {layout.FORMAT_VERSION}",
            f"{layout.MIN_BLOCK_TOKENS:,} tokens",
            f"of {layout.COLUMN_WIDTH}",
        ):
            assert constant in self.text
        for _, dtype in layout.STATISTICS:
            assert dtype in self.text
        block = layout.neuron_block(make.HOOKS[0], 0, 8, "none", True)
        for tensor in [
            *block,
            *layout.row_block(make.HOOKS[2], 0, 8, "none"),
            *layout.statistics(make.HOOKS[0], "none"),
        ]:
            name = tensor.name.replace("0/", "{b}/", 1) if tensor.name.startswith("0/") else tensor.name
            assert f"`{name}`" in self.text, name
