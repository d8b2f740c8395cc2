"""Errors that cross processes: a worker's reaches whoever waits for it as it was raised."""

import copy
import pickle

import pytest

import pyfacts

ERRORS = [
    pyfacts.CheckpointError("sae/cfg.json", "k", "must be 1 to 64, got 0"),
    pyfacts.CheckpointError("sae/cfg.json", None, "is missing"),
    pyfacts.DumpError("does not fit", path="out/00000.json", tensor="0/index", offset=3),
    pyfacts.DumpInterrupted(15, 2, 7),
    pyfacts.HookNeverFired("blocks.0.mlp.hook_post saw no activations"),
    pyfacts.OutOfRangeError("token 3 is out of range"),
    pyfacts.UnknownHookError("no hook is called so"),
]


def test_all_of_them() -> None:
    exported = {getattr(pyfacts, name) for name in pyfacts.__all__}
    assert {type(error) for error in ERRORS} == {
        each for each in exported if isinstance(each, type) and issubclass(each, Exception)
    }


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_copy_is_the_same(error: Exception) -> None:
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(again) is type(error) and str(again) == str(error) and vars(again) == vars(error)
