"""`pyfacts.ablate` against models whose weights were changed to the same effect."""

import copy
from typing import NamedTuple

import numpy as np
import pytest
import tiny_models as tiny
import torch
from torch import nn

import pyfacts

pytestmark = pytest.mark.filterwarnings("ignore:the captured neurons are")

HOOK = "blocks.1.mlp.hook_post"


@pytest.fixture
def model():
    return tiny.opt()


def logits(model):
    with torch.no_grad():
        return model(tiny.tokens()).logits


def test_zero_is_as_if_the_down_weights_were_zero(model):
    """For a neuron, ablation and a zeroed column of the down-projection are the same."""
    with pyfacts.capture(model, HOOK) as cache:
        plain = logits(model)
    busiest = cache[HOOK].to_dense().sum(0).topk(2).indices
    other = copy.deepcopy(model)
    other.model.decoder.layers[1].fc2.weight.data[:, busiest] = 0
    with pyfacts.ablate(model, {HOOK: busiest.tolist()}):
        torch.testing.assert_close(logits(model), logits(other))
        assert not torch.equal(logits(model), plain)
    assert torch.equal(logits(model), plain)  # and it comes off


def test_another_value_and_a_tensor_of_indices(model):
    """A neuron held at v adds v times its column, whatever the input."""
    other = copy.deepcopy(model)
    fc2 = other.model.decoder.layers[1].fc2
    fc2.bias.data += 2.5 * fc2.weight.data[:, 3]
    fc2.weight.data[:, 3] = 0
    with pyfacts.ablate(model, {HOOK: torch.tensor([3])}, value=2.5):
        torch.testing.assert_close(logits(model), logits(other))


def test_a_value_for_each_neuron(model):
    """Of one hook, or by hook; gradients reach the values."""
    other = copy.deepcopy(model)
    fc2 = other.model.decoder.layers[1].fc2
    means = torch.tensor([2.5, -1.0], requires_grad=True)
    fc2.bias.data += fc2.weight.data[:, [3, 1]] @ means.detach()
    fc2.weight.data[:, [3, 1]] = 0
    for value in (means, {HOOK: means}, means.tolist(), np.array(means.tolist()[::-1])[::-1]):
        with pyfacts.ablate(model, {HOOK: [3, 1]}, value=value):
            torch.testing.assert_close(logits(model), logits(other))
    values = {HOOK: means, "blocks.0.mlp.hook_post": 0.5}
    with (
        pyfacts.ablate(model, {"blocks.0.mlp.hook_post": [0, 7], HOOK: [3, 1]}, value=values),
        pyfacts.capture(model) as cache,
    ):
        model(tiny.tokens()).logits.sum().backward()
    assert (cache[HOOK].to_dense()[:, [3, 1]] == means).all()
    assert (cache["blocks.0.mlp.hook_post"].to_dense()[:, [0, 7]] == 0.5).all()
    assert means.grad.abs().min() > 0


@pytest.mark.parametrize("name", ["hook_mlp_out", "hook_attn_out", "hook_resid_pre", "hook_resid_post"])
def test_rows(model, name):
    """The residual stream's hooks, input or output, tuple or not: the next readers see the value."""
    reader = {"hook_resid_pre": "hook_resid_pre"}.get(name, name)
    with pyfacts.ablate(model, {f"blocks.0.{name}": [0, 3]}, value=7.0):
        names = [f"blocks.0.{reader}", "blocks.1.hook_resid_pre"]
        with pyfacts.capture(model, names) as cache:
            model(tiny.tokens())
    assert (cache[names[0]][:, [0, 3]] == 7.0).all() and not (cache[names[0]][:, 1] == 7.0).any()
    assert (cache[names[1]][:, 0] == 7.0).all() == (name == "hook_resid_post")


def test_capture_inside_and_around(model):
    """Inside an ablation the capture sees what the layer sees; opened before it, what came in."""
    with pyfacts.capture(model, HOOK) as plain:
        model(tiny.tokens())
    with (
        pyfacts.capture(model, HOOK) as around,
        pyfacts.ablate(model, {HOOK: [5]}, value=3.0),
        pyfacts.capture(model, HOOK) as inside,
    ):
        model(tiny.tokens())
    assert torch.equal(around[HOOK].to_dense(), plain[HOOK].to_dense())
    expected = plain[HOOK].to_dense()
    expected[:, 5] = 3.0
    assert torch.equal(inside[HOOK].to_dense(), expected)


def test_the_models_own_tensors_stay_whole():
    """The activations are copied, not overwritten: another reader of the same tensor is not affected."""

    class TwoReaders(tiny.PlainMlp):
        def forward(self, x):
            hidden = torch.relu(self.fc1(x))
            return self.fc2(hidden), hidden

    model, x = TwoReaders(), torch.randn(2, 3, 6)
    with pyfacts.ablate(model, {"fc2": range(20)}):
        out, hidden = model(x)
    assert torch.equal(hidden, torch.relu(model.fc1(x)))
    assert torch.equal(out, model.fc2.bias.expand(2, 3, 6))


def test_gradients_flow_around_it(model):
    """The ablated neuron gets none, the others do."""
    with pyfacts.ablate(model, {HOOK: [5]}):
        model(tiny.tokens()).logits.sum().backward()
    gradient = model.model.decoder.layers[1].fc1.weight.grad
    assert not gradient[5].any() and gradient.any()


def test_several_hooks_and_an_exception(model):
    """All of them, and all come off when the body raises."""
    before = [len(m._forward_pre_hooks) for m in model.modules()]
    names = ["blocks.0.mlp.hook_post", HOOK]
    with (
        pytest.raises(KeyError),
        pyfacts.ablate(model, {name: range(tiny.D_MLP) for name in names}),
        pyfacts.capture(model) as cache,
    ):
        model(tiny.tokens())
        raise KeyError
    assert [cache[name].nnz for name in names] == [0, 0]
    assert [len(m._forward_pre_hooks) for m in model.modules()] == before


def test_compiled_model():
    """Compiled code would not see the hook."""
    model = tiny.PlainMlp()
    compiled, x = torch.compile(model, backend="aot_eager"), torch.randn(1, 2, 6)
    compiled(x)
    with pyfacts.ablate(compiled, {"fc2": range(20)}):
        assert torch.equal(compiled(x), model.fc2.bias.expand(1, 2, 6))


@pytest.mark.parametrize(
    ("indices", "value", "error", "match"),
    [
        ({HOOK: [40]}, 0.0, ValueError, r"blocks\.1\.mlp\.hook_post: feature index 40.*\[0, 40\)"),
        ({HOOK: [-1]}, 0.0, ValueError, "feature index -1"),
        ({HOOK: [1.5]}, 0.0, TypeError, "list of integers"),
        ({HOOK: torch.tensor([1.0])}, 0.0, TypeError, "float32"),
        ({HOOK: 3}, 0.0, TypeError, "list of integers, got 3"),
        ({HOOK: [False] * 39 + [True]}, 0.0, TypeError, "list of integers, got .False"),
        ({"blocks.1.mlp.hook_pst": [1]}, 0.0, ValueError, r"Close matches.*blocks\.1\.mlp\.hook_post"),
        ({}, 0.0, ValueError, "indices is empty"),
        ([HOOK], 0.0, TypeError, "dict"),
        ({HOOK: [1]}, "0", TypeError, "value must be a number"),
        ({HOOK: [1]}, ["0"], TypeError, "each value must be a number"),
        ({HOOK: [1]}, [None], TypeError, "each value must be a number"),
        ({HOOK: [1]}, [1.0, 2.0], ValueError, r"1 features take \[1\] values, got \[2\]"),
        ({HOOK: [1]}, {HOOK: torch.ones(2)}, ValueError, r"1 features take \[1\] values, got \[2\]"),
        ({HOOK: [1]}, {HOOK: torch.ones(1, dtype=torch.bool)}, TypeError, "got a torch.strided tensor of torch.bool"),
        ({HOOK: [1, 1]}, {HOOK: torch.ones(2)}, ValueError, "named twice"),
        ({HOOK: [1]}, {"fc2": 1.0}, ValueError, r"blocks\.1\.mlp\.hook_post, fc2 is in one of them only"),
        ({HOOK: [1]}, torch.ones(1, 1), ValueError, r"take \[1\] values"),
        ({"blocks.1.hook_resid_mid": [1]}, 0.0, ValueError, "would not reach the rest of the stream"),
    ],
)
def test_bad_arguments(model, indices, value, error, match):
    with pytest.raises(error, match=match):
        pyfacts.ablate(model, indices, value)


def test_a_module_that_two_layers_share():
    model = tiny.opt()
    layers = model.model.decoder.layers
    layers[1].fc2 = layers[0].fc2
    with (
        pytest.raises(ValueError, match=rf"{HOOK} and blocks\.0\.mlp\.hook_post are one module, .*layers\.1\.fc2"),
        pyfacts.ablate(model, {HOOK: [1]}),
    ):
        pass
    plain = logits(model)
    with pyfacts.ablate(model, {"model.decoder.layers.1.fc2": [1]}):  # wherever it runs
        assert not torch.equal(logits(model), plain)


@pytest.mark.parametrize("value", [1e9, 1e300, [0.0, 1e9], torch.tensor([-1e9, torch.inf])], ids=str)
def test_a_value_beyond_the_activations_dtype(value):
    model = tiny.opt().half()
    with pyfacts.ablate(model, {HOOK: [1]}, 65504.0):
        logits(model)
    with (
        pytest.raises(ValueError, match=r"hook_post: a value of 1e\+\d+ is beyond torch\.float16"),
        pyfacts.ablate(model, {HOOK: [1, 2]}, value),
    ):
        logits(model)


def test_the_input_of_a_parallel_block():
    """Where attention and MLP share a norm, the MLP's branch has no entrance of its own."""
    model = tiny.DECODERS["phi"]()
    with pytest.raises(ValueError, match="attention included"), pyfacts.ablate(model, {"blocks.0.hook_mlp_in": [0]}):
        pass
    with pyfacts.ablate(model, {"blocks.0.mlp.hook_in": [0]}):
        logits(model)


def test_index_beyond_an_unknown_width():
    """A module that does not tell its width is checked when it runs."""
    model = nn.Sequential(nn.Identity())
    with pyfacts.ablate(model, {"0": [2]}), pytest.raises(ValueError, match=r"index 2.*\[0, 2\)"):
        model(torch.ones(1, 2))


def test_the_first_of_a_named_tuple():
    class Pair(NamedTuple):
        x: torch.Tensor
        n: int

    class Tupled(nn.Module):
        def forward(self, x):
            return Pair(x, 3)

    model = nn.Sequential(nn.Linear(2, 4), Tupled())
    with pyfacts.ablate(model, {"1:output": [1]}, value=7.0):
        out = model(torch.zeros(5, 2))
    assert isinstance(out, Pair) and out.n == 3 and (out.x[:, 1] == 7).all()


def test_what_fails_within_does_not_count_against_it(model):
    ablation = pyfacts.ablate(model, {HOOK: [5]})
    with ablation:
        model(tiny.tokens())
        with pytest.raises(KeyError), ablation:
            raise KeyError


def test_opened_again_within_itself_and_as_a_decorator(model):
    plain, ablation = model(tiny.tokens()).logits, pyfacts.ablate(model, {HOOK: [1, 2]}, value=9.0)

    @ablation
    def run():
        return model(tiny.tokens()).logits

    with ablation:
        ablated = model(tiny.tokens()).logits
    with ablation, ablation:
        assert torch.equal(model(tiny.tokens()).logits, ablated)
    assert torch.equal(run(), ablated) and torch.equal(run(), ablated)
    assert torch.equal(model(tiny.tokens()).logits, plain) and not torch.equal(ablated, plain)


def test_a_hook_that_no_forward_reaches_is_an_error(model):
    """Else an experiment on the wrong module would show that nothing changes."""
    with pytest.raises(pyfacts.HookNeverFired, match="never fired: lm_head"):
        with pyfacts.ablate(model, {"lm_head": [0], HOOK: [1]}):
            model.model(tiny.tokens())
    with pytest.raises(ZeroDivisionError), pyfacts.ablate(model, {"lm_head": [0]}):
        raise ZeroDivisionError
