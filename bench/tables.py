"""The figures as tables: README's, of what has an aim, and bench/RESULTS.md, all of every machine."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECTION = re.compile(r"(<!-- figures: begin -->\n).*?(<!-- figures: end -->)", re.DOTALL)
DTYPES = ("bfloat16", "float32")

Row = dict[str, Any]
Figures = dict[str, Any]  # {"machine": Row, "rows": list[Row]}, as bench/run.py writes them


@dataclass(frozen=True)
class Line:
    """One measure of one machine."""

    measure: str
    cells: tuple[str, str]  # of DTYPES
    beside: str = ""
    aim: str = ""
    rates: str = ""  # in bytes of the dense matrix

    def marked(self) -> tuple[str, str]:
        """The cells, with a mark at those that are short of their aim: one for both, or one for each."""
        aims = self.aim.split(" and ")
        bfloat16, float32 = (marked(cell, aim) for cell, aim in zip(self.cells, aims * 2, strict=False))
        return bfloat16, float32


def marked(cell: str, aim: str) -> str:
    """The cell, with a mark if it is short of its aim."""
    return f"{cell} ✗" if misses(cell, aim) else cell


def misses(cell: str, aim: str) -> bool:
    """Whether a number of the cell is on the wrong side of the aim, such as "≥ 20x"."""
    relation, _, bound = aim.partition(" ")
    values, bounds = ([float(number) for number in re.findall(r"\d+(?:\.\d+)?", text)] for text in (cell, bound))
    if relation not in ("≥", "≤", ">") or not values:
        return False
    return max(values) > bounds[0] if relation == "≤" else min(values) < bounds[0]


def documents(root: Path) -> dict[Path, str]:
    """The files that show the committed figures, with their text; what was measured most thoroughly first."""
    machines = [json.loads(path.read_text()) for path in sorted((root / "bench" / "results").glob("*.json"))]
    machines.sort(key=lambda figures: (figures["machine"]["processes"], figures["machine"]["isa"]), reverse=True)
    readme = root / "README.md"
    return {readme: with_figures(readme.read_text(), machines), root / "bench" / "RESULTS.md": results(machines)}


def with_figures(readme: str, machines: Sequence[Figures]) -> str:
    """README's text with its section of figures made anew."""
    assert SECTION.search(readme), "README.md has no lines <!-- figures: begin --> and <!-- figures: end -->"
    return SECTION.sub(lambda found: found[1] + summary(machines) + found[2], readme)


def summary(machines: Sequence[Figures]) -> str:
    """What has an aim, with two columns a machine, and the sizes."""
    names = [chr(ord("A") + i) for i in range(len(machines))]
    lines = [
        "4,096 tokens by 16,384 neurons on one core unless said otherwise; 1.5x is one and a half times the speed of",
        "the peer in the same process; medians of alternating calls, of three processes the middle one. ✗ is short of",
        "its aim. What has no aim, and the rates: [bench/RESULTS.md](bench/RESULTS.md).",
        "",
        *(f"- {name}: {about(figures['machine'])}" for name, figures in zip(names, machines, strict=True)),
    ]
    columns = [f"{name}: {dtype}" for name in names for dtype in DTYPES]
    lines += ["", *head(["", *columns, "aim", "beside"])]
    by_machine = [
        {(line.measure, line.beside): line for line in speed(Rows(figures)) if line.aim} for figures in machines
    ]
    aims = {key: line.aim for found in by_machine for key, line in found.items()}
    for (measure, beside), aim in aims.items():
        known = [found.get((measure, beside)) for found in by_machine]
        cells = [cell for line in known for cell in (line.marked() if line else ("–", "–"))]
        lines.append(cells_of([measure, *cells, aim, beside]))
    return "\n".join([*lines, "", sizes(Rows(machines[0]))]) + "\n"


def results(machines: Sequence[Figures]) -> str:
    """bench/RESULTS.md."""
    parts = [
        "# Results",
        "",
        "Made by `make bench` from `results/`; how they are measured says [README.md](README.md).",
    ]
    for figures in machines:
        parts += ["", f"## {about(figures['machine'])}", ""]
        parts += head(["", *DTYPES, "GB/s of dense bytes", "aim", "beside"])
        parts += [
            cells_of([line.measure, *line.marked(), line.rates, line.aim, line.beside]) for line in speed(Rows(figures))
        ]
        parts += ["", sizes(Rows(figures))]
    return "\n".join(parts) + "\n"


def about(machine: Row) -> str:
    processes = "one process" if machine["processes"] == 1 else f"{machine['processes']} processes"
    return f"{machine['cpu']}, {machine['isa']}, PyTorch {machine['torch']}, {machine['date']}, {processes}"


def head(titles: Sequence[str]) -> list[str]:
    return [cells_of(titles), "|---" * len(titles) + "|"]


def cells_of(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


class Rows:
    """The rows of one machine, found by what they say."""

    def __init__(self, figures: Figures) -> None:
        self._rows, self.best_isa = figures["rows"], figures["machine"]["isa"]

    def find(self, **facts: Any) -> list[Row]:
        facts = {"isa": self.best_isa} | facts
        return [row for row in self._rows if all(row.get(key) == value for key, value in facts.items())]

    def one(self, **facts: Any) -> Row:
        (row,) = self.find(**facts)
        return row

    def of_dtypes(self, **facts: Any) -> tuple[Row, Row]:
        bfloat16, float32 = (self.one(dtype=dtype, **facts) for dtype in DTYPES)
        return bfloat16, float32


# ---- speed -----------------------------------------------------------------------------------------------------------


def speed(rows: Rows) -> Iterator[Line]:
    yield from encoding(rows)
    yield from encoders(rows)
    yield from sparse_linear(rows)
    yield from capture_and_dump(rows)
    if rows.find(op="read batches"):  # not measured everywhere yet
        yield from reading(rows)


def encoding(rows: Rows) -> Iterator[Line]:
    """Encode and decode, on one core."""
    wide, memcpy = [4096, 16384], "memcpy of the dense matrix"
    for op, aims in (("encode", ("≥ 1x",) * 3 + ("≥ 0.7x",)), ("decode", ("≥ 0.8x",) * 2 + ("≥ 0.7x", ""))):
        for density, aim in zip((0.01, 0.03, 0.1, 0.5), aims, strict=True):
            yield faster(f"{op}, {density:.0%} dense", rows.of_dtypes(op=op, density=density, shape=wide), memcpy, aim)
        for width in (11008, 5000):
            measure = f"{op}, 3% of {width:,} neurons"
            yield faster(measure, rows.of_dtypes(op=op, shape=[4096, width]), memcpy, aims[0])
    for density in (0.03, 0.5):
        found = rows.of_dtypes(op="encode into fresh memory", density=density)
        yield faster(f"encode, {density:.0%}, into fresh memory", found, "memcpy into touched memory")
    found = rows.of_dtypes(op="decode into fresh memory")
    yield faster("decode, 3%, into fresh memory", found, "clone of the dense matrix")
    for peer, aim in (("copy_", ""), ("torch.nonzero", "≥ 20x"), ("to_sparse_csr", "≥ 50x")):
        low, high = (spread(rows.find(op="encode", dtype=dtype, shape=wide), peer) for dtype in DTYPES)
        yield Line("encode, slowest and fastest of 1 to 10%", (low, high), f"`{peer}`", aim)
    for op, aim in (("encode", "≥ 0.5x"), ("decode", "")):
        if rows.best_isa != "avx2" and rows.find(isa="avx2"):
            narrow, full = (f"{avx2_share(rows, op, dtype):.2f}x" for dtype in DTYPES)
            yield Line(f"{op} with AVX2, slowest of 1 to 10%", (narrow, full), "itself with AVX-512", aim)


def faster(measure: str, found: tuple[Row, Row], beside: str, aim: str = "") -> Line:
    """So many times the speed of the first peer."""
    first, second = (f"{next(iter(row['peers'].values()))['ratio']:.2f}x" for row in found)
    rates = " and ".join(f"{row['gb_per_s']:.1f}" for row in found)
    return Line(measure, (first, second), beside, aim, rates)


def spread(found: Sequence[Row], peer: str) -> str:
    ratios = [row["peers"][peer]["ratio"] for row in found if row["density"] <= 0.1]
    return " to ".join(f"{ratio:.2g}x" for ratio in (min(ratios), max(ratios)))


def avx2_share(rows: Rows, op: str, dtype: str) -> float:
    """AVX2's speed over the best's, each beside the memcpy of its own run."""
    shares = []
    for row in rows.find(op=op, dtype=dtype, isa="avx2"):
        best = rows.one(op=op, dtype=dtype, density=row["density"], shape=row["shape"])
        if row["density"] <= 0.1:
            shares.append(row["peers"]["memcpy"]["ratio"] / best["peers"]["memcpy"]["ratio"])
    return min(shares)


def encoders(rows: Rows) -> Iterator[Line]:
    """Products and their encoding: the share of each peer's time."""
    of_op = {  # the op of a row: what it is called, and the aim for each peer, by the number of features
        "linear_relu_encode": ("`linear_relu_encode`", {"relu(linear)": {3072: "≤ 1", 16384: "≤ 0.95 and ≤ 0.80"}}),
        "with dense": ("`linear_relu_encode(return_dense=True)`", {"relu(linear)": {}}),
        "jumprelu": ("`linear_relu_encode`, JumpReLU", {"linear": {65536: "≤ 1.05"}}),
        "topk": ("`linear_topk_encode`, k = 32", {"linear": {65536: "≤ 1.05"}, "topk(relu(linear))": {65536: "≤ 0.5"}}),
        "batch topk": ("`linear_batch_topk_encode`, k = 32", {"linear": {}}),
    }
    for op, (name, peers) in of_op.items():
        for n_tokens, n_features in sorted({tuple(row["shape"]) for row in rows.find(op=op)}):
            case = {row["dtype"]: row for row in rows.find(op=op, shape=[n_tokens, n_features])}
            measure = f"{name}, {case['float32']['d_in']:,} to {n_features:,}, {n_tokens:,} tokens, two cores"
            for peer, aims in peers.items():
                first, second = (
                    f"{1 / case[dtype]['peers'][peer]['ratio']:.2f} of the time" if dtype in case else ""
                    for dtype in DTYPES
                )
                yield Line(measure, (first, second), f"`{peer}`", aims.get(n_features, ""))


def sparse_linear(rows: Rows) -> Iterator[Line]:
    found = rows.find(op="sparse_linear")
    for n_features, density in sorted({(row["shape"][1], round(row["density"], 4)) for row in found}):
        measure = f"`sparse_linear` to 768, {100 * density:.2g}% of {n_features:,} neurons, two cores"
        case = {
            row["dtype"]: row["peers"]
            for row in found
            if (row["shape"][1], round(row["density"], 4)) == (n_features, density)
        }
        for peer, beside, aim in (
            ("linear", "`linear` of the dense matrix", "≥ 5x"),
            ("CSR @ W_dec", "`torch.sparse` CSR @ W_dec", "> 1x"),
        ):
            first, second = (f"{case[d][peer]['ratio']:.3g}x" if peer in case.get(d, {}) else "" for d in DTYPES)
            yield Line(measure, (first, second), beside, aim if density == 0.01 else "")


def capture_and_dump(rows: Rows) -> Iterator[Line]:
    capture = rows.one(op="capture")
    overhead = f"{1 / capture['peers']['forward alone']['ratio']:.3f}x the time"
    measure = f"capture of all {capture['n_layers']} layers of OPT-125M's shape, {capture['density']:.0%} dense"
    yield Line(measure, ("", overhead), f"the forward alone, {capture['n_tokens']:,} tokens", "≤ 1.05x")
    dumps = [sorted(rows.find(op="dump", dtype=dtype), key=lambda row: row["n_tokens"]) for dtype in DTYPES]
    first, second = (f"{found[-1]['gib_per_s']:.1f} GiB/s" for found in dumps)
    yield Line("dump of such neurons to disk, codec `none`", (first, second), aim="≥ 2 GiB/s")
    first, second = (" and ".join(f"{added_bytes(row) / 1e6:.0f}" for row in found) for found in dumps)
    counts = " and ".join(f"{row['n_tokens']:,}" for row in dumps[0])
    yield Line(f"MB it adds to resident memory, for {counts} tokens", (first, second), aim="the same")


def reading(rows: Rows) -> Iterator[Line]:
    """A dump's tokens and neurons, from the page cache."""
    first, second = (f"{row['gb_per_s'] * 1e9 / 2**30:.1f} GiB/s" for row in rows.of_dtypes(op="read batches"))
    yield Line("shuffled dense batches of a dump, 3% dense, codec `zstd`", (first, second), aim="≥ 1 GiB/s")
    beside = "the dense matrix, memory-mapped, in the page cache"
    yield faster("the same", rows.of_dtypes(op="read batches"), beside)
    yield faster("ranges of 4,096 tokens of a dump, packed", rows.of_dtypes(op="read tokens"), beside)
    for op, which in (("far neurons", "each of another column"), ("neighbouring neurons", "all of one column")):
        first, second = (
            f"{next(iter(row['peers'].values()))['ratio']:.2f}x ({row['ms'] / 64:.2g} ms each)"
            for row in rows.of_dtypes(op=f"read {op}")
        )
        yield Line(f"64 neurons of a dump at 65,536 tokens, {which}", (first, second), beside)


def added_bytes(dump: Row) -> int:
    return dump["peak_bytes"] - dump["before_bytes"]


# ---- bytes -----------------------------------------------------------------------------------------------------------


def sizes(rows: Rows) -> str:
    """Counted, so the same on every machine."""
    lines = ["Bytes per stored value, bfloat16, in memory:", "", *in_memory(rows)]
    if rows.find(op="bytes per latent on disk"):
        lines += ["", *on_disk(rows)]
    bound = max(row["of_dense"] for row in rows.find(op="bound"))
    return "\n".join(
        [*lines, "", f"A matrix without a single zero takes {bound:.3f}x its dense size (aim: at most 1.07x)."]
    )


def in_memory(rows: Rows) -> list[str]:
    found = sorted(rows.find(op="bytes per value"), key=lambda row: row["density"])
    aims = {0.01: 3.45, 0.03: 3.15, 0.1: 3.05, 0.3: 2.45, 0.5: 2.3}
    lines = head(["density", *(f"{row['density']:.0%}" for row in found)])
    for form in found[0]["forms"]:
        cells = [f"{row['forms'][form]:.2f}" for row in found]
        if form == "pyfacts":
            cells = [marked(cell, f"≤ {aims[row['density']]}") for cell, row in zip(cells, found, strict=True)]
        lines.append(cells_of([form, *cells]))
    return [*lines, cells_of(["aim, at most", *(f"{aims[row['density']]:.2f}" for row in found)])]


def on_disk(rows: Rows) -> list[str]:
    neurons, latents = rows.find(op="bytes per value on disk"), rows.find(op="bytes per latent on disk")
    densities = sorted({row["density"] for row in neurons})
    aims = {0.01: 2.41, 0.03: 2.19, 0.1: 1.96, 0.3: 1.73, 0.5: 1.6}
    lines = [
        f"Bytes per value on disk, {neurons[0]['n_tokens']:,} tokens a shard, everything included: bfloat16 neurons by "
        "density, and an SAE of 131,072 latents, 64 active a token, of Zipfian to uniform frequency.",
        "",
        *head(["codec", *(f"{d:.0%}" for d in densities), "SAE, bfloat16", "SAE, float32"]),
    ]
    for codec in dict.fromkeys(row["codec"] for row in neurons):
        cells = [f"{rows.one(op='bytes per value on disk', codec=codec, density=d)['bytes']:.2f}" for d in densities]
        if codec == "split":
            cells = [marked(cell, f"≤ {aims[d]}") for cell, d in zip(cells, densities, strict=True)]
        for dtype in DTYPES:
            found = [row["bytes"] for row in latents if (row["codec"], row["dtype"]) == (codec, dtype)]
            cells.append(marked(f"{min(found):.2f} to {max(found):.2f}", "≤ 5" if codec == "zstd" else ""))
        lines.append(cells_of([f"`{codec}`", *cells]))
    of_split = [f"{aims[d]:.2f} (`split`)" for d in densities]
    return [*lines, cells_of(["aim, at most", *of_split, "5 (`zstd`)", "5 (`zstd`)"])]
