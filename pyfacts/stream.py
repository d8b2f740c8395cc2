"""The hooks: activations of chosen tokens leave a running model, packed, at the moment they are computed.

`ActivationStream` is what `pyfacts.capture` and `pyfacts.dump` share. It hooks the modules that `HookPoint`s name, and
the modules around the stack of blocks (the model, its base model, its encoder and decoder), where a forward begins and
its token ids and attention mask are seen. Nothing dense is kept: each hook encodes the tensor it is handed, under
no_grad, and returns None, so the model computes what it would without.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import _library, cuda
from .attach import SparseAutoencoder, encode_latents
from .blocks import out_width
from .drain import Activations, Draining
from .encoding import DTYPES
from .errors import HookNeverFired
from .forwards import Watcher, signature, watch
from .hook_point import HookPoint
from .models import positions_first, unwrap
from .select import Select, keep
from .tokens import Ends, Forward, Taken, TokenMask, Tokens, cache_of, packs_sequences, past_length, stays
from .warn import warn
from .wording import some

OnForward = Callable[[dict[str, Activations], dict[str, Tensor]], None]


class _Stop(BaseException):
    """Ends a forward whose remaining layers nobody asked for. Not an Exception, lest the model's code swallow it."""

    def __init__(self, forward: Forward) -> None:
        self.forward = forward


class ActivationStream:
    """Hooks a model's activations, for as long as it is entered.

    Args:
        model: the model; wrappers are looked through, and compiled code runs eagerly meanwhile.
        points: the hooks, from `resolve_hooks`.
        select: what to keep of neurons; None keeps all that is not zero.
        token_mask: see `pyfacts.capture`.
        on_forward: called at the end of every forward that fired hooks, with the activations {hook name: encoding, or
            rows [n, width]} and the positions {stream: int64 [n, 2]} of their tokens.
        stop_early: only `run` is looked at, and ends as soon as all hooks have their tokens. A model that hands over to
            another thread is not seen.
        saes: SAEs, by the hook points of their latents, which join `points`.
    """

    def __init__(
        self,
        model: nn.Module,
        points: Sequence[HookPoint],
        select: Select | None = None,
        token_mask: TokenMask = None,
        on_forward: OnForward | None = None,
        stop_early: bool = False,
        saes: Mapping[HookPoint, SparseAutoencoder] | None = None,
    ) -> None:
        check_select(select)
        check_neurons_to_select(select, points)
        if token_mask is not None and not isinstance(token_mask, Tensor | Mapping) and not callable(token_mask):
            raise TypeError(f"token_mask must be a tensor, a dict of tensors or a callable, got {token_mask!r}")
        streams = {point.stream for point in (*points, *(saes or ()))}
        if isinstance(token_mask, Mapping) and not streams & token_mask.keys():
            raise ValueError(
                f"token_mask has masks for {', '.join(map(repr, token_mask))}, but the hooks' tokens are those of "
                f"{', '.join(map(repr, sorted(filter(None, streams)))) or 'the one stream that the model has'}: "
                "pass a tensor for one stream, or name it"
            )
        self.model = model
        self.saes = dict(saes or {})
        self.points = [*points, *self.saes]
        self.select = select
        self.token_mask = token_mask
        self.on_forward = on_forward
        self.stop_early = stop_early
        self._forward: Forward | None = None
        self._ends: defaultdict[str, Ends] = defaultdict(Ends)
        self._open = False
        self._positions_first: dict[str, Literal["", "torch", "model"]] = {}  # of each hook
        self._running: int | None = None  # the thread that is inside of `run`
        self._to_the_end = False
        self._complete: Forward | None = None  # that goes on to the end though all hooks have their tokens
        self._refusal: Exception | None = None
        self._exit = contextlib.ExitStack()

    # ---- entering and leaving ----------------------------------------------------------------------------------------

    def __enter__(self) -> ActivationStream:
        if isinstance(self.model, nn.DataParallel) and len(self.model.device_ids) > 1:
            raise ValueError(
                f"nn.DataParallel runs copies of the model on {len(self.model.device_ids)} GPUs, and hooks see them "
                "all as one: give its .module, or run one process a GPU"
            )
        root = unwrap(self.model)
        with contextlib.ExitStack() as exit_stack:
            exit_stack.enter_context(eager())
            for path, streams in self._owners(root).items():
                watcher = Watcher(functools.partial(self._begin, path, streams), self._end, self._fail)
                exit_stack.callback(watch(root.get_submodule(path), watcher))
            self._positions_first = {p.name: positions_first(root, p.module_path) for p in self.points}
            for point in self.points:
                exit_stack.callback(add_hook(root.get_submodule(point.module_path), point.side, self._taker(point)))
            if self.stop_early:
                for head in heads(root):
                    exit_stack.callback(head.register_forward_pre_hook(self._at_head).remove)
            self._exit = exit_stack.pop_all()
        self._open = True
        return self

    def __exit__(self, exc_type: object, exc: object, traceback: object) -> None:
        self._open = False
        self._exit.close()
        forward, self._forward = self._forward, None
        if forward is not None and exc_type is None and forward.owner is None:
            self._deliver(forward)
        if self._refusal is not None and exc_type is None:  # raised where somebody has caught it
            raise self._refusal

    def run(self, token_mask: TokenMask, /, *args: Any, **inputs: Any) -> dict[str, Activations]:
        """Runs the model once, without gradients, and returns the activations of the tokens that the mask names.

        Args:
            token_mask: bool [batch, pos], or None for the attention mask's tokens.
            *args: the model's positional inputs.
            **inputs: the model's inputs.

        Returns:
            {hook name: EncodedActivations [n, width], or a tensor [n, width] for rows}.

        Raises:
            HookNeverFired: (a ValueError and a RuntimeError) a hook did not fire.
            ValueError: a hook was handed something that is not one row per token.
        """
        collected: dict[str, Activations] = {}
        on_forward, self.on_forward = self.on_forward, lambda parts, positions: collected.update(parts)
        kept_mask, self.token_mask = self.token_mask, token_mask
        self._running = threading.get_ident()
        try:
            with torch.no_grad():
                self.model(*args, **inputs)
            if self._forward is not None:  # nothing around the blocks was called through its hooks
                self._deliver(self._forward)
        except _Stop as stop:
            self._deliver(stop.forward)
        except Exception:
            if self._complete is None:
                raise
            if self._refusal is None:  # nobody asked for what fails behind the hooks: a decoder without its tokens
                self._deliver(self._complete)
        finally:
            refusal = self._refusal
            self._forward = self._running = self._complete = self._refusal = None
            self.on_forward, self.token_mask = on_forward, kept_mask
        if refusal is not None:  # also if the model has caught it
            raise refusal
        missing = [point.name for point in self.points if point.name not in collected]
        if missing:
            raise never_fired(missing)
        return {point.name: collected[point.name] for point in self.points}

    def run_to_the_end(self, token_mask: TokenMask, /, *args: Any, **inputs: Any) -> dict[str, Activations]:
        """`run`, but goes on from the last hook to the model's head or end, to notice a module that runs again."""
        self._to_the_end = True
        try:
            return self.run(token_mask, *args, **inputs)
        finally:
            self._to_the_end = False

    # ---- where a forward begins and ends -----------------------------------------------------------------------------

    def _owners(self, root: nn.Module) -> dict[str, set[str]]:
        """The modules from the root down to the stacks of blocks, by path, with the streams of the hooks below them."""
        owners: dict[str, set[str]] = {"": set()}
        for point in self.points:
            parts = point.module_path.split(".")
            owners[""].add(point.stream)
            for depth in range(1, len(parts)):
                path = ".".join(parts[:depth])
                if isinstance(root.get_submodule(path), nn.ModuleList | nn.Sequential | nn.ModuleDict):
                    break
                owners.setdefault(path, set()).add(point.stream)
        return owners

    def _begin(
        self, path: str, streams: set[str], module: nn.Module, args: tuple[Any, ...], bound: dict[str, Any]
    ) -> None:
        if self._looks_away():
            return
        forward = self._forward
        # A module that begins inside its own forward was left by an exception that no hook sees.
        if forward is None or forward.owner is None or forward.owner is module:
            if forward is not None and forward.owner is None:
                self._deliver(forward)
            forward = self._forward = Forward(owner=module)
        for stream in streams & {"", "encoder", "decoder"}:
            prefix = "decoder_" if stream == "decoder" and "decoder" not in path else ""
            tokens = forward.tokens.setdefault(stream, Tokens())
            tokens.learn(bound, prefix, args, outermost=forward.owner is module)
            if stream != "encoder":
                cache = cache_of(bound)
                if packs_sequences(cache):
                    self._refusal = ValueError(
                        "continuous batching packs many sequences into one row, and pyfacts cannot tell their tokens "
                        "apart: use model.generate"
                    )
                    raise self._refusal
                tokens.past = tokens.past or past_length(cache)
                tokens.cache = cache if tokens.cache is None and stays(cache) else tokens.cache

    def _end(self, module: nn.Module, output: Any) -> None:
        forward = self._forward
        if forward is not None and forward.owner is module and not self._looks_away():
            self._forward = None
            if stays(cache := cache_of(output)):
                for tokens in forward.tokens.values():
                    tokens.cache_left = cache
            self._deliver(forward)

    def _fail(self, module: nn.Module) -> None:
        """A forward that raised leaves nothing behind."""
        if self._forward is not None and self._forward.owner is module and not self._looks_away():
            self._forward = None

    def _looks_away(self) -> bool:
        """Whether this is no forward to capture: one that a backward pass computes again, or somebody else's."""
        return not self._open or _recomputing() or (self.stop_early and self._running != threading.get_ident())

    def _at_head(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._complete is not None and not self._looks_away():
            raise _Stop(self._complete)

    def _deliver(self, forward: Forward) -> None:
        if not forward.taken:
            return
        with torch.inference_mode(False), torch.no_grad():
            parts = {name: taken.join(name, forward.tokens[taken.stream]) for name, taken in forward.taken.items()}
        positions = {}
        for stream in {taken.stream for taken in forward.taken.values()}:
            tokens = forward.tokens[stream]
            positions[stream] = tokens.positions(self._ends[stream])
        if self.on_forward is not None:
            self.on_forward(parts, positions)

    # ---- taking activations ------------------------------------------------------------------------------------------

    def _taker(self, point: HookPoint) -> Callable[[Any], None]:
        def take(value: Any) -> None:
            if self._looks_away():
                return
            try:
                with torch.inference_mode(False), torch.no_grad():
                    self._take(point, value)
            except Exception as error:
                if self.stop_early:
                    self._refusal = error
                raise
            forward = self._forward
            if self.stop_early and forward is not None and forward.complete(self.points):
                self._complete = forward
                if not self._to_the_end:
                    raise _Stop(forward)

        return take

    def _take(self, point: HookPoint, value: Any) -> None:
        x = _check(point, value, self.saes.get(point))
        forward = self._forward
        if forward is None or (forward.owner is None and forward.has_all(point.name)):
            # The blocks were called around the model's own __call__ (`model.forward(...)` does that).
            if forward is not None:
                self._deliver(forward)
            forward = self._forward = Forward(owner=None)
            self._warn_of_masks_unseen()
        tokens = forward.tokens.setdefault(point.stream, Tokens())
        x = tokens.by_sequence(x, self._positions_first[point.name], point.name)
        tokens.settle(x, self.token_mask, point)
        taken = forward.taken.setdefault(point.name, Taken(point.stream))
        x, shared = tokens.choose(x, taken, point.name)
        x = within_reach(x)
        if point in self.saes:
            part: Activations | Draining = forward.drain.move(encode_latents(point, self._sae_on(point, x.device), x))
        elif point.kind == "rows":
            # A copy: the model may go on to change the tensor in place, and a view would keep all of it alive.
            part = forward.drain.move(x.clone() if shared else x)
        elif self.select is None:
            part = forward.drain.encode(x)
        else:
            part = forward.drain.move(keep(self.select, x, point.name))
        taken.parts.append(part)

    def _warn_of_masks_unseen(self) -> None:
        parameters = signature(unwrap(self.model).forward)
        if self.token_mask is None and parameters is not None and "attention_mask" in parameters.parameters:
            warn(
                "the model's blocks ran past its own __call__ (model.forward(...), or a block by itself), so that no "
                "attention mask is seen, and padding is captured too: call model(...), or give token_mask"
            )

    def _sae_on(self, point: HookPoint, device: torch.device) -> SparseAutoencoder:
        """The SAE of a hook, moved at its first activations to where they are."""
        if self.saes[point].device != device:
            self.saes[point] = self.saes[point].to(device)
        return self.saes[point]


def check_select(select: Any) -> None:
    """Raises TypeError unless this is what `select=` takes."""
    if select is not None and (isinstance(select, type) or not isinstance(select, Select)):
        raise TypeError(f"select must be pyfacts.topk(k), pyfacts.min_abs(theta) or alike, got {select!r}")


def check_neurons_to_select(select: Select | None, points: Sequence[HookPoint]) -> None:
    """Raises ValueError if there is a select and none of the hooks has neurons to select."""
    if select is not None and all(point.kind != "neurons" for point in points):
        hooks = some(point.name for point in points) or "latents of SAEs, which are sparse already"
        raise ValueError(f"select keeps less of neurons, and none are captured, but {hooks}: leave select out")


# ---- modules and tensors ---------------------------------------------------------------------------------------------


def within_reach(x: Tensor) -> Tensor:
    """x, or a copy of it on the CPU if pyfacts has no kernels for its device."""
    if has_kernels(x.device):
        return x
    build = f" (on NVIDIA GPUs it packs, if it is built for them: {_library.BUILD_CUDA})" if x.is_cuda else ""
    warn(f"pyfacts has no kernels for {x.device}: activations travel dense to the CPU and are packed there{build}")
    return x.cpu()


def heads(model: nn.Module) -> list[nn.Module]:
    """The modules that write a number for each token of the vocabulary."""
    modules = list(model.modules())
    found = []
    for module in modules:  # a wrapper may be around a model that knows its own
        with contextlib.suppress(AttributeError, NotImplementedError, TypeError):
            found.append(module.get_output_embeddings())  # type: ignore[operator]
    if not found:
        vocabulary = max((module.num_embeddings for module in modules if isinstance(module, nn.Embedding)), default=0)
        found = [m for m in modules if not isinstance(m, nn.Embedding) and out_width(m) == vocabulary]
    return [module for module in dict.fromkeys(found) if isinstance(module, nn.Module)]


def has_kernels(device: torch.device) -> bool:
    return device.type in ("cpu", "meta") or (device.type == "cuda" and cuda.available())


def add_hook(module: nn.Module, side: str, act: Callable[[Any], Any]) -> Callable[[], None]:
    """Call `act` with a module's input or output tensor at every forward; a tensor that it returns takes its place.

    Args:
        module: the module.
        side: "input" (its first tensor argument) or "output" (the first of a tuple).
        act: called with that tensor (or with whatever is there instead); returns None to leave it.

    Returns:
        A function that takes the hook off.
    """

    def before(
        called: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if called is not module:  # a copy of it
            return None
        if args and isinstance(args[0], Tensor):
            new = act(args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        tensors = [key for key, value in kwargs.items() if isinstance(value, Tensor)]
        if not tensors:
            act(args[0] if args else None)  # which says what is wrong with it
            return None
        key = "hidden_states" if "hidden_states" in tensors else tensors[0]
        new = act(kwargs[key])
        return None if new is None else (args, kwargs | {key: new})

    def after(called: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if called is not module:
            return None
        if isinstance(output, tuple | list) and output:
            new = act(output[0])
            if new is None:
                return None
            items = [new, *output[1:]]
            return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)  # a namedtuple
        return act(output)

    if side == "input":
        return module.register_forward_pre_hook(before, with_kwargs=True).remove
    return module.register_forward_hook(after).remove


_eager_users: list[object] = []
_eager_stance = contextlib.ExitStack()


@contextlib.contextmanager
def eager() -> Iterator[None]:
    """Run compiled code eagerly: hooks that are added to a model after it was compiled would not fire.

    Until the last of those that want it is done, in whatever order they end.
    """
    if "torch._dynamo" not in sys.modules:  # nothing can have been compiled; and importing it takes seconds
        yield
        return
    if not _eager_users:
        _eager_stance.enter_context(torch.compiler.set_stance("force_eager"))
    user = object()
    _eager_users.append(user)
    try:
        yield
    finally:
        _eager_users.remove(user)
        if not _eager_users:
            _eager_stance.close()


def never_fired(names: Sequence[str]) -> HookNeverFired:
    """The error for hooks that no forward reached."""
    return HookNeverFired(
        f"{len(names)} of the requested hooks never fired: {some(names)}. "
        "Either no forward pass ran, or it did not reach their modules (a branch that is switched off, a module that "
        "is bypassed by a fused or compiled path, a copy of the model that ran instead, or, in a dump, another thread)."
    )


def _check(point: HookPoint, value: Any, sae: SparseAutoencoder | None) -> Tensor:
    """The activations that a hook, or the SAE there, was handed, or an error that says what is wrong with them."""
    width, whose = (point.width, "the hook's width is") if sae is None else (sae.d_in, "the SAE there reads d_in =")
    side = f"the {point.side} of {point.module_path or 'the model'}"
    if not isinstance(value, Tensor):
        raise TypeError(f"{point.name}: {side} is {type(value).__name__}, not a tensor; name a module that has one")
    if _is_batched(value):
        raise TypeError(
            f"{point.name}: {side} is one of many under torch.func.vmap, whose numbers pyfacts cannot keep: call the "
            "model on the whole batch"
        )
    if value.dtype not in DTYPES:
        raise TypeError(
            f"{point.name}: {side} is {value.dtype}; activations must be float32, bfloat16 or float16: run the model "
            "in one of these"
        )
    if value.is_nested:
        raise TypeError(
            f"{point.name}: {side} is a nested tensor, without padding, whose rows pyfacts cannot place: make the "
            "nn.TransformerEncoder with enable_nested_tensor=False"
        )
    value = point.flat(value)
    if value.dim() == 0:
        raise ValueError(f"{point.name}: {side} is a single number, not a row per token")
    if width is not None and value.shape[-1] != width:
        raise ValueError(
            f"{point.name}: {side} has width {value.shape[-1]} (shape {tuple(value.shape)}), but {whose} "
            f"{width}: these are not its activations (or, under tensor parallelism, only a shard of them)"
        )
    return value.detach()


def _is_batched(x: Tensor) -> bool:
    """Whether a tensor stands for many under torch.func.vmap, around or within other transforms."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


def _recomputing() -> bool:
    """Whether a backward pass is running: gradient checkpointing recomputes a forward that was captured before."""
    return torch._C._current_graph_task_id() != -1
