"""Measures the CUDA kernels beside PyTorch's: `make gpu-check`, or python bench/gpu.py; writes bench/results/gpu/.

Times are medians of CUDA events around single calls, ours and its peers' in turn, with the L2 cache flushed before
each. A call that waits for its sizes (`encode` does) pays for that in its time. Data are random, at the density that is
named. A ratio below 1 says that pyfacts takes less time, or moves fewer bytes, than the peer.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

import pyfacts
import pyfacts.bench
from pyfacts import cuda, ops

Call = Callable[[], object]
Row = dict[str, Any]

RESULTS = Path(__file__).resolve().parent / "results" / "gpu"
DTYPE = torch.bfloat16


# ---- measuring -------------------------------------------------------------------------------------------------------


class Timer:
    """Seconds of calls on one device; `fused` says whether the fused kernel is among what is measured."""

    def __init__(self, device: str, rounds: int, fused: bool = False) -> None:
        self.device, self.rounds, self.fused = device, rounds, fused
        self._flushed = torch.empty(256 << 20 if device == "cuda" else 1, dtype=torch.uint8, device=device)

    def medians(self, calls: dict[str, Call]) -> dict[str, float]:
        """The median seconds of each call; all run in turn, once before it counts."""
        taken: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(self.rounds + 1):
            for name, call in calls.items():
                taken[name].append(self._seconds(call))
        return {name: statistics.median(seconds[1:]) for name, seconds in taken.items()}

    def _seconds(self, call: Call) -> float:
        self._flushed.zero_()
        if self.device != "cuda":
            return pyfacts.bench.seconds(call)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(1_000_000)  # half a millisecond, in which the first kernels are launched
        start.record()
        result = call()
        end.record()
        end.synchronize()
        del result
        return start.elapsed_time(end) / 1e3


def row(case: str, what: str, value: float, unit: str = "x") -> Row:
    return {"case": case, "what": what, "value": float(f"{value:.4g}"), "unit": unit}


def ratios(case: str, seconds: dict[str, float], ours: str) -> Iterator[Row]:
    """Our milliseconds, and our time over each peer's."""
    yield row(case, ours, seconds[ours] * 1e3, "ms")
    for name, peer in seconds.items():
        if name != ours:
            yield row(case, f"{ours} ÷ {name}", seconds[ours] / peer)


def encoder(n_tokens: int, d_in: int, n_features: int, density: float, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight, bias whose pre-activations are normal, and above zero at a density."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(n_tokens, d_in, generator=generator, device=device, dtype=DTYPE)
    weight = torch.randn(n_features, d_in, generator=generator, device=device, dtype=DTYPE) / d_in**0.5
    bias = torch.full((n_features,), statistics.NormalDist().inv_cdf(density), device=device, dtype=DTYPE)
    return x, weight, bias


# ---- what is measured ------------------------------------------------------------------------------------------------


def rates(timer: Timer, n: int = 8192) -> dict[str, float]:
    """What this GPU does: bytes read and written per second by a copy, operations per second by a product."""
    a = torch.randn(n, n, device=timer.device, dtype=DTYPE)
    out, product = torch.empty_like(a), torch.empty_like(a)
    seconds = timer.medians({"copy": lambda: out.copy_(a), "mm": lambda: torch.mm(a, a, out=product)})
    return {"copy_bytes_per_s": 2 * a.nbytes / seconds["copy"], "mm_flop_per_s": 2 * n**3 / seconds["mm"]}


def up_projection(timer: Timer, shape: tuple[int, int, int], density: float, flop_per_s: float) -> Iterator[Row]:
    """linear_relu_encode, both ways, beside the product with a ReLU in its epilogue, and beside relu(linear)."""
    n_tokens, d_in, n_features = shape
    x, weight, bias = encoder(*shape, density, timer.device)
    case = f"{n_tokens} x {d_in} → {n_features}, {density:.1%}"
    peers: dict[str, Call] = {
        "_addmm_activation": lambda: torch._addmm_activation(bias, x, weight.T),
        "relu(linear)": lambda: torch.relu(linear(x, weight, bias)),
        "encode(_addmm_activation)": lambda: pyfacts.encode(torch._addmm_activation(bias, x, weight.T)),
    }
    ours: dict[str, Call] = {}
    if timer.fused:
        arena = ops.empty_arena(x, n_tokens, n_features)

        def kernel() -> None:  # without what makes the planes of the device form
            assert ops.fused_linear_relu_encode_out(x, weight, bias, "relu", None, None, arena)

        ours["fused kernel"] = kernel
    for name, fused in ways(timer).items():
        ours[name] = by_way(fused, lambda: pyfacts.linear_relu_encode(x, weight, bias))
        ours[f"{name}, h too"] = by_way(fused, lambda: pyfacts.linear_relu_encode(x, weight, bias, return_dense=True))
    seconds = timer.medians(ours | peers)
    for name in ours:
        yield from ratios(case, {key: seconds[key] for key in (name, *peers)}, name)
        share = 2 * n_tokens * d_in * n_features / seconds[name] / flop_per_s
        yield row(case, f"{name}: share of the rate of products", share)


def by_way(fused: bool, call: Call) -> Call:
    """The call, with or without that kernel."""

    def run() -> object:
        before, cuda.FUSED = cuda.FUSED, fused
        try:
            return call()
        finally:
            cuda.FUSED = before

    return run


def ways(timer: Timer) -> dict[str, bool]:
    """The ways to compute linear_relu_encode that are measured, and whether each is by the fused kernel."""
    return {"fused": True, "two steps": False} if timer.fused else {"two steps": False}


def packing(timer: Timer, shape: tuple[int, int], density: float, bytes_per_s: float) -> Iterator[Row]:
    """encode and decode: bytes that they cannot help moving, over the rate of a copy; and beside torch's ways."""
    x = pyfacts.bench.activations(*shape, density, DTYPE).to(timer.device)
    case = f"{shape[0]} x {shape[1]}, {density:.0%}"
    enc = pyfacts.encode(x)
    calls: dict[str, Call] = {
        "encode": lambda: pyfacts.encode(x),
        "decode": enc.to_dense,
        "nonzero and gather": lambda: x[x.nonzero(as_tuple=True)],
        "to_sparse_csr": x.to_sparse_csr,
    }
    if timer.device == "cuda":
        arena = ops.empty_arena(x, *shape)

        def encode_out() -> None:
            arena.cursor.zero_()
            ops.encode_out(x, arena)

        calls["encode_out"] = encode_out
    seconds = timer.medians(calls)
    for name in ("encode", "encode_out", "decode"):
        if name in seconds:
            yield row(case, name, seconds[name] * 1e3, "ms")
            yield row(case, f"{name}: rate ÷ a copy's", (x.nbytes + enc.nbytes) / seconds[name] / bytes_per_s)
    for peer in ("nonzero and gather", "to_sparse_csr"):
        yield row(case, f"encode ÷ {peer}", seconds["encode"] / seconds[peer])


def sae(timer: Timer, shape: tuple[int, int, int], density: float, k: int) -> Iterator[Row]:
    """The encoders of a wide SAE, the memory that they take beyond operands, and its decoder."""
    n_tokens, d_in, n_features = shape
    x, weight, bias = encoder(*shape, density, timer.device)
    case = f"{n_tokens} x {d_in} → {n_features}, {density:.1%}"
    dense_bytes = n_tokens * n_features * DTYPE.itemsize
    threshold = -bias

    def relu() -> object:
        return pyfacts.linear_relu_encode(x, weight, bias)

    def jumprelu() -> object:
        return pyfacts.linear_relu_encode(x, weight, None, "jumprelu", threshold=threshold)

    encoders: dict[str, Call] = {
        **{f"relu, {name}": by_way(fused, relu) for name, fused in ways(timer).items()},
        **{f"jumprelu, {name}": by_way(fused, jumprelu) for name, fused in ways(timer).items()},
        f"topk {k}": lambda: pyfacts.linear_topk_encode(x, weight, bias, k),
        f"batch topk {k}": lambda: pyfacts.linear_batch_topk_encode(x, weight, bias, k),
    }
    if timer.device == "cuda":
        for name, encode in encoders.items():
            yield row(case, f"{name}: peak memory ÷ dense", peak_bytes(encode) / dense_bytes)
    peers: dict[str, Call] = {
        "relu(linear)": lambda: torch.relu(linear(x, weight, bias)),
        "topk(relu(linear))": lambda: torch.relu(linear(x, weight, bias)).topk(k),
    }
    seconds = timer.medians(encoders | peers)
    for name in encoders:
        yield row(case, name, seconds[name] * 1e3, "ms")
        peer = "topk(relu(linear))" if "topk" in name else "relu(linear)"
        yield row(case, f"{name} ÷ {peer}", seconds[name] / seconds[peer])
    enc = pyfacts.linear_topk_encode(x, weight, bias, k)
    h = enc.to_dense()
    products: dict[str, Call] = {
        "sparse_linear": lambda: pyfacts.sparse_linear(enc, weight),
        "dense mm": lambda: h @ weight,
    }
    if timer.device == "cuda":  # PyTorch multiplies no CSR matrix of bfloat16 on the CPU
        csr = enc.to_csr()
        products["CSR @ weight"] = lambda: csr @ weight
    yield from ratios(f"{case}, {k} of them decoded", timer.medians(products), "sparse_linear")


def peak_bytes(call: Call) -> int:
    """How much more memory a call takes at its peak than there was in use."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def capture(timer: Timer, model: nn.Module, batch: int, length: int) -> Iterator[Row]:
    """A forward with all neurons captured beside the forward alone; and what would leave the GPU of them."""
    ids = torch.randint(5, 1000, (batch, length), device=timer.device)

    def forward() -> object:
        with torch.inference_mode():
            return model(ids)

    def captured() -> pyfacts.ActivationCache:
        with pyfacts.capture(model) as cache:
            forward()
        return cache

    parts = [part for part in captured().values() if isinstance(part, pyfacts.EncodedActivations)]
    dense_bytes = sum(part.shape.numel() * part.dtype.itemsize for part in parts)
    density = sum(part.nnz for part in parts) / sum(part.shape.numel() for part in parts)
    case = f"OPT, {len(parts)} layers of {parts[0].n_features}, {ids.numel()} tokens, {density:.1%}"
    yield row(case, "bytes to the host ÷ dense", sum(part.nbytes for part in parts) / dense_bytes)
    del parts
    yield from ratios(case, timer.medians({"capture": captured, "forward": forward}), "capture")


def opt(n_layers: int, d_model: int, n_heads: int, device: str, density: float = 0.04) -> nn.Module:
    """An OPT of random weights without an output head, its biases such that neurons fire at a density."""
    from transformers import OPTConfig, OPTModel

    config = OPTConfig(
        vocab_size=1000,
        hidden_size=d_model,
        word_embed_proj_dim=d_model,
        ffn_dim=4 * d_model,
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        dropout=0.0,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = OPTModel(config).to(DTYPE).eval()
    threshold = statistics.NormalDist().inv_cdf(1 - density)
    with torch.no_grad():
        for layer in model.decoder.layers:
            layer.fc1.bias.copy_(-threshold * layer.fc1.weight.float().norm(dim=1))
    return model


# ---- all of it -------------------------------------------------------------------------------------------------------


def measure(timer: Timer, limit_s: float) -> Iterator[Row]:
    """Every row, the most important first; nothing new is begun after `limit_s` seconds."""
    end = time.monotonic() + limit_s
    rate = rates(timer)
    yield row("this GPU", "copy", rate["copy_bytes_per_s"] / 1e12, "TB/s")
    yield row("this GPU", "product of 8192 x 8192", rate["mm_flop_per_s"] / 1e12, "TFLOP/s")
    sections: list[Callable[[], Iterator[Row]]] = []
    for d_in in (4096, 768, 256, 1024, 2048):
        for density in (0.03, 0.1):
            sections.append(lambda d=d_in, p=density: up_projection(timer, (8192, d, 16384), p, rate["mm_flop_per_s"]))
    for density in (0.03, 0.1, 0.5):
        sections.append(lambda p=density: packing(timer, (8192, 16384), p, rate["copy_bytes_per_s"]))
    sections.append(lambda: sae(timer, (8192, 4096, 131072), 0.001, 32))
    sections.append(lambda: capture(timer, opt(32, 4096, 32, timer.device), 4, 512))
    for section in sections:
        if time.monotonic() > end:
            print("out of time: the rest was not measured", file=sys.stderr)
            return
        try:
            yield from section()
        except RuntimeError as error:  # such as too little memory: the rest may still be measured
            print(f"not measured: {error}", file=sys.stderr)


def machine() -> Row:
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver_and_cuda": f"CUDA {torch.version.cuda}",
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--limit-s", type=float, default=240.0)
    parser.add_argument("--without-fused", action="store_true", help="leave out the fused kernel, for Hopper")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench/gpu.py measures a GPU, and torch sees none here")
    about, rows = machine(), []
    print(" · ".join(about.values()))
    fused = not options.without_fused and torch.cuda.get_device_capability() == (9, 0)
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{about['gpu'].lower().replace(' ', '-')}.json"
    for found in measure(Timer("cuda", options.rounds, fused), options.limit_s):
        rows.append(found)
        print(f"{found['case']:44} {found['what']:44} {found['value']:9.4g} {found['unit']}", flush=True)
        path.write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")  # so far, should this be stopped
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
