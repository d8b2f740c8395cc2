"""A directory that holds another dump, or the same: what a plan compares, and with what a dump goes on."""

import pytest
import torch
from dump_models import (  # noqa: F401
    ARGUMENTS,
    CONTEXT,
    HOOKS,
    N_SEQUENCES,
    TinyModel,
    committed_bytes,
    one_thread,
    raise_at,
    resume,
    tokens,
)
from tiny_models import opt
from torch import nn

import pyfacts
from pyfacts.dump import DumpError, fingerprint, open_dump, run
from pyfacts.dump.fingerprint import weights_xxh3
from pyfacts.dump.inputs import read_tokens
from pyfacts.dump.run import dump
from pyfacts.dump.store import Directory
from pyfacts.select import topk


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"codec": "none"}, "codec"),
        ({"batch_size": 4}, "batch_size"),
        ({"shard_tokens": 4999}, "shard"),
        ({"select": topk(3)}, "select"),
        ({"token_mask": torch.arange(CONTEXT).expand(N_SEQUENCES, CONTEXT) > 0}, "tokens"),
    ],
)
def test_arguments(changes, field, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        resume(tmp_path, progress=raise_at(1, KeyboardInterrupt))
    with pytest.raises(DumpError, match=rf"another dump: {field}\S* is .* there and .* here; .*resume"):
        resume(tmp_path, **changes)


def test_hooks(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        resume(tmp_path, progress=raise_at(1, KeyboardInterrupt))
    for hooks, message in (
        (HOOKS[:1], "of its hooks layers.1.down are missing here, and none are new;"),
        ([*HOOKS, "layers.0.up"], "of its hooks none are missing here, and layers.0.up are new;"),
        ([HOOKS[0], "layers.0.up"], r"hooks\[\d\]"),
    ):
        with pytest.raises(DumpError, match=f"another dump: {message}.*resume"):
            resume(tmp_path, names_filter=hooks)


def test_tokens_weights_and_dtype(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        resume(tmp_path, progress=raise_at(1, KeyboardInterrupt))
    changed = TinyModel()
    with torch.no_grad():
        changed.layers[1].up.bias[3] += 1
    ids = tokens(N_SEQUENCES)
    for model, other, field in [
        (TinyModel(), tokens(N_SEQUENCES, seed=1), r"tokens\.xxh3"),
        (changed, ids, r"model\.weights_xxh3"),
        (TinyModel(dtype=torch.float32), ids, r"model\."),
    ]:
        with pytest.raises(DumpError, match=f"another dump: {field}"):
            dump(model, other, tmp_path, **ARGUMENTS)


def test_weights_whose_names_differ_by_a_wrapper_alone(tmp_path):
    """Of `weight` and `module.weight` neither is left out of the hash."""
    one, other = nn.Module(), nn.Module()
    for model, value in ((one, 0.0), (other, 1.0)):
        model.module = nn.Linear(3, 3, bias=False)
        nn.init.zeros_(model.module.weight)
        model.weight = nn.Parameter(torch.full((3, 3), value))
    assert weights_xxh3(one.state_dict()) != weights_xxh3(other.state_dict())


def test_a_wrapped_model_is_the_same_model(undisturbed, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        resume(tmp_path, progress=raise_at(6000, KeyboardInterrupt))
    dump(torch.nn.DataParallel(TinyModel()), tokens(N_SEQUENCES), tmp_path, **ARGUMENTS)
    assert committed_bytes(tmp_path) == undisturbed


def test_a_record_of_another_dump_is_refused(tmp_path):
    dump(TinyModel(), tokens(20), tmp_path / "a", names_filter=HOOKS)
    dump(TinyModel(), tokens(20, seed=1), tmp_path / "b", names_filter=HOOKS)
    (tmp_path / "a/dump.json").write_bytes((tmp_path / "b/dump.json").read_bytes())
    with pytest.raises(DumpError, match=r"00000\.json: belongs to another plan"):
        open_dump(tmp_path / "a")


def test_another_configuration_of_the_same_weights(tmp_path):
    ids = torch.randint(2, 40, (4, 9))
    dump(opt(), ids, tmp_path, allow_dense=True)
    gelu, eager = opt(activation_function="gelu"), opt(attn_implementation="eager")
    for model, field in ((gelu, r"model\.config\.activation_function"), (eager, r"model\.attention")):
        with pytest.raises(DumpError, match=f"another dump: {field}"):
            dump(model, ids, tmp_path, allow_dense=True)


def test_buffers_are_part_of_the_model(tmp_path):
    def buffered(value):
        model = TinyModel()
        model.register_buffer("shift", torch.tensor(value))
        return model

    dump(buffered(0.0), tokens(8), tmp_path, names_filter=HOOKS)
    with pytest.raises(DumpError, match=r"another dump: model\.weights_xxh3"):
        dump(buffered(1.0), tokens(8), tmp_path, names_filter=HOOKS)


def test_what_the_hash_of_weights_covers():
    w = torch.arange(6.0)
    hashes = {
        weights_xxh3(tensors)
        for tensors in ({"a": w}, {"b": w}, {"a": w.view(2, 3)}, {"a": w.view(torch.int32)}, {"a": w[:3], "b": w[3:]})
    }
    assert len(hashes) == 5
    for absent in (w.to("meta"), w.to_sparse()):
        assert weights_xxh3({"a": w, "b": absent}) is None


def test_what_an_ablation_sets_is_compared(tmp_path):
    model, ids = TinyModel(), tokens(8)

    def run(hook, indices, values):
        with pyfacts.ablate(model, {hook: indices}, values):  # a finished dump need not reach it
            return dump(model, ids, tmp_path, names_filter=HOOKS)

    run(HOOKS[0], [1, 2], [5.0, 6.0])
    assert run(HOOKS[0], [2, 1], [6.0, 5.0]).complete  # the same in another order
    for hook, values in ((HOOKS[0], [6.0, 5.0]), (f"{HOOKS[0]}:output", [5.0, 6.0])):
        with pytest.raises(DumpError, match=r"another dump: model\.ablated"):
            run(hook, [1, 2], values)


@pytest.mark.parametrize("what", ["mask", "lengths", "documents", "positions"])
def test_the_fingerprint_of_tokens_covers(what, tmp_path):
    def survey(source, **arguments):
        return read_tokens(source, Directory(tmp_path), load_tokenizer=pytest.fail, **arguments).survey().xxh3

    one, other = {
        "mask": (([[1, 2, 3]], {"token_mask": [[1, 0, 1]]}), ([[1, 2, 3]], {"token_mask": [[1, 1, 0]]})),
        "lengths": (([[1, 2], [3, 4, 5]], {}), ([[1, 2, 3], [4, 5]], {})),
        "documents": (([[1, 2], [], [3]], {}), ([[1, 2], [3]], {})),
        "positions": (([[1, 2], [3, 4, 5, 6]], {"context_size": 2}), ([[1, 2, 3, 4], [5, 6]], {"context_size": 2})),
    }[what]
    assert survey(one[0], **one[1]) != survey(other[0], **other[1])


def test_a_newer_version_goes_on(undisturbed, tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        resume(tmp_path, progress=raise_at(7000, KeyboardInterrupt))
    monkeypatch.setattr(run, "__version__", "9.9")
    resume(tmp_path)
    assert committed_bytes(tmp_path) == undisturbed


def test_a_model_directory_that_was_renamed(tmp_path):
    ids = torch.randint(2, 40, (4, 9))
    opt().save_pretrained(tmp_path / "model")
    d = dump(tmp_path / "model", ids, tmp_path / "out", allow_dense=True)
    (tmp_path / "model").rename(tmp_path / "renamed")
    assert dump(tmp_path / "renamed", ids, tmp_path / "out", allow_dense=True).plan == d.plan


@pytest.mark.parametrize("weights", ["here", "sharded", "with code"])
def test_a_model_of_another_revision(weights, tmp_path, monkeypatch):
    """Which may be a matter of its README, or of a copy on the disk; its weights tell, if all of them are here."""
    if weights == "sharded":
        monkeypatch.setattr(fingerprint, "weights_xxh3", lambda tensors: None)
    model, ids = opt(), torch.randint(2, 40, (4, 9))
    if weights == "with code":
        model.config.auto_map = {"AutoModel": "modeling.Opt"}
    model.config._commit_hash = "0123abcd"
    dump(model, ids, tmp_path, allow_dense=True)
    model.config._commit_hash = None
    if weights == "here":
        assert dump(model, ids, tmp_path, allow_dense=True).plan["model"]["revision"] == "0123abcd"
    else:
        with pytest.raises(DumpError, match=r"another dump: model\.revision"):
            dump(model, ids, tmp_path, allow_dense=True)


def test_a_width_that_only_the_first_batch_tells(tmp_path):
    hooks = ["layers.1"]
    with pytest.raises(KeyboardInterrupt):
        resume(tmp_path, names_filter=hooks, allow_dense=True, progress=raise_at(1, KeyboardInterrupt))
    assert resume(tmp_path, names_filter=hooks, allow_dense=True)["layers.1"].width == 8


def test_a_dtype_that_changes_on_the_way(tmp_path):
    """Committed under the dtype of the plan, its bits would be read as other numbers."""

    class Turning(TinyModel):
        def forward(self, ids):
            if self.forwards == 3:
                self.to(torch.float16)
            return super().forward(ids)

    with pytest.raises(DumpError, match="has dtype float16 now, the dump was begun with bfloat16"):
        dump(Turning(), tokens(80), tmp_path, names_filter=HOOKS, batch_size=8)
    assert not list(tmp_path.glob("0*"))


def test_a_plan_alone_may_be_deleted(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        resume(tmp_path, progress=raise_at(1, KeyboardInterrupt))
    with pytest.raises(DumpError, match="no committed shard yet"):
        resume(tmp_path, batch_size=4)
    with pytest.raises(KeyboardInterrupt):
        resume(tmp_path, progress=raise_at(5121, KeyboardInterrupt))
    with pytest.raises(DumpError) as caught:
        resume(tmp_path, batch_size=4)
    assert "no committed shard" not in str(caught.value)
