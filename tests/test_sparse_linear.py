"""sparse_linear: the product of an encoding and a matrix, beside float64; the same bits everywhere; gradients."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import DTYPES, sparse
from reference import assert_same_bits

import pyfacts
from pyfacts import ops

OPS = torch.ops.pyfacts
# One rounding to the dtype, beside which float32 sums do not count; in float32 those of some hundred terms.
RELATIVE = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}

# n_tokens, n_features, d_out: around columns, tiles, slabs of 128 floats and vectors of 16; several panels and none.
SHAPES = [
    (1, 1, 1),
    (130, 300, 1),
    (129, 257, 7),
    (3, 255, 16),
    (300, 513, 100),
    (128, 512, 129),
    (140, 1100, 768),
    (9000, 20, 8),
    (2, 9000, 8),
    (0, 300, 5),
    (5, 0, 5),
    (130, 300, 0),
]


def operands(
    n_tokens: int, n_features: int, d_out: int, density: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """h, W_dec, b_dec and a gradient [n_tokens, d_out]."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((n_features, d_out), (d_out,), (n_tokens, d_out))
    weight, bias, grad = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return sparse(n_tokens, n_features, density, dtype), weight, bias, grad


def assert_rounded_once(actual: torch.Tensor, exact: torch.Tensor, magnitude: torch.Tensor) -> None:
    """Within a rounding of the exact sum; `magnitude` is the sum of absolute values, which bounds float32's error."""
    allowed = RELATIVE[actual.dtype] * exact.abs() + 2e-6 * magnitude + 1e-7
    assert actual.shape == exact.shape
    assert bool(((actual.double() - exact).abs() <= allowed).all())


def grad_weight(enc: pyfacts.EncodedActivations, grad: torch.Tensor) -> torch.Tensor:
    return OPS.sparse_linear_grad_weight(*enc.planes, enc.n_features, grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", [0.02, 0.3, 1.0])  # mostly empty segments, bitmaps, full ones
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(shape: tuple[int, int, int], density: float, dtype: torch.dtype) -> None:
    h, weight, bias, grad = operands(*shape, density, dtype)
    enc = pyfacts.encode(h)
    H, W, b, g = (x.double() for x in (h, weight, bias, grad))
    assert_rounded_once(pyfacts.sparse_linear(enc, weight, bias), H @ W + b, H @ W.abs() + b.abs())
    assert_rounded_once(pyfacts.sparse_linear(enc, weight), H @ W, H @ W.abs())
    assert_rounded_once(grad_weight(enc, grad), H.T @ g, H.T @ g.abs())


@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_and_full_segments_side_by_side(dtype: torch.dtype) -> None:
    h, weight, bias, grad = operands(300, 800, 33, 1.0, dtype)
    h[::3], h[:, 256:512], h[128:256] = 0, 0, 0
    enc = pyfacts.encode(h)
    H, W = h.double(), weight.double()
    assert_rounded_once(pyfacts.sparse_linear(enc, weight), H @ W, H @ W.abs())
    assert_rounded_once(grad_weight(enc, grad), H.T @ grad.double(), H.T @ grad.double().abs())
    assert_same_bits(pyfacts.sparse_linear(pyfacts.encode(h * 0), weight, bias), bias.expand(300, -1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_operands(dtype: torch.dtype) -> None:
    """Transposed, with gaps between the rows, and at an odd address."""
    h, weight, bias, _ = operands(130, 300, 40, 0.1, dtype)
    enc = pyfacts.encode(h)
    expected = pyfacts.sparse_linear(enc, weight, bias)
    gaps = torch.zeros(300, 77, dtype=dtype)
    gaps[:, 3:43] = weight
    for view in (weight.T.contiguous().T, gaps[:, 3:43]):
        assert not view.is_contiguous()
        assert_same_bits(pyfacts.sparse_linear(enc, view, bias), expected)
    assert_same_bits(pyfacts.sparse_linear(enc, weight, torch.stack([bias, bias], 1)[:, 0]), expected)


def test_what_is_not_stored_is_not_multiplied() -> None:
    """Infinities and NaNs of W_dec reach the tokens that use their rows, and no others."""
    h = torch.zeros(4, 300)
    h[0, 7], h[1, 8], h[2, 299], h[3, 9] = 1, 1, 1, torch.inf
    weight = torch.ones(300, 20)
    weight[7], weight[8] = torch.inf, torch.nan
    out = pyfacts.sparse_linear(pyfacts.encode(h), weight)
    assert out[0].isposinf().all() and out[1].isnan().all() and out[3].isposinf().all()
    assert (out[2] == 1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_is_widened_and_rounded_as_torch_does(dtype: torch.dtype) -> None:
    """1 * w + b for all 65,536 patterns of w, with b that makes ties, overflow and subnormals."""
    weight = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(1, -1)
    enc = pyfacts.encode(torch.ones(1, 1, dtype=dtype))
    for shift in (0.0, 1.0, 2.0**-20, 32.0, -65504.0):
        bias = torch.full((2**16,), shift, dtype=dtype)
        expected = (weight.float() + bias.float()).to(dtype)
        actual = pyfacts.sparse_linear(enc, weight, bias)
        assert torch.equal(actual.isnan(), expected.isnan())
        assert torch.equal(actual.nan_to_num(0.0), expected.nan_to_num(0.0))
        assert torch.equal(actual.isinf(), expected.isinf())


PRODUCTS_AND_HASH = """
import sys, hashlib, torch, pyfacts
sys.path.insert(0, sys.argv[1])
from conftest import DTYPES
from test_sparse_linear import SHAPES, grad_weight, operands
torch.set_num_threads(int(sys.argv[2]))
digest = hashlib.sha256()
for dtype in DTYPES:
    for shape in [*SHAPES, (1000, 1000, 300)]:
        for density in (0.02, 0.3):
            h, weight, bias, grad = operands(*shape, density, dtype)
            enc = pyfacts.encode(h)
            for out in (pyfacts.sparse_linear(enc, weight, bias), grad_weight(enc, grad)):
                digest.update(out.view(torch.uint8).numpy().tobytes())
print(pyfacts.ops.isa(), digest.hexdigest())
"""


def test_every_instruction_set_and_number_of_threads_gives_the_same_bits() -> None:
    digests = {}
    for isa, n_threads in (("scalar", 1), ("avx2", 2), ("avx512", 3), ("avx512vbmi2", 1), ("avx512vbmi2", 5)):
        done = subprocess.run(
            [sys.executable, "-c", PRODUCTS_AND_HASH, os.path.dirname(__file__), str(n_threads)],
            env={**os.environ, "PYFACTS_ISA": isa, "PYTHONWARNINGS": "ignore"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            assert f"PYFACTS_ISA is '{isa}'" in done.stderr, done.stderr
            continue
        name, digests[isa, n_threads] = done.stdout.split()
        assert name == isa
    assert ("scalar", 1) in digests and len(set(digests.values())) == 1, digests


def test_gradients_are_those_of_the_dense_product() -> None:
    h, weight, bias, grad = operands(140, 300, 20, 0.1, torch.float32)
    enc = pyfacts.encode(h)
    leaves = [(weight.clone().requires_grad_(), bias.clone().requires_grad_()) for _ in range(2)]
    outs = [pyfacts.sparse_linear(enc, *leaves[0]), h @ leaves[1][0] + leaves[1][1]]
    first = [
        torch.autograd.grad((out.square() * grad).sum(), own, create_graph=True)
        for out, own in zip(outs, leaves, strict=True)
    ]
    second = [
        torch.autograd.grad(sum(g.square().sum() for g in grads), own) for grads, own in zip(first, leaves, strict=True)
    ]
    for ours, theirs in ((first[0], first[1]), (second[0], second[1])):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("leaf", ["weight", "bias"])
def test_a_single_gradient_is_enough(leaf: str) -> None:
    h, weight, bias, _ = operands(10, 300, 20, 0.1, torch.float32)
    needed = {"weight": weight, "bias": bias}[leaf].requires_grad_()
    out = pyfacts.sparse_linear(pyfacts.encode(h), weight, bias)
    out.sum().backward()
    expected = h.sum(0)[:, None].expand(-1, 20) if leaf == "weight" else torch.full((20,), 10.0)
    torch.testing.assert_close(needed.grad, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    h, weight, bias, grad = operands(130, 300, 20, 0.1, dtype)
    planes = ops.encode(h, 0.0, False)
    torch.library.opcheck(OPS.sparse_linear.default, (*planes, weight, None))
    torch.library.opcheck(OPS.sparse_linear.default, (*planes, weight.requires_grad_(), bias.requires_grad_()))
    torch.library.opcheck(OPS.sparse_linear_grad_weight.default, (*planes, 300, grad.requires_grad_()))


def test_compiles_into_one_graph() -> None:
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def decoder(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return pyfacts.sparse_linear(pyfacts.encode(torch.relu(x)), weight, bias)

    _, weight, bias, _ = operands(1, 300, 20, 0.1, torch.float32)
    weight.requires_grad_()
    for n_tokens in (3, 200):
        x = torch.randn(n_tokens, 300)
        out = decoder(x, weight, bias)
        torch.testing.assert_close(out, torch.relu(x) @ weight + bias, rtol=1e-4, atol=1e-4)
        (ours,) = torch.autograd.grad(out.sum(), weight)
        torch.testing.assert_close(ours, torch.relu(x).sum(0)[:, None].expand(-1, 20))


def test_a_stored_minus_zero_is_valid() -> None:
    enc = pyfacts.encode(torch.tensor([[-0.0, 2.0]]), signed_zero=True)
    assert enc.nnz == 2
    assert_same_bits(pyfacts.sparse_linear(enc, torch.eye(2)), torch.tensor([[0.0, 2.0]]))


def broken(planes: ops.Planes, fault: str) -> ops.Planes:
    counts, index, values, tile_ptr = (plane.clone() for plane in planes)
    if fault == "a tile start":
        tile_ptr[0, 1, 0] += 1
    elif fault == "a count exceeds":
        counts[1, 3] = 101
    elif fault == "strictly ascending":
        index[1] = index[0]
    elif fault == "at or beyond":
        index[-1] = 100
    elif fault == "value plane":
        values = values[:-1].clone()
    elif fault == "popcount":
        index[planes[1].numel() - 14] ^= 1
    elif fault == "stored value is zero":
        values[5] = 0
    return counts, index, values, tile_ptr


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "fault",
    [
        "a tile start",
        "a count exceeds",
        "strictly ascending",
        "at or beyond",
        "value plane",
        "popcount",
        "stored value is zero",
    ],
)
def test_a_broken_encoding_is_refused(fault: str, dtype: torch.dtype) -> None:
    h = torch.zeros(130, 356, dtype=dtype)  # columns of 256 and 100
    h[0, :3], h[129, 355], h[128, 256:300] = 1, 1, 1
    planes = ops.encode(h, 0.0, False)
    assert int(planes[1][-1]) == 99 and planes[1].numel() == 3 + 13 + 1
    bad = broken(planes, fault)
    with pytest.raises(RuntimeError, match=f"not a valid encoding: .*{fault}"):
        OPS.sparse_linear(*bad, torch.ones(356, 20, dtype=dtype), None)
    with pytest.raises(RuntimeError, match=f"not a valid encoding: .*{fault}"):
        OPS.sparse_linear_grad_weight(*bad, 356, torch.ones(130, 20, dtype=dtype))


def test_direct_callers_are_checked_too() -> None:
    planes = ops.encode(torch.ones(3, 300), 0.0, False)
    for weight, bias in (
        (torch.ones(300, 4).half(), None),
        (torch.ones(300), None),
        (torch.ones(300, 4), torch.ones(5)),
    ):
        with pytest.raises(RuntimeError, match=r"must (be|have)"):
            OPS.sparse_linear(*planes, weight, bias)
    with pytest.raises(RuntimeError, match="grad must be"):
        OPS.sparse_linear_grad_weight(*planes, 300, torch.ones(4, 5))
