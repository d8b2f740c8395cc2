"""Bringing a capture to the host step by step: which step is taken when, and that captures are the same. On the CPU,
where the ops of the device form are those of tests/device_form.py and copies are there at once; the real ones are for
tests/test_cuda.py.
"""

import contextlib
from collections.abc import Callable

import device_form
import pytest
import tiny_models as tiny
import torch
from conftest import sparse
from reference import assert_same_bits
from saes import LATENTS, TinySae
from test_capture import neurons_of
from torch import Tensor

import pyfacts
from pyfacts import drain

pytestmark = pytest.mark.filterwarnings("ignore:the captured neurons are")


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The CPU as a GPU: what the host waited for, in order, numbered as it was queued."""
    device_form.register()
    waited: list[str] = []
    queued = {"sizes": 0, "copy": 0}

    def later(what: str, result: Callable[[], object]) -> Callable[[], object]:
        number = queued[what]
        queued[what] += 1

        def wait() -> object:
            waited.append(f"{what} {number}")
            return result()

        return wait

    monkeypatch.setattr(drain, "on_gpu", lambda x: True)
    monkeypatch.setattr(drain, "stream_of", lambda x: contextlib.nullcontext)
    monkeypatch.setattr(drain, "read_later", lambda x: later("sizes", x.tolist))
    monkeypatch.setattr(drain, "copy_later", lambda tensors: later("copy", lambda: [x.clone() for x in tensors]))
    return waited


def test_the_host_waits_when_others_are_queued_behind(waits: list[str]) -> None:
    x = [sparse(20, 300, density, torch.bfloat16) for density in (0.1, 0.0, 1.0, 0.3, 0.2, 0.4)]
    queue, draining, counts = drain.Drain(), [], []
    for part in x:
        draining.append(queue.encode(part))
        counts.append(len(waits))
    assert counts == [0, 0, 1, 2, 4, 6]
    assert waits == ["sizes 0", "sizes 1", "sizes 2", "copy 0", "sizes 3", "copy 1"]
    for part, of_it in zip(x, draining, strict=True):
        assert_same_bits(of_it.finish().to_dense(), part)
        for ours, theirs in zip(of_it.finish().planes, pyfacts.encode(part).planes, strict=True):
            assert torch.equal(ours, theirs)
    assert sorted(waits) == sorted(f"{what} {i}" for what in ("sizes", "copy") for i in range(6))  # each once


def test_what_is_encoded_or_dense_moves_in_one_step(waits: list[str]) -> None:
    queue = drain.Drain()
    enc = pyfacts.encode(sparse(20, 300, 0.5, torch.float32), min_abs=0.5)
    rows = [queue.move(torch.full((3, 2), float(i))) for i in range(3)]
    moved = queue.move(enc)
    assert waits == ["copy 0", "copy 1"]
    assert [part.finish()[0, 0].item() for part in rows] == [0.0, 1.0, 2.0]
    assert torch.equal(moved.finish().to_dense(), enc.to_dense())
    assert moved.finish().dropped_share == enc.dropped_share > 0


def test_a_large_tensor_is_encoded_at_once(waits: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drain, "LARGEST_BYTES", 1000)
    x = sparse(20, 300, 0.5, torch.float32)
    assert torch.equal(drain.Drain().encode(x).finish().to_dense(), x)
    assert waits == ["copy 0"]


def test_a_capture_is_what_hooks_see(waits: list[str]) -> None:
    model = tiny.opt()
    calls = [tiny.tokens(2, 7, 0), tiny.tokens(3, 4, 1)]
    with torch.inference_mode(), pyfacts.capture(model) as cache:
        for ids in calls:
            model(ids)
    for name, expected in zip(cache, neurons_of(model, *calls), strict=True):
        assert torch.equal(cache[name].to_dense(), expected)
        assert not cache[name].values.is_inference()
    assert sorted(waits) == sorted(f"{what} {i}" for what in ("sizes", "copy") for i in range(2 * tiny.LAYERS))


@pytest.mark.parametrize("select", [None, pyfacts.topk(3)])
def test_rows_latents_and_selections(select: object, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny.opt(), tiny.tokens()
    hooks = ["blocks.0.hook_resid_pre", "blocks.0.mlp.hook_post", "blocks.1.mlp.hook_post"]
    caches = []
    for gpu in (True, False):
        monkeypatch.setattr(drain, "on_gpu", lambda x, gpu=gpu: gpu)
        with pyfacts.capture(model, hooks, select=select, saes={hooks[0]: TinySae(16)}) as cache, torch.no_grad():
            model(ids)
        caches.append(cache)
    assert list(caches[0]) == [*hooks, f"{hooks[0]}.{LATENTS}"]
    for name in caches[0]:
        ours, theirs = (part if isinstance(part, Tensor) else part.to_dense() for part in (c[name] for c in caches))
        assert torch.equal(ours, theirs)


def test_chunks_and_padding_are_put_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.bert(chunk_size_feed_forward=3)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    ids = tiny.tokens(2, 6, 0)
    caches = []
    for gpu in (True, False):
        monkeypatch.setattr(drain, "on_gpu", lambda x, gpu=gpu: gpu)
        with pyfacts.capture(model) as cache, torch.no_grad():
            model(ids, attention_mask=mask)
        caches.append(cache)
    for name in caches[0]:
        assert torch.equal(caches[0][name].to_dense(), caches[1][name].to_dense())
