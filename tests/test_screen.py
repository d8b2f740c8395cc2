"""The encoders of float32 where most of the product is only bounded, from 256 tokens and 256 inputs on.

On CPUs without bfloat16 products nothing is bounded, and the same holds. tests/cpp/bounds_test.cpp tests the bounds.
"""

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from reference import assert_same_bits
from test_linear import assert_encodes, largest
from torch import Tensor
from torch.nn.functional import linear

import pyfacts

D_IN = 256
SHAPES = [(256, 1), (300, 1100), (4200, 600)]  # n_tokens, n_features: the first block of all is one column


def whole_numbers(*shape: int, limit: int, seed: int) -> Tensor:
    return torch.randint(-limit, limit + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


def operands(n_tokens: int, n_features: int, limit: int, deviations: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    """Whole numbers, whose sums are exact in float32 and, above 256, not in bfloat16; few products are positive."""
    x = whole_numbers(n_tokens, D_IN, limit=limit, seed=0)
    weight = whole_numbers(n_features, D_IN, limit=3, seed=1)
    scale = x.std().item() * weight.std().item() * D_IN**0.5
    return x, weight, (whole_numbers(n_features, limit=3, seed=2) - deviations * scale).round()


@pytest.mark.parametrize("limit", [3, 2000])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_activations_are_torchs(shape: tuple[int, int], limit: int) -> None:
    x, weight, bias = operands(*shape, limit)
    z = linear(x, weight, bias)
    assert_encodes(pyfacts.linear_relu_encode(x, weight, bias), z.relu())
    assert_encodes(pyfacts.linear_relu_encode(x, weight, bias, "relu2"), z.relu().square())
    threshold = whole_numbers(shape[1], limit=40 * limit, seed=3)
    jumped = torch.where(z > threshold, z.relu(), 0)
    assert_encodes(pyfacts.linear_relu_encode(x, weight, bias, "jumprelu", threshold=threshold), jumped)
    z = linear(x, weight) + 2 * bias
    assert_encodes(pyfacts.linear_relu_encode(x, weight, 2 * bias), z.relu())


def test_negative_thresholds_let_through_what_zero_does() -> None:
    x, weight, bias = operands(300, 1100, 3)
    threshold = whole_numbers(1100, limit=3, seed=3) - 10000
    enc = pyfacts.linear_relu_encode(x, weight, bias, "jumprelu", threshold=threshold)
    assert_encodes(enc, linear(x, weight, bias).relu())


@pytest.mark.parametrize("limit", [3, 2000])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_topk_is_exact_with_ties(shape: tuple[int, int], limit: int) -> None:
    x, weight, bias = operands(*shape, limit, deviations=0)
    h = linear(x, weight, bias).relu()
    for k in {1, min(7, shape[1]), (shape[1] + 1) // 2}:
        assert_encodes(pyfacts.linear_topk_encode(x, weight, bias, k), largest(h, k))
        over_batch = largest(h.reshape(1, -1), k * len(h)).view_as(h)
        assert_encodes(pyfacts.linear_batch_topk_encode(x, weight, bias, k), over_batch)


def test_topk_among_what_bfloat16_does_not_tell_apart() -> None:
    """All values lie between 250 and 262, in steps of 1/64."""
    x, weight, _ = operands(300, 5000, 2, deviations=0)
    weight /= 64
    x[:, 0], weight[:, 0] = 1, 256
    h = linear(x, weight)
    assert h.min() > 250 and h.max() < 262
    for k in (7, 50):
        assert_encodes(pyfacts.linear_topk_encode(x, weight, None, k), largest(h, k))


@pytest.mark.parametrize("order", ["rising", "falling", "equal", "never positive"])
def test_topk_of_hard_orders(order: str) -> None:
    """Rising, each feature enters the selection, and the screen goes."""
    ramp = torch.arange(1, 3001, dtype=torch.float32)
    row = {"rising": ramp, "falling": ramp.flip(0), "equal": torch.ones(3000), "never positive": -ramp}[order]
    x, weight = torch.ones(256, D_IN), (row / 2048)[:, None].expand(-1, D_IN)
    h = linear(x, weight).relu()
    assert_encodes(pyfacts.linear_topk_encode(x, weight, None, 20), largest(h, 20))
    over_batch = largest(h.reshape(1, -1), 20 * len(h)).view_as(h)
    assert_encodes(pyfacts.linear_batch_topk_encode(x, weight, None, 20), over_batch)


@pytest.mark.parametrize("dense", [slice(0, 256), slice(256, 5000), slice(4000, 5000), slice(0, 5000)], ids=str)
def test_where_too_much_is_positive_the_product_is_whole(dense: slice) -> None:
    x, weight, bias = operands(600, 5000, 2000, deviations=3)
    bias[dense] = 0
    assert_encodes(pyfacts.linear_relu_encode(x, weight, bias), linear(x, weight, bias).relu())


def test_strided_operands() -> None:
    x, weight, bias = operands(300, 700, 2000)
    wide_x, wide_bias = torch.zeros(600, 2 * D_IN), torch.zeros(1400)
    wide_x[::2, ::2], wide_bias[::2] = x, bias
    W_enc = weight.T.contiguous()
    h = linear(x, weight, bias).relu()
    for given_x, given_weight in ((wide_x[::2, ::2], weight), (wide_x[::2, ::2], W_enc.T), (x, W_enc.T)):
        assert_encodes(pyfacts.linear_relu_encode(given_x, given_weight, wide_bias[::2]), h)
        assert_encodes(pyfacts.linear_topk_encode(given_x, given_weight, wide_bias[::2], 5), largest(h, 5))
    one_token = x[:1].expand(300, -1)
    assert_encodes(pyfacts.linear_relu_encode(one_token, weight, bias), h[:1].expand(300, -1))


def test_what_is_not_a_number_or_not_finite_passes_as_in_torch() -> None:
    """Also features that a bias or a threshold of infinity switches off, and operands near float32's limits."""
    x, weight, bias = operands(300, 1100, 3)
    x[5, 7], x[6, 0], x[7, 1] = float("nan"), float("inf"), -float("inf")
    x[8], x[9] = x[8].abs() * 2.0**118, x[9] * 2.0**-130
    weight[300, 2], weight[301, 0] = float("nan"), float("inf")
    weight[302] = weight[302].abs() * 2.0**118
    bias[303], bias[304], bias[305] = float("nan"), float("inf"), -float("inf")
    z = linear(x, weight, bias)
    threshold = torch.zeros(1100)
    threshold[400:500] = float("inf")
    jumped = torch.where((z > threshold) | z.isnan(), z.relu(), 0)
    for enc, expected in (
        (pyfacts.linear_relu_encode(x, weight, bias), z.relu()),
        (pyfacts.linear_relu_encode(x, weight, bias, "jumprelu", threshold=threshold), jumped),
        (pyfacts.linear_topk_encode(x, weight, bias, 9), largest(z.relu(), 9)),
    ):
        torch.testing.assert_close(enc.to_dense(), expected, rtol=1e-6, atol=0, equal_nan=True)
    assert z.isnan().any() and z.isinf().any()


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e15])
def test_nothing_is_missed_of_real_numbers(scale: float) -> None:
    """In float64, what is above zero by more than float32 can err is stored, what is below is not, all of it right."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 300, generator=generator) * torch.logspace(-3, 0.3, 400)[:, None]
    weight = torch.randn(2000, 300, generator=generator) * torch.logspace(-2, 2, 2000)[:, None] * scale
    bias = (-2 * weight.double().norm(dim=1)).float()
    exact = linear(x.double(), weight.double(), bias.double())
    error = 300 * 2.0**-24 * (x.double().norm(dim=1)[:, None] * weight.double().norm(dim=1) + bias.abs())
    enc = pyfacts.linear_relu_encode(x, weight, bias)
    h = enc.to_dense().double()
    assert enc.density < 0.1
    assert ((h - exact.relu()).abs() <= error).all()
    stored = h != 0
    assert stored[exact > error].all() and not stored[exact < -error].any()


def test_dense_h_and_packed_values_agree() -> None:
    torch.manual_seed(0)
    x, up = torch.randn(300, 300), torch.nn.Linear(300, 900)
    with torch.no_grad():
        up.bias -= 1.0
    h, enc = pyfacts.linear_relu_encode(x, up.weight, up.bias, return_dense=True)
    assert_same_bits(enc.to_dense(), h.detach())
    torch.testing.assert_close(h, up(x).relu(), rtol=1e-4, atol=1e-5)


# ---- where it is done ------------------------------------------------------------------------------------------------

PLANES = """
import sys, torch, pyfacts
torch.set_num_threads(int(sys.argv[1]))
generator = torch.Generator().manual_seed(0)
x, weight = torch.randn(600, 300, generator=generator), torch.randn(3000, 300, generator=generator)
for enc in (pyfacts.linear_relu_encode(x, weight, torch.full((3000,), -40.0)),
            pyfacts.linear_topk_encode(x, weight, None, 20),
            pyfacts.linear_batch_topk_encode(x, weight, None, 20)):
    for plane in enc.planes:
        sys.stdout.buffer.write(plane.contiguous().view(torch.uint8).numpy().tobytes())
"""


def planes(n_threads: int, isa: str = "") -> str:
    """A digest of what three encoders make of real numbers."""
    env = {**os.environ, "PYFACTS_ISA": isa}
    done = subprocess.run([sys.executable, "-c", PLANES, str(n_threads)], env=env, capture_output=True, check=True)
    return hashlib.sha256(done.stdout).hexdigest()


def test_the_number_of_threads_does_not_matter() -> None:
    x, weight = torch.randn(600, 300), torch.randn(3000, 300)
    product = torch.ops.mkldnn._linear_pointwise
    some, all_ = (product(rows, weight, None, "none", [], "") for rows in (x[:100], x))
    if not torch.equal(some, all_[:100]):
        pytest.skip("this torch's own product of a row depends on how many there are (2.11 without AVX-512)")
    assert planes(1) == planes(3)


@pytest.mark.skipif(
    "avx512_bf16" not in (Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""),
    reason="no bfloat16 products",
)
def test_it_is_done_where_the_cpu_multiplies_bfloat16() -> None:
    """Values that are computed alone are summed in another order than those of a product."""
    assert planes(1) != planes(1, isa="avx2")


@pytest.mark.parametrize("encoder", [pyfacts.linear_topk_encode, pyfacts.linear_batch_topk_encode])
def test_n_of_all_are_kept(encoder: Callable[..., pyfacts.EncodedActivations]) -> None:
    """More than k of each token are positive, so k are stored."""
    x, weight, bias = operands(300, 900, 2000, deviations=1)
    assert encoder(x, weight, bias, 11).nnz == 11 * 300
