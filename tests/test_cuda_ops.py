"""The ops that pyfacts.cuda builds from others, on the CPU and on a GPU.

On the CPU the ops of the device form are those of tests/device_form.py. Numbers are small and whole where bits are
compared: every order of summation then gives the same.
"""

from collections.abc import Callable
from typing import Any

import device_form
import pytest
import torch
from conftest import DTYPES, needs_cuda, sparse
from reference import assert_same_bits
from test_linear import largest, operands, whole_numbers
from torch import Tensor
from torch.nn.functional import linear

import pyfacts
from pyfacts import cuda, ops

OPS = torch.ops.pyfacts
DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]

on_each_device = pytest.mark.parametrize("device", DEVICES)
of_each_dtype = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture(scope="module", autouse=True)
def _device_form_on_the_cpu() -> None:
    device_form.register()


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 128 tokens, pieces of 256 or so, and products of 128: everything is joined."""
    monkeypatch.setattr(cuda, "CHUNK_BYTES", 1)
    monkeypatch.setattr(cuda, "CHUNK_TOKENS", 1)
    monkeypatch.setattr(cuda, "ARENA_BYTES", 1 << 18)
    monkeypatch.setattr(cuda, "DENSE_BYTES", 1)


def kernel(device: str, name: str) -> Callable[..., Any]:
    """What an op runs for CUDA tensors."""
    return getattr(cuda if device == "cpu" else OPS, name)


def assert_same_planes(actual: ops.Planes, expected: ops.Planes) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert torch.equal(ours.cpu().contiguous().view(torch.uint8), theirs.view(torch.uint8))


def assert_encodes(planes: ops.Planes, expected: Tensor) -> None:
    """The planes that the CPU makes of the expected matrix."""
    assert_same_planes(planes, ops.encode(expected.cpu(), 0.0, False))


# ---- the device form -------------------------------------------------------------------------------------------------


@on_each_device
@of_each_dtype
@pytest.mark.parametrize("shape", [(0, 300), (5, 0), (1, 1), (16, 256), (17, 257), (129, 700), (300, 30)], ids=str)
def test_a_matrix_in_parts(device: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Parts of 32 tokens, in any order."""
    x = sparse(*shape, 0.2, dtype)
    x[::7] = sparse(*shape, 1.0, dtype, seed=1)[::7]  # segments of 255 and of 256
    arena = ops.empty_arena(x.to(device), *shape)
    for token in range(0, shape[0], 32)[::-1]:
        ops.encode_out(x[token : token + 32].to(device), arena, first_token=token)
    assert_encodes(ops.canonicalise(arena), x)

    index, values, tile_ptr = (plane.to(device) for plane in ops.encode(x, 0.0, False)[1:])
    out = [plane.new_full((plane.shape[0] + 3, *plane.shape[1:]), 77) for plane in (index, values)]
    sizes = torch.empty(2, dtype=torch.int64, device=device)
    ops.canonicalise_out(arena, *out, torch.empty_like(tile_ptr), sizes)
    assert sizes.tolist() == [len(index), len(values)]
    for plane, expected in zip(out, (index, values), strict=True):
        assert torch.equal(plane[:-3], expected) and bool((plane[-3:] == 77).all())


@on_each_device
def test_what_does_not_fit_is_counted_and_refused(device: str) -> None:
    x = sparse(100, 300, 0.5, torch.bfloat16).to(device)
    arena = ops.empty_arena(x, *x.shape)
    small = ops.Arena(arena.counts, arena.index, arena.values[:4096], arena.group_ptr, arena.cursor, 300)
    ops.encode_out(x, small)
    assert (small.cursor.item() >> 32) * 16 > 8192
    with pytest.raises(RuntimeError, match="did not fit its buffers"):
        ops.canonicalise(small)
    sizes = torch.zeros(2, dtype=torch.int64, device=device)
    _, index, values, tile_ptr = (plane.to(device) for plane in ops.encode(x.cpu(), 0.0, False))
    ops.canonicalise_out(small, index, values, tile_ptr, sizes)
    assert sizes.tolist() == [-1, -1]

    arena.cursor.zero_()
    ops.encode_out(x, arena)
    short = torch.full_like(values[1:], 77)
    ops.canonicalise_out(arena, index, short, tile_ptr, sizes)
    assert sizes.tolist() == [len(index), len(values)]
    assert bool((short == 77).all())


def test_opcheck_of_the_device_form() -> None:
    x = sparse(40, 300, 0.2, torch.bfloat16)
    arena = ops.empty_arena(x, *x.shape)
    ops.encode_out(x, arena)
    _, index, values, tile_ptr = ops.encode(x, 0.0, False)
    sizes = torch.empty(2, dtype=torch.int64)
    for threshold in (None, torch.ones(512, dtype=torch.bfloat16)):
        arena.cursor.zero_()
        torch.library.opcheck(OPS.encode_out.default, (x, 0.0, False, threshold, 0, 300, *arena.buffers))
    arena.cursor.zero_()
    ops.encode_out(x, arena)
    torch.library.opcheck(OPS.canonicalise.default, (*arena.buffers, 300))
    torch.library.opcheck(OPS.canonicalise_out.default, (*arena.buffers, 300, index, values, tile_ptr, sizes))


@pytest.mark.parametrize(
    ("dtype", "n_features"), [(torch.bfloat16, 131072), (torch.bfloat16, 262144), (torch.float32, 131072)]
)
def test_pieces_are_as_long_as_a_product_should_be(dtype: torch.dtype, n_features: int) -> None:
    """Reading the weight of a wide encoder has to be worth it."""
    pieces = []

    def fill(arena: ops.Arena, begin: int, end: int) -> None:
        pieces.append(end - begin)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cuda.pack(torch.empty(0, dtype=dtype), 1000, n_features, fill, least=cuda.CHUNK_TOKENS)
    assert pieces == [256]


# ---- encoders that compute what they encode --------------------------------------------------------------------------

SHAPES = [(0, 8, 300), (1, 1, 1), (3, 0, 5), (130, 16, 700), (700, 4, 300), (257, 8, 1000)]
some_shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


@on_each_device
@of_each_dtype
@some_shapes
@pytest.mark.parametrize("return_dense", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.usefixtures("small_pieces")
def test_linear_relu_encode(
    device: str, dtype: torch.dtype, shape: tuple[int, int, int], return_dense: bool, with_bias: bool
) -> None:
    x, weight, bias = operands(shape, dtype)
    z = linear(x, weight, bias if with_bias else None)
    threshold = whole_numbers(shape[2], dtype=dtype, seed=3)  # above, below and at zero
    threshold[::7] = -0.0
    given = [t.to(device) for t in (x, weight, bias, threshold)]
    if not with_bias:
        given[2] = None
    for activation, expected in (
        ("relu", z.relu()),
        ("relu2", z.relu().square()),
        ("jumprelu", torch.where(z > threshold, z.relu(), 0)),
    ):
        theta = given[3] if activation == "jumprelu" else None
        h, *planes = kernel(device, "linear_relu_encode")(*given[:3], activation, theta, return_dense)
        assert_encodes(tuple(planes), expected)
        assert_same_bits(h.cpu(), expected + 0.0 if return_dense else expected[:0])


@on_each_device
@of_each_dtype
@some_shapes
@pytest.mark.usefixtures("small_pieces")
def test_gated_relu_encode(device: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    x, weight, bias = operands(shape, dtype)
    up = weight.flip(0)
    given = [t.to(device) for t in (x, weight, up, bias)]
    assert_encodes(kernel(device, "gated_relu_encode")(*given, None), linear(x, weight, bias).relu() * linear(x, up))


@on_each_device
@of_each_dtype
def test_nan_and_infinity_pass_as_in_torch(device: str, dtype: torch.dtype) -> None:
    x = torch.tensor([[float("inf")], [float("nan")], [1.0], [-0.0]], dtype=dtype)
    weight = torch.tensor([[1.0], [-1.0], [0.0], [2.0]], dtype=dtype)
    z = linear(x, weight)
    threshold = torch.tensor([0, -1, float("inf"), 1.5], dtype=dtype)
    for activation, expected in (
        ("relu", z.relu()),
        ("relu2", z.relu().square()),
        ("jumprelu", torch.where((z > threshold) | z.isnan(), z.relu(), 0)),
    ):
        theta = threshold.to(device) if activation == "jumprelu" else None
        h, *planes = kernel(device, "linear_relu_encode")(
            x.to(device), weight.to(device), None, activation, theta, True
        )
        dense = ops.decode(tuple(planes), 4, False)
        torch.testing.assert_close(dense.cpu(), expected, rtol=0, atol=0, equal_nan=True)
        assert_same_bits(h.cpu(), dense.cpu())


@on_each_device
@of_each_dtype
@some_shapes
@pytest.mark.usefixtures("small_pieces")
def test_topk_is_exact_with_ties(device: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    x, weight, bias = operands(shape, dtype)
    h = linear(x, weight, bias).relu()
    given = [t.to(device) for t in (x, weight, bias)]
    for k in {1, min(3, shape[2]), (shape[2] + 1) // 2, shape[2]}:
        assert_encodes(kernel(device, "linear_topk_encode")(*given, k, False), largest(h, k))
        over_batch = largest(h.reshape(1, -1), k * len(h)).view_as(h)
        assert_encodes(kernel(device, "linear_topk_encode")(*given, k, True), over_batch)


@on_each_device
@pytest.mark.usefixtures("small_pieces")
def test_topk_where_the_order_is_hard(device: str) -> None:
    """NaNs of both signs before infinity; all equal; the last chunk of the batch holds all that counts."""
    nan, inf = float("nan"), float("inf")
    weight = torch.tensor([[1.0], [nan], [inf], [-nan], [2.0]], device=device)
    for over_batch in (False, True):
        planes = kernel(device, "linear_topk_encode")(torch.ones(1, 1, device=device), weight, None, 3, over_batch)
        assert ops.to_csr(tuple(plane.cpu() for plane in planes), 5)[1].tolist() == [1, 2, 3]
    x = torch.cat([torch.ones(300, 1), torch.full((40, 1), 9.0)])
    for weight in (torch.ones(500, 1), torch.arange(1, 501.0)[:, None]):
        h = x @ weight.T
        expected = largest(h.reshape(1, -1), 2 * len(h)).view_as(h)
        assert_encodes(kernel(device, "linear_topk_encode")(x.to(device), weight.to(device), None, 2, True), expected)


@on_each_device
@of_each_dtype
@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("k", [1, 3, 300])
def test_topk_of_what_is_there_already(device: str, dtype: torch.dtype, k: int) -> None:
    """By magnitude, bits kept, those of NaNs too."""
    x = whole_numbers(300, 300, dtype=dtype)
    x[3, 10:14] = torch.tensor([float("nan"), float("inf"), -float("inf"), -float("nan")])
    x[3, :4].view(torch.int32 if dtype == torch.float32 else torch.int16)[:] = torch.tensor([-1, -3, -5, -7])
    assert_same_planes(kernel(device, "topk_encode")(x.to(device), k), ops.topk_encode(x, k))
    x = x[4:]
    torch.testing.assert_close(
        kernel(device, "row_sq_norm")(x.to(device)).cpu(), ops.row_sq_norm(x), rtol=1e-12, atol=0
    )
    with pytest.raises((ValueError, RuntimeError), match="k must be 1 to 300, got 301"):
        kernel(device, "topk_encode")(x.to(device), 301)


@on_each_device
def test_bad_arguments_of_the_ops_are_refused(device: str) -> None:
    ones, nan = torch.ones(4, 4, device=device), torch.tensor([1.0, 1.0, float("nan"), 1.0], device=device)
    encode = kernel(device, "linear_relu_encode")
    for arguments, message in (
        (("gelu", None), "unknown activation gelu"),
        (("jumprelu", None), "takes a threshold"),
        (("relu", nan), "takes a threshold"),
        (("jumprelu", nan), "that of feature 2 is"),
    ):
        with pytest.raises(ValueError, match=message):
            encode(ones, ones, None, *arguments, False)
    with pytest.raises(ValueError, match="k must be 1 to 4, got 5"):
        kernel(device, "linear_topk_encode")(ones, ones, None, 5, False)


# ---- pieces ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def arenas(monkeypatch: pytest.MonkeyPatch) -> list[ops.Arena]:
    """Those that are made."""
    made, empty_arena = [], ops.empty_arena
    monkeypatch.setattr(ops, "empty_arena", lambda *shape: made.append(empty_arena(*shape)) or made[-1])
    return made


@on_each_device
@pytest.mark.usefixtures("small_pieces")
def test_a_narrow_matrix_takes_no_larger_arena(device: str, arenas: list[ops.Arena]) -> None:
    """Though the device form pads its columns."""
    x, weight, bias = operands((2000, 4, 8), torch.bfloat16)
    given = [t.to(device) for t in (x, weight, bias)]
    _, *planes = kernel(device, "linear_relu_encode")(*given, "relu", None, False)
    assert_encodes(tuple(planes), linear(x, weight, bias).relu())
    assert len(arenas) > 1 and all(arena.values.nbytes <= cuda.ARENA_BYTES for arena in arenas)


@on_each_device
@of_each_dtype
def test_a_selection_takes_room_for_what_it_keeps(device: str, dtype: torch.dtype, arenas: list[ops.Arena]) -> None:
    """Whatever the values are: all in one column, or one in each, so that every group is padded."""
    together = torch.zeros(200, 2560, dtype=dtype)
    together[:, :6] = torch.arange(1, 7)
    apart = torch.zeros(200, 2560, dtype=dtype)
    apart[:, :2560:256] = 1
    for x, k in ((together, 6), (apart, 10), (torch.ones(200, 300, dtype=dtype), 300)):
        arenas.clear()
        assert_same_planes(kernel(device, "topk_encode")(x.to(device), k), ops.topk_encode(x, k))
        (arena,) = arenas
        assert k == 300 or arena.index.nbytes + arena.values.nbytes < x.nbytes / 2


@on_each_device
@pytest.mark.parametrize("lengths", [(128, 1), (256, 128, 300), (128, 128)], ids=str)
@pytest.mark.parametrize("n_features", [1, 300, 512])
def test_joined_pieces_are_what_cat_makes(device: str, lengths: tuple[int, ...], n_features: int) -> None:
    x = [sparse(n, n_features, 0.2, torch.float16, seed=n) for n in lengths]
    pieces = [tuple(plane.to(device) for plane in ops.encode(part, 0.0, False)) for part in x]
    assert_encodes(cuda.join(pieces), torch.cat(x))


@on_each_device
@of_each_dtype
def test_the_planes_travel_to_the_cpu_for_these(device: str, dtype: torch.dtype) -> None:
    x = sparse(140, 300, 0.1, dtype)
    enc = pyfacts.encode(x)
    planes = enc.to(device).planes
    names = ("slice", "take", "cat", "neuron")
    run = {name: cuda.on_the_cpu(getattr(OPS, name)) if device == "cpu" else getattr(OPS, name) for name in names}
    assert_same_planes(run["slice"](*planes, 300, 3, 130), enc[3:130].planes)
    chosen = torch.tensor([139, 0, 0], device=device)
    assert_same_planes(run["take"](*planes, 300, chosen), enc[[139, 0, 0]].planes)
    twice = [[plane, plane] for plane in planes]
    assert_same_planes(run["cat"](*twice, 300), pyfacts.cat([enc, enc]).planes)
    for ours, theirs in zip(run["neuron"](*planes, 300, 7), enc.neuron(7), strict=True):
        assert ours.device.type == device and torch.equal(ours.cpu(), theirs)


# ---- the gradient of a product with an encoding ----------------------------------------------------------------------


@on_each_device
@of_each_dtype
@pytest.mark.parametrize("shape", [(1, 1, 1), (130, 300, 7), (300, 513, 40), (0, 300, 5), (5, 0, 5), (130, 300, 0)])
@pytest.mark.usefixtures("small_pieces")
def test_sparse_linear_grad_weight(device: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    n_tokens, n_features, d_out = shape
    h = sparse(n_tokens, n_features, 0.1, torch.float32).ceil().to(dtype)
    grad = whole_numbers(n_tokens, d_out, dtype=dtype)
    planes = [plane.to(device) for plane in ops.encode(h, 0.0, False)]
    grad_weight = kernel(device, "sparse_linear_grad_weight")(*planes, n_features, grad.to(device))
    assert_same_bits(grad_weight.cpu() + 0.0, (h.double().T @ grad.double()).to(dtype) + 0.0)


@on_each_device
@pytest.mark.parametrize("place", [(0, 0, 0), (0, 0, 1), (1, 0, 0), (1, 0, 1)])
@pytest.mark.parametrize("value", [-(1 << 60), -1, 1 << 60])
@pytest.mark.usefixtures("small_pieces")
def test_starts_out_of_bounds_are_an_error(device: str, place: tuple[int, int, int], value: int) -> None:
    planes = ops.encode(sparse(300, 300, 0.1, torch.float32), 0.0, False)
    planes[3][place] = value
    on_device = [plane.to(device) for plane in planes]
    with pytest.raises(RuntimeError, match="not a valid encoding: the columns' starts"):
        kernel(device, "sparse_linear_grad_weight")(*on_device, 300, torch.ones(300, 4, device=device))
