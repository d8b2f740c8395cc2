"""The kernels on a GPU, against the CPU's bits; and what only a GPU shows: streams, waiting, autocast, compilation."""

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import tiny_models
import torch
from conftest import DTYPES, needs_cuda, sparse
from reference import BITS, assert_same_bits, decoded, from_bits
from test_cuda_ops import assert_encodes, assert_same_planes
from test_linear import normal_operands, operands, whole_numbers
from torch import Tensor, nn
from torch.nn.functional import linear

import pyfacts
from pyfacts import cuda, drain, ops

of_each_dtype = pytest.mark.parametrize("dtype", DTYPES)
pytestmark = needs_cuda


def on_gpu(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.cuda() for tensor in tensors)


def assert_like_the_cpu(x: Tensor, min_abs: float = 0.0, signed_zero: bool = False) -> None:
    """x is on the GPU: its planes are those of the CPU, and decode to the same bits."""
    expected = ops.encode(x.cpu(), min_abs, signed_zero)
    planes = ops.encode(x, min_abs, signed_zero)
    assert_same_planes(planes, expected)
    dense = ops.decode(planes, x.shape[1], signed_zero)
    assert_same_bits(dense.cpu(), decoded(x.cpu(), min_abs, signed_zero))


@of_each_dtype
@pytest.mark.parametrize("n_features", [0, 1, 9, 255, 256, 257, 700])
def test_encode_and_decode_give_the_cpus_bits(dtype: torch.dtype, n_features: int) -> None:
    for n_tokens in (0, 1, 15, 17, 127, 129, 300):
        for density in (0.02, 0.13, 0.6, 1.0):
            assert_like_the_cpu(sparse(n_tokens, n_features, density, dtype, seed=n_tokens).cuda())


@of_each_dtype
def test_every_count_of_a_segment(dtype: torch.dtype) -> None:
    x = torch.zeros(257, 256, dtype=dtype)
    shuffle = torch.randperm(256, generator=torch.Generator().manual_seed(0))
    for n in range(257):
        x[n, shuffle[:n]] = 1 + torch.arange(n).to(dtype)
    assert_like_the_cpu(x.cuda())


@of_each_dtype
@pytest.mark.parametrize("signed_zero", [False, True])
@pytest.mark.parametrize("min_abs", [0.0, 1e-40, 0.3, 65519.0, 1e300, float("inf")])
def test_special_values_and_thresholds(dtype: torch.dtype, signed_zero: bool, min_abs: float) -> None:
    """Arbitrary bits and zeros of both signs: NaNs, infinities, subnormals."""
    random = np.random.default_rng(0)
    n_bits = 8 * BITS[dtype]().nbytes
    pattern = random.integers(0, 1 << n_bits, (40, 300), BITS[dtype])
    pattern[random.random(pattern.shape) < 0.3] = 0
    pattern[random.random(pattern.shape) < 0.3] = 1 << (n_bits - 1)
    assert_like_the_cpu(from_bits(pattern, dtype).cuda(), min_abs, signed_zero)


def test_rows_of_any_stride_and_alignment() -> None:
    base = sparse(140, 300, 0.1, torch.bfloat16).cuda()
    for x in (base[:, 3:290], base[1::2], base.T, base[:1].expand(5, 300), base[:, ::3]):
        assert_like_the_cpu(x)
    out = torch.full((140, 400), 7.0, dtype=torch.bfloat16, device="cuda")
    pyfacts.encode(base).to_dense(out=out[:, 50:350])
    assert torch.equal(out[:, 50:350], base) and bool((out[:, :50] == 7).all() and (out[:, 350:] == 7).all())


def test_a_matrix_of_many_groups() -> None:
    """More blocks than a GPU runs at a time."""
    assert_like_the_cpu(sparse(5000, 5000, 0.05, torch.bfloat16).cuda())


def test_broken_planes_are_refused() -> None:
    counts, index, values, tile_ptr = pyfacts.encode(sparse(200, 300, 0.1, torch.float32)).to("cuda").planes
    index[0] = 255 - index[0]
    planes = counts, index, values, tile_ptr
    for read in (
        lambda: ops.decode(planes, 300, False),
        lambda: ops.to_csr(planes, 300),
        lambda: ops.sparse_linear(planes, torch.ones(300, 4, device="cuda"), None),
    ):
        with pytest.raises(RuntimeError, match="not a valid encoding: "):
            read()


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Within it, a call of torch's that waits for the GPU raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_packing_waits_for_nothing() -> None:
    """The GPU is kept busy: it cannot have begun when the calls return."""
    x = sparse(300, 700, 0.1, torch.bfloat16).cuda()
    arena = ops.empty_arena(x, *x.shape)
    _, index, values, tile_ptr = ops.encode(x, 0.0, False)
    sizes = torch.empty(2, dtype=torch.int64, device="cuda")

    def run() -> None:
        arena.cursor.zero_()
        ops.encode_out(x, arena)
        ops.canonicalise_out(arena, index, values, tile_ptr, sizes)

    run()  # loads the kernels
    torch.cuda.synchronize()
    torch.cuda._sleep(1 << 30)
    with no_waiting():
        run()
    assert not torch.cuda.current_stream().query()
    assert sizes.tolist() == [len(index), len(values)]


def test_a_drain_waits_for_the_oldest_alone() -> None:
    x = [sparse(300, 700, density, torch.bfloat16).cuda() for density in (0.0, 0.1, 1.0, 0.3, 0.2)]
    for _ in range(2):  # the second time kernels are loaded and pinned memory is there
        torch.cuda.synchronize()
        torch.cuda._sleep(1 << 30)
        queue = drain.Drain()
        draining = [queue.encode(part) for part in x[: drain.DEPTH]]
        waited = torch.cuda.current_stream().query()
        draining += [queue.encode(part) for part in x[drain.DEPTH :]]
        rows = queue.move(x[0].clone())
        for of_it in draining:
            of_it.finish()
    assert not waited
    for part, of_it in zip(x, draining, strict=True):
        assert of_it.finish().device.type == "cpu" and not of_it.finish().values.is_pinned()
        assert_encodes(of_it.finish().planes, part)
    assert torch.equal(rows.finish(), x[0].cpu())


def test_a_captured_forward_has_no_call_that_waits() -> None:
    """But for the drain's own events, of which the test above tells."""
    torch.manual_seed(0)
    layers = [(nn.Linear(64, 700), nn.ReLU(), nn.Linear(700, 64)) for _ in range(2 * drain.DEPTH + 1)]
    model = nn.Sequential(*itertools.chain(*layers)).cuda()
    x = torch.randn(300, 64, device="cuda")
    hooks = [str(3 * layer + 2) for layer in range(len(layers))]
    with torch.inference_mode():
        for context in (contextlib.nullcontext(), no_waiting()):  # the first time kernels are loaded
            with pyfacts.capture(model, hooks) as cache, context:
                model(x)
        for hook in hooks:
            assert_encodes(cache[hook].planes, model[: int(hook)](x))


def test_another_stream_is_honoured() -> None:
    x = sparse(300, 700, 0.1, torch.bfloat16).cuda()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(1 << 28)
        late = x * 2
        planes = ops.encode(late, 0.0, False)
        assert_encodes(planes, x.cpu() * 2)


@of_each_dtype
def test_as_accurate_as_torch(dtype: torch.dtype) -> None:
    x, weight, bias = (operand.to(dtype) for operand in normal_operands(2100, 96, 1500))
    exact = torch.relu(linear(x.double(), weight.double(), bias.double()))
    given = on_gpu(x, weight, bias)
    error = (pyfacts.linear_relu_encode(*given).to_dense().cpu().double() - exact).abs().max()
    assert error <= 2 * (torch.relu(linear(*given)).cpu().double() - exact).abs().max()


@pytest.mark.parametrize("activation", ["relu", "relu2", "jumprelu"])
def test_gradients(activation: str) -> None:
    x, weight, bias = on_gpu(*normal_operands(300, 16, 700))
    threshold = torch.rand(700, device="cuda") if activation == "jumprelu" else None
    leaves = [[t.clone().requires_grad_() for t in (x, weight, bias)] for _ in range(2)]
    h, enc = pyfacts.linear_relu_encode(*leaves[0], activation, return_dense=True, threshold=threshold)
    z = linear(*leaves[1])
    plain = z.relu() if threshold is None else torch.where(z > threshold, z.relu(), 0)
    plain = plain.square() if activation == "relu2" else plain
    assert_same_bits(enc.to_dense().cpu(), h.detach().cpu())
    for ours, theirs in zip(
        torch.autograd.grad(h.square().sum(), leaves[0]),
        torch.autograd.grad(plain.square().sum(), leaves[1]),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@of_each_dtype
@pytest.mark.parametrize("shape", [(1, 1, 1), (130, 300, 7), (300, 513, 1040), (0, 300, 5), (5, 0, 5), (130, 300, 0)])
@pytest.mark.parametrize("density", [0.02, 0.6])
def test_sparse_linear_and_to_csr_give_the_cpus_bits(
    dtype: torch.dtype, shape: tuple[int, int, int], density: float
) -> None:
    n_tokens, n_features, d_out = shape
    enc = pyfacts.encode(sparse(n_tokens, n_features, density, dtype))
    weight, bias = torch.randn(n_features, d_out).to(dtype), torch.randn(d_out).to(dtype)
    on_the_gpu = enc.to("cuda")
    for b in (bias, None):
        ours = pyfacts.sparse_linear(on_the_gpu, weight.cuda(), None if b is None else b.cuda())
        assert_same_bits(ours.cpu(), pyfacts.sparse_linear(enc, weight, b))
    strided = pyfacts.sparse_linear(on_the_gpu, weight.T.contiguous().cuda().T)
    assert_same_bits(strided.cpu(), pyfacts.sparse_linear(enc, weight))
    for ours, theirs in zip(ops.to_csr(on_the_gpu.planes, n_features), ops.to_csr(enc.planes, n_features), strict=True):
        assert torch.equal(ours.cpu(), theirs)


def test_gradients_of_sparse_linear() -> None:
    h, (weight, bias) = sparse(300, 700, 0.1, torch.float32).cuda(), on_gpu(torch.randn(700, 20), torch.randn(20))
    leaves = [[t.clone().requires_grad_() for t in (weight, bias)] for _ in range(2)]
    outs = pyfacts.sparse_linear(pyfacts.encode(h), *leaves[0]), h @ leaves[1][0] + leaves[1][1]
    torch.testing.assert_close(*outs, rtol=1e-3, atol=1e-3)
    for ours, theirs in zip(
        *(torch.autograd.grad(out.square().sum(), own) for out, own in zip(outs, leaves, strict=True)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-2)


def test_autocast_decides_the_dtype() -> None:
    x, weight, bias = on_gpu(*operands((20, 8, 300), torch.float32))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        enc = pyfacts.linear_relu_encode(x, weight, bias)
        assert pyfacts.linear_topk_encode(x, weight, bias, 3).dtype == torch.bfloat16
        out = pyfacts.sparse_linear(pyfacts.encode(x), torch.ones(8, 4, device="cuda"))
    assert_encodes(enc.planes, linear(x, weight, bias).relu().bfloat16())
    assert out.dtype == torch.float32


def test_a_wide_encoder_stays_far_below_its_dense_size() -> None:
    """8,192 tokens by 131,072 latents would be 2.1 GB."""
    x = torch.randn(8192, 64, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(131072, 64, device="cuda", dtype=torch.bfloat16) / 8
    bias = torch.full((131072,), -3.1, device="cuda", dtype=torch.bfloat16)  # about 0.1 % of a normal is above
    pyfacts.linear_relu_encode(x[:128], weight, bias)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    enc = pyfacts.linear_relu_encode(x, weight, bias)
    assert 0 < enc.density < 0.002
    assert torch.cuda.max_memory_allocated() - before < 0.1 * enc.shape.numel() * 2


def test_compiles_into_one_graph() -> None:
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def round_trip(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        enc = pyfacts.linear_relu_encode(x, weight)
        return enc.to_dense(), pyfacts.sparse_linear(enc, weight)

    weight = whole_numbers(600, 16, dtype=torch.float32).cuda()
    for n_tokens in (3, 200):
        x = whole_numbers(n_tokens, 16, dtype=torch.float32).cuda()
        dense, out = round_trip(x, weight)
        assert torch.equal(dense, torch.relu(x @ weight.T)) and torch.equal(out, dense @ weight)


@pytest.mark.filterwarnings("ignore:the captured neurons are")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_capture_gives_what_hooks_see(dtype: torch.dtype) -> None:
    model = tiny_models.opt().to("cuda", dtype)
    calls = [tiny_models.tokens(2, 7, 0).cuda(), tiny_models.tokens(3, 4, 1).cuda()]
    seen: list[Tensor] = []
    hook = model.model.decoder.layers[1].fc2.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    with torch.no_grad():
        alone = [model(ids).logits for ids in calls]
        hook.remove()
        with pyfacts.capture(model) as cache:
            captured = [model(ids).logits for ids in calls]
    for a, b in zip(alone, captured, strict=True):
        assert torch.equal(a, b)
    enc = cache["blocks.1.mlp.hook_post"]
    expected = torch.cat([x.flatten(0, -2) for x in seen])
    assert_same_bits(enc.to_dense().cpu(), expected.cpu() + 0.0)
    tokens, values = enc.neuron(3)
    assert torch.equal(expected[:, 3].nonzero().squeeze(1).to(tokens.device), tokens)
    assert torch.equal(expected[:, 3].to(values.device)[tokens], values)


def test_operands_on_two_devices_are_named() -> None:
    ones = torch.ones(4, 4, device="cuda")
    with pytest.raises(ValueError, match="weight must be on the device of x, cuda:0, got cpu"):
        pyfacts.linear_relu_encode(ones, ones.cpu())


# ---- the fused kernel ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape",
    [(1, 8, 8), (17, 64, 256), (129, 768, 264), (1000, 1024, 520), (300, 8, 4096)]
    + [(590, 8, 4096), (5000, 72, 4096), (2000, 528, 4096)],  # more tiles than multiprocessors: each packs several
    ids=str,
)
@pytest.mark.parametrize("return_dense", [True, False])
def test_the_fused_kernel(dtype: torch.dtype, shape: tuple[int, int, int], return_dense: bool) -> None:
    """Both of its tiles, ragged in every direction; whole numbers, whose sums are exact."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the fused kernel is for Hopper")
    n_tokens, _, n_features = shape
    on_host = operands(shape, dtype)
    x, weight, bias = (t.cuda() for t in on_host)
    threshold = whole_numbers(n_features, dtype=dtype, seed=3).clamp(min=0).cuda()
    for b in (bias, None):
        # In float32, whose sums are exact; on the CPU, lest the sanitizer watch cuBLAS too.
        z = linear(*(t.float() for t in on_host[:2]), None if b is None else on_host[2].float()).to(dtype).cuda()
        for activation, expected in (
            ("relu", z.relu()),
            ("relu2", z.relu().square()),
            ("jumprelu", torch.where(z > threshold, z, 0)),
        ):
            theta = threshold if activation == "jumprelu" else None
            arena = ops.empty_arena(x, n_tokens, n_features)
            h = torch.full_like(z, 7.0) if return_dense else None
            assert ops.fused_linear_relu_encode_out(x, weight, b, activation, theta, h, arena)
            assert_encodes(ops.canonicalise(arena), expected)
            if h is not None:
                assert_same_bits(h, expected + 0.0)


@pytest.mark.parametrize("shape", [(590, 8, 4096), (200, 768, 4096)], ids=str)
def test_the_fused_kernel_stays_in_its_arena(shape: tuple[int, int, int]) -> None:
    """What does not fit is left out, counted all the same, and complained of."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the fused kernel is for Hopper")
    x, weight, bias = on_gpu(*operands(shape, torch.bfloat16))
    room = ops.empty_arena(x, shape[0], shape[2])
    poison = torch.full_like(room.values, 7.0)
    short = replace(ops.empty_arena(x, shape[0], shape[2]), values=poison[:4096])
    for arena in (room, short):
        assert ops.fused_linear_relu_encode_out(x, weight, bias, "relu", None, None, arena)
    assert short.cursor.item() == room.cursor.item() > 0
    assert bool((poison[4096:] == 7).all())
    with pytest.raises(RuntimeError, match="did not fit"):
        ops.canonicalise(short)


def test_what_the_fused_kernel_does_not_take_is_left_alone() -> None:
    x, weight = torch.ones(4, 12, device="cuda", dtype=torch.bfloat16), torch.ones(8, 12, device="cuda").bfloat16()
    for a, b in ((x, weight), (x.float()[:, :8], weight.float()[:, :8]), (x[:, 1:9], weight[:, 1:9])):
        arena = ops.empty_arena(a, 4, 8)
        assert not ops.fused_linear_relu_encode_out(a, b, None, "relu", None, None, arena)
        assert arena.cursor.item() == 0


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "FUSED", True)


@pytest.mark.usefixtures("fused")
def test_the_fused_way_is_that_of_two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "ARENA_BYTES", 1 << 18)  # in pieces
    x, weight, bias = (t.cuda() for t in operands((700, 64, 520), torch.bfloat16))
    h, enc = pyfacts.linear_relu_encode(x, weight, bias, return_dense=True)
    assert_same_bits(h, linear(x, weight, bias).relu() + 0.0)
    assert_same_bits(enc.to_dense(), h)
