"""The examples in the docstrings run, and give what they say."""

import doctest
import importlib
import pkgutil

import pytest

import pyfacts

MODULES = [
    module.name for module in pkgutil.walk_packages(pyfacts.__path__, "pyfacts.") if "__main__" not in module.name
]


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("name", [name for name in MODULES if not name.rsplit(".", 1)[-1].startswith("_")])
def test_examples_of(name: str, tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(str(tmp_path))
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0
