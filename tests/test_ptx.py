"""The CUDA kernels as nvcc compiled them, launched and run on the CPU: PTX, instruction by instruction.

tests/ptx says what its machine knows of a GPU and what it does not. Every test of the lane-by-lane emulation runs
here too, from the launchers on; and the fused kernel, with its pipeline of TMA, mbarriers and WGMMA, which cannot be
compiled as host C++. `make test-ptx` builds what this needs.
"""

import ctypes
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import test_cuda_emulation as emulation
import torch
from conftest import DTYPES
from reference import bits, encode
from test_cuda_emulation import Arena, Planes, canonical, pointer
from test_cuda_fused import ACTIVATIONS, HALVES, expected, one_nan

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build" / "ptx"
LIBRARY = BUILD / "kernels.so"


def up_to_date() -> bool:
    """Whether the library is there, and not older than what it is made of."""
    folders = (ROOT / "csrc" / "cuda", ROOT / "tests" / "ptx", ROOT / "tests" / "cuda_emulation")
    sources = [path for folder in folders for path in folder.iterdir()]
    return LIBRARY.is_file() and LIBRARY.stat().st_mtime >= max(path.stat().st_mtime for path in sources)


pytestmark = pytest.mark.skipif(not up_to_date(), reason="needs `make test-ptx`, and that nvcc")

# The tests of encode, decode, to_csr and sparse_linear, with this module's `emulator`.
for name in [name for name in dir(emulation) if name.startswith("test_")]:
    globals()[name] = getattr(emulation, name)


class Machine:
    """The library of tests/ptx/kernels.cpp, in which a call that goes wrong is an error."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(str(LIBRARY))
        self._library.emulated_error.restype = ctypes.c_char_p
        self.use(sorted(BUILD.glob("*.ptx")))

    def use(self, ptx: list[Path], seed: int = 0) -> None:
        """From here on this PTX, and another order of turns."""
        self._library.ptx_use(":".join(map(str, ptx)).encode(), ctypes.c_uint64(seed))

    def __getattr__(self, name: str) -> Callable[..., None]:
        function = getattr(self._library, name)

        def call(*arguments: object) -> None:
            function(*arguments)
            if error := self._library.emulated_error().decode():
                raise RuntimeError(error)

        return call


@pytest.fixture(scope="module")
def emulator() -> Machine:
    return Machine()


@pytest.fixture
def restored(emulator: Machine) -> Iterator[Machine]:
    yield emulator
    emulator.use(sorted(BUILD.glob("*.ptx")))


def integers(shape: tuple[int, int], padding: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Small ones, whose products add up exactly in any order, in rows that NaNs follow."""
    padded = torch.full((shape[0], shape[1] + padding), torch.nan, dtype=dtype)
    padded[:, : shape[1]] = torch.randint(-3, 4, shape, generator=generator).to(dtype)
    return padded


def make_special(x: torch.Tensor, every: int) -> None:
    """A NaN, infinities, zeros of the other sign, in some of the rows."""
    for row, value in enumerate((torch.nan, torch.inf, -torch.inf)):
        x[row::every, row] = value
    negative_zeros = x[3::every]
    negative_zeros[negative_zeros == 0] = -0.0


def address(data: torch.Tensor | np.ndarray | None) -> ctypes.c_void_p:
    return pointer(data) if isinstance(data, np.ndarray) else ctypes.c_void_p(None if data is None else data.data_ptr())


def assert_fused(
    emulator: Machine,
    dtype: torch.dtype,
    activation: str,
    shape: tuple[int, int, int],
    padding: int = 0,
    special: bool = False,
    with_bias: bool = True,
    with_dense: bool = True,
) -> None:
    """Planes and h are what float64 gives, bit for bit, in an arena of any size; nothing is written beside them.

    `shape`: n_tokens, n_features, d_in.
    """
    n_tokens, n_features, d_in = shape
    generator = torch.Generator().manual_seed(sum(shape))
    x = integers((n_tokens, d_in), padding, dtype, generator)
    weight = integers((n_features, d_in), padding, dtype, generator)
    bias = torch.randint(-40, 41, (n_features,), generator=generator).to(dtype) if with_bias else None
    threshold = torch.randint(-20, 61, (n_features,), generator=generator).to(dtype)
    if special:
        make_special(x[:, :d_in], every=16)
        make_special(weight[:, :d_in], every=64)
        threshold[::32] = -0.0
        if bias is not None:
            bias[::32], bias[17::32] = -0.0, torch.nan
    thresholds = threshold if activation == "jumprelu" else None
    product = (x[:, :d_in].double() @ weight[:, :d_in].double().T).float()
    h = expected(product, bias, activation, thresholds, dtype)

    def run(arena: Arena, dense: np.ndarray | None = None) -> Planes | None:
        emulator.emulated_linear_relu_encode(
            DTYPES.index(dtype),
            *map(ctypes.c_int64, (*shape, padding)),
            *map(address, (x, weight, bias)),
            ACTIVATIONS.index(activation),
            *map(address, (thresholds, dense)),
            ctypes.byref(arena),
        )
        return canonical(emulator, arena, dtype)

    dense = np.full((n_tokens, n_features + padding), 0xA5A5, np.uint16)
    arena = Arena(dtype, n_tokens, n_features)
    assert_planes(run(arena, dense if with_dense else None), h)
    if with_dense:
        np.testing.assert_array_equal(one_nan(dense[:, :n_features], dtype), one_nan(bits(h), dtype))
    assert (dense[:, n_features if with_dense else 0 :] == 0xA5A5).all()

    index_bytes, values_bytes = arena.used
    exact = Arena(dtype, n_tokens, n_features, capacity=arena.used)
    assert_planes(run(exact), h)
    short = Arena(dtype, n_tokens, n_features, capacity=(index_bytes, values_bytes - 16))
    assert run(short) is None
    assert short.used == arena.used


def assert_planes(actual: Planes | None, h: torch.Tensor) -> None:
    assert actual is not None
    for plane, wanted in zip(actual, encode(h), strict=True):
        values = wanted.dtype == np.uint16
        np.testing.assert_array_equal(*(one_nan(p, h.dtype) if values else p for p in (plane, wanted)))


# From d_in 512 on it is the cooperative kernel. The last of each are more tiles than the machine has multiprocessors.
SHAPES = [(1, 8, 8), (17, 256, 64), (129, 264, 136), (700, 1000, 200), (17, 264, 776), (260, 512, 512), (700, 520, 576)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", HALVES)
def test_the_fused_kernel(emulator: Machine, dtype: torch.dtype, activation: str, shape: tuple[int, int, int]) -> None:
    variant = ACTIVATIONS.index(activation) + SHAPES.index(shape)
    assert_fused(
        emulator,
        dtype,
        activation,
        shape,
        padding=8 * (variant % 2),
        special=variant % 3 == 0,
        with_bias=variant % 4 != 1,
        with_dense=variant % 2 == 0,
    )


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("d_in", [200, 576])
def test_the_fused_kernel_in_other_orders(restored: Machine, d_in: int, seed: int) -> None:
    """Copies and products that happen at once or as late as they may, warps that run ahead or fall behind."""
    restored.use(sorted(BUILD.glob("*.ptx")), seed)
    assert_fused(restored, torch.bfloat16, "relu", (400, 512, d_in))


# Faults of the PTX that must not go unnoticed: what is replaced by what, and what the machine says of it, or that the
# planes are not h's.
FAULTS = {
    "nobody waits": (
        r"@P1 bra DONE;\s+bra +LAB_WAIT;",
        "bra DONE;",
        "TMA (is writing|has not brought)|still reads|arrival too many",
    ),
    "stages are never given back": (r"mbarrier\.arrive\.shared::cluster\S+ +_, \[remAddr32\];", "", "nothing goes on"),
    "stages are given back too early": (r"(wgmma\.wait_group\S+) 1;", r"\1 7;", "still reads"),
    "sums are taken too early": (r"wgmma\.wait_group\S+ 0;", "", "accumulator is read before"),
    "bytes are not announced": (
        r"\.expect_tx(\.shared::cta\.b64 _, \[%r\d+\]), %r\d+;",
        r"\1;",
        "TMA has not brought|still reads|nothing goes on",
    ),
    "a copy for one block of two": (r"\.multicast::cluster(.*), %rs\d+(, %rd\d+;)", r"\1\2", "nothing goes on"),
    "blocks start before their barriers": (r"barrier\.cluster\.wait\.aligned;", "", "no barrier was initialised"),
    "matrices in the wrong order": (r"(stmatrix.*\{)(%r\d+), (%r\d+)", r"\1\3, \2", "not equal"),
    "lanes do not wait for each other": (r"bar\.warp\.sync\s+-1;", "", "not equal"),
    "groups in one place": (
        r"atom\.relaxed\.gpu\.global\.add\.u64(\s+%rd\d+, \[%rd\d+\]),\s+%rd\d+;",
        r"ld.global.u64\1;",
        "not equal",
    ),
}


@pytest.mark.parametrize("d_in", [200, 576])
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(restored: Machine, fault: str, d_in: int, tmp_path: Path) -> None:
    pattern, replacement, message = FAULTS[fault]
    sound = BUILD / "linear_relu_encode_bfloat16.ptx"
    text, n = re.subn(pattern, replacement, sound.read_text())
    assert n > 0
    (tmp_path / sound.name).write_text(text)
    ptx = [tmp_path / path.name if path == sound else path for path in sorted(BUILD.glob("*.ptx"))]
    for seed in range(10):
        restored.use(ptx, seed)
        try:
            assert_fused(restored, torch.bfloat16, "relu", (400, 512, d_in))
        except (RuntimeError, AssertionError) as error:
            assert re.search(message, str(error).split("; grid")[0]), error  # the kernel's name says much
            return
    pytest.fail("nobody noticed")
