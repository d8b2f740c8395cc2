"""Makes the figures: runs every benchmark, writes bench/results/<machine>.json, and renders them into README.md.

python bench/run.py             # ten minutes, on a machine that does nothing else
python bench/run.py --render    # README.md from the committed figures, without measuring
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
README = ROOT / "README.md"
SECTION = re.compile(r"(<!-- figures: begin -->\n).*?(<!-- figures: end -->)", re.DOTALL)

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--render", action="store_true", help="only rewrite README.md from bench/results")
    if not parser.parse_args().render:
        figures = {"machine": machine(), "rows": measure()}
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{slug(figures['machine'])}.json"
        path.write_text(json.dumps(rounded(figures), indent=1) + "\n")
        print(f"\n{render(figures)}\nwrote {path.relative_to(ROOT)}")
    README.write_text(with_figures(README.read_text()))


# ---- measuring -------------------------------------------------------------------------------------------------------


def measure() -> list[Row]:
    """The rows of every benchmark, and of encode and decode once more with AVX2.

    Products and dumps run in processes of their own, whose memory glibc manages as by default: what a product is
    compared with returns large matrices, and a dump's peak may not hold what others left behind.
    """
    apart = ("bench/test_linear.py", "bench/test_dump_speed.py")
    rows = run_pytest("bench", *(f"--ignore={file}" for file in apart))
    for file in apart:
        rows += run_pytest(file)
    if rows[0]["isa"].startswith("avx512"):
        rows += run_pytest("bench/test_encode_decode.py", "-k", "not odd and not fresh", PYFACTS_ISA="avx2")
    return rows


def run_pytest(*arguments: str, **environment: str) -> list[Row]:
    with tempfile.TemporaryDirectory() as directory:
        figures = Path(directory) / "figures.json"
        command = [sys.executable, "-m", "pytest", *arguments, "--benchmark-enable", "--benchmark-quiet"]
        command += [
            "-p",
            "no:cacheprovider",
            "-q",
            "-W",
            "ignore:Sparse CSR",
            f"--figures={figures}",
            f"--basetemp={directory}/tmp",
        ]
        subprocess.run(command, cwd=ROOT, env=os.environ | environment, check=True)
        return json.loads(figures.read_text())


def machine() -> Row:
    """What the figures depend on."""
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        fields = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", info.read_text(), re.MULTILINE))
        family = ", ".join(f"{key} {fields[key]}" for key in ("cpu family", "model", "stepping") if key in fields)
        cpu = f"{fields.get('model name', cpu)} ({family})" if family else fields.get("model name", cpu)
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "isa": subprocess.check_output(
            [sys.executable, "-c", "from pyfacts import ops; print(ops.isa())"], text=True, cwd=ROOT / "bench"
        ).strip(),
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "date": datetime.date.today().isoformat(),
    }


def slug(machine: Row) -> str:
    name = re.sub(r"\((R|TM)\)|cpu|stepping \d+|[(),@]|CPU|Processor", " ", machine["cpu"])
    return re.sub(r"[^a-z0-9.]+", "-", f"{name} {machine['isa']}".lower()).strip("-")


def rounded(value: Any) -> Any:
    """Four digits, so that the file can be read and its changes too."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


# ---- rendering -------------------------------------------------------------------------------------------------------


def with_figures(readme: str) -> str:
    """README's text with its section of figures made anew from all committed results."""
    assert SECTION.search(readme), "README.md has no lines <!-- figures: begin --> and <!-- figures: end -->"
    rendered = "\n".join(render(json.loads(path.read_text())) for path in sorted(RESULTS.glob("*.json")))
    return SECTION.sub(lambda found: found[1] + rendered + found[2], readme)


def render(figures: Row) -> str:
    """The tables of one machine in Markdown."""
    about, rows = figures["machine"], Rows(figures["rows"], figures["machine"]["isa"])
    return f"""\
One core of {about["cpu"]}, {about["isa"]}, PyTorch {about["torch"]}, {about["date"]}; 4,096 tokens by 16,384 neurons
unless said otherwise; medians of alternating runs. 1.5x is one and a half times the speed of the peer in the same run;
GB/s and GiB/s count the dense bytes.

| | bfloat16 | float32 | aim | beside |
|---|---|---|---|---|
{speed_table(rows)}

Bytes per stored value, bfloat16, in memory:

{size_table(rows)}
"""


class Rows:
    """The rows of one machine, found by what they say."""

    def __init__(self, rows: list[Row], isa: str) -> None:
        self._rows, self._isa = rows, isa

    def find(self, **facts: Any) -> list[Row]:
        facts = {"isa": self._isa} | facts
        return [row for row in self._rows if all(row.get(key) == value for key, value in facts.items())]

    def one(self, **facts: Any) -> Row:
        (row,) = self.find(**facts)
        return row


def speed_table(rows: Rows) -> str:
    lines = []

    def line(label: str, cells: list[str], aim: str, peer: str) -> None:
        lines.append(f"| {' | '.join([label, *cells, aim, peer])} |")

    wide, memcpy = [4096, 16384], "memcpy of the dense matrix"
    dtypes = ("bfloat16", "float32")
    for op, aims in (("encode", ("≥ 1x",) * 3 + ("≥ 0.7x",)), ("decode", ("≥ 0.8x",) * 2 + ("≥ 0.7x", ""))):
        for density, aim in zip((0.01, 0.03, 0.1, 0.5), aims, strict=True):
            found = [rows.one(op=op, dtype=dtype, density=density, shape=wide) for dtype in dtypes]
            line(f"{op}, {density:.0%} dense", [beside(row, "memcpy") for row in found], aim, memcpy)
        for width in (11008, 5000):
            found = [rows.one(op=op, dtype=dtype, shape=[4096, width]) for dtype in dtypes]
            label = f"{op}, 3% of {width:,} neurons"
            line(label, [beside(row, "memcpy") for row in found], aims[0], memcpy)
    for density in (0.03, 0.5):
        found = [rows.one(op="encode into fresh memory", dtype=dtype, density=density) for dtype in dtypes]
        label = f"encode, {density:.0%}, into fresh memory"
        line(label, [beside(row, "memcpy") for row in found], "", "memcpy into touched memory")
    found = [rows.one(op="decode into fresh memory", dtype=dtype) for dtype in dtypes]
    line("decode, 3%, into fresh memory", [beside(row, "clone") for row in found], "", "clone of the dense matrix")
    for peer, aim in (("copy_", ""), ("torch.nonzero", "≥ 20x"), ("to_sparse_csr", "≥ 50x")):
        cells = [spread(rows.find(op="encode", dtype=dtype, shape=wide), peer) for dtype in dtypes]
        line("encode, slowest and fastest of 1 to 10%", cells, aim, f"`{peer}`")
    if rows.find(isa="avx2"):
        for op in ("encode", "decode"):
            cells = [f"{avx2_share(rows, op, dtype):.2f}x" for dtype in dtypes]
            line(
                f"{op} with AVX2, slowest of 1 to 10%", cells, "≥ 0.5x" if op == "encode" else "", "itself with AVX-512"
            )
    lines += linear_lines(rows)
    capture = rows.one(op="capture")
    label = f"capture of all {capture['n_layers']} layers of OPT-125M's shape, {capture['density']:.0%} dense"
    overhead = 1 / capture["peers"]["forward alone"]["ratio"]
    line(label, ["", f"{overhead:.3f}x the time"], "≤ 1.05x", f"the forward alone, {capture['n_tokens']:,} tokens")
    dumps = [rows.find(op="dump", dtype=dtype) for dtype in dtypes]
    cells = [f"{max(found, key=tokens_of)['gib_per_s']:.1f} GiB/s" for found in dumps]
    line("dump of such neurons to disk, codec `none`", cells, "≥ 2 GiB/s", "")
    cells = [" and ".join(f"{row['peak_bytes'] / 1e6:.0f}" for row in sorted(found, key=tokens_of)) for found in dumps]
    counts = " and ".join(f"{row['n_tokens']:,}" for row in sorted(dumps[0], key=tokens_of))
    line(f"its peak resident memory in MB, for {counts} tokens", cells, "the same", "")
    return "\n".join(lines)


def linear_lines(rows: Rows) -> list[str]:
    """Products on two cores, where they were measured: a line a matrix and peer."""
    lines = []
    dtypes = ("bfloat16", "float32")
    encoders = {  # the op of a row: what it is called, and what its time may be of each peer's
        "linear_relu_encode": ("`linear_relu_encode`", {"relu(linear)": {3072: "≤ 1", 16384: "≤ 0.95 and ≤ 0.80"}}),
        "with dense": ("`linear_relu_encode(return_dense=True)`", {"relu(linear)": {}}),
        "jumprelu": ("`linear_relu_encode`, JumpReLU", {"linear": {65536: "≤ 1.05"}}),
        "topk": ("`linear_topk_encode`, k = 32", {"linear": {65536: "≤ 1.05"}, "topk(relu(linear))": {65536: "≤ 0.5"}}),
        "batch topk": ("`linear_batch_topk_encode`, k = 32", {"linear": {}}),
    }
    for op, (name, peers) in encoders.items():
        found = rows.find(op=op)
        for shape in sorted({tuple(row["shape"]) for row in found}):
            cases = [rows.one(op=op, dtype=dtype, shape=list(shape)) for dtype in dtypes]
            for peer, aims in peers.items():
                cells = [f"{1 / case['peers'][peer]['ratio']:.2f} of the time" for case in cases]
                size = f"{cases[0]['d_in']:,} to {shape[1]:,}, {shape[0]:,} tokens, two cores"
                lines.append(f"| {' | '.join([f'{name}, {size}', *cells, aims.get(shape[1], ''), f'`{peer}`'])} |")
    found = rows.find(op="sparse_linear")
    for n_features, density in sorted({(row["shape"][1], round(row["density"], 4)) for row in found}):
        cases = {
            row["dtype"]: row for row in found if (row["shape"][1], round(row["density"], 4)) == (n_features, density)
        }
        for peer, words in (("linear", "`linear` of the dense matrix"), ("CSR @ W_dec", "`torch.sparse` CSR @ W_dec")):
            cells = [
                f"{cases[dtype]['peers'][peer]['ratio']:.3g}x" if peer in cases[dtype]["peers"] else ""
                for dtype in ("bfloat16", "float32")
            ]
            aim = {"linear": "≥ 5x", "CSR @ W_dec": "> 1x"}[peer] if density == 0.01 else ""
            label = f"`sparse_linear` to 768, {100 * density:.2g}% of {n_features:,} neurons, two cores"
            lines.append(f"| {' | '.join([label, *cells, aim, words])} |")
    return lines


def beside(row: Row, peer: str) -> str:
    return f"{row['peers'][peer]['ratio']:.2f}x ({row['gb_per_s']:.1f} GB/s)"


def spread(rows: list[Row], peer: str) -> str:
    ratios = [row["peers"][peer]["ratio"] for row in rows if row["density"] <= 0.1]
    return " to ".join(f"{ratio:.2g}x" for ratio in (min(ratios), max(ratios)))


def avx2_share(rows: Rows, op: str, dtype: str) -> float:
    """AVX2's speed over the best's, each beside the memcpy of its own run."""
    shares = []
    for row in rows.find(op=op, dtype=dtype, isa="avx2"):
        best = rows.one(op=op, dtype=dtype, density=row["density"], shape=row["shape"])
        if row["density"] <= 0.1:
            shares.append(row["peers"]["memcpy"]["ratio"] / best["peers"]["memcpy"]["ratio"])
    return min(shares)


def tokens_of(row: Row) -> int:
    return row["n_tokens"]


def size_table(rows: Rows) -> str:
    sizes = sorted(rows.find(op="bytes per value"), key=lambda row: row["density"])
    lines = [
        "| density | " + " | ".join(f"{row['density']:.0%}" for row in sizes) + " |",
        "|---" * (len(sizes) + 1) + "|",
    ]
    for form in sizes[0]["forms"]:
        lines.append(f"| {form} | " + " | ".join(f"{row['forms'][form]:.2f}" for row in sizes) + " |")
    aims = {0.01: 3.45, 0.03: 3.15, 0.1: 3.05, 0.3: 2.45, 0.5: 2.3}
    lines.append("| aim, at most | " + " | ".join(f"{aims[row['density']]:.2f}" for row in sizes) + " |")
    bound = max(row["of_dense"] for row in rows.find(op="bound"))
    if rows.find(op="bytes per latent on disk"):
        lines += ["", *on_disk(rows)]
    lines += ["", f"A matrix without a single zero takes {bound:.3f}x its dense size (aim: at most 1.07x)."]
    return "\n".join(lines)


def on_disk(rows: Rows) -> list[str]:
    neurons, latents = rows.find(op="bytes per value on disk"), rows.find(op="bytes per latent on disk")
    densities = sorted({row["density"] for row in neurons})
    aims = {0.01: 2.41, 0.03: 2.19, 0.1: 1.96, 0.3: 1.73, 0.5: 1.6}
    lines = [
        f"Bytes per value on disk, {neurons[0]['n_tokens']:,} tokens a shard, everything included: bfloat16 neurons by "
        "density, and an SAE of 131,072 latents, 64 active a token, of Zipfian to uniform frequency.",
        "",
        "| codec | " + " | ".join(f"{d:.0%}" for d in densities) + " | SAE, bfloat16 | SAE, float32 |",
        "|---" * (len(densities) + 3) + "|",
    ]
    for codec in dict.fromkeys(row["codec"] for row in neurons):
        cells = [f"{rows.one(op='bytes per value on disk', codec=codec, density=d)['bytes']:.2f}" for d in densities]
        for dtype in ("bfloat16", "float32"):
            found = [row["bytes"] for row in latents if (row["codec"], row["dtype"]) == (codec, dtype)]
            cells.append(f"{min(found):.2f} to {max(found):.2f}")
        lines.append(f"| `{codec}` | " + " | ".join(cells) + " |")
    aim = [f"{aims[d]:.2f}" for d in densities]
    return [*lines, "| aim, at most | " + " | ".join(aim) + " | 5 (`zstd`) | 5 (`zstd`) |"]


if __name__ == "__main__":
    main()
