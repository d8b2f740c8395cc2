"""The demos' own steps on small sizes, and, marked slow, the bounds that `pyfacts demo` shows on three seeds."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch

import pyfacts
from pyfacts.demo import common, corpus, facts, text
from pyfacts.dump.run import dump

HOOK = facts.HOOK


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, facts.Recall]:
    """The whole facts demo with few steps: it recalls little, but everything runs and is written."""
    out = tmp_path_factory.mktemp("facts")
    return out, facts.run(out, seed=3, settings=facts.Settings(n_steps=20, d_mlp=40, batch=64))


def test_corpus_needs_both_names() -> None:
    """256 different athletes, 16 to a sport, and no name belongs to one athlete alone."""
    made = corpus.make_corpus(seed=0)
    prompts = [line.split()[:2] for line, kind in zip(made.text, made.kind, strict=True) if kind == "sport"]
    assert len({tuple(pair) for pair in prompts}) == 256
    for names in zip(*prompts, strict=True):
        assert np.unique(names, return_counts=True)[1].min() > 1
    for kind in corpus.RELATIONS:
        assert (made.kind == kind).sum() == 256
    assert set(np.unique(made.answer[made.kind == "sport"], return_counts=True)[1]) == {16}
    assert not np.array_equal(made.answer, corpus.make_corpus(seed=1).answer)


def test_tokenizer_gives_text_and_answers_back() -> None:
    made, tokenizer = corpus.make_corpus(seed=0), corpus.make_tokenizer()
    rows = torch.arange(len(made.ids))
    answers = [tokenizer.decode(i).strip() for i in made.ids[rows, made.answer_at]]
    assert answers == made.answer.tolist()
    assert [tokenizer.decode(ids).removeprefix(corpus.BOS).strip() for ids in made.ids] == made.text


def test_facts_demo_writes_what_it_says(small: tuple[Path, facts.Recall], capsys: pytest.CaptureFixture[str]) -> None:
    """A second run takes the checkpoint and the dump of the first and comes to the same figures."""
    out, recall = small
    dumped = {path: path.stat().st_mtime_ns for path in (out / "facts" / "dump").rglob("*")}
    again = facts.run(out, seed=3, settings=facts.Settings(n_steps=20, d_mlp=40, batch=64))
    assert {path: path.stat().st_mtime_ns for path in (out / "facts" / "dump").rglob("*")} == dumped
    np.testing.assert_array_equal(again.own, recall.own)
    printed = capsys.readouterr().out
    assert "earlier run" in printed and "facts.png" in printed
    assert (out / "facts" / "facts.png").read_bytes().startswith(b"\x89PNG")
    d = pyfacts.open_dump(out / "facts" / "dump")
    assert d.complete and d.n_tokens == corpus.make_corpus(3).ids.numel()


def test_another_seed_replaces_model_and_dump(tmp_path: Path) -> None:
    made = []

    def make(path: Path) -> None:
        path.mkdir()
        made.append(path)

    for seed in (0, 0, 1):
        assert common.checkpoint(tmp_path, {"seed": seed}, make) == tmp_path / "model"
        (tmp_path / "dump").mkdir(exist_ok=True)
        (tmp_path / "dump" / str(seed)).touch()
    assert len(made) == 2
    assert [path.name for path in (tmp_path / "dump").iterdir()] == ["1"]


def test_a_broken_off_training_is_made_again(tmp_path: Path) -> None:
    def break_off(path: Path) -> None:
        path.mkdir()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        common.checkpoint(tmp_path, {}, break_off)
    assert common.checkpoint(tmp_path, {}, Path.mkdir).is_dir()


def test_mean_activations_are_those_of_the_prompts(small: tuple[Path, facts.Recall]) -> None:
    out, _ = small
    made = corpus.make_corpus(3)
    found = facts.mean_activations(pyfacts.open_dump(out / "facts" / "dump"), made)
    model = common.load(out / "facts" / "model")
    with common.plain_hooks(model) as neurons, torch.inference_mode():
        model(made.ids)
        dense = neurons[HOOK].reshape(*made.ids.shape, -1)
    for sport, row in zip(corpus.SPORTS, found, strict=True):
        asked = torch.from_numpy((made.kind == "sport") & (made.answer == sport))
        np.testing.assert_allclose(row, dense[asked, 3].mean(0), rtol=1e-4, atol=1e-6)


def test_specific_takes_off_half_of_what_other_sports_share() -> None:
    activation = np.array([[1.0, 3.0, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 6.0]])
    expected = [[0.5, 3, -1.5], [0.5, -0.75, -1.5], [0.5, -0.75, 6]]
    np.testing.assert_allclose(facts.specific(activation), expected)


def test_logit_attribution_is_the_change_of_the_logits(small: tuple[Path, facts.Recall]) -> None:
    """Against the model itself: raise a neuron a little after the norm is frozen, and look at the sports' logits."""
    model = common.load(small[0] / "facts" / "model")
    decoder = model.model.decoder
    tokens = corpus.make_tokenizer().convert_tokens_to_ids([f"Ġ{sport}" for sport in corpus.SPORTS])
    with torch.no_grad():
        norm = decoder.final_layer_norm
        column = decoder.layers[0].fc2.weight[:, 7]
        x = torch.randn(column.shape, generator=torch.Generator().manual_seed(0))

        def logits(residual: torch.Tensor) -> torch.Tensor:
            """With the norm's division left out."""
            return model.lm_head.weight[tokens] @ ((residual - residual.mean()) * norm.weight + norm.bias)

        change = logits(x + column) - logits(x)
    np.testing.assert_allclose(facts.logit_attribution(model)[:, 7], change - change.mean(), rtol=1e-3, atol=1e-5)


def test_measure_ablates_what_it_is_given(small: tuple[Path, facts.Recall]) -> None:
    """With nothing to ablate nothing changes, and with every neuron gone recall is that of the model without an MLP."""
    made, model = corpus.make_corpus(3), common.load(small[0] / "facts" / "model")
    before = facts.recalled(model, made)
    untouched = facts.measure(model, made, {sport: [] for sport in corpus.SPORTS}, seed=0)
    np.testing.assert_array_equal(untouched.own, untouched.before)
    np.testing.assert_allclose(untouched.before.mean(), before[made.kind == "sport"].mean())
    gone = facts.measure(model, made, {sport: list(range(40)) for sport in corpus.SPORTS}, seed=0)
    with torch.no_grad():
        model.model.decoder.layers[0].fc2.weight.zero_()
    np.testing.assert_allclose(gone.own.mean(), facts.recalled(model, made)[made.kind == "sport"].mean())


def test_a_difference_from_plain_hooks_is_found(small: tuple[Path, facts.Recall]) -> None:
    d = pyfacts.open_dump(small[0] / "facts" / "dump")
    model = common.load(small[0] / "facts" / "model")
    ids = list(corpus.make_corpus(3).ids)
    n_values, dense_bytes = common.verify_round_trip(model, d, ids, facts.DUMP_BATCH)
    assert n_values == d.n_tokens * 40 and dense_bytes == 4 * n_values
    with torch.no_grad():
        model.model.decoder.layers[0].fc1.bias[3] += 1e-3
    with pytest.raises(RuntimeError, match="differs from plain PyTorch hooks"):
        common.verify_round_trip(model, d, ids, facts.DUMP_BATCH)


def test_text_demo_shows_five_neurons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a tenth of the text, hardly trained: five neurons of the dump, each context with its firing token marked."""
    write_corpus = text.write_corpus

    def write_a_part(path: Path) -> None:
        write_corpus(path)
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:8]))

    monkeypatch.setattr(text, "write_corpus", write_a_part)
    monkeypatch.setattr(text, "BATCH", 2)
    shown = text.run(tmp_path, n_steps=4)
    assert shown["picture"].read_bytes().startswith(b"\x89PNG")
    d = pyfacts.open_dump(shown["dump"])
    assert len(set(shown["neurons"])) == 5 and d[HOOK].width == text.D_MLP
    tokenizer = text.load_tokenizer(tmp_path / "text" / "model")
    for j in shown["neurons"]:
        for line, (token, value) in zip(text.context_lines(d, tokenizer, j), d[HOOK].top_tokens(j, 5), strict=True):
            marked = " ".join(tokenizer.decode([int(d.token_ids[token])]).split("\n"))
            assert f"«{marked}»" in line and f"{value:.2f}" in line


def test_text_demo_dumps_every_token(tmp_path: Path) -> None:
    """The corpus is CPython's documentation, whole."""
    from pydoc_data.topics import topics

    text.write_corpus(tmp_path / "corpus.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "corpus.jsonl").read_text().splitlines()]
    assert {line["topic"]: line["text"] for line in lines} == topics


@pytest.fixture
def dumped(tmp_path):
    model = tiny_models.opt()
    with torch.no_grad():
        model.model.decoder.layers[0].fc1.bias[3] = 10
    ids = torch.randint(2, 40, (6, 9), generator=torch.Generator().manual_seed(0))
    return model, dump(model, ids, tmp_path / "out", batch_size=4, allow_dense=True), list(ids)


def test_the_proof_is_bit_for_bit_and_of_every_token(dumped):
    model, d, ids = dumped
    common.verify_round_trip(model, d, ids, 4)
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(RuntimeError, match="54 tokens, 36 were compared"):
        common.verify_round_trip(model, d, ids[:4], 4)
    bias = model.model.decoder.layers[0].fc1.bias
    with torch.no_grad():
        bias[3] = torch.nextafter(bias[3], bias[3] + 1)
    with pytest.raises(RuntimeError, match="differs from plain PyTorch hooks"):
        common.verify_round_trip(model, d, ids, 4)


def test_the_proof_reads_every_checksum(dumped):
    model, d, ids = dumped
    (path,) = d.path.rglob("tokens.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(pyfacts.DumpError):
        common.verify_round_trip(model, pyfacts.open_dump(d.path), ids, 4)


def test_a_broken_off_training_with_other_settings(tmp_path):
    """Does not leave its model under the settings of the one before."""

    def break_off(path: Path) -> None:
        path.mkdir()
        raise KeyboardInterrupt

    made = []
    common.checkpoint(tmp_path, {"seed": 0}, Path.mkdir)
    with pytest.raises(KeyboardInterrupt):
        common.checkpoint(tmp_path, {"seed": 1}, break_off)
    common.checkpoint(tmp_path, {"seed": 0}, lambda path: made.append(path))
    assert made


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_facts_demo_keeps_its_bounds(tmp_path: Path, seed: int) -> None:
    recall = facts.run(tmp_path, seed=seed)
    assert recall.out_of_bounds() == []
