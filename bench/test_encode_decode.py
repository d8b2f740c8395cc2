"""Encode and decode of 4,096 tokens on one thread, at the densities of real MLPs and beyond.

With PYFACTS_ISA set, the slow peers are left out: they do not depend on it.
"""

import ctypes
import os
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import pyfacts
from pyfacts import bench

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
DENSITIES = (0.01, 0.03, 0.1, 0.5)
ODD_WIDTHS = (11008, 5000)  # no powers of two; 5000 is no multiple of 256 either


@pytest.fixture(scope="module", params=DENSITIES)
def at_density(request: pytest.FixtureRequest) -> Tensor:
    return bench.activations(4096, 16384, request.param, torch.float32)


@pytest.fixture(scope="module", params=ODD_WIDTHS)
def of_odd_width(request: pytest.FixtureRequest) -> Tensor:
    return bench.activations(4096, request.param, 0.03, torch.float32)


@pytest.fixture(scope="module", params=DTYPES.values(), ids=DTYPES)
def x(at_density: Tensor, request: pytest.FixtureRequest) -> Tensor:
    return at_density.to(request.param)


@pytest.fixture(scope="module", params=DTYPES.values(), ids=DTYPES)
def odd_x(of_odd_width: Tensor, request: pytest.FixtureRequest) -> Tensor:
    return of_odd_width.to(request.param)


def test_encode(compare: Callable[..., None], x: Tensor, reused_memory: None) -> None:
    compare(_beside_memcpy(bench.encode_case(x, slow_peers="PYFACTS_ISA" not in os.environ), x))


def test_decode(compare: Callable[..., None], x: Tensor) -> None:
    compare(_decode_beside_memcpy(x))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("density", [0.03, 0.5])
def test_encode_into_fresh_memory(compare: Callable[..., None], density: float, dtype: torch.dtype) -> None:
    x = bench.activations(4096, 16384, density, dtype)
    case = _beside_memcpy(bench.encode_case(x, slow_peers=False), x)
    compare(replace(case, facts=case.facts | {"op": "encode into fresh memory"}))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_decode_into_fresh_memory(compare: Callable[..., None], dtype: torch.dtype) -> None:
    case = bench.decode_case(bench.activations(4096, 16384, 0.03, dtype))
    compare(replace(case, facts=case.facts | {"op": "decode into fresh memory"}))


def test_encode_odd_width(compare: Callable[..., None], odd_x: Tensor, reused_memory: None) -> None:
    compare(_beside_memcpy(bench.encode_case(odd_x, slow_peers=False), odd_x))


def test_decode_odd_width(compare: Callable[..., None], odd_x: Tensor) -> None:
    compare(_decode_beside_memcpy(odd_x))


def _decode_beside_memcpy(x: Tensor) -> bench.Case:
    """Both write to a given tensor."""
    encoded, out = pyfacts.encode(x), torch.empty_like(x).fill_(0)
    assert torch.equal(encoded.to_dense(out), x)
    return _beside_memcpy(replace(bench.decode_case(x), call=lambda: encoded.to_dense(out), peers={}), x)


def _beside_memcpy(case: bench.Case, x: Tensor) -> bench.Case:
    copy = torch.empty_like(x).fill_(0)
    memcpy = {"memcpy": lambda: ctypes.memmove(copy.data_ptr(), x.data_ptr(), x.nbytes)}
    return replace(case, peers=memcpy | case.peers)
