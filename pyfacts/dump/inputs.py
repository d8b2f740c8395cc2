"""The tokens of a dump: sequences cut from documents, in order, on disk or mapped rather than in memory."""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import numpy as np
import xxhash

from .documents import Document, read_documents, token_documents, without_padding
from .files import unique_name
from .store import Store


@dataclass(frozen=True)
class Batch:
    """Consecutive sequences, padded on the right.

    Attributes:
        ids: int64 [batch, pos].
        attention: bool [batch, pos], False on padding; None if there is none.
        captured: bool [batch, pos], the tokens to capture.
        document, position: int64 [n], of the captured tokens, row by row.
    """

    ids: np.ndarray
    attention: np.ndarray | None
    captured: np.ndarray
    document: np.ndarray
    position: np.ndarray


@dataclass(frozen=True)
class Sequences:
    """Token ids, cut into sequences.

    Attributes:
        ids: integers [n], one sequence after another (often memory-mapped).
        start, length: int64 [n_sequences], where each sequence lies in `ids`.
        document, first_position: int64 [n_sequences], the document that a sequence was cut from, and where it begins in
            it.
        mask: bool [n], the tokens to capture; or None for all.
        context_size: how many tokens documents were cut after; None if they were not.
    """

    ids: np.ndarray
    start: np.ndarray
    length: np.ndarray
    document: np.ndarray
    first_position: np.ndarray
    mask: np.ndarray | None
    context_size: int | None

    @property
    def n_sequences(self) -> int:
        return len(self.start)

    def batch(self, begin: int, end: int) -> Batch:
        """Returns sequences [begin, end)."""
        lengths = self.length[begin:end]
        shape = (end - begin, int(lengths.max()))
        real = np.arange(shape[1]) < lengths[:, None]
        ids = np.zeros(shape, np.int64)
        captured = np.zeros(shape, bool)
        for row, sequence in enumerate(range(begin, end)):
            ids[row, : lengths[row]] = self._ids(sequence)
            captured[row, : lengths[row]] = self._captured(sequence)
        position = self.first_position[begin:end, None] + np.arange(shape[1])
        document = np.broadcast_to(self.document[begin:end, None], shape)
        return Batch(ids, None if real.all() else real, captured, document[captured], position[captured])

    def survey(self) -> "TokenSurvey":
        """Reads every token once: what a plan needs to know, and the fingerprint.

        Raises:
            ValueError: a token id is negative, or nothing is to be captured.
        """
        digest = xxhash.xxh3_128()
        captured = np.empty(self.n_sequences, np.int64)
        highest = -1
        for sequence in range(self.n_sequences):
            ids, mask = self._ids(sequence), self._captured(sequence)
            low, high = int(ids.min()), int(ids.max())
            if low < 0:
                raise ValueError(
                    f"tokens: document {self.document[sequence]} holds the negative token id {low}; token ids start at "
                    "0 (leave padding out, or give what the tokenizer returned, with its attention mask)"
                )
            if high >= 2**63:
                raise ValueError(
                    f"tokens: document {self.document[sequence]} holds the token id {high}, which no vocabulary has"
                )
            highest = max(highest, high)
            captured[sequence] = np.count_nonzero(mask)
            digest.update(ids.astype("<i8", copy=False).tobytes())
            digest.update(np.packbits(mask, bitorder="little").tobytes())
        for numbers in (self.length, self.document, self.first_position):
            digest.update(numbers.astype("<i8", copy=False).tobytes())
        if not captured.sum():
            raise ValueError("tokens: token_mask leaves no token to capture")
        return TokenSurvey(captured, highest, digest.hexdigest())

    def _ids(self, sequence: int) -> np.ndarray:
        start = self.start[sequence]
        return self.ids[start : start + self.length[sequence]]

    def _captured(self, sequence: int) -> np.ndarray:
        if self.mask is None:
            return np.ones(self.length[sequence], bool)
        start = self.start[sequence]
        return self.mask[start : start + self.length[sequence]]


@dataclass(frozen=True)
class TokenSurvey:
    """What reading all tokens once has told: captured tokens of each sequence, the highest id, a fingerprint."""

    captured: np.ndarray
    highest_id: int
    xxh3: str


def read_tokens(
    source: Any,
    store: Store,
    *,
    load_tokenizer: Callable[[], Any],
    context_size: int | None = None,
    default_context_size: int | None = None,
    token_mask: Any = None,
) -> Sequences:
    """Turns what a caller gives as tokens into sequences.

    Arrays are used where they lie (memory-mapped ones too); documents are tokenised in order and spooled to a file in
    `store.spool`, and so is what a function says of them, which is asked once.

    Args:
        source: integers [n_sequences, pos] or [n] (then `context_size` is needed) as a tensor or array; a list of
            lists; or what `read_documents` takes.
        load_tokenizer: gives the tokenizer if there is text; it is called as `tokenizer(list of str)["input_ids"]`.
        context_size: documents longer than this are cut into sequences of this many tokens.
        default_context_size: the same where the source is text and `context_size` is None.
        token_mask: what to capture: bools shaped like `source`, or a function of one sequence's ids [n] to bools [n].

    Raises:
        ValueError, TypeError: the source is empty, of another shape or dtype, or does not fit `token_mask`.
    """
    if isinstance(source, np.ndarray) and source.dtype.kind in "OU":  # a column of texts, or of lists
        source = source.tolist()
    array = _as_array(source)
    opened = read_documents(source) if array is None else array
    if isinstance(opened, np.ndarray):
        flat, lengths = _flatten(opened, context_size)
    else:
        documents, is_text = _peek(opened)
        flat, lengths = _spool(token_documents(documents, load_tokenizer), store)
        if is_text and context_size is None:
            context_size = default_context_size
    if flat.size == 0:
        name = str(source) if isinstance(source, str | os.PathLike) else "the source"
        raise ValueError(f"tokens: {name} is empty; there is nothing to dump")
    if isinstance(source, Mapping) and hasattr(token_mask, "__len__"):
        token_mask = without_padding("token_mask", token_mask, source)
    sequences = Sequences(flat, *_cut(lengths, context_size), None, context_size)
    mask = _asked(token_mask, sequences, store) if callable(token_mask) else _flat_mask(token_mask, lengths)
    return replace(sequences, mask=mask)


def _as_array(source: Any) -> np.ndarray | None:
    """The source as an array if it is one (a tensor is shared, not copied)."""
    if isinstance(source, np.ndarray):
        return source
    if hasattr(source, "detach") and hasattr(source, "numpy"):
        return np.asarray(source.detach().cpu().numpy())
    return None


def _peek(documents: Any) -> tuple[Iterator[Document], bool]:
    """Whether documents are text, judged by the first."""
    if not isinstance(documents, Iterable):
        raise TypeError(
            f"tokens must be a tensor, an array, a list of lists, a path or a data set, got {type(documents).__name__}"
        )
    iterator = iter(documents)
    first = list(itertools.islice(iterator, 1))
    return itertools.chain(first, iterator), bool(first) and isinstance(first[0], str)


def _flatten(array: np.ndarray, context_size: int | None) -> tuple[np.ndarray, np.ndarray]:
    if array.dtype.kind not in "iu":
        raise TypeError(f"tokens must be integers, got {array.dtype}")
    if array.ndim not in (1, 2):
        raise ValueError(f"tokens must be [n_sequences, pos] or [n], got shape {array.shape}")
    if array.ndim == 1 and context_size is None:
        raise ValueError(
            f"tokens are one stream of {array.size}: say context_size= (--context-size), the tokens of a sequence"
        )
    lengths = np.array([array.size]) if array.ndim == 1 else np.full(array.shape[0], array.shape[1])
    return array.reshape(-1), lengths.astype(np.int64)


def _spool(documents: Iterator[np.ndarray], store: Store) -> tuple[np.ndarray, np.ndarray]:
    """Writes documents one after another into an unnamed file and maps it. Returns ids int32 [n] and their lengths."""
    lengths = []
    with _unnamed_file(store) as file:
        for number, ids in enumerate(documents):
            if ids.size and max(int(ids.max()), -int(ids.min())) >= 2**31:
                worst = ids[np.abs(ids).argmax()]
                raise ValueError(f"tokens: document {number} holds the token id {worst}, which no vocabulary has")
            with store.write_errors():
                file.write(ids.astype(np.int32).tobytes())
            lengths.append(ids.size)
        with store.write_errors():
            file.flush()
        flat = np.memmap(file, np.int32, mode="r") if any(lengths) else np.empty(0, np.int32)
    return flat, np.array(lengths, np.int64)


def _asked(function: Callable[[np.ndarray], Any], sequences: Sequences, store: Store) -> np.ndarray:
    """What a function says of the ids of every sequence: bool [n], in an unnamed file."""
    with _unnamed_file(store) as file:
        for sequence, length in enumerate(sequences.length.tolist()):
            mask = np.asarray(function(sequences._ids(sequence)))
            if mask.shape != (length,):
                raise ValueError(f"token_mask must return one bool per token, got shape {mask.shape} of {mask.dtype}")
            with store.write_errors():
                file.write(_bools(mask).tobytes())
        with store.write_errors():
            file.flush()
        return np.memmap(file, np.bool_, mode="r")


@contextlib.contextmanager
def _unnamed_file(store: Store) -> Iterator[BinaryIO]:
    """A file in `store.spool` that has no name any more, so that nothing of it stays behind."""
    with store.write_errors():
        path = store.spool / unique_name(".tokens")
        file = open(path, "x+b")  # closed below, where a full disk may refuse the last buffer again
        path.unlink()
    try:
        yield file
    finally:
        with contextlib.suppress(OSError):
            file.close()


def _flat_mask(token_mask: Any, lengths: np.ndarray) -> np.ndarray | None:
    if token_mask is None:
        return None
    array = _as_array(token_mask)
    if array is not None:
        rows = [array] if array.ndim == 1 else list(array)
    elif isinstance(token_mask, Iterable):
        rows = [np.asarray(row) for row in token_mask]
    else:
        raise TypeError(f"token_mask must hold bools shaped like tokens, or be a function, got {type(token_mask)}")
    sizes = [row.size for row in rows]
    if any(row.ndim != 1 for row in rows) or sizes != lengths.tolist():
        raise ValueError(
            f"token_mask must be shaped like tokens: it has {len(sizes)} rows of {min(sizes, default=0)} to "
            f"{max(sizes, default=0)} bools, tokens have {len(lengths)} of {lengths.min()} to {lengths.max()}"
        )
    return _bools(np.concatenate(rows))


def _bools(mask: np.ndarray) -> np.ndarray:
    """A mask of bools, or of zeros and ones, as attention masks are."""
    if mask.dtype == np.object_:  # pandas'
        mask = np.array(mask.tolist())
    if mask.dtype != np.bool_ and (mask.dtype.kind not in "iuf" or not ((mask == 0) | (mask == 1)).all()):
        raise TypeError(f"token_mask must hold bools, or zeros and ones, got {mask.dtype}: {mask[:8].tolist()}")
    return mask.astype(np.bool_, copy=False)


def _cut(lengths: np.ndarray, context_size: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Cuts documents into sequences: start, length, document and first position of each. Empty documents give none."""
    longest = max(1, int(lengths.max()))
    window = longest if context_size is None else min(context_size, longest)
    pieces = -(-lengths // window)
    document = np.repeat(np.arange(len(lengths)), pieces)
    first_position = (np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * window
    start = (np.cumsum(lengths) - lengths)[document] + first_position
    return start, np.minimum(window, lengths[document] - first_position), document, first_position
