"""Writes the golden dumps of format version 1: `python tests/golden/make.py DIRECTORY`.

Their content is integer arithmetic, so that a test can make it anew. They are written once and never again: a reader of
a later version must still read them.
"""

import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import pyfacts
from pyfacts.dump import files, layout
from pyfacts.dump.blocks import storage_encoding
from pyfacts.dump.layout import HookSpec
from pyfacts.dump.plan import PLAN_FILE, Plan
from pyfacts.dump.shard_writer import ShardWriter
from pyfacts.dump.store import Directory

BLOCKS = [(9, 11), (13,)]  # tokens of the blocks of each shard
BLOCK_TOKENS = 8
HOOKS = (
    HookSpec("blocks.0.mlp.hook_post", "layers.0.down", "input", 300, "neurons", "bfloat16"),
    HookSpec("layers.1/odd name:output", "layers.1", "output", 17, "neurons", "float32"),
    HookSpec("blocks.0.hook_resid_pre", "layers.0", "input", 5, "rows", "float16"),
)
CODECS = ("none", "zstd", "split")
NUMPY = {"bfloat16": np.uint16, "float16": np.uint16, "float32": np.uint32}


def content(hook: HookSpec) -> np.ndarray:
    """The bits [33, width] of a hook: any pattern but -0.0, at densities from 0 to 1."""
    n_tokens = sum(map(sum, BLOCKS))
    cell = np.arange(n_tokens * hook.width, dtype=np.uint64).reshape(n_tokens, hook.width)
    noise = (cell * np.uint64(0x9E3779B97F4A7C15) + np.uint64(hook.width)) >> np.uint64(20)
    bits = noise.astype(NUMPY[hook.dtype])
    token = np.arange(n_tokens, dtype=np.uint64)[:, None]
    bits[(noise >> np.uint64(24)) % np.uint64(32) > token] = 0
    bits[bits == 1 << (8 * bits.itemsize - 1)] = 0
    return bits


def token_columns() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids, documents and positions of the 33 tokens."""
    i = np.arange(sum(map(sum, BLOCKS)), dtype=np.int64)
    return 7 * i % 50, i // 6, i % 6


def norms(hook: HookSpec) -> np.ndarray:
    """Squared norms of rows before a select, [33]."""
    return np.arange(sum(map(sum, BLOCKS))) + hook.width / 4.0


def plan(codec: str) -> Plan:
    ends = np.cumsum([0, *map(sum, BLOCKS)]).tolist()
    return Plan(
        model={"name": "golden"},
        tokens={"highest_id": 49},
        hooks=HOOKS,
        sequences=(0, 4, 6),
        token_starts=tuple(ends),
        batch_size=2,
        shard_tokens=20,
        codec=codec,
        signed_zero=False,
        select=None if codec == "none" else {"kind": "min_abs", "theta": 0.0},
    )


def write(root: Path, codec: str) -> None:
    """Writes the golden dump of a codec."""
    root.mkdir(parents=True)
    the_plan = plan(codec)
    files.write_durably(root / PLAN_FILE, the_plan.to_json())
    ids, document, position = token_columns()
    with mock.patch.object(layout, "MIN_BLOCK_TOKENS", BLOCK_TOKENS):  # several blocks of few tokens
        start = 0
        for shard, blocks in enumerate(BLOCKS):
            writer = ShardWriter(Directory(root), the_plan, shard)
            for n_tokens in blocks:
                part = slice(start, start + n_tokens)
                writer.add_tokens(ids[part], document[part], position[part])
                for hook in HOOKS:
                    bits = content(hook)[part]
                    if hook.kind == "rows":
                        writer[hook.name].add_rows(bits)
                        continue
                    x = torch.from_numpy(bits.view(np.int16 if bits.itemsize == 2 else np.int32))
                    encoding = storage_encoding(pyfacts.encode(x.view(getattr(torch, hook.dtype))))
                    writer[hook.name].add_encoding(encoding, norms(hook)[part] if the_plan.lossy else None)
                start += n_tokens
            writer.commit()


if __name__ == "__main__":
    for codec in CODECS:
        write(Path(sys.argv[1]) / f"v1-{codec}", codec)
