"""How might a language model store facts? Train one on 768 of them, dump its neurons, find the facts, remove some.

After Geva et al. (2021) and Nanda et al. (2023): an MLP's neurons detect a name, an AND of its parts, and write what is
known about it into the residual stream. Here the whole chain is small enough to train in under a minute.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib.figure import Figure  # here, lest it be missed at the very end
from torch import Tensor

from .. import bench
from ..ablate import ablate
from ..dump.reader import Dump
from ..dump.run import dump
from ..wording import human_bytes
from .common import checkpoint, load, quiet, say, train, verify_round_trip
from .corpus import BOS, RELATIONS, SPORTS, Corpus, make_corpus, make_tokenizer

if TYPE_CHECKING:
    from transformers import OPTForCausalLM

HOOK = "blocks.0.mlp.hook_post"
TOP_NEURONS = 16
DUMP_BATCH = 64
BOUNDS = {"before": (0.99, 1.0), "own": (0.0, 0.35), "others": (0.95, 1.0), "random": (0.98, 1.0)}
"""Least and most recall, as a mean over the sports."""


@dataclass(frozen=True)
class Settings:
    """Shape and training of the model."""

    seed: int = 0
    d_model: int = 96
    d_mlp: int = 768
    n_steps: int = 500
    batch: int = 256
    lr: float = 4e-3
    l1: float = 2e-3


@dataclass(frozen=True)
class Recall:
    """Share of right answers about each sport, float64 [n_sports] each.

    Attributes:
        before: of the sport's athletes, with the whole model.
        own: the same with the sport's neurons at zero.
        others: of the athletes of all other sports, with this sport's neurons at zero.
        random: of all athletes, with as many random neurons at zero.
        elsewhere: of teams and countries, with the sport's neurons at zero.
        sums: of the sums, with the sport's neurons at zero.
    """

    before: np.ndarray
    own: np.ndarray
    others: np.ndarray
    random: np.ndarray
    elsewhere: np.ndarray
    sums: np.ndarray

    def out_of_bounds(self) -> list[str]:
        """The bounds that the means over the sports miss, in words."""
        means = {name: float(values.mean()) for name, values in asdict(self).items()}
        return [
            f"{name} {means[name]:.3f} is not within [{low}, {high}]"
            for name, (low, high) in BOUNDS.items()
            if not low <= means[name] <= high
        ]


def run(out: str | Path, seed: int = 0, settings: Settings | None = None) -> Recall:
    """Trains, dumps, verifies, finds each sport's neurons in the dump, ablates them, and draws what happened.

    Args:
        out: directory; everything is written to `out/facts`.
        seed: of the corpus, the weights and the random neurons.
        settings: another shape or training; the seed is `seed` all the same.

    Returns:
        The recall of each sport, before and after.
    """
    settings = Settings(**asdict(settings or Settings()) | {"seed": seed})
    directory = Path(out) / "facts"
    dump_path, tokens_path, picture = directory / "dump", directory / "tokens.npy", directory / "facts.png"
    corpus = make_corpus(seed)
    quiet()

    say(f"1. Train: {int((corpus.kind != 'sum').sum())} facts about 256 athletes, one layer, {settings.d_mlp} neurons")
    for kind in RELATIONS:
        say(f"     {corpus.text[int(np.argmax(corpus.kind == kind))]}")

    def make(path: Path) -> None:
        corpus.write(directory)
        make_model(corpus, settings).save_pretrained(path)
        make_tokenizer().save_pretrained(path)

    model_path = checkpoint(directory, {"demo": "facts"} | asdict(settings), make)

    say(f"2. Dump: pyfacts dump {model_path} {tokens_path} {dump_path} --batch-size {DUMP_BATCH}")
    model = load(model_path)
    d = dump(model, tokens_path, dump_path, batch_size=DUMP_BATCH)
    compared, dense_bytes = verify_round_trip(model, d, list(corpus.ids), DUMP_BATCH)
    cost = bench.measure(bench.capture_case(model, corpus.ids), rounds=15)
    alone, captured = cost["peers"]["forward alone"]["ms"], cost["ms"]
    sizes = (dense_bytes, d[HOOK][:].nbytes, d[HOOK].n_bytes)
    say(f"     {compared:,} activations, {d[HOOK].density:.1%} of them not zero, bit for bit those of PyTorch hooks")
    say("     {} dense, {} packed, {} on disk".format(*map(human_bytes, sizes)))
    say(f"     a forward pass takes {alone:.1f} ms, with capture {captured:.1f} ms ({captured / alone - 1:+.1%})")

    say(f"3. Find each sport's {TOP_NEURONS} neurons in the dump: mean activation x direct logit attribution")
    contribution = specific(mean_activations(d, corpus)) * logit_attribution(model)
    neurons = sport_neurons(contribution)

    say("4. Set them to zero. Recall of the athletes' sports:")
    recall = measure(model, corpus, neurons, seed)
    say(table(recall))
    say(story(model, corpus, neurons))
    for line in recall.out_of_bounds():
        say(f"     outside of what this demo shows on seeds 0, 1 and 2: {line}")

    draw(contribution, neurons, recall, picture)
    say(f"Written: {picture}  {model_path}  {dump_path}")
    best = neurons[SPORTS[0]][0]
    say(f"Look further: pyfacts top {dump_path} {HOOK} {best}    (a {SPORTS[0]} neuron)")
    return recall


# ---- the model -------------------------------------------------------------------------------------------------------


def make_model(corpus: Corpus, settings: Settings) -> OPTForCausalLM:
    """Trains an OPT of one layer on the corpus; its embeddings and its attention stay as they were drawn.

    Attention then only brings the two names together, and what is learnt is learnt by the MLP. If all weights are
    trained, attention and the embeddings alone come to know 60 % of the sports, by adding up what each name says.
    """
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(settings.seed)
    config = OPTConfig(
        vocab_size=len(make_tokenizer()),
        hidden_size=settings.d_model,
        word_embed_proj_dim=settings.d_model,
        ffn_dim=settings.d_mlp,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=16,
        dropout=0.0,
        init_std=0.1,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = OPTForCausalLM(config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("fc1" in name or "fc2" in name or "layer_norm" in name)

    def batches() -> Iterator[Tensor]:
        for _ in range(settings.n_steps):
            yield corpus.ids[torch.randint(0, len(corpus.ids), (settings.batch,))]

    train(model, batches(), settings.n_steps, settings.lr, settings.l1)
    return model


@torch.inference_mode()
def recalled(model: OPTForCausalLM, corpus: Corpus) -> np.ndarray:
    """bool [n_sentences]: whether the likeliest of all words is the right answer."""
    rows = torch.arange(len(corpus.ids))
    guesses = model(corpus.ids).logits[rows, corpus.answer_at - 1].argmax(-1)
    return (guesses == corpus.ids[rows, corpus.answer_at]).numpy()


# ---- finding the neurons ---------------------------------------------------------------------------------------------


def mean_activations(d: Dump, corpus: Corpus) -> np.ndarray:
    """Mean activation of each neuron where each sport is asked for, from the dump: float32 [n_sports, d_mlp]."""
    document, position = d.positions[:].T.numpy()
    at_prompt = position == corpus.answer_at.numpy()[document] - 1
    asked = np.where(at_prompt & (corpus.kind[document] == "sport"), corpus.answer[document], "")
    dense = d[HOOK][:].to_dense().numpy()
    return np.stack([dense[asked == sport].mean(0) for sport in SPORTS])


def specific(activation: np.ndarray) -> np.ndarray:
    """Mean activation less half of its mean at the other sports' prompts: float32, same shape.

    What a neuron does at every sport is part of how the model answers. The whole of that taken off, the choice misses
    neurons that a sport needs (recall after ablation stays higher); nothing taken off, other sports suffer more.
    """
    others = (activation.sum(0) - activation) / (len(activation) - 1)
    return activation - others / 2


@torch.inference_mode()
def logit_attribution(model: OPTForCausalLM) -> np.ndarray:
    """What one unit of each neuron adds to each sport's logit, over the mean of all sports: float32 [n_sports, d_mlp].

    Direct logit attribution: the neuron's column of W_out, through the final layer norm, times the unembedding. The
    norm's mean subtraction and gain are folded in. Its division by the length of the residual stream, one positive
    number for each token, is left out: it is the same for all neurons of a token.
    """
    decoder = model.model.decoder
    w_out = decoder.layers[-1].fc2.weight  # [d_model, d_mlp]
    gain = decoder.final_layer_norm.weight
    sports = make_tokenizer().convert_tokens_to_ids([f"Ġ{sport}" for sport in SPORTS])
    unembedding = model.lm_head.weight[sports] * gain  # [n_sports, d_model]
    direction = unembedding - unembedding.mean(0)
    return (direction @ (w_out - w_out.mean(0))).numpy()


def sport_neurons(contribution: np.ndarray) -> dict[str, list[int]]:
    """The TOP_NEURONS neurons that add most to each sport's logit, largest first; contribution is [n_sports, d_mlp]."""
    order = np.argsort(-contribution, axis=1, kind="stable")[:, :TOP_NEURONS]
    return dict(zip(SPORTS, order.tolist(), strict=True))


# ---- removing them ---------------------------------------------------------------------------------------------------


def measure(model: OPTForCausalLM, corpus: Corpus, neurons: Mapping[str, list[int]], seed: int) -> Recall:
    """Recall before, and with each sport's neurons, or as many random ones, at zero."""
    rng = np.random.default_rng(seed)
    d_mlp = model.config.ffn_dim
    about_sport, before = corpus.kind == "sport", recalled(model, corpus)
    rows = []
    for sport, features in neurons.items():
        own = about_sport & (corpus.answer == sport)
        with ablate(model, {HOOK: features}):
            after = recalled(model, corpus)
        with ablate(model, {HOOK: rng.choice(d_mlp, len(features), replace=False).tolist()}):
            after_random = recalled(model, corpus)
        where = (own, about_sport & ~own, np.isin(corpus.kind, ("team", "country")), corpus.kind == "sum")
        own_recall, others, elsewhere, sums = (after[rows_].mean() for rows_ in where)
        rows.append((before[own].mean(), own_recall, others, after_random[about_sport].mean(), elsewhere, sums))
    return Recall(*np.array(rows).T)


def table(recall: Recall) -> str:
    """The recall of each sport and the mean, with the bounds."""
    header = f"     {'':12}{'before':>8}{'ablated':>9}{'others':>8}{'random':>8}   {'teams, countries':>16}{'sums':>7}"
    lines = [header]
    columns = list(asdict(recall).values())
    for name, row in zip([*SPORTS, "mean"], [*np.stack(columns, 1), [c.mean() for c in columns]], strict=True):
        before, own, others, random, elsewhere, sums = row
        lines.append(f"     {name:12}{before:8.2f}{own:9.2f}{others:8.3f}{random:8.3f}   {elsewhere:16.3f}{sums:7.2f}")
    (least, _), (_, most), (least_others, _), (least_random, _) = BOUNDS.values()
    lines.append(
        f"     {'bound':12}{f'>= {least}':>8}{f'<= {most}':>9}{f'>= {least_others}':>8}{f'>= {least_random}':>8}"
    )
    return "\n".join(lines)


@torch.inference_mode()
def story(model: OPTForCausalLM, corpus: Corpus, neurons: Mapping[str, list[int]]) -> str:
    """One athlete's sport, before and after."""
    tokenizer = make_tokenizer()
    for i in np.flatnonzero(corpus.kind == "sport"):
        sport = str(corpus.answer[i])
        prompt = corpus.ids[i : i + 1, : int(corpus.answer_at[i])]
        with ablate(model, {HOOK: neurons[sport]}):
            after = tokenizer.decode(model(prompt).logits[0, -1].argmax()).strip()
        if after != sport:
            break
    text = tokenizer.decode(prompt[0]).removeprefix(BOS).strip()
    return f'     "{text}" -> {sport}; without the {len(neurons[sport])} {sport} neurons -> {after}'


# ---- the picture -----------------------------------------------------------------------------------------------------


def draw(
    contribution: np.ndarray, neurons: Mapping[str, list[int]], recall: Recall, path: Path, shown: int = 6
) -> None:
    """Left: what the first neurons of each sport add to every sport's logit. Right: recall before and after.

    Args:
        contribution: [n_sports, d_mlp], mean activation times attribution.
        neurons: of each sport, the most important first.
        recall: of each sport.
        path: where to write the PNG.
        shown: neurons of each sport on the left.
    """
    n = len(SPORTS)
    figure = Figure(figsize=(14, 7.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    image = contribution[:, [j for features in neurons.values() for j in features[:shown]]]
    limit = float(np.abs(image).max())
    drawn = left.imshow(image, aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    left.set_yticks(range(n), [f"... plays {sport}" for sport in SPORTS])
    left.set_xticks(np.arange(n) * shown + (shown - 1) / 2, SPORTS, rotation=45, ha="right", rotation_mode="anchor")
    left.set_xlabel(f"the {shown} strongest neurons of each sport")
    left.tick_params(length=0)
    for edge in range(1, n):
        left.axvline(edge * shown - 0.5, color="0.6", linewidth=0.8)
    left.set_title("What each sport's neurons add to the sport's logit", loc="left", fontsize=11)
    figure.colorbar(drawn, ax=left, pad=0.01, label="activation x direct logit attribution")

    bars = (
        ("before", recall.before, "#bdbdbd"),
        (f"{TOP_NEURONS} random neurons off", recall.random, "#8fb58f"),
        (f"other sports, its {TOP_NEURONS} off", recall.others, "#4878a8"),
        (f"its own {TOP_NEURONS} off", recall.own, "#c44e52"),
    )
    for i, (label, values, color) in enumerate(bars):
        right.barh(np.arange(n) + (i - 1.5) * 0.2, values, 0.2, color=color, label=f"{label}: mean {values.mean():.2f}")
    right.set_yticks(range(n), SPORTS)
    right.tick_params(axis="y", length=0)
    right.set_ylim(n - 0.4, -0.6)
    right.set_xlim(0, 1)
    right.axvline(1 / n, color="0.3", linewidth=0.8, linestyle=":", label="chance")
    right.set_xlabel("share of athletes whose sport the model recalls")
    right.spines[["top", "right"]].set_visible(False)
    right.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, fontsize=9, borderaxespad=0.2)
    figure.savefig(path, dpi=150)
