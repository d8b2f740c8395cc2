"""Where a module's forward begins and ends, and with which arguments.

torch's hooks tell of most. Models of TransformerLens call their own `forward` (`run_with_hooks`, `generate`), which no
hook sees: for those a stand-in takes its place.
"""

import functools
import inspect
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from . import lens_calls
from .lens import is_lens


@dataclass(frozen=True, eq=False)
class Watcher:
    """What to call: `begin(module, positional arguments, arguments by name)`, then `end(module)` or `fail(module)`."""

    begin: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]
    end: Callable[[nn.Module], None]
    fail: Callable[[nn.Module], None]


def watch(module: nn.Module, watcher: Watcher) -> Callable[[], None]:
    """Call a watcher around every forward of a module, until the function that this returns is called."""
    if not is_lens(module):
        return _hook(module, watcher)
    stop = _stand_in(module, watcher)
    inner = getattr(module, "original_model", None)  # of a bridge; its `hf_generate` calls nothing else
    if not isinstance(inner, nn.Module):
        return stop
    stop_inner = _hook(inner, watcher)

    def stop_both() -> None:
        stop()
        stop_inner()

    return stop_both


def _hook(module: nn.Module, watcher: Watcher) -> Callable[[], None]:
    signature = _signature(module)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        watcher.begin(module, args, _bind(signature, args, kwargs))

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        failed = output is None and sys.exc_info()[0] is not None
        (watcher.fail if failed else watcher.end)(module)

    handles = [
        module.register_forward_pre_hook(before, prepend=True, with_kwargs=True),
        module.register_forward_hook(after, always_call=True),
    ]

    def stop() -> None:
        for handle in handles:
            handle.remove()

    return stop


# ---- a stand-in for `forward` ----------------------------------------------------------------------------------------


STAND_IN = "_pyfacts_stand_in"
"""What stand-ins have: a copy that was made of a watched module keeps its own."""


@dataclass
class _Watched:
    own: Any  # what the module itself, not its class, has for a forward
    watchers: list[Watcher] = field(default_factory=list)
    stand_in: Any = None


_watched: WeakKeyDictionary[nn.Module, _Watched] = WeakKeyDictionary()


def _stand_in(module: nn.Module, watcher: Watcher) -> Callable[[], None]:
    if module not in _watched:
        own = module.__dict__.get("forward")
        watched = _watched[module] = _Watched(own=None if hasattr(own, STAND_IN) else own)
        # A method, not a function that knows its module: a copy of the module has one of its own, that nobody watches.
        watched.stand_in = module.forward = types.MethodType(_watched_forward(type(module).forward), module)
    _watched[module].watchers.append(watcher)

    def stop() -> None:
        watched = _watched[module]
        watched.watchers.remove(watcher)
        if watched.watchers:
            return
        del _watched[module]
        if module.__dict__.get("forward") is not watched.stand_in:  # somebody put another one over it
            return
        if watched.own is None:
            del module.forward
        else:
            module.forward = watched.own

    return stop


def _watched_forward(plain: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(plain)

    @functools.wraps(plain)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        watched = _watched.get(self, _Watched(own=None))
        watchers, call = list(watched.watchers), watched.own or plain.__get__(self)
        if watchers:
            bound = lens_calls.arguments(self, _bind(signature, (self, *args), kwargs))
        for watcher in watchers:
            watcher.begin(self, args, bound)
        try:
            output = call(*args, **kwargs)
        except Exception:
            for watcher in watchers:
                watcher.fail(self)
            raise
        for watcher in watchers:
            watcher.end(self)
        return output

    setattr(forward, STAND_IN, True)
    return forward


def _signature(module: nn.Module) -> inspect.Signature | None:
    try:
        return inspect.signature(module.forward)
    except (TypeError, ValueError):
        return None


def _bind(signature: inspect.Signature | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments by name; those that do not fit are the model's to complain about."""
    try:
        return dict(signature.bind_partial(*args).arguments) | kwargs if signature is not None else kwargs
    except TypeError:
        return kwargs
