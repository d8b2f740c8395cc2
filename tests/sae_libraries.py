"""The libraries that save SAEs, without the parts of them that train: only their SAE classes are imported.

Their packages import trainers, model wrappers and data sets at the top, of which nothing is needed here and half is not
installed (requirements-sae.txt). So each package is entered with its `__init__` left out.
"""

import importlib
import importlib.machinery
import importlib.util
import logging
import os
import sys
import types

import pytest


def sae_lens(module: str, package: str = "saes") -> types.ModuleType:
    """SAELens' `sae_lens.<package>.<module>`."""
    transformer_lens = pytest.importorskip("transformer_lens.HookedRootModule")
    sys.modules.setdefault("transformer_lens.HookedTransformer", transformer_lens)  # its name before TransformerLens 4
    _enter("sae_lens", __version__="6.54.12", logger=logging.getLogger("sae_lens"))
    _enter(f"sae_lens.{package}")
    return importlib.import_module(f"sae_lens.{package}.{module}")


def dictionary_learning(module: str) -> types.ModuleType:
    """`dictionary_learning.<module>`."""
    _enter("dictionary_learning")
    _enter("dictionary_learning.trainers")
    return importlib.import_module(f"dictionary_learning.{module}")


def sparsify(module: str) -> types.ModuleType:
    """EleutherAI's `sparsify.<module>`, without Triton, which it would take without a GPU too."""
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    _enter("sparsify")
    return importlib.import_module(f"sparsify.{module}")


def _enter(package: str, **attributes: object) -> None:
    if package in sys.modules:
        return
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip(f"{package} is not installed (requirements-sae.txt)")
    module = types.ModuleType(package)
    module.__path__ = list(spec.submodule_search_locations)
    module.__spec__ = importlib.machinery.ModuleSpec(package, None, is_package=True)
    module.__spec__.submodule_search_locations = module.__path__
    vars(module).update(attributes)
    sys.modules[package] = module
