"""linear_relu_encode: the same numbers as relu(linear), packed; block by block; differentiable through h."""

import pytest
import torch
from conftest import DTYPES
from reference import assert_same_bits
from torch.nn.functional import linear

import pyfacts

# A block of tokens may sum in another order than the whole; the error against float64 may be at most twice torch's.
SLACK = 2.0


def operands(n_tokens: int, d_in: int, n_features: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n_tokens, d_in, generator=generator)
    weight = torch.randn(n_features, d_in, generator=generator) / d_in**0.5
    bias = torch.randn(n_features, generator=generator) - 1
    return x.to(dtype), weight.to(dtype), bias.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 8, 300), (1, 8, 300), (300, 64, 513), (1000, 96, 4200), (700, 32, 20000)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_as_accurate_as_torch(shape: tuple[int, int, int], dtype: torch.dtype, with_bias: bool) -> None:
    """Shapes on both sides of one block (4 MiB); the largest error is at most twice that of relu(linear)."""
    x, weight, bias = operands(*shape, dtype)
    if not with_bias:
        bias = None
    exact = torch.relu(linear(x.double(), weight.double(), None if bias is None else bias.double()))
    enc = pyfacts.linear_relu_encode(x, weight, bias)
    assert enc.shape == (shape[0], shape[2]) and enc.dtype == dtype
    if shape[0]:
        error = (enc.to_dense().double() - exact).abs().max()
        peer = (torch.relu(linear(x, weight, bias)).double() - exact).abs().max()
        assert error <= SLACK * peer + 1e-7
        assert enc.nnz == int((enc.to_dense() != 0).sum())


@pytest.mark.parametrize("dtype", DTYPES)
def test_h_and_the_encoding_agree_in_every_bit(dtype: torch.dtype) -> None:
    x, weight, bias = operands(300, 64, 900, dtype)
    h, enc = pyfacts.linear_relu_encode(x, weight, bias, return_dense=True)
    assert_same_bits(enc.to_dense(), h)
    assert_same_bits(h, torch.relu(linear(x, weight, bias)))


def test_the_dense_result_never_exists_as_a_whole() -> None:
    """40,000 features: dense would be 320 MB; no tensor op in the call makes more than 32 MB."""
    x, weight, bias = operands(2000, 16, 40_000, torch.float32)
    bias -= 4
    with torch.profiler.profile(profile_memory=True) as profile:
        pyfacts.linear_relu_encode(x, weight, bias)
    allocations = [event.cpu_memory_usage for event in profile.events()]
    assert 0 < max(allocations) < 32e6


def test_gradients() -> None:
    """Through h, to x, weight and bias, first and second order; none through the encoding."""
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*shape, dtype=torch.float32) for shape in ((6, 5), (7, 5), (7,)))
    upstream = torch.randn(6, 7)

    def gradients(forward: object) -> list[torch.Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        h = forward(*leaves)  # type: ignore[operator]
        first = torch.autograd.grad((h * upstream).square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        return [*first, *second]

    def fused(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        h, enc = pyfacts.linear_relu_encode(x, weight, bias, return_dense=True)
        assert h.requires_grad and not enc.values.requires_grad
        return h

    expected = gradients(lambda x, w, b: torch.relu(linear(x, w, b)))
    for ours, theirs in zip(gradients(fused), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_single_gradient_is_enough() -> None:
    x, weight, bias = operands(6, 5, 7, torch.float32)
    weight.requires_grad_()
    h, _ = pyfacts.linear_relu_encode(x, weight, bias, return_dense=True)
    h.sum().backward()
    reference = weight.detach().clone().requires_grad_()
    torch.relu(linear(x, reference, bias)).sum().backward()
    torch.testing.assert_close(weight.grad, reference.grad)


def test_autocast_decides_the_dtype() -> None:
    x, weight, bias = operands(20, 8, 300, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        enc = pyfacts.linear_relu_encode(x, weight, bias)
        expected = torch.relu(linear(x, weight, bias))
    assert_same_bits(enc.to_dense(), expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.ones(7, 4)}, ValueError, "differ in d_in: 5 and 4"),
        ({"bias": torch.ones(6)}, ValueError, r"bias must be \[7\]"),
        ({"weight": torch.ones(7, 5).half()}, TypeError, "weight must have the dtype of x"),
        ({"x": torch.ones(5)}, ValueError, r"got shape \(5,\)"),
        ({"x": torch.ones(6, 5).double()}, TypeError, "float64"),
        ({"activation": "gelu"}, ValueError, "activation must be 'relu', got 'gelu'"),
    ],
)
def test_bad_operands_are_named(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {"x": torch.ones(6, 5), "weight": torch.ones(7, 5), "bias": torch.ones(7), **change}
    with pytest.raises(error, match=message):
        pyfacts.linear_relu_encode(**arguments)  # type: ignore[arg-type]
