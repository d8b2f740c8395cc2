"""The encoders that compute what they encode, beside torch: same numbers, packed, block by block, differentiable.

Most operands are small whole numbers: every order of summation then gives the same bits, and there are many ties.
"""

import os
import resource
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from conftest import DTYPES
from reference import assert_same_bits
from torch import Tensor
from torch.nn.functional import linear

import pyfacts

# n_tokens, d_in, n_features: nothing, one of each, ragged, more than a block of tokens and of features, wide.
SHAPES = [(0, 8, 300), (1, 1, 1), (3, 0, 5), (130, 16, 700), (4100, 4, 700), (40, 8, 5000)]


def whole_numbers(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def operands(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    n_tokens, d_in, n_features = shape
    return (
        whole_numbers(n_tokens, d_in, dtype=dtype),
        whole_numbers(n_features, d_in, dtype=dtype, seed=1),
        whole_numbers(n_features, dtype=dtype, seed=2),
    )


def normal_operands(n_tokens: int, d_in: int, n_features: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n_tokens, d_in, generator=generator)
    weight = torch.randn(n_features, d_in, generator=generator) / max(1, d_in) ** 0.5
    return x, weight, torch.randn(n_features, generator=generator) - 1


def assert_encodes(enc: pyfacts.EncodedActivations, expected: Tensor) -> None:
    """Bit for bit, and in the planes that `encode` makes of the expected matrix."""
    assert_same_bits(enc.to_dense(), expected + 0.0)
    for ours, theirs in zip(enc.planes, pyfacts.encode(expected).planes, strict=True):
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


def largest(h: Tensor, n: int) -> Tensor:
    """h with all but the n largest of each row zeroed, the first of equals kept; NaN is the largest."""
    order = h.argsort(dim=1, descending=True, stable=True)[:, :n]
    return torch.zeros_like(h).scatter_(1, order, h.gather(1, order))


# ---- activations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_activations_are_torchs(shape: tuple[int, int, int], dtype: torch.dtype, with_bias: bool) -> None:
    x, weight, bias = operands(shape, dtype)
    if not with_bias:
        bias = None
    z = linear(x, weight, bias)
    threshold = whole_numbers(shape[2], dtype=dtype, seed=3)  # above, below and at zero
    assert_encodes(pyfacts.linear_relu_encode(x, weight, bias), z.relu())
    assert_encodes(pyfacts.linear_relu_encode(x, weight, bias, "relu2"), z.relu().square())
    jumped = torch.where(z > threshold, z.relu(), 0)
    assert_encodes(pyfacts.linear_relu_encode(x, weight, bias, "jumprelu", threshold=threshold), jumped)
    up, up_bias = weight.flip(0), None if bias is None else bias.flip(0)
    gated = pyfacts.gated_relu_encode(x, weight, up, bias, up_bias)
    assert_encodes(gated, z.relu() * linear(x, up, up_bias))


@pytest.mark.parametrize("dtype", DTYPES)
def test_as_accurate_as_torch(dtype: torch.dtype) -> None:
    """A block may sum in another order than the whole; its largest error is at most twice torch's."""
    x, weight, bias = (operand.to(dtype) for operand in normal_operands(2100, 96, 1500))
    exact = torch.relu(linear(x.double(), weight.double(), bias.double()))
    error = (pyfacts.linear_relu_encode(x, weight, bias).to_dense().double() - exact).abs().max()
    assert error <= 2 * (torch.relu(linear(x, weight, bias)).double() - exact).abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_tokens", [3, 40])  # with few, operands in half precision are not widened
def test_sums_are_float32(n_tokens: int, dtype: torch.dtype) -> None:
    """Large terms cancel, and leave what half precision would have rounded away, or to infinity."""
    x = torch.tensor([300.0, 1.0, -300.0], dtype=dtype).expand(n_tokens, 3)
    weight = torch.tensor([300.0, 1.0, 300.0], dtype=dtype).expand(500, 3)
    enc = pyfacts.linear_relu_encode(x, weight, torch.ones(500, dtype=dtype))
    assert_encodes(enc, torch.full((n_tokens, 500), 2.0, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_pass_as_in_torch(dtype: torch.dtype) -> None:
    """Also the negative NaN that x86 makes of inf - inf."""
    x = torch.tensor([[float("inf")], [float("nan")], [1.0]], dtype=dtype)
    weight = torch.tensor([[1.0], [-1.0], [0.0], [2.0]], dtype=dtype)
    bias = torch.tensor([-float("inf"), 0, 0, 1], dtype=dtype)
    z = linear(x, weight, bias)
    threshold = torch.tensor([0, -1, float("inf"), 2.5], dtype=dtype)
    for activation, expected in (
        ("relu", z.relu()),
        ("relu2", z.relu().square()),
        ("jumprelu", torch.where((z > threshold) | z.isnan(), z.relu(), 0)),
    ):
        given = threshold if activation == "jumprelu" else None
        enc = pyfacts.linear_relu_encode(x, weight, bias, activation, threshold=given)
        torch.testing.assert_close(enc.to_dense(), expected, rtol=0, atol=0, equal_nan=True)
    assert z.isnan().any() and (z == float("inf")).any()


def test_transposed_and_strided_operands() -> None:
    """An SAE's W_enc [d_in, d_sae] goes in as a view."""
    x, weight, bias = operands((50, 8, 600), torch.float32)
    expected = linear(x, weight, bias).relu()
    W_enc = weight.T.contiguous()
    wide = torch.zeros(100, 16)
    wide[::2, ::2] = x
    assert_encodes(pyfacts.linear_relu_encode(wide[::2, ::2], W_enc.T, bias), expected)
    assert_encodes(pyfacts.linear_topk_encode(wide[::2, ::2], W_enc.T, bias, 600), expected)


WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "whole rows": lambda big: big[:1500, :64],
    "every other row": lambda big: big[:3000:2, :64],
    "every other element": lambda big: big[:1500, :128:2],
    "transposed": lambda big: big.T[:1500, :64],
    "one row for all": lambda big: big[:1, :64].expand(1500, 64),
    "rows over one another": lambda big: big.as_strided((1500, 64), (3, 1)),
}


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("n_tokens", [100, 600, 4200])  # on either side of what decides which product is taken
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operands_of_any_strides(weight: Callable[[Tensor], Tensor], n_tokens: int, dtype: torch.dtype) -> None:
    big = whole_numbers(3000, 3000, dtype=dtype)
    x, w = whole_numbers(2 * n_tokens, 99, dtype=dtype, seed=1)[::2, :64], weight(big)
    for bias in (big[0, :3000:2], big[:1, 0].expand(1500), big[0, 7:1507]):
        assert_encodes(
            pyfacts.linear_relu_encode(x, w, bias), linear(x.float(), w.float(), bias.float()).relu().to(dtype)
        )


def test_autocast_decides_the_dtype() -> None:
    x, weight, bias = operands((20, 8, 300), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        enc = pyfacts.linear_relu_encode(x, weight, bias)
        expected = torch.relu(linear(x, weight, bias))
        assert pyfacts.linear_topk_encode(x, weight, bias, 3).dtype == torch.bfloat16
    assert_encodes(enc, expected)


def test_autocast_decodes_what_it_encoded() -> None:
    x, weight, bias = operands((20, 8, 300), torch.float32)
    W_dec = torch.randn(300, 5, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        enc = pyfacts.linear_relu_encode(x, weight, bias)
        out = pyfacts.sparse_linear(enc, W_dec, torch.ones(5))
    expected = pyfacts.sparse_linear(enc, W_dec.bfloat16(), torch.ones(5).bfloat16())
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)
    out.sum().backward()
    assert W_dec.grad is not None and W_dec.grad.dtype == torch.float32
    with pytest.raises(TypeError, match=r"W_dec must have the dtype of enc"):
        pyfacts.sparse_linear(enc, W_dec)


def test_autocast_casts_no_operand_that_linear_would_not() -> None:
    x, weight, bias = operands((20, 8, 300), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for wrong in (
            (x.double(), weight.double(), None),
            (x.long(), weight, None),
            (x, weight, 1.0),
            (x, [1.0], None),
        ):
            with pytest.raises(TypeError):
                pyfacts.linear_relu_encode(*wrong)
            with pytest.raises(TypeError):
                pyfacts.linear_topk_encode(*wrong, 3)


def test_forward_mode_is_refused_rather_than_zero() -> None:
    x, weight, _ = operands((20, 8, 300), torch.float32)
    enc, W_dec = pyfacts.encode(x.relu()), torch.randn(8, 4)
    for call, primal in (
        (lambda w: pyfacts.linear_relu_encode(x, w, return_dense=True)[0], weight),
        (lambda w: pyfacts.sparse_linear(enc, w), W_dec),
    ):
        with pytest.raises(NotImplementedError, match="differentiates backwards only"):
            torch.func.jvp(call, (primal,), (torch.ones_like(primal),))


# ---- selections ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_topk_is_exact_with_ties(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """The lowest features of equals; over the batch the earliest tokens first."""
    x, weight, bias = operands(shape, dtype)
    h = linear(x, weight, bias).relu()
    for k in {1, min(3, shape[2]), (shape[2] + 1) // 2, shape[2]}:
        assert_encodes(pyfacts.linear_topk_encode(x, weight, bias, k), largest(h, k))
        over_batch = largest(h.reshape(1, -1), k * len(h)).view_as(h)
        assert_encodes(pyfacts.linear_batch_topk_encode(x, weight, bias, k), over_batch)


@pytest.mark.parametrize("values", ["equal", "rising", "falling", "few"])
def test_topk_of_hard_orders(values: str) -> None:
    """All equal, every later one larger (each enters the selection), every later one smaller, fewer than k positive."""
    n_features = 3000
    ramp = torch.arange(1, n_features + 1, dtype=torch.float32)
    row = {
        "equal": torch.ones(n_features),
        "rising": ramp,
        "falling": ramp.flip(0),
        "few": torch.where(ramp % 1000 == 0, 1.0, -1.0),
    }[values]
    x, weight = torch.ones(5, 1), row[:, None]
    expected = largest(row.relu().expand(5, -1), 20)
    assert_encodes(pyfacts.linear_topk_encode(x, weight, None, 20), expected)
    batch = largest(row.relu().expand(5, -1).reshape(1, -1), 100).view(5, -1)
    assert_encodes(pyfacts.linear_batch_topk_encode(x, weight, None, 20), batch)


def test_nan_counts_as_the_largest() -> None:
    weight = torch.tensor([[1.0], [float("nan")], [float("inf")], [-float("nan")], [2.0]])
    enc = pyfacts.linear_topk_encode(torch.ones(1, 1), weight, None, 3)
    assert enc.to_csr().col_indices().tolist() == [1, 2, 3]


def test_batch_topk_finds_the_largest_wherever_they_are() -> None:
    """Later blocks of tokens hold all that counts."""
    x = torch.cat([torch.ones(2100, 1), torch.full((300, 1), 9.0)])
    weight = torch.arange(1, 1401, dtype=torch.float32)[:, None] / 64
    enc = pyfacts.linear_batch_topk_encode(x, weight, None, 2)
    h = x @ weight.T
    assert enc.nnz == 2 * len(x)
    assert_encodes(enc, largest(h.reshape(1, -1), enc.nnz).view_as(h))


# ---- any number of threads, any instruction set ----------------------------------------------------------------------


HASH = """
import sys, hashlib, torch, pyfacts
sys.path.insert(0, sys.argv[1])
from conftest import DTYPES
from test_linear import operands, whole_numbers
torch.set_num_threads(int(sys.argv[2]))
digest = hashlib.sha256()
for dtype in DTYPES:
    for shape in ((130, 16, 700), (40, 8, 2500), (2100, 4, 300)):
        x, weight, bias = operands(shape, dtype)
        threshold = whole_numbers(shape[2], dtype=dtype, seed=3)
        for enc in (
            pyfacts.linear_relu_encode(x, weight, bias),
            pyfacts.linear_relu_encode(x, weight, bias, "jumprelu", threshold=threshold),
            pyfacts.gated_relu_encode(x, weight, weight.flip(0), bias),
            pyfacts.linear_topk_encode(x, weight, bias, 7),
            pyfacts.linear_batch_topk_encode(x, weight, bias, 7),
        ):
            for plane in enc.planes:
                digest.update(plane.contiguous().view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


def test_threads_and_instruction_sets_give_the_same_bytes() -> None:
    digests = set()
    for isa, n_threads in (("scalar", "1"), ("avx2", "1"), ("avx512", "2"), ("avx512vbmi2", "3"), ("", "5")):
        env = {**os.environ, "PYFACTS_ISA": isa, "PYTHONWARNINGS": "ignore"}
        command = [sys.executable, "-c", HASH, os.path.dirname(__file__), n_threads]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            digests.add(done.stdout)
        else:
            assert f"PYFACTS_ISA is '{isa}'" in done.stderr, done.stderr
    assert len(digests) == 1


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "encoder",
    [
        lambda x, w, b: pyfacts.linear_relu_encode(x, w, b - 4),
        lambda x, w, b: pyfacts.linear_relu_encode(x, w, b, "jumprelu", threshold=torch.full_like(b, 4.0)),
        lambda x, w, b: pyfacts.linear_topk_encode(x, w, b, 32),
        lambda x, w, b: pyfacts.linear_batch_topk_encode(x, w, b, 32),
    ],
    ids=["relu", "jumprelu", "topk", "batch_topk"],
)
def test_the_dense_result_never_exists_as_a_whole(encoder: Callable[..., pyfacts.EncodedActivations]) -> None:
    """Dense would be 655 MB: the process grows by at most a tenth of that."""
    x, weight, bias = normal_operands(4096, 16, 40_000)
    encoder(x[:256], weight[:2000], bias[:2000])  # loads what is loaded once
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    enc = encoder(x, weight, bias)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert 0 < enc.nnz and grown < 65e6


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", "relu2", "jumprelu"])
def test_gradients(activation: str) -> None:
    """Through h, to x, weight and bias, first and second order; none through the encoding."""
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*shape) for shape in ((6, 5), (7, 5), (7,)))
    upstream = torch.randn(6, 7)
    threshold = torch.rand(7) if activation == "jumprelu" else None

    def gradients(forward: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        h = forward(*leaves)
        first = torch.autograd.grad((h * upstream).square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        return [h, *first, *second]

    def fused(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        h, enc = pyfacts.linear_relu_encode(x, weight, bias, activation, return_dense=True, threshold=threshold)
        assert h.requires_grad and not enc.values.requires_grad
        assert_same_bits(enc.to_dense(), h.detach())
        return h

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        z = linear(x, weight, bias)
        h = z.relu() if threshold is None else torch.where(z > threshold, z.relu(), 0)
        return h.square() if activation == "relu2" else h

    for ours, theirs in zip(gradients(fused), gradients(plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [0.003, 30.0])
def test_gradients_of_squares_that_float16_does_not_hold(scale: float) -> None:
    torch.manual_seed(0)
    x, weight = (torch.randn(64, 32) * scale).half(), torch.randn(48, 32).half()

    def gradient(dtype: torch.dtype, forward: Callable[..., Tensor]) -> Tensor:
        leaf = weight.to(dtype, copy=True).requires_grad_()
        (h := forward(x.to(dtype), leaf)).backward(torch.full_like(h, 1 / 64))
        return leaf.grad.double()

    ours = gradient(torch.float16, lambda x, w: pyfacts.linear_relu_encode(x, w, None, "relu2", return_dense=True)[0])
    exact = gradient(torch.float64, lambda x, w: linear(x, w).relu().square())
    assert (ours - exact).norm() < 2e-3 * exact.norm()


def test_a_single_gradient_is_enough() -> None:
    x, weight, bias = normal_operands(6, 5, 7)
    weight.requires_grad_()
    h, _ = pyfacts.linear_relu_encode(x, weight, bias, return_dense=True)
    h.sum().backward()
    reference = weight.detach().clone().requires_grad_()
    torch.relu(linear(x, reference, bias)).sum().backward()
    torch.testing.assert_close(weight.grad, reference.grad)


def test_what_is_saved_for_backward_is_packed() -> None:
    """relu(linear) keeps h, 4 bytes an element; here the planes are kept, which the caller holds anyway."""
    x, weight, bias = normal_operands(512, 16, 4096)

    def saved_bytes(forward: Callable[[Tensor], object]) -> int:
        saved: dict[int, int] = {}
        given = {t.data_ptr() for t in (x, weight, bias)}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in given:
                saved[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            forward(weight.clone().requires_grad_())
        weight_bytes = weight.nbytes
        return sum(n for n in saved.values() if n != weight_bytes)

    plain = saved_bytes(lambda w: linear(x, w, bias - 2).relu())
    packed = saved_bytes(lambda w: pyfacts.linear_relu_encode(x, w, bias - 2, return_dense=True))
    assert plain == 512 * 4096 * 4
    assert 0 < packed < plain / 10


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.ones(7, 4)}, ValueError, "differ in d_in: 5 and 4"),
        ({"bias": torch.ones(6)}, ValueError, r"bias must be \[7\]"),
        ({"weight": torch.ones(7, 5).half()}, TypeError, "weight must have the dtype of x"),
        ({"x": torch.ones(5)}, ValueError, r"got shape \(5,\)"),
        ({"x": torch.ones(6, 5).double()}, TypeError, "float64"),
        ({"x": [[1.0]]}, TypeError, "x must be a torch.Tensor, got list"),
        ({"activation": "gelu"}, ValueError, "one of 'relu', 'relu2', 'jumprelu', got 'gelu'"),
        ({"activation": "jumprelu"}, ValueError, "needs a threshold"),
        ({"threshold": torch.ones(7)}, ValueError, "belongs to activation 'jumprelu'"),
        ({"activation": "jumprelu", "threshold": torch.ones(6)}, ValueError, r"threshold must be \[7\]"),
        ({"activation": "jumprelu", "threshold": 0.5}, TypeError, "threshold must be a torch.Tensor, got float"),
        ({"activation": "jumprelu", "threshold": torch.ones(7).half()}, TypeError, "threshold must have the dtype"),
        (
            {"activation": "jumprelu", "threshold": torch.tensor([0, 0, 0, float("nan"), 0, 0, 0])},
            ValueError,
            "that of feature 3 is",
        ),
    ],
)
def test_bad_operands_are_named(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {"x": torch.ones(6, 5), "weight": torch.ones(7, 5), "bias": torch.ones(7), **change}
    with pytest.raises(error, match=message):
        pyfacts.linear_relu_encode(**arguments)  # type: ignore[call-overload]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nan", [float("nan"), -float("nan")])
def test_the_op_refuses_a_nan_threshold_too(dtype: torch.dtype, nan: float) -> None:
    """Compiled code comes without the check in Python."""
    ones, threshold = torch.ones(7, 5, dtype=dtype), torch.zeros(7, dtype=dtype)
    threshold[3] = nan
    with pytest.raises(RuntimeError, match="that of feature 3 is"):
        torch.ops.pyfacts.linear_relu_encode(ones, ones, None, "jumprelu", threshold, False)


@pytest.mark.parametrize("encoder", [pyfacts.linear_topk_encode, pyfacts.linear_batch_topk_encode])
@pytest.mark.parametrize(("k", "error"), [(0, ValueError), (-1, ValueError), (8, ValueError), (1.5, TypeError)])
def test_k_out_of_range(encoder: Callable[..., object], k: float, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"k must be 1 to n_features \(7\)" if error is ValueError else "float"):
        encoder(torch.ones(6, 5), torch.ones(7, 5), None, k)


def test_gate_and_up_must_fit_each_other() -> None:
    x = torch.ones(6, 5)
    with pytest.raises(ValueError, match=r"got \(7, 5\) and \(8, 5\)"):
        pyfacts.gated_relu_encode(x, torch.ones(7, 5), torch.ones(8, 5))
    with pytest.raises(ValueError, match=r"b_up must be \[7\] for W_up"):
        pyfacts.gated_relu_encode(x, torch.ones(7, 5), torch.ones(7, 5), None, torch.ones(5))


@pytest.mark.parametrize("activation", ["relu", "relu2"])
def test_gradients_pass_where_h_is_nan(activation):
    x = torch.tensor([[1.0, torch.nan], [1.0, 2.0]], requires_grad=True)
    w = torch.eye(2)
    h, _ = pyfacts.linear_relu_encode(x, w, activation=activation, return_dense=True)
    (ours,) = torch.autograd.grad(h.sum(), x)
    z = torch.relu(x @ w.T)
    (theirs,) = torch.autograd.grad((z if activation == "relu" else z**2).sum(), x)
    assert torch.equal(ours.isnan(), theirs.isnan()) and torch.equal(ours.nan_to_num(7), theirs.nan_to_num(7))


def test_batch_topk_prefers_the_earliest_token_though_its_block_comes_later():
    """Token 0's ones lie behind the first block, whose own fill what is kept more than twice over."""
    weight = torch.zeros(1024, 4)
    weight[:256, 1:] = 1
    weight[256:, 0] = 1
    enc = pyfacts.linear_batch_topk_encode(torch.eye(4), weight, None, k=1)
    assert enc.to_dense().nonzero().tolist() == [[0, j] for j in range(256, 260)]
