"""Measures pyfacts beside its PyTorch peers; `pyfacts bench` prints the table, `bench/` in the source tree the rest.

A `Case` is one thing that pyfacts does, the same thing done by peers, and the bytes it has to move. All are run in
turn, A B C A B C, so that a machine that slows down slows all of them, and the medians are compared. The floor is the
time that moving the bytes takes at the rate at which this machine copies.
"""

from __future__ import annotations

import functools
import importlib.util
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Row = dict[str, Any]
Call = Callable[[], object]

OPT_125M: dict[str, Any] = {
    "vocab_size": 50272,
    "hidden_size": 768,
    "word_embed_proj_dim": 768,
    "ffn_dim": 3072,
    "num_attention_heads": 12,
    "max_position_embeddings": 2048,
    "dropout": 0.0,
}


@dataclass(frozen=True)
class Case:
    """Something to measure.

    Attributes:
        name: what is measured, for people.
        call: does it once.
        peers: what to compare with, by name.
        dense_bytes: bytes of the dense activations that it handles; rates count these.
        moved_bytes: bytes that it cannot help reading and writing.
        facts: what else belongs in its row (operation, dtype, density, ...).
    """

    name: str
    call: Call
    peers: dict[str, Call]
    dense_bytes: int
    moved_bytes: int
    facts: Row = field(default_factory=dict)


def run(quick: bool = False) -> list[Row]:
    """Measures encode, decode and capture on this machine, with torch's current number of threads.

    Args:
        quick: small sizes, a few seconds instead of half a minute.

    Returns:
        A row of plain values for every case, see `row`.

    Example:
        >>> import pyfacts.bench
        >>> print(pyfacts.bench.table(pyfacts.bench.run(quick=True)))  # doctest: +SKIP
    """
    import torch

    n_tokens, n_features, n_layers, seq_len, budget_s = (1024, 8192, 2, 64, 0.5) if quick else (4096, 16384, 2, 256, 3)
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        x = activations(n_tokens, n_features, 0.03, dtype)
        rows += [measure(case, budget_s) for case in (encode_case(x), decode_case(x))]
    if importlib.util.find_spec("transformers") is None:
        rows.append({"name": "capture", "skipped": "needs transformers: pip install transformers"})
    else:
        rows.append(measure(capture_case(opt(n_layers), torch.randint(5, 50000, (4, seq_len))), 2 * budget_s))
    return rows


def table(rows: Sequence[Row]) -> str:
    """Returns rows as aligned text: each case, then a line for each peer with how many times faster pyfacts is.

    Example:
        >>> import pyfacts.bench
        >>> pyfacts.bench.table([{"name": "capture", "skipped": "needs transformers"}]).splitlines()[-1]
        'capture: needs transformers'
    """
    import torch

    from . import ops

    measured = [row for row in rows if "skipped" not in row]
    width = max([len(name) for row in measured for name in (row["name"], *row["peers"])] + [20]) + 2
    lines = [f"{'':{width}}{'ms':>9}  {'GB/s':>6}  {'pyfacts is':>11}"]
    for row in measured:
        lines.append(f"{row['name']:{width}}{row['ms']:9.2f}  {row['gb_per_s']:6.2f}")
        for name, peer in row["peers"].items():
            lines.append(f"{'  ' + name:{width}}{peer['ms']:9.2f}  {peer['gb_per_s']:6.2f}  {peer['ratio']:10.2f}x")
        lines.append(f"{'  floor: ' + _megabytes(row['moved_bytes']) + ' moved':{width}}{row['floor_ms']:9.2f}")
    lines += ["", f"Medians with {torch.get_num_threads()} threads and {ops.isa()} instructions."]
    lines += ["GB/s of dense activations; pyfacts is so many times as fast as the peer in the line."]
    lines += [f"{row['name']}: {row['skipped']}" for row in rows if "skipped" in row]
    return "\n".join(lines)


# ---- measuring -------------------------------------------------------------------------------------------------------


def measure(case: Case, budget_s: float = 3.0, rounds: int | None = None) -> Row:
    """Runs a case and its peers in turn, once to warm up and then `rounds` times (by default 3 to 15, by the budget).

    Returns:
        See `row`.
    """
    calls = {"": case.call} | case.peers
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PyTorch says once that sparse CSR is in beta
        warm_up = sum(seconds(call) for call in calls.values())
    rounds = rounds or min(15, max(3, int(budget_s / max(warm_up, 1e-9))))
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            taken[name].append(seconds(call))
    return row(case, taken.pop(""), taken)


def seconds(call: Call) -> float:
    """How long one call takes. Freeing what it returns is not counted."""
    start = time.perf_counter()
    result = call()
    end = time.perf_counter()
    del result
    return end - start


def row(case: Case, taken: Sequence[float], peers_taken: dict[str, list[float]]) -> Row:
    """What was measured, as plain values.

    Args:
        case: the case.
        taken: seconds of each round.
        peers_taken: the same for each peer.

    Returns:
        name, ms (median), gb_per_s (dense bytes per second), moved_bytes, floor_ms (those bytes at the rate at which
        this machine copies), peers {name: {ms, gb_per_s, ratio}} where ratio is the peer's time over ours, the facts.
    """
    ours = statistics.median(taken)
    peers = {}
    for name, their_seconds in peers_taken.items():
        theirs = statistics.median(their_seconds)
        peers[name] = {"ms": theirs * 1e3, "gb_per_s": case.dense_bytes / theirs / 1e9, "ratio": theirs / ours}
    return {
        "name": case.name,
        "ms": ours * 1e3,
        "gb_per_s": case.dense_bytes / ours / 1e9,
        "moved_bytes": case.moved_bytes,
        "floor_ms": case.moved_bytes / copy_bandwidth() * 1e3,
        "peers": peers,
    } | case.facts


@functools.cache
def copy_bandwidth() -> float:
    """Bytes read and written per second when a tensor of 128 MiB is copied, with torch's threads; measured once."""
    import torch

    source = torch.ones(2**27, dtype=torch.uint8)
    target = torch.empty_like(source).fill_(0)
    return 2 * source.nbytes / statistics.median(seconds(lambda: target.copy_(source)) for _ in range(7))


# ---- cases -----------------------------------------------------------------------------------------------------------


def activations(n_tokens: int, n_features: int, density: float, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Activations like a ReLU's: at random places half-normal values, scaled by a lognormal factor of each neuron.

    Returns:
        [n_tokens, n_features] of dtype, about `density` of it not zero.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n_tokens, n_features, generator=generator).abs_()
    x *= torch.randn(n_features, generator=generator).exp_()
    x *= torch.rand(n_tokens, n_features, generator=generator) < density
    return x.to(dtype)


def encode_case(x: Tensor, slow_peers: bool = True) -> Case:
    """`pyfacts.encode(x)`: reads x, writes the planes into memory of its own. `copy_` copies x into a given tensor."""
    import torch

    import pyfacts

    copy = torch.empty_like(x).fill_(0)
    peers: dict[str, Call] = {"copy_": lambda: copy.copy_(x)}
    if slow_peers:
        peers |= {"torch.nonzero": x.nonzero, "to_sparse_csr": x.to_sparse_csr}
    moved = x.nbytes + pyfacts.encode(x).nbytes
    return Case(f"encode {_describe(x)}", lambda: pyfacts.encode(x), peers, x.nbytes, moved, _facts("encode", x))


def decode_case(x: Tensor) -> Case:
    """`to_dense()` of x encoded: reads the planes, writes a fresh dense tensor, as `clone` does."""
    import pyfacts

    encoded = pyfacts.encode(x)
    peers: dict[str, Call] = {"clone": x.clone}
    moved = x.nbytes + encoded.nbytes
    return Case(f"decode {_describe(x)}", encoded.to_dense, peers, x.nbytes, moved, _facts("decode", x))


def capture_case(model: nn.Module, token_ids: Tensor) -> Case:
    """A forward with every MLP's neurons captured, beside the forward alone.

    The bytes are those that capture adds: the neurons read, the planes written.
    """
    import torch

    import pyfacts

    from .encoding import density_of

    def forward() -> None:
        with torch.inference_mode():
            model(token_ids)

    def captured() -> pyfacts.ActivationCache:
        with pyfacts.capture(model) as cache:
            forward()
        return cache

    parts = [part for part in captured().values() if isinstance(part, pyfacts.EncodedActivations)]
    dense = sum(part.shape.numel() * part.dtype.itemsize for part in parts)
    packed = sum(part.nbytes for part in parts)
    density = density_of(parts)
    facts = {"op": "capture", "n_tokens": token_ids.numel(), "n_layers": len(parts), "density": density}
    name = f"capture {len(parts)} layers of {parts[0].shape[1]:,}, {token_ids.numel():,} tokens, {density:.1%}"
    return Case(name, captured, {"forward alone": forward}, dense, dense + packed, facts)


def opt(n_layers: int = 12, density: float = 0.04) -> nn.Module:
    """An OPT-125M of random weights (float32), without its output head, whose neurons fire at about a given density.

    Each pre-activation is normal, for its input is a LayerNorm's output, with its weight row's norm as deviation.
    """
    import torch
    from transformers import OPTConfig, OPTModel

    torch.manual_seed(0)
    model = OPTModel(OPTConfig(**OPT_125M, num_hidden_layers=n_layers)).eval()
    threshold = statistics.NormalDist().inv_cdf(1 - density)
    with torch.no_grad():
        for layer in model.decoder.layers:
            layer.fc1.bias.copy_(-threshold * layer.fc1.weight.norm(dim=1))
    return model


def _facts(op: str, x: Tensor) -> Row:
    density = round(x.count_nonzero().item() / max(1, x.numel()), 3)
    return {"op": op, "dtype": str(x.dtype).removeprefix("torch."), "density": density, "shape": list(x.shape)}


def _describe(x: Tensor) -> str:
    facts = _facts("", x)
    return f"{facts['dtype']} {x.shape[0]} x {x.shape[1]}, {facts['density']:.0%}"


def _megabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:.0f} MB"
