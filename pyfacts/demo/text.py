"""What do neurons fire on? A one-layer ReLU model on real English, every token of it dumped, and five neurons read.

The shape is that of Towards Monosemanticity (Bricken et al., 2023): one layer, d_model 128, 512 ReLU neurons. The text
is the documentation that every CPython carries (`pydoc_data.topics`), so nothing is downloaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.figure import Figure  # here, lest it be missed at the very end
from torch import Tensor

from ..dump.reader import Dump
from ..dump.run import dump
from ..wording import human_bytes
from .common import checkpoint, load, quiet, say, train, verify_round_trip

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

HOOK = "blocks.0.mlp.hook_post"
D_MODEL, D_MLP, VOCABULARY, CONTEXT = 128, 512, 1024, 128
STEPS, BATCH, LEARNING_RATE, L1 = 300, 8, 4e-3, 1e-3
DUMP_BATCH = 8


def run(out: str | Path, seed: int = 0, n_steps: int = STEPS) -> dict[str, Any]:
    """Trains, dumps, verifies, shows five neurons, draws the layer's densities.

    Args:
        out: directory; everything is written to `out/text`.
        seed: of the weights and of the order of the text.
        n_steps: training steps.

    Returns:
        The densities [d_mlp], the neurons shown, and the paths written.
    """
    directory = Path(out) / "text"
    corpus = directory / "corpus.jsonl"
    quiet()

    say(f"1. Train a tokenizer and a one-layer model: d_model {D_MODEL}, {D_MLP} ReLU neurons")
    settings = {"demo": "text", "seed": seed, "n_steps": n_steps, "vocabulary": VOCABULARY, "l1": L1}

    def make(path: Path) -> None:
        write_corpus(corpus)
        make_model(corpus, path, seed, n_steps)

    model_path = checkpoint(directory, settings, make)

    say(f"2. Dump: pyfacts dump {model_path} {corpus} {directory / 'dump'} --context-size {CONTEXT}")
    model = load(model_path)
    d = dump(model, corpus, directory / "dump", context_size=CONTEXT, batch_size=DUMP_BATCH)
    compared, dense_bytes = verify_round_trip(model, d, sequences_of(d), DUMP_BATCH)
    say(f"     {compared:,} activations, {d[HOOK].density:.1%} of them not zero, bit for bit those of PyTorch hooks")
    say(f"     {human_bytes(dense_bytes)} dense, {human_bytes(d[HOOK].n_bytes)} on disk")

    say("3. Five neurons, read from the dump: the tokens at which they fire most, marked «so»")
    tokenizer = load_tokenizer(model_path)
    density = d[HOOK].feature_stats().density
    chosen = choose_neurons(d, tokenizer)
    for j in chosen:
        say(f"     neuron {j}, active at {density[j]:.2%} of the tokens")
        for line in context_lines(d, tokenizer, j):
            say(f"     {line}")

    picture = directory / "density.png"
    draw(density, chosen, picture)
    say(f"Written: {picture}  {model_path}  {directory / 'dump'}")
    say(f"Look further: pyfacts top {directory / 'dump'} {HOOK} {chosen[0]}")
    return {"density": density, "neurons": chosen, "picture": picture, "dump": directory / "dump"}


def write_corpus(path: Path) -> None:
    """Writes the documentation, one topic a line."""
    from pydoc_data.topics import topics

    path.write_text("".join(json.dumps({"topic": name, "text": topics[name]}) + "\n" for name in sorted(topics)))


def make_model(corpus: Path, path: Path, seed: int, n_steps: int) -> None:
    """Trains a byte-level BPE tokenizer and a model on a corpus, and saves both."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", pad_token="</s>")

    torch.manual_seed(seed)
    config = OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=D_MODEL,
        word_embed_proj_dim=D_MODEL,
        ffn_dim=D_MLP,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        dropout=0.0,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = OPTForCausalLM(config)
    stream = torch.tensor([i for ids in tokenizer(texts)["input_ids"] for i in [*ids, 0]])
    say(f"     {sum(map(len, texts)):,} characters, {len(stream):,} tokens of {len(tokenizer)} kinds")
    train(model, windows(stream, n_steps, seed), n_steps, LEARNING_RATE, L1)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def windows(stream: Tensor, n_steps: int, seed: int) -> Iterator[Tensor]:
    """Yields batches [BATCH, CONTEXT] from random places of a stream of token ids."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n_steps):
        starts = torch.randint(0, len(stream) - CONTEXT, (BATCH, 1), generator=generator)
        yield stream[starts + torch.arange(CONTEXT)]


def sequences_of(d: Dump) -> list[Tensor]:
    """The sequences that were dumped, each [pos]: documents cut into pieces of CONTEXT tokens."""
    document, position = d.positions[:].T
    starts = torch.nonzero((position % CONTEXT == 0) | (document != document.roll(1)), as_tuple=True)[0].tolist()
    ids = d.token_ids[:]
    return [ids[a:b] for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)]


def load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer beside a saved model."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


def choose_neurons(d: Dump, tokenizer: PreTrainedTokenizerFast, n: int = 5) -> list[int]:
    """The neurons that are most about one kind of token: the largest share of their activation on one token id.

    Of the louder half of the neurons, so that what is shown matters to the model; no two of the same token, and none of
    mere spaces, so that five neurons show five things.
    """
    hook, ids = d[HOOK], np.asarray(d.token_ids[:])
    total = hook.feature_stats().sum
    found: dict[int, tuple[float, int]] = {}
    for j in np.flatnonzero((total > 0) & (total >= np.median(total))).tolist():
        tokens, values = hook.neuron(j)
        by_token = np.bincount(ids[np.asarray(tokens)], weights=np.asarray(values, np.float64))
        favourite = int(by_token.argmax())
        share = float(by_token[favourite] / by_token.sum())
        if tokenizer.decode([favourite]).strip():
            found[favourite] = max(found.get(favourite, (0.0, 0)), (share, j))
    return [j for _, j in sorted(found.values(), reverse=True)[:n]]


def context_lines(d: Dump, tokenizer: PreTrainedTokenizerFast, j: int, k: int = 5, window: int = 16) -> list[str]:
    """The k tokens at which a neuron fires most, each in its context on one line."""
    lines = []
    for context in d.contexts(HOOK, j, k=k, window=window):
        before, token, after = (part.replace("\n", " ") for part in context.text(tokenizer))
        lines.append(f"{context.value:6.2f}  {before[-44:]:>44}«{token}»{after[:44]}")
    return lines


def draw(density: np.ndarray, chosen: list[int], path: Path) -> None:
    """Draws how many neurons fire how often, on a logarithmic axis, with the chosen ones marked."""
    alive = density[density > 0]
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.hist(alive, bins=np.geomspace(alive.min(), max(alive.max(), alive.min() * 1.01), 40).tolist(), color="#4878a8")
    axes.set_xscale("log")
    axes.set_xlabel("density: share of the tokens at which a neuron is active")
    axes.set_ylabel("neurons")
    silent = len(density) - len(alive)
    axes.set_title(
        f"{len(density)} neurons: {density.mean():.1%} of their activations are not zero, {silent} never fire",
        loc="left",
    )
    top = axes.get_ylim()[1]
    label: dict[str, Any] = {
        "color": "#c44e52",
        "va": "top",
        "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 1.5},
    }
    for i, j in enumerate(chosen):
        axes.axvline(density[j], color="#c44e52", linewidth=1)
        axes.annotate(str(j), (density[j], top * (0.97 - 0.08 * i)), (4, 0), textcoords="offset points", **label)
    axes.text(0.99, 0.97, "the five shown", ha="right", transform=axes.transAxes, **label)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
