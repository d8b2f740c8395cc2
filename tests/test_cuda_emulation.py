"""The CUDA kernels without a GPU: their device code, compiled as host C++ and run lane by lane, against the CPU ops.

tests/cuda_emulation says how. Planes, dense matrices and reported faults must all be the CPU's.
"""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DTYPES, sparse
from reference import BITS, bits, from_bits

from pyfacts import ops

ROOT = Path(__file__).parent.parent
COMPILER = next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
# Unaligned typed accesses, wild shifts and overflows abort. _FORTIFY_SOURCE forbids to _longjmp between stacks.
FLAGS = [
    *("-std=c++20", "-O1", "-shared", "-fPIC", "-U_FORTIFY_SOURCE"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized"),
    *("-fsanitize=alignment,shift,bounds,signed-integer-overflow", "-fno-sanitize-recover=undefined"),
]

Planes = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("cuda") / "emulation.so"
    sources = [ROOT / "tests/cuda_emulation/emulation.cpp", ROOT / "csrc/cpu/check.cpp"]
    subprocess.run([COMPILER, *FLAGS, *sources, "-o", library], check=True)
    return ctypes.CDLL(str(library))


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


class Arena(ctypes.Structure):
    """csrc/cuda/arena.h, over numpy arrays: of the worst case's sizes, or smaller."""

    _fields_ = (
        ("dtype", ctypes.c_uint8),
        ("n_tokens", ctypes.c_int64),
        ("n_features", ctypes.c_int64),
        ("counts", ctypes.c_void_p),
        ("index", ctypes.c_void_p),
        ("index_capacity", ctypes.c_int64),
        ("values", ctypes.c_void_p),
        ("values_capacity", ctypes.c_int64),
        ("group_ptr", ctypes.c_void_p),
        ("cursor", ctypes.c_void_p),
    )

    def __init__(
        self, dtype: torch.dtype, n_tokens: int, n_features: int, capacity: tuple[int, int] | None = None
    ) -> None:
        columns, groups = -(-n_features // 256), -(-n_tokens // 8)
        worst = columns * groups * 8
        index_capacity, values_capacity = capacity or (worst * 32, worst * 256 * BITS[dtype]().nbytes)
        self.arrays = {
            "counts": np.full((columns, n_tokens), 0xA5, np.uint8),
            "index": np.full(index_capacity, 0xA5, np.uint8),
            "values": np.full(values_capacity, 0xA5, np.uint8),
            "group_ptr": np.full((columns, groups), 0xA5A5A5A5, np.uint64),
            "cursor": np.zeros(1, np.uint64),
        }
        super().__init__(
            dtype=DTYPES.index(dtype),
            n_tokens=n_tokens,
            n_features=n_features,
            index_capacity=index_capacity,
            values_capacity=values_capacity,
            **{name: array.ctypes.data for name, array in self.arrays.items()},
        )

    @property
    def used(self) -> tuple[int, int]:
        """Bytes of index and of values that the cursor has placed."""
        units = int(self.arrays["cursor"][0])
        return 16 * (units & 0xFFFFFFFF), 16 * (units >> 32)


def encode_out(
    emulator: ctypes.CDLL,
    x: torch.Tensor,
    arena: Arena,
    min_abs: float = 0.0,
    signed_zero: bool = False,
    threshold: torch.Tensor | None = None,
    first_token: int = 0,
    seed: int = 0,
) -> None:
    emulator.emulated_encode(
        DTYPES.index(x.dtype),
        ctypes.c_void_p(x.data_ptr()),
        *map(ctypes.c_int64, (x.stride(0), *x.shape)),
        ctypes.c_double(min_abs),
        ctypes.c_bool(signed_zero),
        None if threshold is None else ctypes.c_void_p(threshold.data_ptr()),
        ctypes.byref(arena),
        ctypes.c_int64(first_token),
        seed,
    )


def canonical(emulator: ctypes.CDLL, arena: Arena, dtype: torch.dtype, seed: int = 0) -> Planes | None:
    """The canonical planes, None of an arena that overflowed."""
    n_tiles = -(-arena.n_tokens // 128)
    tile_ptr = np.full((-(-arena.n_features // 256), n_tiles, 2), -7, np.int64)
    total = np.full(2, -7, np.int64)
    emulator.emulated_canonical_starts(ctypes.byref(arena), pointer(tile_ptr), pointer(total), seed)
    if total[0] < 0:
        return None
    index, values = np.full(total[0], 0xA5, np.uint8), np.full(total[1], 0xA5A5, BITS[dtype])
    emulator.emulated_canonical_copy(ctypes.byref(arena), *map(pointer, (tile_ptr, total, index, values)), seed)
    return arena.arrays["counts"], index, values, tile_ptr


def encode(
    emulator: ctypes.CDLL, x: torch.Tensor, min_abs: float = 0.0, signed_zero: bool = False, seed: int = 0
) -> Planes | None:
    arena = Arena(x.dtype, *x.shape)
    encode_out(emulator, x, arena, min_abs, signed_zero, seed=seed)
    return canonical(emulator, arena, x.dtype, seed)


def decode(
    emulator: ctypes.CDLL, planes: Planes, n_features: int, dtype: torch.dtype, signed_zero: bool = False, seed: int = 0
) -> tuple[torch.Tensor, str]:
    """The dense matrix, and what is wrong with the planes ("" for nothing)."""
    counts, index, values, tile_ptr = map(np.ascontiguousarray, planes)
    out = np.full((counts.shape[1], n_features), 0xA5A5, BITS[dtype])
    message = ctypes.create_string_buffer(200)
    sizes = map(ctypes.c_int64, (counts.shape[1], n_features))
    emulator.emulated_decode(
        DTYPES.index(dtype),
        *sizes,
        pointer(counts),
        pointer(index),
        ctypes.c_int64(index.size),
        pointer(values),
        ctypes.c_int64(values.size),
        pointer(tile_ptr),
        ctypes.c_bool(signed_zero),
        pointer(out),
        message,
        ctypes.c_int64(len(message)),
        seed,
    )
    return from_bits(out, dtype).reshape(out.shape), message.value.decode()


def to_csr(
    emulator: ctypes.CDLL, planes: Planes, n_features: int, dtype: torch.dtype, seed: int = 0
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], str]:
    """crow, col and values, and what is wrong with the planes ("" for nothing)."""
    counts, index, values, tile_ptr = map(np.ascontiguousarray, planes)
    crow = np.full(counts.shape[1] + 1, -7, np.int64)
    col = np.full(values.size, -7, np.int64)
    row_values = np.full(values.size, 0xA5A5, BITS[dtype])
    message = ctypes.create_string_buffer(200)
    emulator.emulated_to_csr(
        DTYPES.index(dtype),
        *map(ctypes.c_int64, (counts.shape[1], n_features)),
        *map(pointer, (counts, index)),
        ctypes.c_int64(index.size),
        pointer(values),
        ctypes.c_int64(values.size),
        *map(pointer, (tile_ptr, crow, col, row_values)),
        message,
        ctypes.c_int64(len(message)),
        seed,
    )
    return (crow, col, row_values), message.value.decode()


def cpu_planes(x: torch.Tensor, min_abs: float = 0.0, signed_zero: bool = False) -> Planes:
    counts, index, values, tile_ptr = ops.encode(x, min_abs, signed_zero)
    return counts.numpy(), index.numpy(), bits(values), tile_ptr.numpy()


def cpu_decode(
    planes: Planes, n_features: int, dtype: torch.dtype, signed_zero: bool = False
) -> tuple[torch.Tensor | None, str]:
    counts, index, tile_ptr = (torch.from_numpy(np.ascontiguousarray(planes[i])) for i in (0, 1, 3))
    try:
        return ops.decode((counts, index, from_bits(planes[2], dtype), tile_ptr), n_features, signed_zero), ""
    except RuntimeError as error:
        return None, str(error)


def assert_like_the_cpu(
    emulator: ctypes.CDLL, x: torch.Tensor, min_abs: float = 0.0, signed_zero: bool = False, seed: int = 0
) -> None:
    """Both directions: the planes, and the dense matrix that they decode to."""
    expected = cpu_planes(x, min_abs, signed_zero)
    for actual, plane in zip(encode(emulator, x, min_abs, signed_zero, seed), expected, strict=True):
        np.testing.assert_array_equal(actual, plane)
    dense, fault = decode(emulator, expected, x.shape[1], x.dtype, signed_zero, seed)
    assert fault == ""
    np.testing.assert_array_equal(bits(dense), bits(cpu_decode(expected, x.shape[1], x.dtype, signed_zero)[0]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_features", [0, 1, 7, 9, 31, 255, 257])
def test_ragged_widths_and_lengths(emulator: ctypes.CDLL, dtype: torch.dtype, n_features: int) -> None:
    """Around a byte, a warp, a column and a tile; positions and bitmaps; a different order of lanes each time."""
    for n_tokens, density in ((0, 0.5), (1, 0.02), (33, 0.6), (130, 0.13)):
        x = sparse(n_tokens, n_features, density, dtype, seed=n_features)
        assert_like_the_cpu(emulator, x, seed=n_features + n_tokens)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_count_of_a_segment(emulator: ctypes.CDLL, dtype: torch.dtype) -> None:
    """0 to 256 values of a full segment, among them 31, 32, 33 (where positions end), 255 and 256 (one count byte)."""
    x = torch.zeros(257, 256, dtype=dtype)
    shuffle = torch.randperm(256, generator=torch.Generator().manual_seed(0))
    for n in range(257):
        x[n, shuffle[:n]] = 1 + torch.arange(n).to(dtype)
    assert_like_the_cpu(emulator, x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("signed_zero", [False, True])
@pytest.mark.parametrize("min_abs", [0.0, 1e-40, 0.3, 65519.0, 1e300, float("inf")])
def test_special_values_and_thresholds(
    emulator: ctypes.CDLL, dtype: torch.dtype, signed_zero: bool, min_abs: float
) -> None:
    """Arbitrary bits and zeros of both signs: NaNs, infinities, subnormals; a threshold rounds down to the dtype."""
    random = np.random.default_rng(0)
    pattern = random.integers(0, 1 << 8 * BITS[dtype]().nbytes, (8, 300), BITS[dtype])
    pattern[random.random(pattern.shape) < 0.3] = 0
    pattern[random.random(pattern.shape) < 0.3] = 1 << (8 * BITS[dtype]().nbytes - 1)
    near = torch.tensor([[min_abs]], dtype=torch.float64).to(dtype)
    pattern[0, :2] = bits(near)[0, 0] + np.array([0, 1], BITS[dtype])  # the threshold itself and its neighbour
    assert_like_the_cpu(emulator, from_bits(pattern, dtype), min_abs, signed_zero)


@pytest.mark.parametrize("dtype", DTYPES)
def test_thresholds_of_features(emulator: ctypes.CDLL, dtype: torch.dtype) -> None:
    """Arbitrary bits, and values at their threshold and beside it; zero, tiny, infinite and other thresholds."""
    random = np.random.default_rng(0)
    n_features = 300
    thresholds = torch.zeros(512, dtype=dtype)
    thresholds[:n_features] = torch.from_numpy(random.exponential(1.0, n_features)).to(dtype)
    thresholds[:40] = 0
    thresholds[40:44] = torch.tensor([float("inf"), torch.finfo(dtype).max, torch.finfo(dtype).tiny, 1e-6]).to(dtype)
    pattern = random.integers(0, 1 << 8 * BITS[dtype]().nbytes, (37, n_features), BITS[dtype])
    for row, change in enumerate((0, 1, -1)):
        pattern[row] = bits(thresholds[:n_features]) + np.array(change).astype(BITS[dtype])
        pattern[row + 3] = pattern[row] | 1 << (8 * BITS[dtype]().nbytes - 1)
    pattern[6:12, ::2] = 0
    x = from_bits(pattern, dtype)
    arena = Arena(dtype, *x.shape)
    encode_out(emulator, x, arena, min_abs=float("inf"), threshold=thresholds)
    kept = x.where((x > thresholds[:n_features]) | x.isnan(), 0)
    for actual, expected in zip(canonical(emulator, arena, dtype), cpu_planes(kept), strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_rows_with_a_stride_and_no_alignment(emulator: ctypes.CDLL) -> None:
    base = sparse(140, 300, 0.1, torch.bfloat16)
    for x in (base[:, 3:290], base[1::2], base[:1].expand(5, 300)):
        assert_like_the_cpu(emulator, x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_aligned_rows(emulator: ctypes.CDLL, dtype: torch.dtype) -> None:
    """Whole groups are read 16 bytes at a time, and only if rows begin at multiples of 16 bytes."""
    base = sparse(41, 1024 + 64, 0.2, dtype, seed=1)
    for first in (0, 16 // dtype.itemsize, 1):
        assert_like_the_cpu(emulator, base[:, first : first + 1024], seed=first)


def test_parts_of_a_matrix_fill_one_arena(emulator: ctypes.CDLL) -> None:
    """In any order; the canonical form does not tell."""
    x = sparse(75, 700, 0.2, torch.bfloat16, seed=2)
    arena = Arena(x.dtype, *x.shape)
    for first, end in ((40, 72), (0, 40), (72, 75)):
        encode_out(emulator, x[first:end], arena, first_token=first, seed=first)
    for actual, plane in zip(canonical(emulator, arena, x.dtype), cpu_planes(x), strict=True):
        np.testing.assert_array_equal(actual, plane)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("plane", ["index", "values"])
def test_an_arena_that_is_too_small_says_how_much_was_needed(
    emulator: ctypes.CDLL, dtype: torch.dtype, plane: str
) -> None:
    """Nothing is written past its end; what was needed is enough."""
    x = sparse(30, 300, 0.2, dtype, seed=3)
    roomy = Arena(dtype, *x.shape)
    encode_out(emulator, x, roomy)
    index_bytes, values_bytes = roomy.used
    small = (index_bytes - 16, values_bytes) if plane == "index" else (index_bytes, values_bytes - 16)
    arena = Arena(dtype, *x.shape, capacity=small)
    encode_out(emulator, x, arena, seed=1)
    assert arena.used == roomy.used
    assert canonical(emulator, arena, dtype) is None
    exact = Arena(dtype, *x.shape, capacity=roomy.used)
    encode_out(emulator, x, exact, seed=2)
    for actual, expected in zip(canonical(emulator, exact, dtype), cpu_planes(x), strict=True):
        np.testing.assert_array_equal(actual, expected)


def valid_planes(seed: int, dtype: torch.dtype) -> tuple[Planes, int]:
    """A small encoding with every kind of segment: empty, positions, bitmaps, saturated counts, a ragged column."""
    x = sparse(131, 263, 0.1, dtype, seed)
    x[::5] = sparse(131, 263, 0.7, dtype, seed + 1)[::5]
    x[7], x[130, :255], x[3] = 1.0, 2.0, 0.0
    return cpu_planes(x), 263


def spoil(planes: Planes, random: np.random.Generator) -> Planes:
    """Changes a few entries of the planes, and cuts or lengthens one: in a third of the cases each, only the contents
    of segments, only what decides where they lie, or anything."""
    spoiled = [plane.copy() for plane in planes]
    for which in random.choice([[1, 2], [0, 3], [0, 1, 2, 3]][random.integers(3)], size=2):
        flat = spoiled[which].reshape(-1)
        values = [0, np.iinfo(flat.dtype).max, flat[random.integers(flat.size)], flat[random.integers(flat.size)] ^ 1]
        flat[random.integers(flat.size)] = values[random.integers(4)]
        if which in (1, 2) and random.random() < 0.2:
            spoiled[which] = flat[: random.integers(flat.size)] if random.random() < 0.5 else np.append(flat, flat[:1])
    return tuple(spoiled)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_spoilt_planes_have_the_fault_that_the_cpu_reports(emulator: ctypes.CDLL, dtype: torch.dtype) -> None:
    """Whatever is wrong, nothing is read out of bounds, and the first fault, its column and token are the CPU's."""
    random = np.random.default_rng(0)
    valid, n_features = valid_planes(0, dtype)
    found: set[str] = set()
    for seed in range(30):
        planes = spoil(valid, random)
        dense, fault = decode(emulator, planes, n_features, dtype, seed=seed)
        expected, error = cpu_decode(planes, n_features, dtype)
        if expected is None:
            assert fault and f": {fault}" in error, f"seed {seed}"
            found.add(fault.split(" (")[0])
        else:
            assert fault == "", f"seed {seed}"
            np.testing.assert_array_equal(bits(dense), bits(expected))
    assert len(found) >= 6, found


def altered(planes: Planes, plane: int, at: int, value: int) -> Planes:
    changed = [array.copy() for array in planes]
    changed[plane].reshape(-1)[at] = value
    return tuple(changed)


@pytest.mark.parametrize(
    ("plane", "at", "value", "message"),
    [
        (0, 0, 101, "a count exceeds"),
        (0, 0, 2, "a tile start|the index plane|bits beyond|popcount|positions"),
        (1, 0, 50, "not strictly ascending"),
        (1, 2, 100, "beyond the column's width"),
        (1, 3, 0xFE, "popcount"),
        (1, 3 + 12, 0x80, "bits beyond"),
        (2, 1, 0, "zero"),
        (3, 0, 1, "tile start"),
        (3, 1, -(1 << 60), "tile start"),
    ],
)
def test_every_fault_has_its_name(emulator: ctypes.CDLL, plane: int, at: int, value: int, message: str) -> None:
    x = torch.zeros(2, 100)
    x[0, [3, 50, 99]] = 1.0
    x[1, :40] = 2.0
    planes = altered(cpu_planes(x), plane, at, value)
    for fault in (decode(emulator, planes, 100, torch.float32)[1], to_csr(emulator, planes, 100, torch.float32)[1]):
        assert re.search(message, fault)
        assert f": {fault}" in cpu_decode(planes, 100, torch.float32)[1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [100, 255, 256])
@pytest.mark.parametrize("n_values", [14, 40, 255, 256])
def test_a_bitmap_of_other_bits_than_were_counted(
    emulator: ctypes.CDLL, dtype: torch.dtype, width: int, n_values: int
) -> None:
    """The only row there is, so that what is read or written beyond it is beyond the planes."""
    x = torch.zeros(1, width, dtype=dtype)
    x[0, :n_values] = 1
    counts, index, values, tile_ptr = cpu_planes(x)
    for spoilt in (np.full_like(index, 0xFF), np.zeros_like(index)):
        planes = counts, spoilt, values, tile_ptr
        expected, error = cpu_decode(planes, width, dtype)
        for fault in (decode(emulator, planes, width, dtype)[1], to_csr(emulator, planes, width, dtype)[1]):
            assert (expected is not None and fault == "") or (fault and f": {fault}" in error)


@pytest.mark.parametrize("dtype", DTYPES)
def test_compressed_sparse_rows(emulator: ctypes.CDLL, dtype: torch.dtype) -> None:
    x = sparse(140, 700, 0.1, dtype, seed=4)
    x[::3] = sparse(140, 700, 0.6, dtype, seed=5)[::3]
    x[5], x[6, :511], x[7] = 1.0, 2.0, 0.0
    for part in (x, x[:1], x[:, :9], x[:0], x[:, :0]):
        planes = cpu_planes(part)
        actual, fault = to_csr(emulator, planes, part.shape[1], dtype)
        assert fault == ""
        crow, col, values = ops.to_csr(ops.encode(part, 0.0, False), part.shape[1])
        for a, b in zip(actual, (crow.numpy(), col.numpy(), bits(values)), strict=True):
            np.testing.assert_array_equal(a, b)


def test_spoilt_planes_have_no_compressed_sparse_rows(emulator: ctypes.CDLL) -> None:
    """As with decode; here -0.0 may be stored."""
    random = np.random.default_rng(1)
    valid, n_features = valid_planes(0, torch.bfloat16)
    found = set()
    for seed in range(40):
        planes = spoil(valid, random)
        _, fault = to_csr(emulator, planes, n_features, torch.bfloat16, seed)
        assert fault == decode(emulator, planes, n_features, torch.bfloat16, signed_zero=True)[1]
        found.add(fault.split(" (")[0])
    assert len(found) >= 6, found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d_out", [1, 8, 33, 1032])
def test_sparse_linear_has_the_bits_of_the_cpu(emulator: ctypes.CDLL, dtype: torch.dtype, d_out: int) -> None:
    generator = torch.Generator().manual_seed(d_out)
    h = sparse(5, 300, 0.1, dtype, seed=6)
    h[1], h[2] = 0.0, sparse(1, 300, 0.9, dtype, seed=7)  # no entries, and more than a chunk of them
    W_dec = torch.randn(300, d_out, generator=generator).to(dtype)
    for b_dec in (None, torch.randn(d_out, generator=generator).to(dtype)):
        planes = ops.encode(h, 0.0, False)
        crow, col, values = ops.to_csr(planes, 300)
        out = np.full((5, d_out), 0xA5A5, BITS[dtype])
        emulator.emulated_sparse_linear(
            DTYPES.index(dtype),
            *map(ctypes.c_int64, h.shape),
            *(ctypes.c_void_p(t.data_ptr()) for t in (crow, col, values, W_dec)),
            ctypes.c_void_p(None if b_dec is None else b_dec.data_ptr()),
            ctypes.c_int64(d_out),
            pointer(out),
            0,
        )
        np.testing.assert_array_equal(out, bits(ops.sparse_linear(planes, W_dec, b_dec)))
