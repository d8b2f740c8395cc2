"""Dumps of SAEs' latents: read back, resumed, refused under another SAE, small and of bounded memory when wide."""

import itertools
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dump_models import CONTEXT, TinyModel, committed_bytes, hooked, one_thread, tokens  # noqa: F401  a fixture
from saes import LATENTS, TinySae
from tiny_models import t5
from torch import Tensor, nn

import pyfacts
from pyfacts.dump import DumpError, open_dump

BASE = "layers.0.down:output"
HOOK = f"{BASE}.{LATENTS}"
N_SEQUENCES = 700  # three shards of 5,000 tokens and more


def dump(out: Path, sae: TinySae | None = None, model: nn.Module | None = None, **changes) -> pyfacts.Dump:
    saes = {BASE: sae or TinySae(8)}
    return pyfacts.dump(model or TinyModel(), tokens(N_SEQUENCES), out, saes=saes, **{"shard_tokens": 5000} | changes)


@pytest.fixture(scope="module")
def dumped(tmp_path_factory: pytest.TempPathFactory) -> pyfacts.Dump:
    return dump(tmp_path_factory.mktemp("saes") / "out")


@pytest.fixture(scope="module")
def expected() -> Tensor:
    """The latents of every token, packed and unpacked, from what the next layer reads without what skips the MLP."""
    model, sae, outputs = TinyModel().eval(), TinySae(8), []
    model.layers[0].down.register_forward_hook(lambda m, args, out: outputs.append(out.reshape(-1, 8)))
    with torch.no_grad():
        for ids in tokens(N_SEQUENCES).split(8):
            model(ids)
    return torch.cat([sae.encode(rows).to_dense() for rows in outputs])


def stop_at(n_tokens: int):
    def progress(now) -> None:
        if now.tokens_done >= n_tokens:
            raise KeyboardInterrupt

    return progress


def test_what_is_dumped_is_read(dumped: pyfacts.Dump, expected: Tensor) -> None:
    """By token, by neuron, by the largest, with contexts; latents in the SAE's dtype under a bfloat16 model."""
    assert dumped.hook_names == [HOOK] and dumped.codec == "zstd"
    latents = dumped[HOOK]
    assert (latents.kind, latents.width, latents.dtype) == ("neurons", 600, "float32")
    assert torch.equal(latents[4990:5100].to_dense(), expected[4990:5100])
    j = int((expected[:, 256:] != 0).sum(0).argmax()) + 256
    found, values = latents.neuron(j)
    assert torch.equal(found, expected[:, j].nonzero()[:, 0]) and torch.equal(values, expected[found, j])
    assert latents.top_tokens(j, 1)[0][1] == expected[:, j].max()
    assert dumped.contexts(HOOK, j, 2)[0].value == expected[:, j].max()
    assert dumped.verify().nnz == {HOOK: int(expected.count_nonzero())}


def test_the_plan_says_which_sae(dumped: pyfacts.Dump) -> None:
    (sae,) = dumped.plan["saes"].values()
    assert sae["d_in"] == 8 and sae["d_sae"] == 600 and sae["config"] == {"architecture": "topk", "k": 4}
    assert len(sae["weights_xxh3"]) == 32


def test_hooks_beside_latents(tmp_path: Path) -> None:
    d = dump(tmp_path, names_filter="layers.1.down", select=pyfacts.topk(5))
    assert d.hook_names == ["layers.1.down", HOOK]
    neurons = hooked(TinyModel(), ["layers.1.down"], [(ids,) for ids in tokens(N_SEQUENCES).split(8)])["layers.1.down"]
    assert torch.equal(d["layers.1.down"][:].to_dense(), pyfacts.topk(5).encode(neurons).to_dense())
    assert d[HOOK][:].dropped_share == pytest.approx(0, abs=1e-12)  # select is not for latents
    d.verify()


def test_the_forward_stops_after_the_hook(tmp_path: Path) -> None:
    model, later = TinyModel(), []
    model.layers[1].register_forward_hook(lambda *_: later.append(1))
    dump(tmp_path, model=model)
    assert model.forwards == -(-N_SEQUENCES // 8) and len(later) == 1  # the first forward is looked at whole


def test_an_interrupted_dump_resumes_to_the_same_bytes(dumped: pyfacts.Dump, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        dump(tmp_path, progress=stop_at(7000))
    assert not open_dump(tmp_path).complete
    assert dump(tmp_path).complete and committed_bytes(tmp_path) == committed_bytes(dumped.path)


def test_kill_9_then_resume_gives_the_same_bytes(dumped: pyfacts.Dump, tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, __file__, str(tmp_path)], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert 0 < open_dump(tmp_path).n_tokens_committed < N_SEQUENCES * CONTEXT
    dump(tmp_path)
    assert committed_bytes(tmp_path) == committed_bytes(dumped.path)


@pytest.mark.parametrize(
    ("sae", "field"),
    [
        (TinySae(8, seed=1), "weights_xxh3"),
        (TinySae(8, k=5), "config.k"),
        (TinySae(8, d_sae=601), "d_sae"),
        (TinySae(8, dtype=torch.bfloat16), "weights_xxh3"),
    ],
)
def test_another_sae_is_refused(sae: TinySae, field: str, dumped: pyfacts.Dump) -> None:
    with pytest.raises(DumpError, match=rf"another dump: saes\.{HOOK}\.{field} is .* there and .* here"):
        dump(dumped.path, sae)


def test_no_sae_is_another_dump_too(dumped: pyfacts.Dump) -> None:
    with pytest.raises(DumpError, match=f"another dump: .*{HOOK}"):
        pyfacts.dump(TinyModel(), tokens(N_SEQUENCES), dumped.path, names_filter="layers.0.down", shard_tokens=5000)


def test_the_hash_goes_by_canonical_names(dumped: pyfacts.Dump) -> None:
    """A compiled SAE's tensors have a prefix, and are the same SAE."""
    sae = TinySae(8)
    tensors = {f"_orig_mod.{name}": tensor for name, tensor in reversed(sae.tensors().items())}
    sae.tensors = lambda: tensors  # type: ignore[method-assign]
    assert dump(dumped.path, sae).complete


def test_dense_latents_are_refused_with_their_size(tmp_path: Path) -> None:
    sae, seen = TinySae(8, k=None), []
    sae.b_enc += 102
    with pytest.raises(ValueError, match=rf"100% dense \({HOOK}: 100%\).* [kMG]B"):
        dump(tmp_path / "out", sae)
    dump(tmp_path / "sparse", progress=seen.append)
    n_tokens = N_SEQUENCES * CONTEXT
    assert seen[0].dense_bytes == n_tokens * 600 * 4 and 0 < seen[0].packed_bytes < n_tokens * 600 * 4 / 10


def test_blocks_grow_until_their_columns_are_worth_it(tmp_path: Path) -> None:
    """One latent a token of 600, three columns: 2,048 values a column are 6,144 tokens. Rows take 4,096."""
    ids, batch_tokens = tokens(20000 // CONTEXT), 8 * CONTEXT
    for out, hooks, least in (("latents", None, 3 * 2048), ("with rows", [BASE], 4096)):
        d = pyfacts.dump(TinyModel(), ids, tmp_path / out, hooks, saes={BASE: TinySae(8, k=1)}, batch_size=8)
        d.verify()
        assert d[HOOK].nnz == d.n_tokens
        blocks = json.loads((tmp_path / out / "00000.json").read_text())["blocks"]
        assert blocks[0] == -(-least // batch_tokens) * batch_tokens


class WideSae(TinySae):
    """131,072 latents of which 64 are active, some more often than others: 16,384 tokens, over and over."""

    def __init__(self, dtype: torch.dtype, batch_tokens: int) -> None:
        super().__init__(8, d_sae=131072, dtype=dtype)
        generator = torch.Generator().manual_seed(0)
        batches = []
        for _ in range(16384 // batch_tokens):
            draws = (torch.rand(batch_tokens, 64, generator=generator).square() * self.d_sae).long()
            values = torch.randn(batch_tokens, 64, generator=generator).abs().to(dtype)
            batches.append(
                pyfacts.encode(torch.zeros(batch_tokens, self.d_sae, dtype=dtype).scatter_(1, draws, values))
            )
        self.batches = itertools.cycle(batches)

    def encode(self, x: Tensor) -> pyfacts.EncodedActivations:
        return next(self.batches)


def test_a_wide_sae_in_few_bytes_and_bounded_memory(tmp_path: Path) -> None:
    """At most 4 bytes per bfloat16 value of 131,072 latents, beside the statistics; and memory for blocks, not shards.

    The statistics are 28 bytes a latent and shard.
    """
    resident = []

    def progress(now) -> None:
        with open("/proc/self/statm") as file:
            resident.append(int(file.read().split()[1]) * resource.getpagesize())

    saes, ids = {BASE: WideSae(torch.bfloat16, 8 * CONTEXT)}, tokens(8192)
    d = pyfacts.dump(TinyModel(), ids, tmp_path, saes=saes, shard_tokens=1 << 20, progress=progress)
    latents = d[HOOK]
    assert d.codec == "zstd" and d.n_shards == 1 and latents.nnz > 0.99 * 64 * ids.numel()
    assert 3 < (latents.n_bytes - 28 * latents.width) / latents.nnz < 4
    fourth = len(resident) // 4
    growth = max(resident[-fourth:]) - max(resident[fourth : 2 * fourth])
    assert growth < 20e6  # two blocks; half of the shard, held packed in memory, would be 60 MB


if __name__ == "__main__":

    def die_at(now) -> None:
        if now.shards_done >= 1:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    dump(Path(sys.argv[1]), progress=die_at)


def test_latents_of_a_decoder(tmp_path):
    sae = pyfacts.SAE(torch.ones(40, 9), torch.ones(9), torch.ones(9, 40), torch.ones(40))
    with pytest.raises(ValueError, match="belongs to a decoder"):
        pyfacts.dump(t5(), [[1, 2]], tmp_path, saes={"decoder_blocks.0.mlp.hook_post": sae})
