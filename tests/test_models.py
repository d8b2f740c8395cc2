"""Which modules hook names mean, checked against the architectures' table and against the models' own arithmetic."""

import importlib

import pytest
import tiny_models as tiny
import torch
from torch import nn

import pyfacts
from pyfacts import HookPoint
from pyfacts.models import hook_points, resolve_hooks, unwrap

capture = importlib.import_module("pyfacts.capture").capture
pytestmark = pytest.mark.filterwarnings("ignore:the captured neurons are")

# The down-projection of layer {i}, its width, the activation: DESIGN's table, spelled out.
NEURONS = {
    "opt": ("model.decoder.layers.{i}.fc2", 40, "relu"),
    "opt-base": ("decoder.layers.{i}.fc2", 40, "relu"),
    "opt-post-norm": ("model.decoder.layers.{i}.fc2", 40, "relu"),
    "gpt2": ("transformer.h.{i}.mlp.c_proj", 40, "gelu_new"),
    "gpt2-wide": ("transformer.h.{i}.mlp.c_proj", 64, "gelu_new"),
    "gpt-neox": ("gpt_neox.layers.{i}.mlp.dense_4h_to_h", 40, "gelu"),
    "gpt-neox-sequential": ("gpt_neox.layers.{i}.mlp.dense_4h_to_h", 40, "gelu"),
    "llama": ("model.layers.{i}.mlp.down_proj", 40, "silu"),
    "mistral": ("model.layers.{i}.mlp.down_proj", 40, "silu"),
    "qwen2": ("model.layers.{i}.mlp.down_proj", 40, "silu"),
    "qwen3": ("model.layers.{i}.mlp.down_proj", 40, "silu"),
    "gemma2": ("model.layers.{i}.mlp.down_proj", 40, "gelu_pytorch_tanh"),
    "gemma3-text": ("model.layers.{i}.mlp.down_proj", 40, "gelu_pytorch_tanh"),
    "gemma3-multimodal": ("model.language_model.layers.{i}.mlp.down_proj", 40, "gelu_pytorch_tanh"),
    "gemma3n": ("model.layers.{i}.mlp.down_proj", (40, 48), "gelu_pytorch_tanh"),
    "phi": ("model.layers.{i}.mlp.fc2", 40, "gelu_new"),
    "phi3": ("model.layers.{i}.mlp.down_proj", 40, "silu"),
    "nemotron": ("model.layers.{i}.mlp.down_proj", 40, "relu2"),
    "olmo2": ("model.layers.{i}.mlp.down_proj", 40, "silu"),
    "bert": ("encoder.layer.{i}.output.dense", 40, "gelu"),
    "t5-encoder": ("encoder.block.{i}.layer.1.DenseReluDense.wo", 40, "relu"),
}
PARALLEL = {"gpt-neox", "phi"}
POST_NORM = {"bert", "opt-post-norm"}


@pytest.mark.parametrize("name", tiny.DECODERS)
def test_neurons_are_the_down_projections_input(name):
    """The table: module path, width (the weight's input dimension) and activation of every architecture."""
    model = tiny.DECODERS[name]()
    path, widths, activation = NEURONS[name]
    neurons = [point for point in hook_points(model).values() if point.kind == "neurons"]
    assert len(neurons) == tiny.LAYERS
    for i, point in enumerate(neurons):
        width = widths if isinstance(widths, int) else widths[i]
        assert point == HookPoint(
            f"blocks.{i}.mlp.hook_post", path.format(i=i), "input", width, "neurons", activation, ""
        )
        weight = model.get_submodule(point.module_path).weight
        assert width == weight.shape[0 if name.startswith("gpt2") else 1]


@pytest.mark.parametrize("name", tiny.DECODERS)
def test_captured_neurons_times_the_down_weight_is_its_output(name):
    """What is captured under a neuron's name is what a plain PyTorch hook sees go into the down-projection."""
    model, seen = tiny.DECODERS[name](), {}
    path = NEURONS[name][0]
    for i in range(tiny.LAYERS):
        module = model.get_submodule(path.format(i=i))
        module.register_forward_hook(lambda m, args, out, i=i: seen.update({i: (args[0].detach(), out.detach())}))
    with capture(model) as cache, torch.no_grad():
        model(input_ids=tiny.tokens())
    for i in range(tiny.LAYERS):
        captured = cache[f"blocks.{i}.mlp.hook_post"].to_dense()
        into, out = seen[i]
        assert torch.equal(captured, into.reshape(captured.shape) + 0.0)
        module = model.get_submodule(path.format(i=i))
        weight = module.weight if name.startswith("gpt2") else module.weight.T
        product = captured @ weight + (module.bias if getattr(module, "bias", None) is not None else 0)
        torch.testing.assert_close(product, out.reshape(product.shape), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", sorted(set(tiny.DECODERS) - {"gemma3n"}))
def test_residual_stream_adds_up(name):
    """hook_resid_mid = pre + attn_out and post = mid + mlp_out (pre + attn_out + mlp_out where they are parallel)."""
    model = tiny.DECODERS[name]()
    points = [n for n, p in hook_points(model).items() if p.kind == "rows"]
    with capture(model, points) as cache, torch.no_grad():
        hidden = model(input_ids=tiny.tokens(), output_hidden_states=True).hidden_states
    for i in range(tiny.LAYERS):
        row = {n.removeprefix(f"blocks.{i}."): cache[n] for n in points if n.startswith(f"blocks.{i}.")}
        assert all(rows.shape == (14, tiny.D_MODEL) for rows in row.values())
        assert torch.equal(row["hook_resid_pre"], hidden[i].reshape(14, -1))
        if i + 1 < tiny.LAYERS:
            assert torch.equal(row["hook_resid_post"], cache[f"blocks.{i + 1}.hook_resid_pre"])
        mid = row["hook_resid_pre"] + row["hook_attn_out"]
        assert ("hook_resid_mid" in row) == (name not in PARALLEL)
        if name not in PARALLEL:
            torch.testing.assert_close(row["hook_resid_mid"], mid)
        if name in POST_NORM:
            after = _post_norm(model, name, i)(row["hook_mlp_in"] + row["hook_mlp_out"])
            torch.testing.assert_close(row["hook_resid_post"], after)
            assert torch.equal(row["hook_mlp_in"], row["mlp.hook_in"])
        else:
            torch.testing.assert_close(row["hook_resid_post"], mid + row["hook_mlp_out"])
            torch.testing.assert_close(row["hook_mlp_in"], row["hook_resid_pre"] if name in PARALLEL else mid)


@pytest.mark.parametrize(
    ("make", "missing"),
    [
        (tiny.beam, {"hook_attn_out", "hook_mlp_out"}),
        (tiny.esmc, {"hook_attn_out", "hook_mlp_out"}),
        (tiny.gpt_neox_japanese, {"hook_attn_out"}),
    ],
)
def test_what_is_scaled_outside_of_modules_is_not_listed(make, missing):
    """Of what is listed the sums hold: here the stream's parts alone, and what a whole MLP adds."""
    model = make()
    names = [name for name in hook_points(model) if name.startswith("blocks.1.") and "mlp.hook" not in name]
    assert missing.isdisjoint(name.removeprefix("blocks.1.") for name in names)
    with capture(model, names) as cache, torch.no_grad():
        model(input_ids=tiny.tokens())
    row = {name.removeprefix("blocks.1."): rows for name, rows in cache.items()}
    assert torch.equal(row["hook_mlp_in"], row["hook_resid_mid"])
    if "hook_mlp_out" in row:
        torch.testing.assert_close(row["hook_resid_post"], row["hook_resid_mid"] + row["hook_mlp_out"])


def test_feed_forwards_beside_attentions_are_no_blocks():
    """XLM adds and normalises around them: what they read and give is not the stream."""
    assert list(hook_points(tiny.xlm())) == [
        f"blocks.{i}.mlp.{name}" for i in (0, 1) for name in ("hook_in", "hook_post")
    ]


def test_a_routers_own_mlp_is_no_neurons():
    with pytest.raises(ValueError, match="experts"):
        resolve_hooks(tiny.zaya(), "blocks.1.mlp.hook_post")


def _post_norm(model, name, i):
    return model.encoder.layer[i].output.LayerNorm if name == "bert" else model.model.decoder.layers[i].final_layer_norm


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "phi"])
def test_mlp_hook_in_is_what_the_mlp_reads(name):
    """`mlp.hook_in` is after the norm: the MLP applied to it gives what the MLP gave."""
    model = tiny.DECODERS[name]()
    with capture(model, ["blocks.0.mlp.hook_in", "blocks.0.mlp.hook_post"]) as cache, torch.no_grad():
        model(input_ids=tiny.tokens())
    mlp = unwrap(model).get_submodule(NEURONS[name][0].format(i=0).rpartition(".")[0])
    with capture(mlp, NEURONS[name][0].rpartition(".")[2]) as alone, torch.no_grad():
        mlp(cache["blocks.0.mlp.hook_in"])
    (again,) = alone.values()
    torch.testing.assert_close(again.to_dense(), cache["blocks.0.mlp.hook_post"].to_dense())


@pytest.mark.parametrize("name", tiny.ENCODER_DECODERS)
def test_encoder_decoder(name):
    """Both stacks have their own names; the decoder's stream also goes through cross-attention."""
    model = tiny.ENCODER_DECODERS[name]()
    points = hook_points(model)
    neurons = {n: (p.module_path, p.stream) for n, p in points.items() if p.kind == "neurons"}
    expected = {
        f"encoder_blocks.{i}.mlp.hook_post": (f"encoder.block.{i}.layer.1.DenseReluDense.wo", "encoder")
        for i in range(tiny.LAYERS)
    }
    expected |= {
        f"decoder_blocks.{i}.mlp.hook_post": (f"decoder.block.{i}.layer.2.DenseReluDense.wo", "decoder")
        for i in range(tiny.LAYERS + 1)
    }
    assert neurons == expected
    rows = [n for n, p in points.items() if p.kind == "rows"]
    with capture(model, rows) as cache, torch.no_grad():
        model(input_ids=tiny.tokens(), decoder_input_ids=tiny.tokens(length=4))
    for block in ("encoder_blocks.0", "encoder_blocks.1", "decoder_blocks.0", "decoder_blocks.1"):
        row = {n.removeprefix(f"{block}."): cache[n] for n in rows if n.startswith(f"{block}.")}
        mid = row["hook_resid_pre"] + row["hook_attn_out"]
        torch.testing.assert_close(row["hook_resid_mid"], mid)
        if block.startswith("decoder"):
            mid = mid + row["hook_cross_attn_out"]
            torch.testing.assert_close(row["hook_resid_mid_cross"], mid)
        torch.testing.assert_close(row["hook_mlp_in"], mid)
        torch.testing.assert_close(row["hook_resid_post"], mid + row["hook_mlp_out"])


# ---- mixtures of experts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny.MIXTURES)
def test_experts_are_refused(name):
    """By name with a sentence, by the experts' own paths too; never listed, never captured as something else."""
    model = tiny.MIXTURES[name]()
    assert not any(".experts" in point.module_path for point in hook_points(model).values())
    for asked in ("blocks.1.mlp.hook_post", "model.layers.1.mlp.experts", "model.layers.1.mlp.experts:output"):
        with pytest.raises(ValueError, match=r"mixture of experts.*does not capture experts"):
            resolve_hooks(model, asked)


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_nothing_but_experts(name):
    """There are no neurons to give for None; the residual stream and the mixture's output are still there."""
    model = tiny.MIXTURES[name]()
    with pytest.raises(ValueError, match="mixture of experts"):
        resolve_hooks(model)
    points = [n for n in hook_points(model) if n.startswith("blocks.1.")]
    with capture(model, points) as cache, torch.no_grad():
        model(input_ids=tiny.tokens())
    mid = cache["blocks.1.hook_resid_pre"] + cache["blocks.1.hook_attn_out"]
    torch.testing.assert_close(cache["blocks.1.hook_resid_mid"], mid)
    torch.testing.assert_close(cache["blocks.1.hook_resid_post"], mid + cache["blocks.1.hook_mlp_out"])


@pytest.mark.parametrize(("name", "shared"), [("qwen2-moe", "shared_expert"), ("deepseek", "shared_experts")])
def test_dense_and_shared_mlps_beside_experts(name, shared):
    """None takes the dense layer's MLP and the shared expert, each with its own width, and the values are theirs."""
    model = tiny.MIXTURES[name]()
    points = {p.name: p for p in resolve_hooks(model)}
    assert {n: p.width for n, p in points.items()} == {
        "blocks.0.mlp.hook_post": tiny.D_MLP,
        f"blocks.1.mlp.{shared}.hook_post": 24,
    }
    seen = {}
    module = model.model.layers[1].mlp.get_submodule(shared).down_proj
    module.register_forward_pre_hook(lambda m, args: seen.update(x=args[0].detach()))
    with capture(model) as cache, torch.no_grad():
        model(input_ids=tiny.tokens())
    assert torch.equal(cache[f"blocks.1.mlp.{shared}.hook_post"].to_dense(), seen["x"].reshape(14, 24))


def test_experts_as_a_list_of_modules():
    """Before transformers 5 experts were modules; they are as sparse in tokens, and refused alike."""

    class Mlp(nn.Module):
        def __init__(self):
            super().__init__()
            self.up_proj, self.down_proj = nn.Linear(4, 8), nn.Linear(8, 4)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = nn.ModuleDict({"experts": nn.ModuleList([Mlp(), Mlp()]), "shared_expert": Mlp()})

    model = nn.Module()
    model.layers = nn.ModuleList([Block(), Block()])
    assert [p.name for p in resolve_hooks(model)] == [f"blocks.{i}.mlp.shared_expert.hook_post" for i in range(2)]
    with pytest.raises(ValueError, match="mixture of experts"):
        resolve_hooks(model, "layers.0.mlp.experts.1.down_proj")


# ---- names -----------------------------------------------------------------------------------------------------------


def test_names_filter():
    """None, a name, a list, a callable; each hook once."""
    model = tiny.opt()
    neurons = ["blocks.0.mlp.hook_post", "blocks.1.mlp.hook_post"]
    assert [p.name for p in resolve_hooks(model)] == neurons
    assert [p.name for p in resolve_hooks(model, neurons[1])] == neurons[1:]
    assert [p.name for p in resolve_hooks(model, [*reversed(neurons), neurons[0]])] == neurons[::-1]
    assert [p.name for p in resolve_hooks(model, lambda name: name.endswith("mlp.hook_post"))] == neurons
    assert [p.name for p in resolve_hooks(model, lambda name: "resid_p" in name)] == [
        f"blocks.{i}.hook_resid_{side}" for i in range(2) for side in ("pre", "post")
    ]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("blocks.*.hook_resid_post", [f"blocks.{i}.hook_resid_post" for i in range(2)]),
        (["lm_head", "blocks.1.*resid_p*"], ["lm_head", "blocks.1.hook_resid_pre", "blocks.1.hook_resid_post"]),
        (["blocks.1.mlp.hook_post", "*.mlp.hook_post"], [f"blocks.{i}.mlp.hook_post" for i in (1, 0)]),
        ("*.fc2", [f"model.decoder.layers.{i}.fc2" for i in range(2)]),
        ("*.fc1:output", [f"model.decoder.layers.{i}.fc1:output" for i in range(2)]),
    ],
)
def test_patterns(names, expected):
    """`*` in a name: the hooks that are listed, or else modules; beside exact names, and in the order given."""
    assert [p.name for p in resolve_hooks(tiny.opt(), names)] == expected


def test_a_pattern_beside_experts():
    """What it names of experts is not captured, and it says so."""
    with pytest.warns(UserWarning, match=r"blocks\.1\.mlp\.hook_post is a mixture of experts"):
        points = resolve_hooks(tiny.deepseek(), "blocks.*.mlp.hook_post")
    assert [point.name for point in points] == ["blocks.0.mlp.hook_post"]
    with pytest.warns(UserWarning, match=r"blocks\.1\.mlp\.hook_post is a mixture of experts"):
        assert resolve_hooks(tiny.deepseek(), lambda name: name.endswith("mlp.hook_post")) == points
    for every in ("*.mlp.hook_post", lambda name: name.endswith("mlp.hook_post")):
        with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.hook_post is a mixture of experts"):
            resolve_hooks(tiny.mixtral(), every)
    assert "model.layers.1.self_attn" in [point.module_path for point in resolve_hooks(tiny.deepseek(), "*:output")]


def test_a_pattern_of_a_module_with_two_names():
    model = nn.Module()
    model.long_name = model.b = nn.Linear(3, 3)
    assert [point.name for point in resolve_hooks(model, "*")] == ["b"]
    assert [point.name for point in resolve_hooks(model, "long*")] == ["long_name"]


@pytest.mark.parametrize(
    ("names", "error", "match"),
    [
        (
            "blocks.*.hook_rsid_post",
            ValueError,
            r"'.*hook_rsid_post' matches no hook.*blocks\.0\.hook_resid_pre",
        ),
        (["*.hook_post", "*.fc2:inside"], ValueError, "path:output"),
        ("blocks.0.mlp.hook_pst", ValueError, r"blocks\.0\.mlp\.hook_pst.*Close matches: .*blocks\.0\.mlp\.hook_post"),
        ("blocks.7.mlp.hook_post", ValueError, r"Close matches: .*blocks\.1\.mlp\.hook_post"),
        (["model.decoder.layers.0.fc3"], ValueError, r"Close matches: .*model\.decoder\.layers\.0\.fc2"),
        ("qqqqq", ValueError, r"Known are blocks\.0"),
        ("model.decoder.layers.0.fc2:inside", ValueError, "path:output"),
        ([], ValueError, "empty"),
        (lambda name: False, ValueError, "none of the model's 16 hooks"),
        ([3], TypeError, "3 of type int"),
        (3, TypeError, "got int"),
    ],
)
def test_bad_names(names, error, match):
    """An unknown name lists close matches; everything else says what was expected."""
    with pytest.raises(error, match=match):
        resolve_hooks(tiny.opt(), names)


def test_plain_model_by_module_path():
    """No blocks: the path is the way, and the message says so. Widths come from the module on each side."""
    model = tiny.PlainMlp()
    for call in (hook_points, resolve_hooks):
        with pytest.raises(ValueError, match=r'no MLP blocks in this PlainMlp.*names_filter="fc2".*"fc2:output"'):
            call(model)
    for name, side, width in [("fc2", "input", 20), ("fc2:input", "input", 20), ("fc2:output", "output", 6)]:
        (point,) = resolve_hooks(model, name)
        assert (point.name, point.module_path, point.side, point.width) == (name, "fc2", side, width)


def test_module_path_on_a_recognised_model():
    """A path works beside names, on Conv1D too, whose weight is transposed."""
    points = resolve_hooks(tiny.gpt2(), ["transformer.h.0.attn.c_proj", "transformer.h.1.mlp.c_fc:output"])
    assert [(p.side, p.width) for p in points] == [("input", 16), ("output", 40)]


@pytest.mark.parametrize("kind", ["MPNet", "RobertaPreLayerNorm"])
def test_blocks_of_berts_names_with_others_inside(kind):
    """Every hook that is listed can be captured."""
    model = tiny.bert(kind)
    with pyfacts.capture(model, list(pyfacts.hook_points(model)), select=pyfacts.topk(3)) as cache:
        model(tiny.tokens())
    assert {name.partition(".1.")[2] for name in cache} >= {"mlp.hook_post", "hook_resid_pre", "hook_resid_post"}


def test_not_a_model():
    with pytest.raises(TypeError, match="got dict"):
        hook_points({})


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, lambda m: torch.compile(nn.DataParallel(m))])
def test_wrappers_are_looked_through(wrap):
    """The same hooks with and without, and module paths as without."""
    model = tiny.opt()
    assert hook_points(wrap(model)) == hook_points(model)
    assert resolve_hooks(wrap(model), "model.decoder.layers.0.fc2") == resolve_hooks(
        model, "model.decoder.layers.0.fc2"
    )


def test_block_compiled_by_itself():
    """Regional compilation wraps each block: the hook goes to the module inside."""
    model = tiny.opt()
    model.model.decoder.layers[1] = torch.compile(model.model.decoder.layers[1])
    assert hook_points(model)["blocks.1.mlp.hook_post"].module_path == "model.decoder.layers.1._orig_mod.fc2"


def test_adapter_around_a_linear():
    """A LoRA layer keeps the Linear as `base_layer`: same name, same width."""

    class Lora(nn.Module):
        def __init__(self, base_layer):
            super().__init__()
            self.base_layer = base_layer

        def forward(self, x):
            return self.base_layer(x)

    model = tiny.llama_like("Llama")
    for layer in model.model.layers:
        layer.mlp.down_proj = Lora(layer.mlp.down_proj)
    assert [(p.module_path, p.width) for p in resolve_hooks(model)] == [
        (f"model.layers.{i}.mlp.down_proj", tiny.D_MLP) for i in range(tiny.LAYERS)
    ]


class Wrapper(nn.Module):
    """A handmade LoRA of a Linear, under whatever name its maker chose."""

    def __init__(self, name, wrapped):
        super().__init__()
        setattr(self, name, wrapped)
        self.name, self.down = name, nn.Linear(wrapped.in_features, 2, bias=False)
        self.up = nn.Linear(2, wrapped.out_features, bias=False)

    def forward(self, x):
        return getattr(self, self.name)(x) + self.up(self.down(x))


@pytest.mark.parametrize("which", [{"down_proj"}, {"gate_proj", "up_proj"}])
def test_handmade_wrappers_in_one_layer(which):
    model = tiny.llama_like("Llama")
    expected = hook_points(model)
    mlp = model.model.layers[1].mlp
    for name in which:
        setattr(mlp, name, Wrapper("base", getattr(mlp, name)))
    assert hook_points(model) == expected


def test_a_block_whose_mlp_is_not_recognised_is_not_left_out_silently():
    model = tiny.llama_like("Llama")
    mlp = model.model.layers[1].mlp
    mlp.down_proj = Wrapper("ours", mlp.down_proj)
    name, path = "blocks.1.mlp.hook_post", "model.layers.1.mlp.down_proj"
    said = rf"{name}: {path} is not recognised as what it is in other blocks .*names_filter='{path}'"
    with pytest.warns(UserWarning, match=f"1 of the model's blocks are left out. {said}"):
        assert name not in [point.name for point in resolve_hooks(model)]
    with pytest.warns(UserWarning, match=said):
        resolve_hooks(model, "blocks.*.mlp.hook_post")
    with pytest.raises(ValueError, match=said):
        resolve_hooks(model, name)
    with pyfacts.capture(model, path) as cache:
        model(tiny.tokens())
    assert cache[path].n_features == tiny.D_MLP


def test_blocks_of_other_kinds_are_left_out_silently(recwarn):
    """Nothing in them is called as a down-projection beside them is."""
    model = tiny.llama_like("Llama")
    model.model.layers[1].mlp = nn.Identity()
    assert [point.name for point in resolve_hooks(model)] == ["blocks.0.mlp.hook_post"]
    assert not recwarn


def test_scripted_models_are_refused():
    with pytest.warns(DeprecationWarning), pytest.raises(TypeError, match="give the module that it was made of"):
        hook_points(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)))


def test_two_towers_that_cannot_be_told_apart():
    """Neither an encoder and a decoder, nor one of text: say which stacks there are, guess nothing."""
    model = nn.Module()
    model.left, model.right = tiny.opt("OPTModel"), tiny.opt("OPTModel")
    with pytest.raises(ValueError, match=r"2 stacks of blocks \(left.*right.*left\.decoder\.layers\.0\.fc2"):
        hook_points(model)
    with pytest.raises(ValueError, match="2 stacks"):
        resolve_hooks(model)
    assert resolve_hooks(model, "right.decoder.layers.1.fc2")[0].width == tiny.D_MLP
