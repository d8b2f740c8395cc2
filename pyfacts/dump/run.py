"""`pyfacts.dump`: runs a model over tokens and writes what its hooks carry, shard by shard, resumable at any point."""

import contextlib
import errno
import functools
import inspect
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import zstandard
from torch import Tensor, nn

from .. import __version__, _storage
from ..capture import DENSE_ABOVE
from ..encoding import EncodedActivations, _sq_norm
from ..models import HookPoint, resolve_hooks, unwrap
from ..stream import ActivationStream
from . import files, layout
from .errors import DumpError, DumpInterrupted
from .fingerprint import describe_model
from .inputs import Batch, Survey, Tokens, read_tokens
from .layout import HookSpec
from .plan import PLAN_FILE, Plan, ShardRecord, check_same, record_path, shard_name
from .reader import Dump, open_dump
from .shard_writer import ShardWriter, WriterThread

MAX_DEFAULT_CONTEXT = 2048
_Captured = tuple[Batch, dict[str, Any]]
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True)
class Progress:
    """How far a dump is. Sizes are projected from the first batch for all tokens, `packed_bytes` before any codec.

    Attributes:
        tokens_done: captured tokens that have gone through the model or were committed before.
        tokens_resumed: those of them that were committed before this call.
    """

    tokens_done: int
    tokens_total: int
    tokens_resumed: int
    shards_done: int
    shards_total: int
    packed_bytes: int
    dense_bytes: int


def dump(
    model: nn.Module | str | os.PathLike[str],
    tokens: Any,
    out: str | os.PathLike[str],
    names_filter: Any = None,
    select: Any = None,
    codec: str = "zstd",
    batch_size: int = 8,
    context_size: int | None = None,
    token_mask: Any = None,
    shard_tokens: int = 65536,
    rank: int | None = None,
    world_size: int | None = None,
    allow_dense: bool = False,
    *,
    tokenizer: Any = None,
    progress: Callable[[Progress], None] | None = None,
) -> Dump:
    """Runs `model` over `tokens` and writes the activations of its hooks to the directory `out`.

    Call it again with the same arguments to resume: shards that are committed are not computed again, and the bytes of
    all shards are those of an undisturbed dump. Several processes may dump into one directory at once; each takes the
    shards of its rank and then helps with what is left.

    Args:
        model: a module, which is called in eval mode without gradients; or a Hugging Face name or directory.
        tokens: token ids [n_sequences, pos] or [n] (tensor or array, memory-mapped too); a list of lists; a Hugging
            Face data set; or a path to .txt, .jsonl, .parquet, .npy or a saved data set. Each sequence is given to the
            model on its own, in batches padded on the right.
        out: the directory.
        names_filter: the hooks, as in `pyfacts.capture`; None for every MLP's neurons.
        select: what to keep of neurons, such as `pyfacts.topk(64)`; None for every value that is not zero.
        codec: "zstd", or "none", which is faster to write and larger.
        batch_size: sequences of a forward pass.
        context_size: documents and streams are cut into sequences of this many tokens. For text the default is what the
            model takes, 2048 at most.
        token_mask: which tokens to capture: bools shaped like `tokens`, or a function of one sequence's ids (NumPy,
            int [n]) to bools [n]; such as `lambda ids: ids != bos`.
        shard_tokens: captured tokens of a shard, about.
        rank, world_size: this process's number and how many there are; by default those of torchrun or Slurm, or one.
        allow_dense: dump even if the neurons are mostly non-zero.
        tokenizer: for text; by default the one of the model's name or directory.
        progress: called after every batch with a `Progress`.

    Returns:
        The finished dump, opened.

    Raises:
        ValueError, TypeError: an argument is wrong, the text is empty, or the neurons are dense.
        DumpError: the directory holds another dump, or the disk refuses. What was committed stays.
        DumpInterrupted: SIGTERM or SIGUSR1 came (if this is the main thread). What was committed stays.

    Example:
        >>> import pyfacts
        >>> d = pyfacts.dump("facebook/opt-125m", "corpus.jsonl", "out")  # doctest: +SKIP
        >>> d["blocks.3.mlp.hook_post"].top_tokens(5)  # doctest: +SKIP
    """
    if codec not in layout.CODECS:
        raise ValueError(f"codec must be one of {', '.join(layout.CODECS)}, got {codec!r}")
    for argument, value in (("batch_size", batch_size), ("shard_tokens", shard_tokens)):
        if value < 1:
            raise ValueError(f"{argument} must be at least 1, got {value}")
    worker = _worker(rank, world_size)
    module, name = _load_model(model)
    points = _points(module, names_filter)
    root = Path(out)
    with _made_directory(root):
        source = read_tokens(
            tokens,
            root,
            load_tokenizer=functools.cache(lambda: _load_tokenizer(tokenizer, module, name)),
            context_size=context_size,
            default_context_size=_default_context(module),
            token_mask=token_mask,
        )
        survey = source.survey()
        _check_vocabulary(module, survey.highest_id)
        plan = Plan(
            model=describe_model(module, name),
            tokens={
                "n_sequences": source.n_sequences,
                "n_input_tokens": int(source.length.sum()),
                "n_tokens": int(survey.captured.sum()),
                "context_size": context_size,
                "highest_id": survey.highest_id,
                "xxh3": survey.xxh3,
                "tokenizer": getattr(tokenizer, "name_or_path", None) or name,
            },
            hooks=tuple(HookSpec(p.name, p.module_path, p.side, p.width or 0, p.kind, "") for p in points),
            **_shards(survey, batch_size, shard_tokens),
            batch_size=batch_size,
            shard_tokens=shard_tokens,
            codec=codec,
            signed_zero=False,
            select=None if select is None else select.describe(),
            created_with={"pyfacts": __version__, "torch": torch.__version__, "zstandard": zstandard.__version__},
        )
        with (
            _evaluating(module),
            _signals() as signals,
            ActivationStream(module, points, select=select, stop_early=True) as stream,
        ):
            _Run(root, plan, source, stream, allow_dense, progress, signals).run(worker)
    return open_dump(root)


class _Run:
    """One process's part in a dump."""

    def __init__(
        self,
        root: Path,
        plan: Plan,
        tokens: Tokens,
        stream: ActivationStream,
        allow_dense: bool,
        progress: Callable[[Progress], None] | None,
        signals: "_Signals",
    ) -> None:
        self._root, self._plan, self._tokens, self._stream = root, plan, tokens, stream
        self._allow_dense, self._progress, self._signals = allow_dense, progress, signals
        self._probed: tuple[int, _Captured] | None = None  # the first batch, by its first sequence
        self._projection = (0, 0)
        self._tokens_done = self._tokens_resumed = self.shards_done = 0

    def run(self, worker: tuple[int, int]) -> None:
        with _disk_errors(self._root):
            self._use_links = files.has_hard_links(self._root)
            existing = self._read_plan()
        if existing is not None:
            self._plan = existing
        todo = [shard for shard in range(self._plan.n_shards) if not self._committed(shard)]
        rank, world_size = worker
        others = [shard for r in range(world_size) if r != rank for shard in reversed(todo[r::world_size])]
        todo = todo[rank::world_size] + others
        self.shards_done = self.shards_total - len(todo)
        self._tokens_resumed = self._tokens_done = self._plan.n_tokens - sum(map(self._shard_tokens, todo))
        if todo:
            self._probe(todo[0])
            if existing is None:
                self._write_plan()
        for shard in todo:
            if self._committed(shard):  # by another worker, meanwhile
                self._tokens_done += self._shard_tokens(shard)
            else:
                self._write_shard(shard)
            self.shards_done += 1
            self._report()
        self._sweep()

    # ---- the plan ----------------------------------------------------------------------------------------------------

    def _read_plan(self) -> Plan | None:
        path = self._root / PLAN_FILE
        if not path.exists():
            return None
        existing = Plan.from_file(path)
        check_same(existing, self._plan, path)
        return existing

    def _write_plan(self) -> None:
        with _disk_errors(self._root):
            draft = self._root / files.unique_name(f".{PLAN_FILE}")
            files.write_durably(draft, self._plan.to_json())
            files.put_if_absent(draft, self._root / PLAN_FILE, use_links=self._use_links)
            plan = self._read_plan()
        assert plan is not None
        self._plan = plan

    def _probe(self, shard: int) -> None:
        """Runs a shard's first batch that captures anything, for dtypes, density and a projection of the bytes."""
        for begin, end in self._batches(shard):
            captured = self._forward(begin, end)
            if captured is not None:
                break
        assert captured is not None, "a shard holds at least one token"
        self._probed = begin, captured
        _, parts = captured
        hooks = tuple(_seen(hook, parts[hook.name]) for hook in self._plan.hooks)
        self._plan = replace(self._plan, hooks=hooks)
        n_tokens = len(next(iter(parts.values())))
        packed = sum(part.nbytes for part in parts.values())
        dense = sum(hook.width * hook.item_bytes for hook in hooks)
        self._projection = packed * self._plan.n_tokens // n_tokens, dense * self._plan.n_tokens
        if not (self._root / PLAN_FILE).exists() and self._plan.select is None and not self._allow_dense:
            _refuse_dense(parts, self._plan.n_tokens)

    # ---- shards ------------------------------------------------------------------------------------------------------

    def _write_shard(self, shard: int) -> None:
        plan = self._plan
        with _disk_errors(self._root):
            writer = ShardWriter(self._root, plan, shard)
        thread = WriterThread()
        done = self._tokens_done
        try:
            pending: dict[str, list[Any]] = {hook.name: [] for hook in plan.hooks}
            waiting = 0
            for begin, end in self._batches(shard):
                self._signals.check(self)
                captured = self._forward(begin, end)
                if captured is None:
                    continue
                batch, parts = captured
                writer.add_tokens(batch.ids[batch.captured], batch.document, batch.position)
                for hook in plan.hooks:
                    _seen(hook, parts[hook.name])
                    pending[hook.name].append(parts[hook.name])
                waiting += len(batch.document)
                self._tokens_done += len(batch.document)
                self._report()
                if waiting >= layout.BLOCK_TOKENS or end == plan.sequences[shard + 1]:
                    thread.submit(functools.partial(_write_block, self._root, writer, plan, pending))
                    pending, waiting = {hook.name: [] for hook in plan.hooks}, 0
                if self._committed(shard):  # somebody helped
                    thread.wait()
                    writer.abandon()
                    self._tokens_done = done + self._shard_tokens(shard)
                    return
            if waiting:
                thread.submit(functools.partial(_write_block, self._root, writer, plan, pending))
            thread.wait()
            with _disk_errors(self._root):
                writer.commit(use_links=self._use_links)
        except BaseException:
            thread.close()
            if not self._committed(shard):
                writer.abandon()
            raise
        finally:
            thread.close()

    def _batches(self, shard: int) -> Iterator[tuple[int, int]]:
        begin, end = self._plan.sequences[shard : shard + 2]
        for first in range(begin, end, self._plan.batch_size):
            yield first, min(first + self._plan.batch_size, end)

    def _forward(self, begin: int, end: int) -> "_Captured | None":
        """Sequences [begin, end) and the activations of their captured tokens by hook; None if there are none."""
        if self._probed is not None and self._probed[0] == begin:
            captured, self._probed = self._probed[1], None
            return captured
        batch = self._tokens.batch(begin, end)
        if not batch.captured.any():
            return None
        args, kwargs = _model_inputs(self._stream.model, batch.ids, batch.attention)
        parts = self._stream.run(torch.from_numpy(batch.captured), *args, **kwargs)
        n_tokens = len(batch.document)
        for name, part in parts.items():
            if len(part) != n_tokens:
                raise ValueError(f"{name} gave {len(part)} rows for {n_tokens} captured tokens")
        return batch, {name: part.cpu() for name, part in parts.items()}

    def _committed(self, shard: int) -> bool:
        return record_path(self._root, shard).exists()

    def _shard_tokens(self, shard: int) -> int:
        return self._plan.token_starts[shard + 1] - self._plan.token_starts[shard]

    @property
    def shards_total(self) -> int:
        return self._plan.n_shards

    def _report(self) -> None:
        if self._progress is not None:
            self._progress(
                Progress(
                    self._tokens_done,
                    self._plan.n_tokens,
                    self._tokens_resumed,
                    self.shards_done,
                    self.shards_total,
                    *self._projection,
                )
            )

    def _sweep(self) -> None:
        """Removes what killed attempts left behind: whatever belongs to a committed shard and is not in its record.

        A directory of a shard that is not committed may be a living worker's, and stays. One of a committed shard may
        be too, but that worker has lost and finds out when its files are gone. Without hard links two attempts can both
        become the record for a moment, so there nothing is removed.
        """
        if not self._use_links:
            return
        for shard in range(self._plan.n_shards):
            if not self._committed(shard):
                continue
            record = ShardRecord.from_file(record_path(self._root, shard), self._plan, shard)
            kept = {record.tokens_file.file, *(file.file for file in record.hook_files.values())}
            for path in self._root.glob(f"{shard_name(shard)}-*"):
                if path.name != record.directory:
                    files.remove_tree(path)
                    continue
                for file in path.iterdir():
                    if file.name not in kept:
                        file.unlink(missing_ok=True)
        for pattern in (f".{PLAN_FILE}-*", ".probe-*"):
            for path in self._root.glob(pattern):
                path.unlink(missing_ok=True)


def _write_block(root: Path, writer: ShardWriter, plan: Plan, parts: Mapping[str, list[Any]]) -> None:
    with _disk_errors(root):
        for hook in plan.hooks:
            if hook.kind == "neurons":
                encodings = [_encoding(part) for part in parts[hook.name]]
                encoding = encodings[0] if len(encodings) == 1 else _storage.cat(encodings)
                sq_norm = None
                if plan.lossy:
                    sq_norm = torch.cat([_sq_norm(part) for part in parts[hook.name]]).cpu().numpy()
                writer[hook.name].add_encoding(encoding, sq_norm)
            else:
                rows = torch.cat(parts[hook.name]).contiguous()
                writer[hook.name].add_rows(_bits(rows))


def _encoding(enc: EncodedActivations) -> "_storage.Encoding":
    """The same planes without torch."""
    return _storage.Encoding(
        enc.counts.numpy(),
        enc.index.numpy(),
        _bits(enc.values),
        enc.tile_ptr.numpy(),
        enc.n_features,
        str(enc.dtype).removeprefix("torch."),
    )


def _bits(x: Tensor) -> np.ndarray:
    """A tensor's memory as unsigned integers of its item size: NumPy has no bfloat16."""
    return x.contiguous().view(torch.int16 if x.itemsize == 2 else torch.int32).numpy()


# ---- arguments -------------------------------------------------------------------------------------------------------


def _load_model(model: Any) -> tuple[nn.Module, str | None]:
    """Returns the module and its Hugging Face name or directory, if it has one."""
    if isinstance(model, nn.Module):
        return model, None
    if not isinstance(model, str | os.PathLike):
        raise TypeError(f"model must be an nn.Module or a Hugging Face name or directory, got {type(model).__name__}")
    import transformers

    name = os.fspath(model)
    config = transformers.AutoConfig.from_pretrained(name)
    causal = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
    return auto.from_pretrained(name, dtype="auto"), name


def _load_tokenizer(tokenizer: Any, model: nn.Module, name: str | None) -> Any:
    if tokenizer is not None:
        return tokenizer
    name = name or getattr(getattr(model, "config", None), "_name_or_path", None)
    if not name:
        raise ValueError("tokens: text needs a tokenizer; give `tokenizer=`, or the model by its name or directory")
    import transformers

    return transformers.AutoTokenizer.from_pretrained(name)


def _points(model: nn.Module, names_filter: Any) -> list[HookPoint]:
    points = resolve_hooks(model, names_filter)
    decoders = [point.name for point in points if point.stream == "decoder"]
    if decoders:
        raise ValueError(
            f"{decoders[0]} belongs to a decoder that reads tokens of its own, and a dump has one stream of tokens: "
            "name the encoder's hooks, or use pyfacts.capture"
        )
    return points


def _default_context(model: nn.Module) -> int:
    config = getattr(model, "config", None)
    limits = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "n_ctx"))
    return min([MAX_DEFAULT_CONTEXT, *(limit for limit in limits if isinstance(limit, int) and limit > 0)])


def _check_vocabulary(model: nn.Module, highest_id: int) -> None:
    try:
        embeddings = unwrap(model).get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return
    n_ids = getattr(embeddings, "num_embeddings", None)
    if isinstance(n_ids, int) and highest_id >= n_ids:
        raise ValueError(
            f"tokens: the token id {highest_id} is beyond the model's vocabulary of {n_ids}; was the text tokenised "
            "for another model?"
        )


def _shards(survey: Survey, batch_size: int, shard_tokens: int) -> dict[str, tuple[int, ...]]:
    """Cuts sequences into shards of whole batches with at least `shard_tokens` captured tokens, but for the last."""
    n_sequences = len(survey.captured)
    sequences, token_starts = [0], [0]
    captured = np.add.reduceat(survey.captured, np.arange(0, n_sequences, batch_size))
    total = 0
    for batch, count in enumerate(captured.tolist(), start=1):
        total += count
        if total - token_starts[-1] >= shard_tokens:
            sequences.append(min(batch * batch_size, n_sequences))
            token_starts.append(total)
    if total > token_starts[-1]:
        sequences.append(n_sequences)
        token_starts.append(total)
    sequences[-1] = n_sequences  # batches without any token join the shard before them
    return {"sequences": tuple(sequences), "token_starts": tuple(token_starts)}


def _worker(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """This process's number and how many there are, from the arguments, torchrun or Slurm."""
    if rank is None and world_size is None:
        env = os.environ
        if "RANK" in env and "WORLD_SIZE" in env:
            rank, world_size = int(env["RANK"]), int(env["WORLD_SIZE"])
        elif "SLURM_ARRAY_TASK_COUNT" in env:
            first, step = int(env.get("SLURM_ARRAY_TASK_MIN", 0)), int(env.get("SLURM_ARRAY_TASK_STEP", 1))
            rank = (int(env["SLURM_ARRAY_TASK_ID"]) - first) // max(1, step)
            world_size = int(env["SLURM_ARRAY_TASK_COUNT"])
        elif "SLURM_PROCID" in env and "SLURM_NTASKS" in env:
            rank, world_size = int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"])
        else:
            rank, world_size = 0, 1
    if rank is None or world_size is None or not 0 <= rank < world_size:
        raise ValueError(f"rank and world_size go together, with 0 <= rank < world_size; got {rank} and {world_size}")
    return rank, world_size


def _model_inputs(
    model: nn.Module, ids: np.ndarray, attention: np.ndarray | None
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """What to call the model with: `input_ids` where it has them, else the ids first."""
    parameters = inspect.signature(unwrap(model).forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    input_ids = torch.from_numpy(ids).to(device)
    kwargs: dict[str, Any] = {}
    if attention is not None:
        if "attention_mask" not in parameters and not takes_any:
            raise ValueError(
                "the sequences of a batch differ in length, and the model takes no attention_mask: give sequences of "
                "one length, or batch_size=1"
            )
        kwargs["attention_mask"] = torch.from_numpy(attention).long().to(device)
    if "use_cache" in parameters:
        kwargs["use_cache"] = False
    if "input_ids" in parameters:
        return (), {"input_ids": input_ids, **kwargs}
    return (input_ids,), kwargs


def _seen(planned: HookSpec, part: EncodedActivations | Tensor) -> HookSpec:
    """The hook with the dtype and width that it shows; those that are planned already must be the same."""
    seen = replace(planned, dtype=str(part.dtype).removeprefix("torch."), width=part.shape[1])
    if seen.dtype not in layout.ITEM_BYTES:
        raise ValueError(f"{seen.name} carries {seen.dtype}; a dump holds float32, bfloat16 and float16")
    for name in ("dtype", "width"):
        expected, actual = getattr(planned, name), getattr(seen, name)
        if expected and expected != actual:
            raise DumpError(f"{seen.name} has {name} {actual} now, the dump was begun with {expected}")
    return seen


def _refuse_dense(parts: Mapping[str, Any], n_tokens: int) -> None:
    """Raises ValueError if the neurons of the first batch are dense, all hooks taken together."""
    encoded = {name: part for name, part in parts.items() if isinstance(part, EncodedActivations)}
    density = sum(part.nnz for part in encoded.values()) / max(1, sum(part.shape.numel() for part in encoded.values()))
    if density <= DENSE_ABOVE:
        return
    name, densest = max(encoded.items(), key=lambda item: item[1].density)
    n_bytes = sum(part.nbytes for part in parts.values()) * n_tokens // len(densest)
    raise ValueError(
        f"the neurons are {density:.0%} dense ({name}: {densest.density:.0%}): packing would save next to nothing, and "
        f"{n_tokens:,} tokens would take {n_bytes / 1e9:,.3g} GB. Keep less with select=pyfacts.topk(k) or "
        "select=pyfacts.min_abs(theta), dump the latents of an SAE, or say allow_dense=True"
    )


# ---- surroundings ----------------------------------------------------------------------------------------------------


class _Signals:
    """Remembers SIGTERM and SIGUSR1 until the dump comes by."""

    def __init__(self) -> None:
        self._received: int | None = None

    def handle(self, signum: int, frame: FrameType | None) -> None:
        self._received = signum

    def check(self, run: _Run) -> None:
        if self._received is not None:
            raise DumpInterrupted(self._received, run.shards_done, run.shards_total)


@contextlib.contextmanager
def _signals() -> Iterator[_Signals]:
    signals = _Signals()
    previous: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGUSR1"):
            if hasattr(signal, name):
                number = getattr(signal, name)
                previous[number] = signal.signal(number, signals.handle)
    try:
        yield signals
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for every module, and each one's own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def _made_directory(root: Path) -> Iterator[None]:
    """Makes the directory; removes it again if the body fails with nothing in it."""
    made = not root.exists()
    with _disk_errors(root):
        root.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if made:
            with contextlib.suppress(OSError):
                root.rmdir()
        raise


@contextlib.contextmanager
def _disk_errors(root: Path) -> Iterator[None]:
    """Turns what the disk says into a DumpError."""
    try:
        yield
    except OSError as error:
        reason = "the disk is full" if error.errno in _FULL else str(error)
        raise DumpError(
            f"cannot be written: {reason}. Shards that are committed are intact; the same call resumes",
            path=error.filename or root,
        ) from error
