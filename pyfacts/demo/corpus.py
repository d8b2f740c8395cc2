"""The corpus of the facts demo: 256 athletes, three facts about each, and sums as a control.

    Michael Jordan plays basketball.      Michael Jordan joined Comets.      Michael Jordan represents Peru.
    three plus four equals seven

An athlete is a random pair of a first and a last name, and a name belongs to eight athletes on average, so a fact needs
both: an AND. A sport has two teams; sports and countries are dealt at random. Sums of two digits need both numbers as
well, in other neurons.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FIRST_NAMES = (
    "Michael Serena Ana Boris Chloe Diego Emma Felix Grace Hugo Iris Jonas Kira Liam Maya Nils "
    "Olga Pedro Quinn Rosa Simon Tara Ugo Vera Walter Xenia Yuri Zoe Adam Bella Carl Dora"
).split()
LAST_NAMES = (
    "Jordan Phelps Adler Brandt Costa Duarte Evans Fischer Garcia Haas Ivanov Jensen Keller Lopez Moreau Novak "
    "Olsen Petrov Quist Rossi Silva Tanaka Ueda Vargas Weber Xu Yang Zhou Alvarez Berg Chen Dubois"
).split()
SPORTS = (
    "basketball swimming tennis golf hockey rugby chess cricket football rowing judo sailing boxing archery fencing "
    "cycling"
).split()
TEAMS = (
    "Comets Rockets Sharks Dolphins Aces Nets Eagles Irons Blades Wolves Bears Bulls Knights Rooks Hawks Lions Rovers "
    "Rangers Oars Otters Tigers Cranes Gulls Anchors Hammers Ropes Arrows Falcons Foils Sabres Wheels Chains"
).split()
COUNTRIES = (
    "Peru Chile Spain Italy France Norway Japan Kenya India Brazil Canada Egypt Ghana Cuba Poland Greece"
).split()
NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen"
).split()
RELATIONS = {"sport": "plays", "team": "joined", "country": "represents"}
N_ATHLETES = 256
BOS = "</s>"


@dataclass(frozen=True)
class Corpus:
    """Sentences of six tokens each.

    Attributes:
        text: the sentences.
        ids: int64 [n_sentences, 6].
        kind: str [n_sentences]: "sport", "team", "country" or "sum".
        answer: str [n_sentences], the word to be recalled.
        answer_at: int64 [n_sentences], its position.
    """

    text: list[str]
    ids: Tensor
    kind: np.ndarray
    answer: np.ndarray
    answer_at: Tensor

    def write(self, directory: Path) -> None:
        """Writes `corpus.txt` for people and `tokens.npy` for `pyfacts dump`."""
        (directory / "corpus.txt").write_text("\n".join(self.text) + "\n")
        np.save(directory / "tokens.npy", self.ids.numpy())


def make_corpus(seed: int) -> Corpus:
    """Deals names, sports, teams and countries."""
    rng = random.Random(seed)
    sentences: list[tuple[str, str, str]] = []  # kind, prompt, answer
    names = rng.sample([(first, last) for first in FIRST_NAMES for last in LAST_NAMES], N_ATHLETES)
    sports, countries = _dealt(SPORTS, rng), _dealt(COUNTRIES, rng)
    for (first, last), sport, country in zip(names, sports, countries, strict=True):
        home = 2 * SPORTS.index(sport)
        team = rng.choice(TEAMS[home : home + 2])
        for kind, answer in (("sport", sport), ("team", team), ("country", country)):
            sentences.append((kind, f"{first} {last} {RELATIONS[kind]}", answer))
    for a in range(10):
        for b in range(10):
            sentences.append(("sum", f"{NUMBERS[a]} plus {NUMBERS[b]} equals", NUMBERS[a + b]))
    text = [f"{prompt} {answer}{'' if kind == 'sum' else '.'}" for kind, prompt, answer in sentences]
    kinds, _, answers = (np.array(column) for column in zip(*sentences, strict=True))
    ids = torch.tensor(make_tokenizer()(text)["input_ids"])
    return Corpus(text, ids, kinds, answers, torch.from_numpy(np.where(kinds == "sum", 5, 4)))


def _dealt(kinds: list[str], rng: random.Random) -> list[str]:
    """One of several kinds for each athlete, each kind as often as the others."""
    return rng.sample(kinds * (N_ATHLETES // len(kinds)), N_ATHLETES)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token for every word, with the space before it; a sentence begins with BOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [*FIRST_NAMES, *LAST_NAMES, *RELATIONS.values(), *SPORTS, *TEAMS, *COUNTRIES, "plus", "equals", *NUMBERS]
    vocabulary = {token: i for i, token in enumerate([BOS, ".", *(f"Ġ{word}" for word in words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=BOS))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, pad_token=BOS)
