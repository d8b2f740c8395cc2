"""A model small enough to dump in milliseconds, its activations without pyfacts, and dumps that end badly.

As a script it is the child of the kill tests: `python dump_models.py OUT POINT` dumps and kills itself at POINT.
"""

import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pyfacts.dump.run import dump

HOOKS = ["layers.0.down", "layers.1.down"]
VOCAB, WIDTH, CONTEXT = 64, 300, 16


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Import this into a test module: on products this small, waking a pool of threads costs more than the work."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


class Layer(nn.Module):
    def __init__(self, d_model: int, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(d_model, width)
        self.down = nn.Linear(width, d_model)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class TinyModel(nn.Module):
    """Two MLPs behind an embedding; about 10 % of the neurons fire."""

    def __init__(self, width: int = WIDTH, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed = nn.Embedding(VOCAB, 8)
        self.layers = nn.ModuleList([Layer(8, width), Layer(8, width)])
        self.head = nn.Linear(8, VOCAB)
        self.forwards = 0
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
            self.embed.weight.mul_(3)
            for layer in self.layers:
                layer.up.bias.sub_(1.0)
        self.to(dtype)

    def forward(self, ids: Tensor) -> Tensor:
        self.forwards += 1
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def tokens(n_sequences: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (n_sequences, CONTEXT), generator=torch.Generator().manual_seed(seed))


def hooked(model: nn.Module, paths: list[str], batches: list[dict | tuple]) -> dict[str, Tensor]:
    """The inputs of modules over batches, by plain PyTorch hooks: {path: [n_tokens, width]}."""
    found: dict[str, list[Tensor]] = {path: [] for path in paths}

    def take(path: str):
        return lambda module, args: found[path].append(args[0].detach().reshape(-1, args[0].shape[-1]).clone())

    handles = [model.get_submodule(path).register_forward_pre_hook(take(path)) for path in paths]
    training = model.training
    model.eval()
    with torch.no_grad():
        for batch in batches:
            model(**batch) if isinstance(batch, dict) else model(*batch)
    model.train(training)
    for handle in handles:
        handle.remove()
    return {path: torch.cat(parts) for path, parts in found.items()}


def committed_bytes(root: Path) -> dict[str, bytes]:
    """Everything in a dump by name, with the directories' unique suffixes left out."""
    content = {}
    for path in sorted(root.rglob("*")):
        if path.is_file():
            parts = [part.split("-")[0] if part[:5].isdigit() else part for part in path.relative_to(root).parts]
            data = path.read_bytes()
            if path.name[:5].isdigit():
                data = b"\n".join(line for line in data.splitlines() if b'"directory"' not in line)
            content["/".join(parts)] = data
    return content


N_SEQUENCES = 1000
ARGUMENTS = {"names_filter": HOOKS, "shard_tokens": 5000, "batch_size": 8}  # four shards, the last one short


def resume(out: Path, **changes: object):
    """Dumps `TinyModel`, or what is left of it."""
    return dump(TinyModel(), tokens(N_SEQUENCES), out, **ARGUMENTS | changes)


def raise_at(tokens_done: int, error: BaseException | type[BaseException]):
    """What `progress` may be, to end a dump there."""

    def progress(now) -> None:
        if now.tokens_done >= tokens_done:
            raise error

    return progress


KILL_POINTS = ("first batch", "mid shard", "before the headers", "before the link", "after the link")
_KILL_TOKENS = {"first batch": 1, "mid shard": 5000 + 3000}


def main(out: str, point: str) -> None:
    from pyfacts.dump import files, shard_writer

    def die(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    put = files.put_if_absent

    def put_then_die(source: Path, target: Path, **kwargs: bool) -> bool:
        if target.name != "00001.json":
            return put(source, target, **kwargs)
        if point == "after the link":
            os.link(source, target)
        die()
        return False

    if point in ("before the link", "after the link"):
        files.put_if_absent = put_then_die
    if point == "before the headers":
        shard_writer.ShardWriter.commit = die  # type: ignore[method-assign, assignment]

    def progress(now) -> None:
        if now.tokens_done >= _KILL_TOKENS.get(point, 1 << 60):
            die()

    dump(TinyModel(), tokens(N_SEQUENCES), out, progress=progress, **ARGUMENTS)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
