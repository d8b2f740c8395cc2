"""The library of CUDA kernels, `make cuda`, without a GPU: it loads, registers, and refuses tensors in words."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_cuda_emulation import COMPILER

import pyfacts
from pyfacts import _library, cuda

REGISTERED = """
import ctypes, sys
from pathlib import Path
import torch
from pyfacts import _library, cuda

if not cuda.available():
    ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
    _library.load_library(_library.find("_cuda"))
    assert cuda.available()
    cuda.register()
schemas = [schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("pyfacts::")]
has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
print(*sorted(name.removeprefix("pyfacts::") for name in schemas if has_kernel(name, "CUDA")))
print(*sorted(name.removeprefix("pyfacts::") for name in schemas if not has_kernel(name, "CUDA")))
"""


@pytest.mark.skipif(_library.find("_cuda") is None or COMPILER is None, reason="needs the CUDA kernels: make cuda")
def test_every_op_is_registered(tmp_path: Path) -> None:
    """In a process of its own. Where torch has no CUDA, a library of the name that the kernels ask for stands in."""
    stub = tmp_path / "libtorch_cuda.so"
    source = 'extern "C" int aoti_torch_get_current_cuda_stream() { return 1; }'
    command = [COMPILER, "-shared", "-fPIC", "-x", "c++", "-", "-Wl,-soname,libtorch_cuda.so", "-o", stub]
    subprocess.run(command, input=source.encode(), check=True)
    done = subprocess.run(
        [sys.executable, "-c", REGISTERED, stub], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    with_kernel, without = (line.split() for line in done.stdout.splitlines())
    assert without == ["isa"]
    assert {"encode", "encode_out", "linear_relu_encode", "sparse_linear_grad_weight"} <= set(with_kernel)


@pytest.mark.skipif(cuda.available(), reason="the CUDA kernels are loaded")
def test_tensors_on_a_gpu_are_refused_with_the_way_to_build(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(2, 3, device="cuda")
        with pytest.raises(ValueError, match=r"x is on cuda:0, .* without its CUDA kernels: .*PYFACTS_CUDA=ON"):
            pyfacts.encode(x)
