"""Products that are encoded and products with an encoding, on two cores, beside PyTorch's own."""

import functools
import warnings
from collections.abc import Callable, Iterator
from statistics import NormalDist

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

import pyfacts
from pyfacts import bench

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
D_OUT = 768


@pytest.fixture
def fast_peer(request: pytest.FixtureRequest) -> None:
    """Skips bfloat16 where the CPU has no such products: `linear` takes seven times as long as in float32."""
    if request.getfixturevalue("dtype") == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this CPU has no bfloat16 products")


@pytest.fixture
def both_cores() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("d_in", "n_features"), [(768, 3072), (1024, 16384)])
@pytest.mark.parametrize("op", ["linear_relu_encode", "with dense"])
def test_linear_relu_encode(
    compare: Callable[..., None], op: str, d_in: int, n_features: int, dtype: torch.dtype, both_cores: None
) -> None:
    """4 % of an MLP's neurons, packed, or packed beside the dense h."""
    x, weight, bias = operands(2048, d_in, n_features, 0.04, dtype)
    peers: dict[str, bench.Call] = {"relu(linear)": lambda: linear(x, weight, bias).relu()}
    call = functools.partial(pyfacts.linear_relu_encode, x, weight, bias, return_dense=op == "with dense")
    compare(encoder_case(op, call, peers, x, weight), rounds=7)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("op", ["jumprelu", "topk", "batch topk"])
def test_sae_encoders(
    compare: Callable[..., None], op: str, dtype: torch.dtype, fast_peer: None, both_cores: None
) -> None:
    """65,536 latents; the threshold lets about 32 of a token's pass, as many as k."""
    x, weight, bias = operands(4096, 768, 65536, 0.5, dtype)
    threshold = torch.full_like(bias, NormalDist().inv_cdf(1 - 32 / 65536))
    peers: dict[str, bench.Call] = {"linear": lambda: linear(x, weight, bias)}
    if op == "topk":
        peers["topk(relu(linear))"] = lambda: linear(x, weight, bias).relu().topk(32)
    calls: dict[str, bench.Call] = {
        "jumprelu": lambda: pyfacts.linear_relu_encode(x, weight, bias, "jumprelu", threshold=threshold),
        "topk": lambda: pyfacts.linear_topk_encode(x, weight, bias, 32),
        "batch topk": lambda: pyfacts.linear_batch_topk_encode(x, weight, bias, 32),
    }
    compare(encoder_case(op, calls[op], peers, x, weight), rounds=3)


def operands(
    n_tokens: int, d_in: int, n_features: int, density: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and a bias that leaves about `density` of the standard normal products positive."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n_tokens, d_in, generator=generator)
    weight = torch.randn(n_features, d_in, generator=generator) / d_in**0.5
    bias = torch.full((n_features,), NormalDist().inv_cdf(density))
    return x.to(dtype), weight.to(dtype), bias.to(dtype)


def encoder_case(op: str, call: bench.Call, peers: dict[str, bench.Call], x: Tensor, weight: Tensor) -> bench.Case:
    """What it cannot help moving are the operands; its floor is arithmetic, which the peer shows."""
    (n_tokens, d_in), n_features = x.shape, weight.shape[0]
    dtype = str(x.dtype).removeprefix("torch.")
    facts = {"op": op, "dtype": dtype, "shape": [n_tokens, n_features], "d_in": d_in}
    name = f"{op} {dtype} {n_tokens} x {d_in} to {n_features}"
    dense_bytes = n_tokens * n_features * x.dtype.itemsize
    return bench.Case(name, call, peers, dense_bytes, x.nbytes + weight.nbytes, facts)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("density", [0.01, 0.1, 0.3])
def test_sparse_linear(
    compare: Callable[..., None], density: float, dtype: torch.dtype, fast_peer: None, both_cores: None
) -> None:
    compare(sparse_linear_case(bench.activations(4096, 16384, density, torch.float32).to(dtype)), rounds=5)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_sparse_linear_of_an_sae(
    compare: Callable[..., None], dtype: torch.dtype, fast_peer: None, both_cores: None
) -> None:
    compare(sparse_linear_case(topk_latents(4096, 65536, 32).to(dtype)), rounds=3)


def topk_latents(n_tokens: int, n_features: int, k: int) -> Tensor:
    """k values of every token, at random places."""
    generator = torch.Generator().manual_seed(0)
    places = torch.rand(n_tokens, n_features, generator=generator).topk(k, dim=1).indices
    values = torch.randn(n_tokens, k, generator=generator).abs() + 1e-3
    return torch.zeros(n_tokens, n_features).scatter_(1, places, values)


def sparse_linear_case(h: Tensor) -> bench.Case:
    """`sparse_linear(enc, W_dec)`: reads the planes and W_dec, writes [n_tokens, 768]. CSR has no 16-bit product."""
    n_tokens, n_features = h.shape
    W_dec = torch.randn(n_features, D_OUT, generator=torch.Generator().manual_seed(0)).to(h.dtype)
    weight, enc = W_dec.T.contiguous(), pyfacts.encode(h)
    peers: dict[str, bench.Call] = {"linear": lambda: linear(h, weight)}
    if h.dtype == torch.float32:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            csr = h.to_sparse_csr()
        peers["CSR @ W_dec"] = lambda: csr @ W_dec
    moved = enc.nbytes + W_dec.nbytes + n_tokens * D_OUT * h.dtype.itemsize
    dtype, density = str(h.dtype).removeprefix("torch."), round(enc.density, 4)
    facts = {"op": "sparse_linear", "dtype": dtype, "density": density, "shape": [n_tokens, n_features]}
    name = f"sparse_linear {dtype} {n_tokens} x {n_features} to {D_OUT}, {density:.2%}"
    return bench.Case(name, lambda: pyfacts.sparse_linear(enc, W_dec), peers, h.nbytes, moved, facts)
