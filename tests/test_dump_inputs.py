"""What `dump` takes as model and tokens, and what it says of input that it cannot take."""

import json
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from dump_models import CONTEXT, HOOKS, VOCAB, TinyModel, hooked, one_thread, tokens  # noqa: F401
from tiny_models import opt, t5
from torch import nn

from pyfacts.dump import DumpError, arguments, documents, layout, open_dump
from pyfacts.dump.container import MAX_HEADER_BYTES, header_room
from pyfacts.dump.inputs import read_tokens
from pyfacts.dump.layout import HookSpec
from pyfacts.dump.run import dump
from pyfacts.dump.store import Directory

WORDS = [f"w{i}" for i in range(40)]
DOCUMENTS = [" ".join(WORDS[(i * j) % 40] for j in range(1, n)) for i, n in enumerate((5, 30, 2, 71, 12))]


@pytest.fixture(scope="module")
def tokenizer():
    """Words to ids, with a token of its own before every text, as OPT's has."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<s>", "<unk>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def ids(tokenizer):
    return [tokenizer(text)["input_ids"] for text in DOCUMENTS]


@pytest.fixture(scope="module")
def model_directory(tokenizer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    opt().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def read(source, directory):
    return read_tokens(source, Directory(directory), load_tokenizer=pytest.fail)


@pytest.mark.parametrize("name", ["OPT", "Bert", "Gemma2", "T5"])
def test_a_directory_without_a_tokenizer(name, tmp_path):
    """transformers makes one of nothing: OPT's finds no token in any text, BERT's finds [UNK] everywhere."""
    import transformers

    getattr(transformers, f"{name}Config")().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="no tokenizer in .*model"):
        documents.tokenizer_of(str(tmp_path / "model"))


def write(kind, path, ids):
    """Writes the documents as a file of a kind; returns what to give as tokens."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    if kind == "jsonl text":
        path = path / "x.jsonl"
        path.write_text("\n".join(json.dumps({"text": text, "other": 1}) for text in DOCUMENTS) + "\n\n")
    elif kind == "jsonl ids":
        path = path / "x.jsonl"
        path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids))
    elif kind in ("parquet text", "parquet ids"):
        path = path / "x.parquet"
        column = {"text": DOCUMENTS} if kind == "parquet text" else {"token_ids": ids}
        pyarrow.parquet.write_table(pyarrow.table(column), path, row_group_size=2)
    elif kind in ("data set", "saved data set"):
        padded = [row + [9] * (80 - len(row)) for row in ids]
        mask = [[1] * len(row) + [0] * (80 - len(row)) for row in ids]
        loaded = datasets.Dataset.from_dict({"input_ids": padded, "attention_mask": mask})
        if kind == "data set":
            return loaded
        loaded.save_to_disk(str(path / "set"))
        return path / "set"
    elif kind == "list of texts":
        return DOCUMENTS
    elif kind == "list of lists":
        return ids
    elif kind == "list of arrays":
        return [np.array(row, np.int16) for row in ids]
    return path


KINDS = ["jsonl text", "jsonl ids", "parquet text", "parquet ids", "data set", "saved data set", "list of texts"]


@pytest.mark.parametrize("kind", [*KINDS, "list of lists", "list of arrays"])
def test_every_source_gives_the_same_sequences(kind, tokenizer, ids, tmp_path):
    source = write(kind, tmp_path, ids)
    before = sorted(tmp_path.rglob("*"))
    found = read_tokens(source, Directory(tmp_path), load_tokenizer=lambda: tokenizer, context_size=20)
    assert sorted(tmp_path.rglob("*")) == before  # the spool has no name
    expected = [(d, at, row[at : at + 20]) for d, row in enumerate(ids) for at in range(0, len(row), 20)]
    batch = found.batch(0, found.n_sequences)
    assert found.n_sequences == len(expected)
    for i, (document, position, sequence) in enumerate(expected):
        assert batch.ids[i, : len(sequence)].tolist() == sequence and not batch.ids[i, len(sequence) :].any()
        assert batch.attention[i].tolist() == [j < len(sequence) for j in range(20)]
        assert (found.document[i], found.first_position[i]) == (document, position)
    assert batch.document.tolist() == [d for d, _, row in expected for _ in row]
    assert batch.position.tolist() == [at + j for _, at, row in expected for j in range(len(row))]


def test_a_text_file_and_the_models_own_tokenizer(model_directory, tokenizer, tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("\n".join(DOCUMENTS))
    d = dump(model_directory, path, tmp_path / "out", names_filter="blocks.1.mlp.hook_post", allow_dense=True)
    expected = tokenizer("\n".join(DOCUMENTS))["input_ids"]
    assert d.token_ids[:].tolist() == expected
    assert d.positions[:].tolist() == [[0, i] for i in range(len(expected))]
    # The model takes 64 positions: longer text is cut into sequences of as many.
    batches = [{"input_ids": torch.tensor([expected[i : i + 64]])} for i in range(0, len(expected), 64)]
    path = "model.decoder.layers.1.fc2"
    assert torch.allclose(d["blocks.1.mlp.hook_post"][:].to_dense(), hooked(opt(), [path], batches)[path], atol=1e-6)
    assert d.plan["model"]["name"] == str(model_directory) and d.plan["model"]["class"] == "OPTForCausalLM"
    assert d.plan["model"]["config"]["ffn_dim"] == 40


def test_long_text_files_are_read_in_pieces(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "TEXT_PIECE_CHARS", 100)
    (tmp_path / "x.txt").write_text("\n".join(DOCUMENTS))
    found = read_tokens(tmp_path / "x.txt", Directory(tmp_path), load_tokenizer=lambda: tokenizer)
    pieces, text = [], "\n".join(DOCUMENTS)
    while text:
        end = text.find("\n", 100) + 1
        pieces.append(text[: end or None])
        text = text[end:] if end else ""
    assert len(pieces) > 1 and [tokenizer(p)["input_ids"] for p in pieces] == [
        found.batch(i, i + 1).ids[0].tolist() for i in range(found.n_sequences)
    ]


@pytest.mark.parametrize("make", [torch.Tensor.numpy, torch.Tensor.int, lambda t: t.t().contiguous().t()])
def test_arrays(make, tmp_path):
    d = dump(TinyModel(), make(tokens(12)), tmp_path, names_filter=HOOKS)
    assert torch.equal(d.token_ids[:], tokens(12).reshape(-1))


@pytest.mark.parametrize("how", ["array", "npy", "memmap"])
def test_a_stream_is_cut_and_not_read_into_memory(how, tmp_path):
    stream = tokens(12).reshape(-1)[:-3].numpy().astype(np.uint16)
    np.save(tmp_path / "x.npy", stream)
    source = {"array": stream, "npy": tmp_path / "x.npy", "memmap": np.load(tmp_path / "x.npy", mmap_mode="r")}[how]
    if how == "memmap":
        found = read_tokens(source, Directory(tmp_path), load_tokenizer=pytest.fail, context_size=CONTEXT)
        assert np.shares_memory(found.ids, source)
    with pytest.raises(ValueError, match="context_size="):
        dump(TinyModel(), source, tmp_path / "out", names_filter=HOOKS)
    d = dump(TinyModel(), source, tmp_path / "out", names_filter=HOOKS, context_size=CONTEXT, batch_size=1)
    batches = [(part[None],) for part in torch.tensor(stream.astype(int)).split(CONTEXT)]
    expected = hooked(TinyModel(), HOOKS[:1], batches)
    assert torch.equal(d[HOOKS[0]][:].to_dense(), expected[HOOKS[0]])
    assert d.positions[:].tolist() == [[0, i] for i in range(len(stream))]


class TestMasks:
    def test_array_and_function_agree(self, tmp_path):
        ids = tokens(50)
        by_array = dump(TinyModel(), ids, tmp_path / "a", names_filter=HOOKS, token_mask=ids > 20, shard_tokens=100)
        by_function = dump(
            TinyModel(), ids, tmp_path / "b", names_filter=HOOKS, token_mask=lambda x: x > 20, shard_tokens=100
        )
        keep = (ids > 20).reshape(-1)
        assert torch.equal(by_array.token_ids[:], ids.reshape(-1)[keep])
        assert torch.equal(by_function.token_ids[:], ids.reshape(-1)[keep])
        expected = hooked(TinyModel(), HOOKS[:1], [(batch,) for batch in ids.split(8)])[HOOKS[0]][keep]
        assert torch.equal(by_array[HOOKS[0]][:].to_dense(), expected)
        assert torch.equal(by_function[HOOKS[0]][:].to_dense(), expected)

    def test_batches_without_any_token(self, tmp_path):
        ids, mask = tokens(80), torch.zeros(80, CONTEXT, dtype=torch.bool)
        mask[20:24, 3] = mask[60, 0] = True
        model = TinyModel()
        d = dump(model, ids, tmp_path, names_filter=HOOKS, token_mask=mask, shard_tokens=2)
        assert d.n_tokens == 5 and d.positions[:].tolist() == [[20, 3], [21, 3], [22, 3], [23, 3], [60, 0]]
        assert model.forwards == 2
        d.verify()

    def test_a_function_is_asked_once(self, tmp_path):
        """So that one that draws lots has one answer."""
        rng = np.random.default_rng(0)
        d = dump(
            TinyModel(), tokens(40), tmp_path, names_filter=HOOKS, token_mask=lambda ids: rng.random(len(ids)) < 0.5
        )
        expected = np.random.default_rng(0).random((40, CONTEXT)) < 0.5
        assert torch.equal(d.token_ids[:], tokens(40)[torch.from_numpy(expected)])
        d.verify()

    @pytest.mark.parametrize(
        ("mask", "message"),
        [
            (torch.ones(4, CONTEXT - 1), "shaped like tokens"),
            (torch.ones(5, CONTEXT), "shaped like tokens"),
            (torch.zeros(4, CONTEXT), "no token to capture"),
            (lambda ids: ids[:-1] > 0, "one bool per token"),
            (lambda ids: np.arange(len(ids)), "must hold bools, or zeros and ones, got int64"),
            (lambda ids: ["x"] * len(ids), "must hold bools, or zeros and ones, got <U1"),
            (torch.full((4, CONTEXT), torch.nan), "must hold bools, or zeros and ones, got float32"),
        ],
    )
    def test_bad_masks(self, mask, message, tmp_path):
        with pytest.raises((ValueError, TypeError), match=message):
            dump(TinyModel(), tokens(4), tmp_path / "out", names_filter=HOOKS, token_mask=mask)
        assert not (tmp_path / "out").exists()


def test_a_model_by_its_name_is_loaded_onto_the_device(model_directory, monkeypatch):
    monkeypatch.setattr(arguments, "default_device", lambda: torch.device("meta"))
    module, name = arguments.load_model(model_directory)
    assert name == str(model_directory)
    assert {parameter.device.type for parameter in module.parameters()} == {"meta"}


@pytest.mark.parametrize(
    "environment, number",
    [({}, 0), ({"LOCAL_RANK": "3", "SLURM_LOCALID": "1"}, 3), ({"SLURM_LOCALID": "1"}, 1), ({"LOCAL_RANK": "5"}, 1)],
)
def test_the_device_is_the_gpu_of_the_local_rank(environment, number, monkeypatch):
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(arguments.cuda, "available", lambda: True)
    assert arguments.default_device() == torch.device("cuda", number)


def test_a_gpu_without_kernels_is_not_used_and_that_is_said(monkeypatch):
    assert torch.cuda.is_available() or arguments.default_device() == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(arguments.cuda, "available", lambda: False)
    with pytest.warns(UserWarning, match="runs on the CPU though there is a GPU.*PYFACTS_CUDA=ON"):
        assert arguments.default_device() == torch.device("cpu")


def test_a_model_that_does_not_fit_the_device(model_directory, monkeypatch):
    def refuse(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.nn.Module, "to", refuse)
    with pytest.raises(ValueError, match="does not fit cpu alone: load it yourself"):
        arguments.load_model(model_directory)


def test_relative_positions_have_no_end(tmp_path):
    """T5's `n_positions` is the length of what it was trained on."""
    model = t5(cls="T5EncoderModel", n_positions=8)
    d = dump(model, torch.randint(2, 40, (2, 20)), tmp_path / "out", allow_dense=True)
    assert d.n_tokens == 40


def test_positions_that_roberta_does_not_count(tmp_path):
    """Its positions begin behind padding's, so two of the table's are never a token's."""
    from transformers import RobertaConfig, RobertaModel

    sizes = {"vocab_size": VOCAB, "hidden_size": 8, "intermediate_size": 32, "num_attention_heads": 2}
    model = RobertaModel(RobertaConfig(**sizes, num_hidden_layers=1, max_position_embeddings=18, pad_token_id=1))
    assert arguments.max_context(model) == 16
    assert dump(model, torch.full((1, 16), 5), tmp_path / "out", allow_dense=True).n_tokens == 16
    with pytest.raises(ValueError, match="17 tokens, and the model takes 16 positions"):
        dump(model, torch.full((1, 17), 5), tmp_path / "longer", allow_dense=True)


def test_a_model_that_is_offloaded(tmp_path):
    """Its own parameters are on the meta device until they are needed."""
    from accelerate import cpu_offload

    ids = torch.randint(2, 40, (3, 9))
    plain = dump(opt(), ids, tmp_path / "plain")
    offloaded = dump(cpu_offload(opt(), execution_device=torch.device("cpu")), ids, tmp_path / "offloaded")
    for hook in plain.hook_names:
        assert torch.equal(plain[hook][:].to_dense(), offloaded[hook][:].to_dense())


@pytest.mark.parametrize("kind", ["BatchEncoding", "dict", "lists"])
def test_what_a_tokenizer_returned(kind, tokenizer, ids, tmp_path):
    """Its padding is no token."""
    tokenizer.pad_token = "<unk>"
    batch = tokenizer(DOCUMENTS, padding=True, return_tensors=None if kind == "lists" else "pt")
    found = read(batch if kind != "dict" else dict(batch), tmp_path)
    assert [found._ids(i).tolist() for i in range(found.n_sequences)] == ids


def test_a_token_mask_shaped_like_what_a_tokenizer_returned(tmp_path):
    """Padding included; a single text comes without a list around it."""
    padded = {"input_ids": [[2, 4, 6, 8], [5, 7, 0, 0]], "attention_mask": [[1, 1, 1, 1], [1, 1, 0, 0]]}
    single = {"input_ids": [2, 4, 6, 8], "attention_mask": [1, 1, 1, 0]}

    def captured(source, mask):
        found = read_tokens(source, Directory(tmp_path), load_tokenizer=pytest.fail, token_mask=mask)
        batch = found.batch(0, found.n_sequences)
        return batch.ids[batch.captured].tolist(), batch.position.tolist()

    mask = [[1, 0, 0, 1], [0, 1, 1, 1]]
    for form in (mask, np.array(mask), torch.tensor(mask).bool()):
        assert captured(padded, form) == ([2, 8, 7], [0, 3, 1])
    assert captured(single, None) == ([2, 4, 6], [0, 1, 2])
    assert captured(single, [0, 1, 1, 1]) == ([4, 6], [1, 2])
    with pytest.raises(ValueError, match=r"token_mask must be shaped like tokens\['attention_mask'\], padding"):
        captured(padded, [[1, 1, 1, 1], [1, 1]])


def test_a_streaming_data_set_after_a_map(ids, tmp_path):
    """It does not know its columns; and a number called `tokens` is no document."""
    import datasets

    rows = datasets.Dataset.from_list([{"input_ids": row, "tokens": len(row)} for row in ids])
    stream = rows.to_iterable_dataset().map(lambda row: row)
    found = read(stream, tmp_path)
    assert [found._ids(i).tolist() for i in range(found.n_sequences)] == ids
    lines = tmp_path / "rows.jsonl"
    lines.write_text("".join(json.dumps({"tokens": len(row), "token_ids": row}) + "\n" for row in ids))
    assert read(lines, tmp_path).length.tolist() == [len(row) for row in ids]


class TestBadInput:
    @pytest.mark.parametrize("argument", ["batch_size", "shard_tokens", "context_size"])
    @pytest.mark.parametrize(("value", "error"), [(2.5, TypeError), ("8", TypeError), (0, ValueError)])
    def test_sizes(self, argument, value, error, tmp_path):
        with pytest.raises(error, match=f"{argument} must be"):
            dump(TinyModel(), tokens(4), tmp_path / "out", HOOKS, **{argument: value})
        assert not (tmp_path / "out").exists()

    def test_sizes_beyond_all_others(self, tmp_path):
        plain = dump(TinyModel(), tokens(4), tmp_path / "a", HOOKS)
        huge = {"batch_size": 10**30, "shard_tokens": 10**30, "context_size": 10**30}
        d = dump(TinyModel(), tokens(4), tmp_path / "b", HOOKS, **huge)
        assert torch.equal(d[HOOKS[0]][:].to_dense(), plain[HOOKS[0]][:].to_dense())
        assert d.contexts(HOOKS[0], int(d[HOOKS[0]].feature_stats().nnz.argmax()))

    def test_more_tokens_than_a_shard_can_have(self, monkeypatch, tmp_path):
        hook, n = HookSpec("x" * 200, "", "input", 1, "neurons", "float32"), layout.MAX_SHARD_TOKENS

        def room(n_blocks):
            tensors = layout.hook_file(hook, [None] * n_blocks, "none", lossy=True)
            metadata = layout.metadata(hook, [n] * n_blocks, "none", True, n)
            return header_room(((t.name, t.dtype, len(t.shape)) for t in tensors), metadata)

        each, digits = (room(1100) - room(1000)) / 100, 13  # of a block, with four digits in each tensor's name
        assert room(0) + layout.max_blocks(n) * (each + digits) < MAX_HEADER_BYTES
        monkeypatch.setattr(layout, "MAX_SHARD_TOKENS", 100)
        with pytest.raises(ValueError, match="a shard would have 640 tokens, and can have 100: give a smaller"):
            dump(TinyModel(), tokens(40), tmp_path / "out", HOOKS)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("out", "message"), [("", "address is empty"), (Path("s3://bucket/out"), "give it as a str")]
    )
    def test_no_directory(self, out, message, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ValueError, match=message):
            dump(TinyModel(), tokens(4), out, HOOKS)
        assert not list(tmp_path.iterdir())

    def test_a_name_that_no_file_can_have(self, tmp_path):
        model = nn.ModuleDict({"層" * 40: nn.Linear(4, 4)})
        with pytest.raises(ValueError, match="is too long: its file's name would have 372 bytes, and may have 251"):
            dump(model, tokens(4), tmp_path / "out", "層" * 40)

    def test_sizes_of_numpy_and_a_select_that_is_none(self, tmp_path):
        assert dump(TinyModel(), tokens(4), tmp_path / "out", HOOKS, batch_size=np.int64(2)).complete
        with pytest.raises(TypeError, match="select must be"):
            dump(TinyModel(), tokens(4), tmp_path / "out", HOOKS, select=5)

    def test_a_mapping_of_one_text_is_one_document(self):
        assert list(documents.read_documents({"text": "w1 w2"})) == ["w1 w2"]
        assert list(documents.read_documents({"text": ["w1", "w2"]})) == ["w1", "w2"]

    @pytest.mark.parametrize("kind", ["pandas", "arrow", "file"])
    def test_tables_and_open_files(self, kind, tmp_path):
        """Iterating over them gives the names of columns, and lines."""
        import pandas
        import pyarrow

        (tmp_path / "x.txt").write_text("w1")
        with open(tmp_path / "x.txt") as file:
            make = {"pandas": pandas.DataFrame, "arrow": pyarrow.table}.get(kind, lambda columns: file)
            with pytest.raises(TypeError, match="tokens: of an? .* give the"):
                read(make({"text": ["w1"]}), tmp_path)
        if kind != "file":  # what the message advises
            for column in (make({"text": ["w1", "w2 w3"]})["text"], {"text": make({"text": ["w1", "w2 w3"]})["text"]}):
                assert list(documents.read_documents(column)) == ["w1", "w2 w3"]
            assert read(make({"ids": [[5, 6], [7]]})["ids"], tmp_path).ids.tolist() == [5, 6, 7]
            with pytest.raises(ValueError, match="is Arrow's"):
                read(iter(pyarrow.array(["w1"])), tmp_path)

    def test_a_disk_that_cannot_hold_the_tokens(self, tmp_path):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        documents = ([1] * 1000 for _ in range(100))
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            with pytest.raises(DumpError, match="cannot be written: .*the same call resumes"):
                read(documents, tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("kind", ["mapping", "arrow", "jsonl", "parquet", "data set", "stream"])
    @pytest.mark.parametrize("beside", [[2, 1], [["w1", "w2"], ["w3"]]], ids=["numbers", "strings"])
    def test_tokens_beside_texts_that_are_no_ids(self, tmp_path, kind, beside):
        """A column `tokens` may say how many each text has, or what they look like."""
        import datasets
        import pyarrow
        import pyarrow.parquet

        columns = {"text": ["w1 w2", "w3"], "tokens": beside}
        table = pyarrow.table(columns)
        pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
        (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
        data_set = datasets.Dataset.from_dict(columns)
        source = {
            "mapping": columns,
            "arrow": {name: table[name] for name in columns},
            "jsonl": tmp_path / "x.jsonl",
            "parquet": tmp_path / "x.parquet",
            "data set": data_set,
            "stream": data_set.to_iterable_dataset(),
        }[kind]
        assert list(documents.read_documents(source)) == columns["text"]

    def test_texts_that_parquet_keeps_in_a_dictionary(self, tmp_path):
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.table({"text": pyarrow.array(["w1 w2", "w3", "w3"]).dictionary_encode()})
        pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
        assert list(documents.read_documents(tmp_path / "x.parquet")) == ["w1 w2", "w3", "w3"]

    @pytest.mark.parametrize("dtype", [object, str])
    def test_an_array_of_texts(self, tmp_path, tokenizer, ids, dtype):
        read_texts = read_tokens(np.array(DOCUMENTS, dtype), Directory(tmp_path), load_tokenizer=lambda: tokenizer)
        assert read_texts.ids.tolist() == [token for document in ids for token in document]

    @pytest.mark.parametrize(
        ("document", "message"),
        [
            ({"text": "w1"}, "document 1 must be text or token ids, got dict with text: give one of these"),
            (None, "NoneType"),
        ],
    )
    def test_documents_that_are_none(self, tmp_path, document, message):
        with pytest.raises(ValueError, match=message):
            read([[1], document], tmp_path)

    def test_a_byte_order_mark(self, tmp_path):
        (tmp_path / "x.jsonl").write_text('{"text": "w1"}', encoding="utf-8-sig")
        assert list(documents.read_documents(tmp_path / "x.jsonl")) == ["w1"]

    def test_one_text_beside_its_ids(self):
        assert list(documents.read_documents({"text": "w1 w2", "input_ids": [1, 2]})) == [[1, 2]]
        assert list(documents.read_documents({"text": None, "input_ids": [1, 2]})) == [[1, 2]]
        assert list(documents.read_documents({"text": "w1 w2", "tokens": 2})) == ["w1 w2"]
        assert list(documents.read_documents({"text": "w1 w2", "tokens": ["w1", "w2"]})) == ["w1 w2"]
        assert list(documents.read_documents({"tokens": ["w1 w2", "w3"]})) == ["w1 w2", "w3"]

    def test_a_home_directory(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        np.save(tmp_path / "ids.npy", np.zeros((3, 4), dtype=np.int64))
        assert dump(TinyModel(), "~/ids.npy", "~/out", names_filter=HOOKS).complete
        assert open_dump("~/out").n_tokens == 12 and (tmp_path / "out" / "dump.json").exists()

    def test_a_mapping_of_something_else(self, tmp_path):
        with pytest.raises(ValueError, match=r"the mapping has the fields train, test; one of input_ids"):
            read({"train": [[1]], "test": [[2]]}, tmp_path)

    @pytest.mark.parametrize(
        ("source", "error", "message"),
        [
            (torch.rand(3, 4), TypeError, "integers.*float32"),
            (torch.zeros(2, 3, 4, dtype=torch.int64), ValueError, r"\(2, 3, 4\)"),
            (torch.zeros(0, 4, dtype=torch.int64), ValueError, "empty"),
            ([], ValueError, "empty"),
            ([[], []], ValueError, "empty"),
            ([[1, 2], [0.5]], ValueError, "document 1"),
            ([[1, 2], [[3]]], ValueError, "document 1"),
            ([[1, -2]], ValueError, "-2"),
            ([[1, 1 << 40]], ValueError, "1099511627776"),
            (np.array([[1, 1 << 63]], np.uint64), ValueError, "9223372036854775808, which no vocabulary has"),
            (["some text"], ValueError, "tokenizer"),
            ({"input_ids": [[-4294967291, 7]]}, ValueError, "-4294967291"),
            ({"input_ids": [[1, 2, 3]], "attention_mask": [[1, 1]]}, ValueError, "must be shaped like"),
            (7, TypeError, "int"),
            ("nowhere.jsonl", ValueError, "nowhere"),
        ],
    )
    def test_tokens(self, source, error, message, tmp_path):
        with pytest.raises(error, match=message):
            dump(TinyModel(), source, tmp_path / "out", names_filter=HOOKS)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("x.txt", "", "x.txt is empty"),
            ("x.jsonl", "\n", "is empty"),
            ("x.jsonl", '{"text": "w1"}\n{"text": ', "line 2 .* no JSON"),
            ("x.jsonl", "[1]", "no JSON object"),
            ("x.jsonl", '{"body": "w1"}', "fields body; one of .*text"),
            ("x.csv", "1,2", "unknown kind"),
            ("x.jsonl", '{"text": "w1"}\n\n{"text": null}', r"'text' is null in line 3 of .*x\.jsonl"),
            ("x.jsonl", '{"text": "w1 é"}', r"x\.jsonl is not in UTF-8"),
            ("x.txt", "w1 é", r"x\.txt is not in UTF-8"),
            ("x.jsonl", '{"input_ids": [1, 2, 3], "attention_mask": [1, 1]}', r"a row of 3 ids has .* of \(2,\)"),
            ("x.jsonl", '{"input_ids": [1, 2, 3], "attention_mask": 1}', r"a row of 3 ids has .* of \(\)"),
            ("x.jsonl", '{"input_ids": [[1, 2], [3]]}', r"document 0 .* flat list of token ids, got shape \(2,\)"),
            ("x.npy", "", r"x\.npy is no array"),
        ],
    )
    def test_files(self, name, content, message, tokenizer, tmp_path):
        (tmp_path / name).write_text(content, encoding="latin-1")
        with pytest.raises(ValueError, match=message):
            dump(opt(), tmp_path / name, tmp_path / "out", tokenizer=tokenizer)
        assert not (tmp_path / "out").exists()

    def test_a_directory_of_splits(self, tmp_path):
        import datasets

        split = datasets.Dataset.from_dict({"input_ids": [[1]]})
        datasets.DatasetDict({"train": split}).save_to_disk(str(tmp_path / "s"))
        with pytest.raises(ValueError, match="splits train"):
            dump(opt(), tmp_path / "s", tmp_path / "out")

    def test_token_ids_beyond_the_vocabulary(self, tmp_path):
        with pytest.raises(ValueError, match="token id 50 is beyond the model's vocabulary of 50"):
            dump(opt(), [[1, 50]], tmp_path / "out")

    def test_padding_for_a_model_without_attention_mask(self, tmp_path):
        with pytest.raises(ValueError, match="batch_size=1"):
            dump(TinyModel(), [[1, 2, 3], [4]], tmp_path / "out", names_filter=HOOKS)
        assert dump(TinyModel(), [[1, 2, 3], [4]], tmp_path / "out", names_filter=HOOKS, batch_size=1).n_tokens == 4

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"codec": "gzip"}, "none, zstd, split"),
            ({"batch_size": 0}, "batch_size"),
            ({"shard_tokens": 0}, "shard_tokens"),
            ({"context_size": 0}, "context_size"),
            ({"names_filter": "layers.0.downn"}, "layers.0.down"),
        ],
    )
    def test_arguments(self, arguments, message, tmp_path):
        with pytest.raises(ValueError, match=message):
            dump(TinyModel(), tokens(4), tmp_path / "out", **{"names_filter": HOOKS} | arguments)
        assert not (tmp_path / "out").exists()

    def test_a_model_that_is_none(self, tmp_path):
        with pytest.raises(TypeError, match="nn.Module"):
            dump(3, tokens(4), tmp_path / "out")

    def test_a_decoder_with_tokens_of_its_own(self, tmp_path):
        from tiny_models import t5

        with pytest.raises(ValueError, match=r"decoder_blocks.*one stream"):
            dump(t5(), [[1, 2]], tmp_path / "out")
        d = dump(t5(), [[1, 2]], tmp_path / "out", names_filter=lambda name: name == "encoder_blocks.0.mlp.hook_post")
        assert d.n_tokens == 2


def test_lists_of_ids_are_not_cut_unasked(tmp_path):
    """As arrays are not; text alone is cut to what the model takes."""
    with pytest.raises(ValueError, match="70 tokens, and the model takes 64 positions"):
        dump(opt(), [[5] * 70], tmp_path / "out", allow_dense=True)


def test_padding_in_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"input_ids": [[5, 6, 0], [7, 0, 0]], "attention_mask": [[1, 1, 0], [1, 0, 0]]})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    source = read_tokens(tmp_path / "x.parquet", Directory(tmp_path), load_tokenizer=pytest.fail)
    assert source.ids.tolist() == [5, 6, 7]
