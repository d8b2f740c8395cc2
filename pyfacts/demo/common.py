"""What the demos share: sparse training, a checkpoint that is made once, and the proof against plain PyTorch hooks."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..dump.reader import Dump
from ..models import resolve_hooks

CHECKPOINT = "checkpoint.json"


def say(text: str = "") -> None:
    """Prints a line of the story at once, into a pipe too."""
    print(text, flush=True)


def quiet() -> None:
    """Turns off the progress bars of transformers, which would cut the story."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def load(path: Path) -> Any:
    """A saved model, on the CPU."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()


def checkpoint(directory: Path, settings: dict[str, Any], make: Callable[[Path], None]) -> Path:
    """Returns `directory / "model"`, made by `make(path)` unless an earlier run with equal settings has finished it.

    A dump of another model in the same directory goes with that model.
    """
    record, model = directory / CHECKPOINT, directory / "model"
    if record.exists() and json.loads(record.read_text()) == settings:
        say(f"     the model of an earlier run is in {model}; delete {directory} to train again")
        return model
    record.unlink(missing_ok=True)
    for old in (model, directory / "dump"):
        shutil.rmtree(old, ignore_errors=True)
    directory.mkdir(parents=True, exist_ok=True)
    make(model)
    record.write_text(json.dumps(settings, indent=1))
    return model


def train(model: nn.Module, batches: Iterable[Tensor], n_steps: int, lr: float, l1: float) -> None:
    """Trains on the next token, with an L1 penalty that keeps the MLP neurons sparse.

    Args:
        model: a causal language model; left in eval mode.
        batches: token ids [batch, pos], n_steps of them.
        n_steps: steps of AdamW; the learning rate warms up for a tenth of them and then falls to zero.
        lr: its highest value.
        l1: weight of the penalty: the sum of a token's activations, averaged over tokens and added over layers.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=n_steps, pct_start=0.1)
    started = time.perf_counter()
    model.train()
    with plain_hooks(model) as neurons:
        for step, ids in enumerate(batches, start=1):
            logits = model(ids).logits
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
            penalty = sum(h.abs().sum(-1).mean() for h in neurons.values())
            (loss + l1 * penalty).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if step % max(1, n_steps // 4) == 0:
                seconds = time.perf_counter() - started
                say(f"     step {step:4} of {n_steps}: loss {loss.item():.3f}, {seconds:.0f} s")
    model.eval()


@contextmanager
def plain_hooks(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """What a PyTorch hook of ten lines sees: the neurons of the latest forward, dense, by hook name."""
    seen: dict[str, Tensor] = {}
    handles = []
    for point in resolve_hooks(model):

        def keep(_: nn.Module, args: tuple[Tensor, ...], name: str = point.name) -> None:
            seen[name] = args[0]

        handles.append(model.get_submodule(point.module_path).register_forward_pre_hook(keep))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def verify_round_trip(model: nn.Module, d: Dump, sequences: Iterable[Tensor], batch_size: int) -> tuple[int, int]:
    """Compares every activation of a dump, bit for bit, with what plain PyTorch hooks see in the same batches.

    Args:
        model: the dumped model.
        d: the dump; `verify()` reads all of its checksums first.
        sequences: the dumped token ids, each [pos].
        batch_size: that of the dump: a model's last bits depend on it.

    Returns:
        The number of values compared, and how many bytes they have dense.

    Raises:
        RuntimeError: an activation differs.
    """
    d.verify()
    sequences = list(sequences)
    start = compared = dense_bytes = 0
    with plain_hooks(model) as neurons, torch.inference_mode():
        for first in range(0, len(sequences), batch_size):
            batch = sequences[first : first + batch_size]
            lengths = torch.tensor([len(ids) for ids in batch])
            ids = nn.utils.rnn.pad_sequence(batch, batch_first=True)
            real = torch.arange(ids.shape[1]) < lengths[:, None]
            model(ids) if real.all() else model(ids, attention_mask=real.long())
            stop = start + int(lengths.sum())
            for name, seen in neurons.items():
                expected = seen.reshape(*ids.shape, -1)[real] + 0.0  # -0.0 is stored as +0.0
                dumped = d[name][start:stop].to_dense()
                if not torch.equal(dumped.view(torch.int32), expected.view(torch.int32)):
                    raise RuntimeError(f"{name}: the dump differs from plain PyTorch hooks in tokens {start}:{stop}")
                compared += expected.numel()
                dense_bytes += expected.nbytes
            start = stop
    if start != d.n_tokens:
        raise RuntimeError(f"the dump holds {d.n_tokens} tokens, {start} were compared")
    return compared, dense_bytes
