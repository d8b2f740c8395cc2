"""`pyfacts.dump`: runs a model over tokens and writes what its hooks carry, shard by shard, resumable at any point."""

import functools
import operator
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import zstandard
from torch import Tensor, nn

from .. import __version__
from ..ablate import excuse_ablations
from ..attach import SaesByHook
from ..models import NamesFilter, unwrap
from ..scalars import at_least_one
from ..select import Select
from ..stream import ActivationStream, check_neurons_to_select, check_select
from . import layout
from .arguments import (
    check_lengths,
    check_vocabulary,
    default_context,
    dumped_points,
    load_model,
    load_tokenizer,
    rank_of_process,
)
from .errors import DumpError
from .fingerprint import describe_model, describe_sae, plain
from .inputs import TokenSurvey, read_tokens
from .layout import HookSpec
from .plan import Plan
from .reader import Dump
from .store import open_store
from .surroundings import caught_signals, evaluating
from .worker import Progress, Worker


def dump(
    model: nn.Module | str | os.PathLike[str],
    tokens: Any,
    out: str | os.PathLike[str],
    names_filter: NamesFilter = None,
    select: Select | None = None,
    saes: SaesByHook | None = None,
    codec: str = "zstd",
    batch_size: int = 8,
    context_size: int | None = None,
    token_mask: Callable[[np.ndarray], Any] | Tensor | np.ndarray | Sequence[Sequence[bool]] | None = None,
    shard_tokens: int = 65536,
    rank: int | None = None,
    world_size: int | None = None,
    allow_dense: bool = False,
    *,
    tokenizer: Any = None,
    progress: Callable[[Progress], None] | None = None,
) -> Dump:
    """Runs `model` over `tokens` and writes the activations of its hooks to `out`.

    Call it again with the same arguments to resume: shards that are committed are not computed again, and the bytes of
    all shards are those of an undisturbed dump. Several processes may dump into one place at once; each takes the
    shards of its rank and then helps with what is left.

    Args:
        model: a module, which is called in eval mode without gradients; or a Hugging Face name or directory, which is
            loaded onto the GPU of `LOCAL_RANK` (0 without), or the CPU if there is none or pyfacts has no kernels for
            it. A resume must be of the same weights, and of what `pyfacts.ablate` sets; what hooks of yours change is
            not looked at.
        tokens: token ids [n_sequences, pos] or [n] without padding (tensor or array, memory-mapped too); what a
            tokenizer returned (padding is dropped by its attention mask); a list of lists; a Hugging Face data set; or
            a path to .txt, .jsonl, .parquet, .npy or a saved data set. Each sequence is given to the model on its own,
            in batches padded on the right.
        out: a directory, or an address that fsspec knows (`s3://bucket/out`, with s3fs installed): then shards are
            written to a temporary directory first (`TMPDIR`, which needs room for two), and uploaded while the next one
            is computed.
        names_filter: the hooks, as in `pyfacts.capture`; None for every MLP's neurons or, with `saes`, no hook but
            their latents.
        select: what to keep of neurons, such as `pyfacts.topk(64)`; None for every value that is not zero.
            It does not apply to latents of SAEs.
        saes: SAEs by the hook whose activations they read, as in `pyfacts.capture`: their latents are dumped as
            `<hook>.hook_sae_acts_post`. The plan records each SAE's config and a hash of its weights.
        codec: "zstd"; "split", smaller by a tenth to a quarter; or "none", which is faster to write and larger.
        batch_size: sequences of a forward pass.
        context_size: documents and streams are cut into sequences of this many tokens. For text the default is what the
            model takes, 2048 at most.
        token_mask: which tokens to capture: bools, or zeros and ones, shaped like `tokens`; or a function of one
            sequence's ids (NumPy, int [n]) to bools [n], such as `lambda ids: ids != bos`, which is asked once.
        shard_tokens: captured tokens of a shard, about.
        rank, world_size: this process's number and how many there are; by default those of torchrun or Slurm, or one.
        allow_dense: dump even if the neurons are mostly non-zero.
        tokenizer: for text; by default the one of the model's name or directory.
        progress: called with a `Progress` after every batch, for every shard that another worker commits, and at the
            end.

    Returns:
        The finished dump, opened.

    Raises:
        ValueError, TypeError: an argument is wrong, the text is empty, or the neurons are dense.
        DumpError: the directory holds another dump, or the disk refuses. What was committed stays.
        DumpInterrupted: SIGTERM or SIGUSR1 came (if this is the main thread). What was committed stays.
        HookNeverFired: (a ValueError and a RuntimeError) a forward did not reach a hook.
        OSError: transformers does not find a model of that name.
        ImportError: transformers, datasets, pyarrow or the object store's client is needed and not installed.

    Example:
        >>> import pyfacts
        >>> d = pyfacts.dump("facebook/opt-125m", "corpus.jsonl", "out")  # doctest: +SKIP
        >>> d["blocks.3.mlp.hook_post"].top_tokens(5)  # doctest: +SKIP
    """
    if codec not in layout.CODECS:
        raise ValueError(f"codec must be one of {', '.join(layout.CODECS)}, got {codec!r}")
    batch_size, shard_tokens = at_least_one("batch_size", batch_size), at_least_one("shard_tokens", shard_tokens)
    context_size = None if context_size is None else at_least_one("context_size", context_size)
    check_select(select)
    rank, world_size = rank_of_process(rank, world_size)
    module, name = load_model(model)
    points, latents = dumped_points(module, names_filter, saes)
    check_neurons_to_select(select, points)
    store = open_store(out)
    with store.writing():
        source = read_tokens(
            tokens,
            store,
            load_tokenizer=functools.cache(lambda: load_tokenizer(tokenizer, module, name)),
            context_size=context_size,
            default_context_size=default_context(module),
            token_mask=token_mask,
        )
        check_lengths(module, int(source.length.max(initial=0)))
        survey = source.survey()
        check_vocabulary(module, survey.highest_id)
        plan = Plan(
            model=describe_model(module, name),
            tokens={
                "context_size": source.context_size,
                "n_sequences": source.n_sequences,
                "n_input_tokens": int(source.length.sum()),
                "n_tokens": int(survey.captured.sum()),
                "highest_id": survey.highest_id,
                "xxh3": survey.xxh3,
                "tokenizer": getattr(tokenizer, "name_or_path", None) or name,
            },
            hooks=tuple(HookSpec(p.name, p.module_path, p.side, p.width or 0, p.kind, "") for p in (*points, *latents)),
            saes={point.name: describe_sae(sae) for point, sae in latents.items()},
            **_shards(survey, batch_size, shard_tokens),
            batch_size=batch_size,
            shard_tokens=shard_tokens,
            codec=codec,
            signed_zero=False,
            select=None if select is None else plain(select.describe()),
            created_with={"pyfacts": __version__, "torch": torch.__version__, "zstandard": zstandard.__version__},
        )
        with (
            evaluating(module),
            caught_signals() as signals,
            ActivationStream(module, points, select=select, stop_early=True, saes=latents) as stream,
        ):
            if not Worker(store, plan, source, stream, allow_dense, progress, signals).run(rank, world_size):
                excuse_ablations(unwrap(module))
    d = Dump(store, "torch")
    if not d.complete:
        raise DumpError("records of committed shards have gone; dump again to compute these shards anew", path=d.path)
    return d


def _shards(survey: TokenSurvey, batch_size: int, shard_tokens: int) -> dict[str, tuple[int, ...]]:
    """Cuts sequences into shards of whole batches with at least `shard_tokens` captured tokens, but for the last."""
    n_sequences = len(survey.captured)
    sequences, token_starts = [0], [0]
    captured = np.add.reduceat(survey.captured, np.arange(0, n_sequences, min(batch_size, n_sequences)))
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
    largest = max(map(operator.sub, token_starts[1:], token_starts))
    if largest > layout.MAX_SHARD_TOKENS:
        raise ValueError(
            f"a shard would have {largest:,} tokens, and can have {layout.MAX_SHARD_TOKENS:,}: give a smaller "
            "shard_tokens (or batch_size, of whose batches shards are made)"
        )
    return {"sequences": tuple(sequences), "token_starts": tuple(token_starts)}
