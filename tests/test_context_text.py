"""A firing token in its text, by tokenizers that each decode a lone token in a way of their own."""

from collections.abc import Callable

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pyfacts.dump.results import Context

TEXT = "the cat sat on the mat, playing nicely 😀 日本 with the other cats."


def byte_level() -> Tokenizer:
    """GPT-2's and OPT's: a character may be of several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet))
    return tokenizer


def metaspace() -> Tokenizer:
    """T5's: a lone token loses its leading space."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.train_from_iterator([TEXT] * 5, trainers.BpeTrainer(vocab_size=60))
    return tokenizer


def sentence_piece() -> Tokenizer:
    """Llama 2's and Mistral's: so does it here."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.train_from_iterator([TEXT.replace(" ", " ▁")] * 5, trainers.BpeTrainer(vocab_size=60))
    return tokenizer


def word_piece() -> Tokenizer:
    """BERT's: a piece of a word carries a mark, and spaces are made up."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=60, special_tokens=["[UNK]"])
    tokenizer.train_from_iterator([TEXT] * 5, trainer)
    return tokenizer


@pytest.mark.parametrize("make", [byte_level, metaspace, sentence_piece, word_piece])
def test_every_token_in_its_text(make: Callable[[], Tokenizer]) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=make())
    ids = tokenizer(TEXT)["input_ids"]
    texts = [
        Context(100 + at, 1.0, 0, at, start=100, token_ids=np.array(ids), values=None).text(tokenizer)
        for at in range(len(ids))
    ]
    assert all("".join(text) == TEXT for text in texts)
    firing = [text[1] for text in texts]
    assert {"cat", "😀"} <= {part.strip() for part in firing}
    assert "".join(firing) == TEXT or make is byte_level  # there a character belongs to each of its tokens
    assert [begin for begin, _, _ in texts] == sorted((begin for begin, _, _ in texts), key=len)


def test_tokens_without_text() -> None:
    """As what a tokenizer leaves out of its text; the next one's is not taken for theirs."""

    class Tokens:
        def decode(self, ids: list[int]) -> str:
            return "".join("ab"[i] for i in ids if i < 2)

    context = Context(1, 1.0, 0, 1, start=0, token_ids=np.array([0, 7, 1]), values=None)
    assert context.text(Tokens()) == ("a", "", "b")
