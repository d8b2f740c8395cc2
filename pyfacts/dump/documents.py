"""Documents out of files and data sets: text to tokenise, or token ids, one after another and never all in memory."""

import contextlib
import io
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

TEXT_FIELDS = ("text",)
ID_FIELDS = ("input_ids", "token_ids", "tokens")
TEXT_PIECE_CHARS = 1 << 20  # a .txt file is one document for every so many characters, cut at the end of a line
TOKENIZER_BATCH = 64

Document = str | Sequence[int] | np.ndarray


def read_documents(source: Any) -> Iterable[Document] | np.ndarray:
    """Opens a token source.

    Args:
        source: a path (.txt, .jsonl, .parquet, .npy, or the directory of a saved Hugging Face data set), a Hugging Face
            `Dataset`, what a tokenizer returned (a mapping; padding is dropped by its attention mask), or an iterable
            of strings or of lists of token ids.

    Returns:
        An iterable of documents, or, for .npy, the memory-mapped array.

    Raises:
        ValueError: the path does not exist, is of an unknown kind, or has no field of text or token ids.
        TypeError: the source is a table or an open file.
    """
    if isinstance(source, Mapping):
        return _mapping(source)
    if hasattr(source, "columns") and hasattr(source, "shape"):  # whose names would pass for documents
        raise TypeError(f"tokens: of a {type(source).__name__} give the column with the texts, such as table['text']")
    if isinstance(source, io.IOBase):
        raise TypeError(f"tokens: of an open file ({type(source).__name__}) give the path")
    source = _python_column(source)
    if not isinstance(source, str | os.PathLike):
        return _dataset(source, "the data set") if hasattr(source, "column_names") else source
    path = Path(os.path.expanduser(source))
    if path.is_dir():
        return _saved_dataset(path)
    if not path.is_file():
        raise ValueError(f"tokens: there is no file or data set {str(path)!r}")
    readers = {".txt": _text, ".jsonl": _json_lines, ".parquet": _parquet}
    if path.suffix == ".npy":
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except (EOFError, ValueError) as error:
            raise ValueError(f"tokens: {path} is no array that NumPy saved: {error}") from error
    if path.suffix not in readers:
        raise ValueError(
            f"tokens: {str(path)!r} is of an unknown kind; give .txt, .jsonl, .parquet, .npy, or the directory of a "
            "saved Hugging Face data set"
        )
    return readers[path.suffix](path)


def token_documents(documents: Iterable[Document], load_tokenizer: Callable[[], Any]) -> Iterator[np.ndarray]:
    """Turns documents into int64 token ids [n], tokenising text as `tokenizer(text)` does, special tokens included.

    Args:
        load_tokenizer: asked for the tokenizer when the first text comes.

    Raises:
        ValueError: a document is neither text nor a flat list of integers.
    """
    documents = iter(documents)
    tokenizer = None
    number = 0
    while batch := list(itertools.islice(documents, TOKENIZER_BATCH)):
        texts = [document for document in batch if isinstance(document, str)]
        if texts and tokenizer is None:
            tokenizer = load_tokenizer()
        # Documents longer than the model's context are cut later: nothing to warn of.
        options = {"verbose": False} if hasattr(tokenizer, "model_max_length") else {}
        encoded = iter(tokenizer(texts, **options)["input_ids"] if tokenizer is not None and texts else ())
        for document in batch:
            yield _ids(next(encoded) if isinstance(document, str) else document, number)
            number += 1


def tokenizer_of(name: str) -> Any:
    """The tokenizer of a Hugging Face name or directory.

    Raises:
        ValueError: there is none. From a directory without one transformers makes tokenizers that know no word.
    """
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    if len(tokenizer) <= len(tokenizer.all_special_tokens) + 1:  # a mark of words' beginnings is no word
        raise ValueError(
            f"there is no tokenizer in {name}: the {type(tokenizer).__name__} that transformers makes of it knows no "
            "word; save the model's tokenizer there (tokenizer.save_pretrained), or give token ids"
        )
    return tokenizer


def _ids(document: Any, number: int) -> np.ndarray:
    if hasattr(document, "as_py"):
        raise ValueError(f"tokens: document {number} is Arrow's {type(document).__name__}: give its as_py()")
    try:
        ids = np.asarray(document)
    except ValueError:  # lists of several lengths
        ids = np.asarray(document, dtype=object)
    if ids.size == 0:
        ids = ids.astype(np.int64)
    if isinstance(document, Mapping) or document is None:
        fields = f" with {', '.join(map(str, document))}: give one of these" if document else ""
        raise ValueError(f"tokens: document {number} must be text or token ids, got {type(document).__name__}{fields}")
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(
            f"tokens: document {number} must be text or a flat list of token ids, got shape {ids.shape} of {ids.dtype}"
        )
    return ids.astype(np.int64, copy=False)


def without_padding(name: str, rows: Sequence[Any], columns: Mapping[str, Any]) -> list[Any]:
    """Rows that are shaped like what a tokenizer returned, less what its attention mask, if there is one, leaves out.

    Raises:
        ValueError: they are shaped otherwise than the mask.
    """
    rows, masks = _of_one_text(rows), columns.get("attention_mask")
    if masks is None:
        return list(rows)
    masks = _of_one_text(masks)
    if [len(row) for row in rows] != [len(mask) for mask in masks]:
        raise ValueError(f"{name} must be shaped like tokens['attention_mask'], padding included")
    return [_unmasked(*row) for row in zip(rows, masks, strict=True)]


def _of_one_text(rows: Sequence[Any]) -> Sequence[Any]:
    """Several rows; a tokenizer gives a single text's without a list around them."""
    return [rows] if len(rows) and np.ndim(rows[0]) == 0 and not isinstance(rows[0], str) else rows


def _mapping(columns: Mapping[str, Any]) -> list[Document]:
    columns = {name: _python_column(column) for name, column in columns.items()}
    field = _field(columns, "the mapping", {name: kind for name in columns if (kind := _why_no_ids(name, columns))})
    column = columns[field]
    if field in TEXT_FIELDS:
        return [column] if isinstance(column, str) else list(column)
    return without_padding(f"tokens[{field!r}]", column, columns)


def _why_no_ids(name: str, columns: Mapping[str, Any]) -> str:
    """What an id column holds instead: a number, or one for each of several texts (of a single text they are its ids),
    or words; "" if it may hold ids."""
    column, texts = columns[name], next((columns[text] for text in TEXT_FIELDS if text in columns), None)
    if name not in ID_FIELDS:
        return ""
    if not hasattr(column, "__len__"):
        return "numbers"
    first: Any = next(iter(column), None)
    if isinstance(first, str) and texts is not None:
        return "strings"
    if _why_no_document(first) == "lists of strings":
        return "lists of strings"
    counts = not isinstance(texts, str | None) and len(column) == len(texts) > 0 and np.ndim(first) == 0
    return "numbers" if counts else ""


def _why_no_document(value: Any) -> str:
    """What a row's value is, if it can be neither a text nor ids; "" if it can."""
    if isinstance(value, int | float):
        return "numbers"
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) and isinstance(value[0], str):
        return "lists of strings"
    return ""


def _python_column(column: Any) -> Any:
    """Arrow's columns hold Arrow's scalars, whose bytes would pass for token ids."""
    return column.to_pylist() if hasattr(column, "to_pylist") else column


@contextlib.contextmanager
def _utf8(path: Path) -> Iterator[TextIO]:
    try:
        with open(path, encoding="utf-8-sig") as file:
            yield file
    except UnicodeDecodeError as error:
        raise ValueError(f"tokens: {path} is not in UTF-8: {error}") from error


def _text(path: Path) -> Iterator[str]:
    with _utf8(path) as file:
        while piece := file.read(TEXT_PIECE_CHARS):
            yield piece + file.readline()


def _json_lines(path: Path) -> Iterator[Document]:
    with _utf8(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"tokens: line {number} of {path} is no JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"tokens: line {number} of {path} is no JSON object")
            yield _row(row, f"line {number} of {path}")


def _parquet(path: Path) -> Iterator[Document]:
    import pyarrow.parquet
    import pyarrow.types

    file = pyarrow.parquet.ParquetFile(path)
    unfit = {column.name: "numbers" for column in file.schema_arrow if pyarrow.types.is_primitive(column.type)}
    for column in file.schema_arrow:
        if pyarrow.types.is_nested(column.type) and "string" in str(getattr(column.type, "value_type", "")):
            unfit[column.name] = "lists of strings"
    field = _field(file.schema_arrow.names, str(path), unfit)
    columns = [name for name in (field, "attention_mask") if name in file.schema_arrow.names]
    for batch in file.iter_batches(batch_size=1024, columns=columns):
        rows = batch.to_pydict()
        for values in zip(*(rows[name] for name in columns), strict=True):
            yield _unmasked(*values)


def _saved_dataset(path: Path) -> Iterator[Document]:
    import datasets

    loaded = datasets.load_from_disk(str(path))
    if isinstance(loaded, dict):
        raise ValueError(f"tokens: {path} holds the splits {', '.join(loaded)}; give the directory of one of them")
    return _dataset(loaded, str(path))


def _dataset(rows: Any, name: str) -> Iterator[Document]:
    if rows.column_names is None:  # a stream after a `map`
        for row in rows:
            yield _row(row, f"a row of {name}")
        return
    features = rows.features or {}
    unfit = {}
    for column, kind in features.items():
        if type(kind).__name__ == "Value" and "string" not in kind.dtype and kind.dtype != "null":
            unfit[column] = "numbers"
        elif "string" in str(getattr(getattr(kind, "feature", None), "dtype", "")):
            unfit[column] = "lists of strings"
    field = _field(rows.column_names, name, unfit)
    columns = [column for column in (field, "attention_mask") if column in rows.column_names]
    for batch in rows.with_format(None).iter(batch_size=1024):
        for values in zip(*(batch[column] for column in columns), strict=True):
            yield _unmasked(*values)


def _row(row: Mapping[str, Any], where: str) -> Document:
    """The document of one row."""
    field = _field(row, where, {name: kind for name, value in row.items() if (kind := _why_no_document(value))})
    if row[field] is None:
        raise ValueError(f"tokens: {field!r} is null in {where}: leave such rows out, or give them an empty text")
    return _unmasked(row[field], row.get("attention_mask"))


def _field(names: Iterable[str], where: str, unfit: Mapping[str, str]) -> str:
    """The field that holds documents. `tokens` may be how many there are, or what they look like.

    Args:
        unfit: what other fields hold.
    """
    names = list(names)
    for field in (*ID_FIELDS, *TEXT_FIELDS):
        if field in names and field not in unfit:
            return field
    shown = ", ".join(f"{name} ({unfit[name]})" if name in unfit else name for name in names)
    raise ValueError(
        f"tokens: {where} has the fields {shown}; one of {', '.join((*ID_FIELDS, *TEXT_FIELDS))} is needed, with lists "
        "of ids or texts"
    )


def _unmasked(document: Document, attention_mask: Sequence[int] | None = None) -> Document:
    """Drops padding that a data set was saved with: batches are padded anew."""
    if attention_mask is None or isinstance(document, str):
        return document
    if np.shape(attention_mask) != (len(document),):
        raise ValueError(f"tokens: a row of {len(document)} ids has an attention_mask of {np.shape(attention_mask)}")
    return np.asarray(document)[np.asarray(attention_mask, dtype=bool)]
