"""The measuring behind `pyfacts bench` and README's figures. Nothing here asserts a time that was measured."""

import math
import re
from pathlib import Path

import pytest
import torch

from pyfacts import bench

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def scripts_of_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "bench")


def test_documents_show_the_committed_figures() -> None:
    import tables

    for path, text in tables.documents(ROOT).items():
        assert path.read_text() == text, f"{path.name} shows other figures than bench/results: bench/run.py --render"


def test_readme_shows_what_has_an_aim_on_every_machine() -> None:
    import tables

    rows = [r for r in made_up_rows() if r["isa"] != "avx2" and not r["op"].startswith("read")]
    other = {"machine": MACHINE | {"cpu": "Other CPU"}, "rows": rows}
    shown = tables.summary([made_up(), other])
    assert "- A: Some CPU (model 1), avx512, PyTorch 2.13.0, 2026-01-01, 3 processes\n- B: Other CPU, avx512" in shown
    assert "|  | A: bfloat16 | A: float32 | B: bfloat16 | B: float32 | aim | beside |" in shown
    assert "| encode, 3% dense | 2.00x | 2.00x | 2.00x | 2.00x | ≥ 1x | memcpy of the dense matrix |" in shown
    assert "| encode with AVX2, slowest of 1 to 10% | 0.75x | 0.75x | – | – | ≥ 0.5x | itself with AVX-512 |" in shown
    batches = (
        "| shuffled dense batches of a dump, 3% dense, codec `zstd` | 7.5 GiB/s | 7.5 GiB/s | – | – | ≥ 1 GiB/s |  |"
    )
    assert batches in shown and "neurons of a dump" not in shown
    assert "copy_" not in shown and "fresh memory" not in shown
    assert len({line.count("|") for line in shown.splitlines() if line.startswith(("| encode", "| capture"))}) == 1


def test_a_machine_with_avx2_and_no_bfloat16_products() -> None:
    """Its own columns are AVX2's, its products float32's alone. What it lacks does not hide what others have."""
    import tables

    ops = ("linear_relu_encode", "with dense", "jumprelu", "topk", "batch topk", "sparse_linear")
    rows = [row for row in made_up_rows() if row["isa"] != "avx2"]
    rows = [row | {"isa": "avx2"} for row in rows if not (row["op"] in ops and row["dtype"] == "bfloat16")]
    old = {"machine": MACHINE | {"isa": "avx2"}, "rows": rows}
    shown = tables.summary([old, made_up()])
    assert "| encode, 3% dense | 2.00x | 2.00x | 2.00x | 2.00x |" in shown
    assert "| encode with AVX2, slowest of 1 to 10% | – | – | 0.75x | 0.75x |" in shown
    (line,) = [line for line in shown.splitlines() if line.startswith("| `linear_relu_encode`, 768")]
    assert "two cores |  | 0.50 of the time | 0.80 of the time | 0.50 of the time | ≤ 1 |" in line


def test_results_name_machine_peers_and_every_aim() -> None:
    import tables

    shown = tables.results([made_up()])
    assert "## Some CPU (model 1), avx512, PyTorch 2.13.0, 2026-01-01, 3 processes" in shown
    assert "| encode, 3% dense | 2.00x | 2.00x | 8.0 and 8.0 | ≥ 1x | memcpy of the dense matrix |" in shown
    assert "| encode, slowest and fastest of 1 to 10% | 30x to 40x | 30x to 40x |  | ≥ 20x | `torch.nonzero` |" in shown
    assert "| encode, 50%, into fresh memory | 0.60x | 0.60x | 8.0 and 8.0 |  | memcpy into touched memory |" in shown
    assert "|  | 1.250x the time ✗ |  | ≤ 1.05x | the forward alone, 2,048 tokens |" in shown
    assert "| MB it adds to resident memory, for 16,384 and 131,072 tokens | 10 and 11 | 10 and 11 |" in shown
    beside = "the dense matrix, memory-mapped, in the page cache"
    assert f"| ranges of 4,096 tokens of a dump, packed | 0.50x | 0.50x | 8.0 and 8.0 |  | {beside} |" in shown
    assert f", all of one column | 0.50x (1.5 ms each) | 0.50x (1.5 ms each) |  |  | {beside} |" in shown
    sparse_linear = "| `sparse_linear` to 768, 1% of 16,384 neurons, two cores |"
    assert f"{sparse_linear} 10x | 40x |  | ≥ 5x | `linear` of the dense matrix |" in shown
    assert f"{sparse_linear}  | 4x |  | > 1x | `torch.sparse` CSR @ W_dec |" in shown
    encoder = "| `linear_relu_encode`, 768 to 3,072, 2,048 tokens, two cores |"
    assert f"{encoder} 0.80 of the time | 0.50 of the time |  | ≤ 1 | `relu(linear)` |" in shown
    assert "| density | 1% | 50% |" in shown
    assert "| pyfacts | 3.40 | 2.25 |" in shown
    assert "| aim, at most | 3.45 | 2.30 |" in shown
    assert "takes 1.065x its dense size" in shown


def test_the_run_in_the_middle_is_kept() -> None:
    from run import in_the_middle

    timed = [{"peers": {"memcpy": {"ratio": ratio}, "other": {"ratio": -ratio}}} for ratio in (3.0, 1.0, 2.0)]
    dumped = [{"gib_per_s": rate} for rate in (1.0, 9.0, 8.0)]
    assert in_the_middle([[a, b] for a, b in zip(timed, dumped, strict=True)]) == [timed[2], dumped[2]]


def test_result_file_is_named_after_cpu_and_isa() -> None:
    from run import slug

    cpu = "Intel(R) Xeon(R) Processor @ 2.50GHz (cpu family 6, model 85, stepping 7)"
    assert slug({"cpu": cpu, "isa": "avx512"}) == "intel-xeon-2.50ghz-family-6-model-85-avx512"


def test_cases_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    clock = FakeClock(monkeypatch)

    def call(name: str, took: float):
        def run() -> None:
            calls.append(name)
            clock.now += took

        return run

    monkeypatch.setattr(bench, "copy_bandwidth", lambda: 1000.0)
    case = bench.Case("ours", call("ours", 2.0), {"peer": call("peer", 3.0)}, 400, 500, {"op": "nothing"})
    row = bench.measure(case, rounds=3)
    assert calls == ["ours", "peer"] * 4  # the first pair warms up
    assert row["ms"] == 2000 and row["floor_ms"] == 500 and row["gb_per_s"] == 400 / 2 / 1e9
    assert row["peers"] == {"peer": {"ms": 3000.0, "gb_per_s": 400 / 3 / 1e9, "ratio": 1.5}}
    assert row["op"] == "nothing"


def test_a_row_takes_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "copy_bandwidth", lambda: 1.0)
    row = bench.row(bench.Case("", print, {}, 1, 1), [1.0, 9.0, 2.0], {"peer": [4.0, 0.1, 90.0]})
    assert row["ms"] == 2000 and row["peers"]["peer"]["ratio"] == 2


def test_activations_have_the_density_and_no_negative_values() -> None:
    x = bench.activations(512, 1024, 0.03, torch.bfloat16)
    assert x.shape == (512, 1024) and x.dtype == torch.bfloat16
    assert math.isclose(x.count_nonzero().item() / x.numel(), 0.03, rel_tol=0.05)
    assert (x >= 0).all()
    assert torch.equal(x, bench.activations(512, 1024, 0.03, torch.bfloat16))


@pytest.mark.parametrize("make", [bench.encode_case, bench.decode_case])
def test_moved_bytes_are_dense_and_packed(make) -> None:
    import pyfacts

    x = bench.activations(256, 512, 0.1, torch.float32)
    assert make(x).dense_bytes == x.nbytes
    assert make(x).moved_bytes == x.nbytes + pyfacts.encode(x).nbytes


def test_table_shows_every_case_and_peer_of_a_small_run() -> None:
    x = bench.activations(128, 300, 0.1, torch.bfloat16)
    rows = [bench.measure(case, rounds=1) for case in (bench.encode_case(x), bench.decode_case(x))]
    shown = bench.table([*rows, {"name": "capture", "skipped": "needs transformers"}])
    for name in (
        "encode bfloat16 128 x 300, 10%",
        "copy_",
        "torch.nonzero",
        "to_sparse_csr",
        "decode",
        "clone",
        "floor",
    ):
        assert name in shown
    assert len(re.findall(r"\d\.\d\dx$", shown, re.MULTILINE)) == 4
    assert shown.endswith("capture: needs transformers")


def test_capture_case_hooks_every_layer_at_the_density_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    small = {"vocab_size": 64, "hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 512, "num_attention_heads": 4}
    monkeypatch.setattr(bench, "OPT_125M", bench.OPT_125M | small)
    case = bench.capture_case(bench.opt(2, density=0.04), torch.randint(5, 60, (2, 64)))
    assert case.facts["n_layers"] == 2 and case.facts["n_tokens"] == 128
    assert math.isclose(case.facts["density"], 0.04, rel_tol=0.3)
    assert case.dense_bytes == 2 * 128 * 512 * 4


class FakeClock:
    """Stands in for time.perf_counter in `pyfacts.bench`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(bench.time, "perf_counter", lambda: self.now)


MACHINE = {
    "cpu": "Some CPU (model 1)",
    "cores": 2,
    "isa": "avx512",
    "torch": "2.13.0",
    "date": "2026-01-01",
    "processes": 3,
}


def made_up():
    return {"machine": MACHINE, "rows": list(made_up_rows())}


def made_up_rows():
    def timed(op: str, peers: dict[str, float], **facts):
        peers = {name: {"ratio": ratio} for name, ratio in peers.items()}
        return {"op": op, "isa": "avx512", "gb_per_s": 8.0, "peers": peers, **facts}

    for dtype in ("bfloat16", "float32"):
        for density in (0.01, 0.03, 0.1, 0.5):
            wide = {"dtype": dtype, "density": density, "shape": [4096, 16384]}
            slow = {"copy_": 1.2, "torch.nonzero": 300 * density if density > 0.03 else 40.0, "to_sparse_csr": 60.0}
            yield timed("encode", {"memcpy": 2.0} | slow, **wide)
            yield timed("decode", {"memcpy": 1.0}, **wide)
            yield timed("encode", {"memcpy": 1.5}, **wide) | {"isa": "avx2"}
            yield timed("decode", {"memcpy": 0.9}, **wide) | {"isa": "avx2"}
        for width in (11008, 5000):
            for op in ("encode", "decode"):
                yield timed(op, {"memcpy": 1.1}, dtype=dtype, density=0.03, shape=[4096, width])
        for density in (0.03, 0.5):
            facts = {"dtype": dtype, "density": density, "shape": [4096, 16384]}
            yield timed("encode into fresh memory", {"memcpy": 0.6}, **facts)
        yield timed("decode into fresh memory", {"clone": 1.2}, dtype=dtype, density=0.03, shape=[4096, 16384])
        for n_tokens, peak in ((131072, 501e6), (16384, 500e6)):
            dump = {"op": "dump", "isa": "avx512", "dtype": dtype, "n_tokens": n_tokens}
            yield dump | {"gib_per_s": 2.5, "peak_bytes": peak, "before_bytes": 490e6}
        for op in ("batches", "tokens", "far neurons", "neighbouring neurons"):
            yield timed(f"read {op}", {"memory-mapped dense matrix": 0.5}, dtype=dtype, ms=96.0)
        yield {"op": "bound", "isa": "avx512", "dtype": dtype, "of_dense": 1.065}
    linear = {"density": 0.01, "shape": [4096, 16384]}
    up = {"shape": [2048, 3072], "d_in": 768}
    yield timed("linear_relu_encode", {"relu(linear)": 1.25}, dtype="bfloat16", **up)
    yield timed("linear_relu_encode", {"relu(linear)": 2.0}, dtype="float32", **up)
    yield timed("sparse_linear", {"linear": 10.0}, dtype="bfloat16", **linear)
    yield timed("sparse_linear", {"linear": 40.0, "CSR @ W_dec": 4.0}, dtype="float32", **linear)
    yield timed("capture", {"forward alone": 0.8}, n_tokens=2048, n_layers=12, density=0.039)
    for density, size in ((0.5, 2.25), (0.01, 3.4)):
        yield {"op": "bytes per value", "isa": "avx512", "density": density, "forms": {"pyfacts": size}}


@pytest.mark.parametrize(
    ("cell", "aim", "missed"),
    [
        ("0.99x", "≥ 1x", True),
        ("1.00x", "≥ 1x", False),
        ("13x to 21x", "≥ 20x", True),
        ("20x to 30x", "≥ 20x", False),
        ("0.63 of the time", "≤ 0.5", True),
        ("0.50 of the time", "≤ 0.5", False),
        ("4.1 GiB/s", "≥ 2 GiB/s", False),
        ("", "> 1x", False),
        ("5 and 6", "the same", False),
    ],
)
def test_what_is_short_of_its_aim_is_marked(cell: str, aim: str, missed: bool) -> None:
    import tables

    assert tables.misses(cell, aim) == missed
    line = tables.Line("", ("0.96 of the time", "0.81 of the time"), aim="≤ 0.95 and ≤ 0.80")
    assert line.marked() == ("0.96 of the time ✗", "0.81 of the time ✗")
