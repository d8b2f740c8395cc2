"""The ops as torch sees them: schemas, fakes, opcheck, torch.compile, every instruction set."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import DTYPES, sparse
from reference import assert_same_bits

import pyfacts
from pyfacts import ops

OPS = torch.ops.pyfacts


def samples(dtype: torch.dtype) -> list[tuple[object, tuple[object, ...]]]:
    """One call of every op."""
    x = sparse(130, 300, 0.1, dtype)
    planes = ops.encode(x, 0.0, False)
    parts = [[plane, plane] for plane in planes]
    weight, bias = torch.randn(300, 20).to(dtype), torch.randn(300).to(dtype)
    tokens = torch.randn(130, 20).to(dtype)
    return [
        (OPS.encode.default, (x, 0.0, False)),
        (OPS.encode.default, (x.T, 0.5, True)),
        (OPS.decode.default, (*planes, 300, False)),
        (OPS.decode_out.default, (*planes, 300, False, torch.empty_like(x))),
        (OPS.slice.default, (*planes, 300, 3, 129)),
        (OPS.take.default, (*planes, 300, torch.tensor([5, 3, 3]))),
        (OPS.cat.default, (*parts, 300)),
        (OPS.neuron.default, (*planes, 300, 299)),
        (OPS.to_csr.default, (*planes, 300)),
        (OPS.linear_relu_encode.default, (tokens, weight, bias, "relu", None, False)),
        (OPS.linear_relu_encode.default, (tokens, weight, None, "jumprelu", bias.abs(), True)),
        (OPS.gated_relu_encode.default, (tokens, weight, weight, bias, None)),
        (OPS.linear_topk_encode.default, (tokens, weight, bias, 3, False)),
        (OPS.linear_topk_encode.default, (tokens, weight, None, 3, True)),
        (OPS.topk_encode.default, (tokens, 3)),
        (OPS.row_sq_norm.default, (tokens,)),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", range(16))
def test_opcheck(dtype: torch.dtype, number: int) -> None:
    op, args = samples(dtype)[number]
    torch.library.opcheck(op, args)


def test_opcheck_with_gradients() -> None:
    x, weight, bias = (torch.randn(*shape, requires_grad=True) for shape in ((5, 4), (300, 4), (300,)))
    torch.library.opcheck(OPS.linear_relu_encode.default, (x, weight, bias, "relu2", None, True))


def test_encode_compiles_into_one_graph() -> None:
    """A function that encodes and decodes between other torch ops compiles with fullgraph, for several lengths."""

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def round_trip(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        enc = pyfacts.encode(torch.relu(x @ weight))
        fused = pyfacts.linear_relu_encode(x, weight.T.contiguous())
        every = pyfacts.linear_topk_encode(x, weight.T, None, k=600)
        return enc.to_dense(), enc.values, fused.to_dense(), every.to_dense()

    weight = torch.randn(16, 600)
    for n_tokens in (3, 200, 129):
        x = torch.randn(n_tokens, 16)
        dense, values, fused, every = round_trip(x, weight)
        expected = torch.relu(x @ weight)
        torch.testing.assert_close(dense, expected)
        torch.testing.assert_close(fused, expected)
        torch.testing.assert_close(every, expected)
        assert values.numel() == int((expected != 0).sum())


ENCODE_AND_HASH = """
import sys, hashlib, torch, pyfacts
sys.path.insert(0, sys.argv[1])
from conftest import DTYPES, LENGTHS, WIDTHS, sparse
digest = hashlib.sha256()
for dtype in DTYPES:
    for width in WIDTHS:
        for n_tokens in LENGTHS:
            for density in (0.02, 0.13, 0.6):
                for min_abs, signed_zero in ((0.0, False), (0.5, True)):
                    x = -sparse(n_tokens, width, density, dtype, seed=width)
                    enc = pyfacts.encode(x, min_abs, signed_zero)
                    for plane in (*enc.planes, enc.to_dense()):
                        digest.update(plane.contiguous().view(torch.uint8).numpy().tobytes())
print(pyfacts.ops.isa(), digest.hexdigest())
"""


def run_with_isa(isa: str, *code: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYFACTS_ISA": isa, "PYTHONWARNINGS": "ignore"}
    return subprocess.run([sys.executable, "-c", *code], env=env, capture_output=True, text=True, check=False)


def test_every_instruction_set_gives_the_same_bytes() -> None:
    """All variants this CPU runs, forced one after the other; what it cannot run is refused by name."""
    digests = {}
    for isa in ("scalar", "avx2", "avx512", "avx512vbmi2"):
        done = run_with_isa(isa, ENCODE_AND_HASH, os.path.dirname(__file__))
        if done.returncode:
            assert f"PYFACTS_ISA is '{isa}'" in done.stderr
            continue
        name, digest = done.stdout.split()
        assert name == isa
        digests[isa] = digest
    assert "scalar" in digests and len(set(digests.values())) == 1, digests


def test_operands_that_do_not_fit_are_refused_by_the_ops_too() -> None:
    """Whoever calls them directly has not been checked by pyfacts.linear."""
    x, weight = torch.randn(512, 256), torch.randn(300, 256)
    wrong = [
        (x, weight[:, :255], None),
        (x, weight, torch.full((300,), -45.0).bfloat16()),
        (x, weight, torch.full((300, 3), -45.0)),
        (x, weight, torch.full((301,), -45.0)),
        (x, weight.bfloat16(), None),
    ]
    for operands in wrong:
        for call in (
            lambda a, b, c: OPS.linear_relu_encode(a, b, c, "relu", None, False),
            lambda a, b, c: OPS.linear_topk_encode(a, b, c, 3, False),
            lambda a, b, c: OPS.gated_relu_encode(a, b, b, c, None),
        ):
            with pytest.raises(RuntimeError):
                call(*operands)


def test_the_ops_compute_in_their_operands_dtype_whatever_autocast_says() -> None:
    x, transposed = torch.randn(9, 256), torch.randn(256, 300).T
    for dtype in (torch.float32, torch.bfloat16):
        operands = x.to(dtype), transposed.to(dtype)
        expected = OPS.linear_relu_encode(*operands, None, "relu", None, True)
        with torch.autocast("cpu", torch.float16):
            found = OPS.linear_relu_encode(*operands, None, "relu", None, True)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_a_buffer_that_is_written_to_is_changed_for_autograd() -> None:
    x, weight = torch.full((4, 5), 7.0), torch.ones(4, 5, requires_grad=True)
    loss = (weight * x).sum()
    pyfacts.encode(torch.ones(4, 5)).to_dense(out=x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


ENCODE_IN_CHILDREN = """
import os, threading, torch, pyfacts
torch.set_num_threads(1)
x, done = torch.relu(torch.randn(128, 256)), False
def encode():
    while not done:
        pyfacts.encode(x)
threads = [threading.Thread(target=encode) for _ in range(2)]
for thread in threads:
    thread.start()
for _ in range(100):
    child = os.fork()
    if child == 0:
        pyfacts.encode(x)
        os._exit(0)
    os.waitpid(child, 0)
done = True
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_child_of_a_process_whose_threads_encode_may_encode() -> None:
    """As a DataLoader's worker does; it would wait for a lock that a thread held when it was made."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", ENCODE_IN_CHILDREN], check=True, timeout=120)


def test_float16_is_the_same_where_subnormals_are_flushed() -> None:
    h = torch.tensor([[3e-5, 5e-6, 1.0]]).half()
    expected = pyfacts.encode(h, min_abs=1e-5).sq_norm
    try:
        torch.set_flush_denormal(True)
        flushed = pyfacts.encode(h, min_abs=1e-5).sq_norm
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(flushed, expected) and expected.item() > 1


def test_an_unknown_instruction_set_is_refused() -> None:
    done = run_with_isa("avx9", "import pyfacts")
    assert done.returncode and "ImportError" in done.stderr
    assert "PYFACTS_ISA is 'avx9'" in done.stderr and "scalar" in done.stderr
    without_torch = run_with_isa("avx9", "import sys; sys.modules['torch'] = None; import pyfacts")
    assert without_torch.returncode and "PYFACTS_ISA is 'avx9'" in without_torch.stderr


FORKED = """
import multiprocessing, torch, pyfacts

def work(small):
    again = pyfacts.encode(small.to_dense())
    assert len(pyfacts.cat([again, small[3:5], small[[1, 0]]]).to_csr().values()) > small.nnz
    assert pyfacts.topk(3).encode(small.to_dense()).nnz == 60

if __name__ == "__main__":
    torch.set_num_threads(2)
    small = pyfacts.encode(torch.relu(torch.randn(2000, 2000)))[:20]  # OpenMP has started its threads
    child = multiprocessing.get_context("fork").Process(target=work, args=(small,))
    child.start()
    child.join(60)
    code = child.exitcode
    child.kill()
    print(code)
"""


def test_small_matrices_in_a_forked_process(tmp_path: Path) -> None:
    """Which has none of the threads that its parent's OpenMP counts on."""
    (tmp_path / "forked.py").write_text(FORKED)
    done = subprocess.run([sys.executable, "forked.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "0\n", done.stderr


def test_one_thread_and_many_give_the_same_bytes() -> None:
    x = sparse(1000, 1000, 0.1, torch.bfloat16)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = pyfacts.encode(x)
        torch.set_num_threads(5)
        many = pyfacts.encode(x)
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(one.planes, many.planes, strict=True):
        assert torch.equal(a, b)
    assert_same_bits(many.to_dense(), x)


OPS = torch.ops.pyfacts
PLANES = pyfacts.encode(sparse(300, 300, 0.1, torch.float32)).planes
HALF = pyfacts.encode(sparse(300, 300, 0.1, torch.float16)).planes


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: OPS.slice(*PLANES, 300, 5, 3), "out of range"),
        (lambda: OPS.slice(*PLANES, 300, 0, 301), "out of range"),
        (lambda: OPS.neuron(*PLANES, 300, 300), "out of range"),
        (lambda: OPS.neuron(*PLANES, 300, -1), "out of range"),
        (lambda: OPS.cat(*([a, b] for a, b in zip(PLANES, HALF, strict=True)), 300), "one dtype"),
        (lambda: OPS.decode(PLANES[0].T.contiguous().T, *PLANES[1:], 300, False), "contiguous"),
        (lambda: OPS.decode(*PLANES[:3], PLANES[3][:, :2].contiguous(), 300, False), "tile_ptr must be"),
        (lambda: OPS.decode_out(*PLANES, 300, False, torch.empty(1, 300).expand(300, 300)), "whole rows apart"),
    ],
)
def test_direct_callers_of_readers_are_checked_too(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()
