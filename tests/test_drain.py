"""Encoding that is not waited for: what is asked for when, and that captures are the same. On the CPU, where the ops of
the device form are those of tests/device_form.py, and sizes are there at once; the copies are for tests/test_cuda.py.
"""

from collections.abc import Callable

import device_form
import pytest
import tiny_models as tiny
import torch
from conftest import sparse
from reference import assert_same_bits
from test_capture import neurons_of

import pyfacts
from pyfacts import drain


@pytest.fixture(autouse=True)
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The CPU as a GPU: which of the sizes were asked for, in order."""
    device_form.register()
    asked: list[int] = []
    packed = 0

    def read_later(x: torch.Tensor) -> Callable[[], list[int]]:
        nonlocal packed
        number, packed = packed, packed + 1

        def read() -> list[int]:
            asked.append(number)
            return x.tolist()

        return read

    monkeypatch.setattr(drain, "read_later", read_later)
    monkeypatch.setattr(drain, "suits", lambda x: True)
    return asked


def test_sizes_are_asked_for_when_others_are_queued_behind(reads: list[int]) -> None:
    x = [sparse(20, 300, density, torch.bfloat16) for density in (0.1, 0.0, 1.0, 0.3, 0.2)]
    queue, packed, seen = drain.Drain(), [], []
    for part in x:
        packed.append(queue.encode(part))
        seen.append(list(reads))
    assert seen == [[], [], [0], [0, 1], [0, 1, 2]]
    for part, of_it in zip(x, packed, strict=True):
        assert_same_bits(of_it.finish().to_dense(), part)
        for ours, theirs in zip(of_it.finish().planes, pyfacts.encode(part).planes, strict=True):
            assert torch.equal(ours, theirs)
    assert reads == [0, 1, 2, 3, 4]  # each once


@pytest.mark.filterwarnings("ignore:the captured neurons are")
def test_a_capture_is_what_hooks_see(reads: list[int]) -> None:
    model = tiny.opt()
    calls = [tiny.tokens(2, 7, 0), tiny.tokens(3, 4, 1)]
    with torch.inference_mode(), pyfacts.capture(model) as cache:
        for ids in calls:
            model(ids)
    for name, expected in zip(cache, neurons_of(model, *calls), strict=True):
        assert torch.equal(cache[name].to_dense(), expected)
        assert not cache[name].values.is_inference()
    assert sorted(reads) == list(range(2 * tiny.LAYERS))


@pytest.mark.filterwarnings("ignore:the captured neurons are")
def test_chunks_and_padding_are_put_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.bert(chunk_size_feed_forward=3)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    ids = tiny.tokens(2, 6, 0)
    caches = []
    for suits in (True, False):
        monkeypatch.setattr(drain, "suits", lambda x, suits=suits: suits)
        with pyfacts.capture(model) as cache, torch.no_grad():
            model(ids, attention_mask=mask)
        caches.append(cache)
    for name in caches[0]:
        assert torch.equal(caches[0][name].to_dense(), caches[1][name].to_dense())
