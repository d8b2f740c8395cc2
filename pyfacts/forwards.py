"""Where a module's forward begins and ends, and with which arguments.

torch's hooks tell of most. Models of TransformerLens call their own `forward` (`run_with_hooks`, `generate`), which no
hook sees: there a stand-in takes its place, and a bridge's inner model, which can be called by itself, is hooked too.
"""

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from . import lens_calls
from .lens import is_lens


@dataclass(frozen=True, eq=False)
class Watcher:
    """What to call: `begin(module, arguments, arguments by name)`, then `end(module, output)` or `fail(module)`."""

    begin: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]
    end: Callable[[nn.Module, Any], None]
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
    parameters = signature(module.forward)
    raised_before: BaseException | None = None

    def before(called: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal raised_before
        if called is module:  # and not a copy of it
            raised_before = sys.exc_info()[1]
            watcher.begin(module, args, _bind(parameters, args, kwargs))

    def after(called: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if called is module:
            raised = sys.exc_info()[1]
            if raised is not None and raised is not raised_before:  # by the forward, or by a hook behind it
                watcher.fail(module)
            else:
                watcher.end(module, output)

    handles = [
        module.register_forward_pre_hook(before, prepend=True, with_kwargs=True),
        module.register_forward_hook(after, always_call=True),
    ]

    def stop() -> None:
        for handle in handles:
            handle.remove()

    return stop


# ---- a stand-in for `forward` ----------------------------------------------------------------------------------------


class _Watchers(list[Watcher]):
    """Those of one module: nobody watches its copies."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Watchers":
        return _Watchers()

    def __reduce__(self) -> Any:
        return _Watchers, ()


def _stand_in(module: nn.Module, watcher: Watcher) -> Callable[[], None]:
    own = module.__dict__.get("forward")  # what the module itself, not its class, has
    if isinstance(own, functools.partial) and own.func is _watched_forward:
        forward = own
    else:  # a partial: a copy of the module will have one of the copy
        forward = functools.partial(_watched_forward, module, own, _Watchers())
        module.forward = functools.update_wrapper(forward, module.forward)
    _, own, watchers = forward.args
    watchers.append(watcher)

    def stop() -> None:
        watchers.remove(watcher)
        if watchers or module.__dict__.get("forward") is not forward:  # or somebody put another one over it
            return
        if own is None:
            del module.forward
        else:
            module.forward = own

    return stop


def _watched_forward(module: nn.Module, own: Any, watchers: _Watchers, /, *args: Any, **kwargs: Any) -> Any:
    plain = type(module).forward.__get__(module)
    watching = list(watchers)
    if watching:
        bound = lens_calls.arguments(module, _bind(signature(plain), args, kwargs))
    for watcher in watching:
        watcher.begin(module, args, bound)
    try:
        output = (own or plain)(*args, **kwargs)
    except BaseException:
        for watcher in watching:
            watcher.fail(module)
        raise
    for watcher in watching:
        watcher.end(module, output)
    return output


def signature(forward: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(forward)
    except (TypeError, ValueError):
        return None


def _bind(signature: inspect.Signature | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments by name; those that do not fit are the model's to complain about."""
    try:
        return dict(signature.bind_partial(*args).arguments) | kwargs if signature is not None else kwargs
    except TypeError:
        return kwargs
