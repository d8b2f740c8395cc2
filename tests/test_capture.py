"""`pyfacts.capture` against plain PyTorch hooks, and its promises one by one; docstrings name what would break them."""

import contextlib
import gc
import importlib
import weakref

import pytest
import tiny_models as tiny
import torch
from saes import TinySae
from torch import nn

import pyfacts

capture_module = importlib.import_module("pyfacts.capture")
capture = capture_module.capture
pytestmark = pytest.mark.filterwarnings("ignore:the captured neurons are")

NEURONS = [f"blocks.{i}.mlp.hook_post" for i in range(tiny.LAYERS)]


@pytest.fixture
def model():
    return tiny.opt()


def neurons_of(model, *calls, **kwargs):
    """What goes into every fc2 of an OPT, by plain PyTorch hooks; [n_tokens, d_mlp] per layer, over all calls."""
    seen = [[] for _ in range(tiny.LAYERS)]
    handles = [
        layer.fc2.register_forward_pre_hook(lambda m, args, i=i: seen[i].append(args[0].detach().clone()))
        for i, layer in enumerate(model.model.decoder.layers)
    ]
    with torch.no_grad():
        for ids in calls:
            model(ids, **kwargs)
    for handle in handles:
        handle.remove()
    return [torch.cat(parts).reshape(-1, tiny.D_MLP) + 0.0 for parts in seen]


def n_hooks(model):
    return sum(
        len(hooks)
        for module in model.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._forward_hooks_always_called)
    )


# ---- what is captured ------------------------------------------------------------------------------------------------


def test_captures_every_token_of_every_forward(model):
    """ "Several forwards append in order": dropping, duplicating or reordering a forward breaks this."""
    calls = [tiny.tokens(2, 7, 0), tiny.tokens(3, 4, 1), tiny.tokens(1, 1, 2)]
    with capture(model) as cache:
        for ids in calls:
            model(ids)
    for name, expected in zip(NEURONS, neurons_of(model, *calls), strict=True):
        assert cache[name].shape == (27, tiny.D_MLP)
        assert torch.equal(cache[name].to_dense(), expected)
    expected = (
        [(s, p) for s in range(2) for p in range(7)] + [(2 + s, p) for s in range(3) for p in range(4)] + [(5, 0)]
    )
    assert cache.positions.tolist() == [list(pair) for pair in expected]
    assert cache.positions.dtype == torch.int64


def test_cache_is_a_mapping(model):
    """keys, in, iteration, length, repr, and errors that help."""
    with capture(model, [NEURONS[1], "blocks.0.hook_resid_pre"]) as cache:
        assert "nothing yet" in repr(cache)
        with pytest.raises(KeyError, match="not fired yet"):
            cache[NEURONS[1]]
        model(tiny.tokens())
    assert list(cache) == list(cache.keys()) == [NEURONS[1], "blocks.0.hook_resid_pre"]
    assert len(cache) == 2 and NEURONS[1] in cache and NEURONS[0] not in cache
    assert f"{NEURONS[1]}: [14, 40], density" in repr(cache) and "[14, 16], rows" in repr(cache)
    assert isinstance(cache[NEURONS[1]], pyfacts.EncodedActivations)
    assert cache["blocks.0.hook_resid_pre"].shape == (14, 16)
    for look_up in (cache.__getitem__, cache.positions_of, cache.n_forwards):
        with pytest.raises(KeyError, match=r"blocks\.0\.mlp\.hook_post.*not captured.*blocks\.1\.mlp\.hook_post"):
            look_up(NEURONS[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(model, dtype):
    """Values come in the model's dtype, bit for bit."""
    model = model.to(dtype)
    with capture(model) as cache:
        model(tiny.tokens())
    for name, expected in zip(NEURONS, neurons_of(model, tiny.tokens()), strict=True):
        assert cache[name].dtype == dtype and torch.equal(cache[name].to_dense(), expected)


def test_plain_module_by_path():
    """[batch, pos, width] and [batch, width] inputs, the input and the output side."""
    model = tiny.PlainMlp()
    x = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
    with capture(model, ["fc2", "fc2:output"]) as cache:
        out = model(x)
    assert torch.equal(cache["fc2"].to_dense(), torch.relu(model.fc1(x)).reshape(12, 20))
    assert torch.equal(cache["fc2:output"].to_dense(), out.reshape(12, 6))
    assert cache.positions.tolist() == [[s, p] for s in range(3) for p in range(4)]
    with capture(model, "fc2") as cache:
        model(x[:, 0])
    assert torch.equal(cache["fc2"].to_dense(), torch.relu(model.fc1(x[:, 0])))
    assert cache.positions.tolist() == [[s, 0] for s in range(3)]


def test_rows_are_copies():
    """A model that changes a tensor in place after the hook must not change what was captured."""

    class InPlace(tiny.PlainMlp):
        def forward(self, x):
            hidden = self.fc1(x)
            out = self.fc2(hidden)
            hidden.zero_()
            return out

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.ModuleDict({"mlp": InPlace()})])

        def forward(self, x):
            return self.layers[0]["mlp"](x)

    model = Model()
    with capture(model, ["blocks.0.mlp.hook_post"]) as cache, torch.no_grad():
        model(torch.ones(1, 2, 6))
    assert torch.equal(cache["blocks.0.mlp.hook_post"].to_dense(), model.layers[0]["mlp"].fc1(torch.ones(2, 6)))
    llama = tiny.llama_like("Llama")
    llama.model.layers[0].register_forward_hook(lambda m, args, out: out.add(0.0 * args[0].zero_()))
    with capture(llama, "blocks.0.hook_resid_pre") as cache, torch.no_grad():
        llama(tiny.tokens())
    assert torch.equal(cache["blocks.0.hook_resid_pre"], llama.model.embed_tokens(tiny.tokens()).reshape(14, -1))


# ---- "capture never changes what the model computes" -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["opt", "gpt2", "gemma2", "bert", "qwen2-moe"])
def test_outputs_are_the_same_bit_for_bit(name):
    """Outputs, and gradients: a hook that returned something, or broke the graph, would show."""
    model = (tiny.DECODERS | tiny.MIXTURES)[name]()
    ids = tiny.tokens()
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])

    def outputs_and_gradients():
        model.zero_grad()
        out = model(input_ids=ids, attention_mask=mask)[0]
        out.square().sum().backward()
        return [out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    plain = outputs_and_gradients()
    with capture(model, list(pyfacts_hooks(model))):
        captured = outputs_and_gradients()
    assert len(plain) > 10
    assert all(torch.equal(a, b) for a, b in zip(plain, captured, strict=True))


def pyfacts_hooks(model):
    return importlib.import_module("pyfacts.models").hook_points(model)


# ---- "hooks come off when the context ends, also on an exception" ----------------------------------------------------


def test_hooks_come_off(model):
    """Also after an error in the model, and after one of capture's own."""
    before = n_hooks(model)
    with capture(model):
        assert n_hooks(model) > before
        model(tiny.tokens())
    assert n_hooks(model) == before
    with pytest.raises(KeyError, match="mine"), capture(model):
        raise KeyError("mine")
    assert n_hooks(model) == before
    model.model.decoder.layers[0].fc2.in_features = 39
    with pytest.raises(ValueError, match="width"), capture(model):
        model(tiny.tokens())
    assert n_hooks(model) == before


def test_nothing_dense_stays_alive(model):
    """Neither hook objects nor the tensors they were handed outlive the forward."""
    handed = []
    model.model.decoder.layers[0].fc2.register_forward_pre_hook(lambda m, args: handed.append(weakref.ref(args[0])))
    capturing = capture(model)
    with capturing as cache, torch.no_grad():
        model(tiny.tokens())
        assert handed[0]() is None
    stream = weakref.ref(cache)
    del cache, capturing
    gc.collect()
    assert stream() is None


def test_capture_twice(model):
    """The second capture starts from nothing, the first keeps what it has; one capture object can be used again."""
    capturing = capture(model)
    with capturing as first:
        model(tiny.tokens())
    with capturing as second:
        model(tiny.tokens(seed=1))
    a, b = neurons_of(model, tiny.tokens())[0], neurons_of(model, tiny.tokens(seed=1))[0]
    assert torch.equal(first[NEURONS[0]].to_dense(), a) and torch.equal(second[NEURONS[0]].to_dense(), b)


def test_nested_captures(model):
    """Each sees the forwards inside its own context, all of them and no other."""
    with capture(model) as outer:
        model(tiny.tokens())
        with capture(model, NEURONS[1]) as inner:
            model(tiny.tokens(seed=1))
        model(tiny.tokens(seed=2))
    calls = [tiny.tokens(seed=seed) for seed in range(3)]
    assert torch.equal(outer[NEURONS[1]].to_dense(), neurons_of(model, *calls)[1])
    assert torch.equal(inner[NEURONS[1]].to_dense(), neurons_of(model, calls[1])[1])


def test_a_forward_that_fails_leaves_nothing_behind(model):
    """Half a forward would put the hooks' rows out of step with each other and with the positions."""
    last = model.model.decoder.layers[1]

    def fail(module, args):
        raise RuntimeError("broken layer")

    with capture(model) as cache:
        model(tiny.tokens())
        handle = last.fc1.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="broken layer"):
            model(tiny.tokens(seed=1))
        handle.remove()
        handle = model.register_forward_hook(lambda *_: fail(None, None), prepend=True)
        with pytest.raises(RuntimeError, match="broken layer"):  # behind all layers, and before the capture's own hook
            model(tiny.tokens(seed=1))
        handle.remove()
        try:
            raise KeyError
        except KeyError:  # a forward inside an except block is no failed forward
            model(tiny.tokens(seed=2))
    expected = neurons_of(model, tiny.tokens(), tiny.tokens(seed=2))
    assert [torch.equal(cache[n].to_dense(), e) for n, e in zip(NEURONS, expected, strict=True)] == [True, True]
    assert cache.positions[:, 0].unique().tolist() == [0, 1, 2, 3]


def test_a_capture_that_is_opened_within_a_forward(model):
    """That forward goes on, and what it has missed does not hurt the next."""
    caches = []
    opened = capture(model)
    handle = model.model.decoder.layers[0].register_forward_pre_hook(lambda *_: caches.append(opened.__enter__()))
    with pytest.warns(UserWarning, match="no attention mask is seen"):
        model(tiny.tokens())
    handle.remove()
    model(tiny.tokens(seed=1))
    opened.__exit__(None, None, None)
    expected = neurons_of(model, tiny.tokens(), tiny.tokens(seed=1))
    assert [torch.equal(caches[0][n].to_dense(), e) for n, e in zip(NEURONS, expected, strict=True)] == [True, True]


# ---- modes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_grad_modes(model, mode):
    """The same values in each; what was captured is an ordinary tensor without a graph, even from inference_mode."""
    names = [*NEURONS, "blocks.0.hook_resid_mid"]
    with capture(model, names) as cache, mode():
        model(tiny.tokens())
    assert torch.equal(cache[NEURONS[0]].to_dense(), neurons_of(model, tiny.tokens())[0])
    rows = cache["blocks.0.hook_resid_mid"]
    assert not rows.requires_grad and not rows.is_inference() and not cache[NEURONS[0]].values.is_inference()
    nn.Linear(16, 2)(rows).sum().backward()  # an inference tensor could not be saved for backward


def test_train_mode(model):
    """In training the values are those after dropout, that is of the tensor that the down-projection reads."""
    model = tiny.opt(dropout=0.5).train()
    seen = []
    model.model.decoder.layers[0].fc2.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    with capture(model, NEURONS[0]) as cache:
        model(tiny.tokens())
    assert torch.equal(cache[NEURONS[0]].to_dense(), seen[0])


def test_autocast(model):
    """Under autocast the down-projection is handed bfloat16, and that is what is captured; top-k is not cast again."""
    with torch.autocast("cpu", torch.bfloat16):
        expected = neurons_of(model, tiny.tokens())
        with capture(model) as cache:
            model(tiny.tokens())
        with capture(model, select=importlib.import_module("pyfacts.select").topk(3)) as few:
            model(tiny.tokens())
    assert cache[NEURONS[0]].dtype == torch.bfloat16
    assert torch.equal(cache[NEURONS[1]].to_dense(), expected[1])
    kept = few[NEURONS[1]].to_dense()
    assert torch.equal(kept[kept != 0], expected[1][kept != 0]) and int((kept != 0).sum(1).max()) <= 3


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_captures_once(model, use_reentrant):
    """Backward computes the blocks again: without the check of `_current_graph_task_id` every row comes twice."""
    expected = neurons_of(model, tiny.tokens())
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.get_input_embeddings().register_forward_hook(lambda m, args, out: out.requires_grad_())
    recomputed = []
    model.model.decoder.layers[0].fc2.register_forward_pre_hook(lambda m, args: recomputed.append(1))
    with capture(model) as cache:
        model(tiny.tokens(), use_cache=False).logits.sum().backward()
        model(tiny.tokens(seed=1), use_cache=False).logits.sum().backward()
    assert len(recomputed) == 4  # the checkpointing did happen
    assert cache[NEURONS[0]].shape[0] == cache[NEURONS[1]].shape[0] == cache.positions.shape[0] == 28
    assert torch.equal(cache[NEURONS[0]][:14].to_dense(), expected[0])


def test_hooks_on_several_devices(model):
    """device_map: accelerate moves each layer's input to its device, here weights come from the CPU or from disk."""
    accelerate = pytest.importorskip("accelerate")
    expected = neurons_of(model, tiny.tokens())
    model = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with capture(model) as cache, torch.no_grad():
        model(tiny.tokens(), attention_mask=torch.tensor([[1] * 7, [0] * 3 + [1] * 4]))
    assert cache[NEURONS[0]].shape == (11, tiny.D_MLP)
    with capture(model) as cache, torch.no_grad():
        model(tiny.tokens())
    assert torch.equal(cache[NEURONS[1]].to_dense(), expected[1])


def test_compiled_model():
    """A hook added to compiled code would fire zero times: the capture runs it eagerly, and compiled again after."""
    model = tiny.PlainMlp()
    compiled = torch.compile(model, backend="aot_eager")
    x = torch.randn(2, 3, 6)
    plain = compiled(x)
    with capture(compiled, "fc2") as cache:
        assert torch.equal(compiled(x), plain)
    assert torch.equal(cache["fc2"].to_dense(), torch.relu(model.fc1(x)).reshape(6, 20))
    assert torch.compiler.is_compiling() is False and importlib.import_module("torch._dynamo")
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_compiled_again_whichever_capture_closes_first():
    compiled = torch.compile(tiny.PlainMlp(), backend="aot_eager")
    first, second = capture(compiled, "fc2"), capture(compiled, "fc2")
    first.__enter__()
    second.__enter__()
    compiled(torch.randn(2, 6))
    first.__exit__(None, None, None)
    assert torch._dynamo.eval_frame._stance.stance == "force_eager"
    second.__exit__(None, None, None)
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_compiled_in_place():
    """`module.compile()` leaves no wrapper to look through, only compiled code."""
    model = tiny.PlainMlp()
    model.compile(backend="aot_eager")
    x = torch.randn(2, 3, 6)
    model(x)
    with capture(model, "fc2") as cache:
        model(x)
    assert cache["fc2"].shape == (6, 20)


# ---- "a requested hook that never fired is an error when the context ends" -------------------------------------------


def test_a_hook_that_never_fired(model):
    """A silent empty result would be worse than none; an error that is under way is not covered up."""
    with pytest.raises(ValueError, match=r"2 of the requested hooks never fired: blocks\.0\.mlp"), capture(model):
        pass
    model.model.decoder.layers = model.model.decoder.layers[:]
    names = [NEURONS[0], "lm_head"]
    with pytest.raises(RuntimeError, match=r"1 of the requested hooks never fired: lm_head"), capture(model, names):
        model.model(tiny.tokens())
    with pytest.raises(KeyError, match="mine"), capture(model):
        raise KeyError("mine")


def test_layers_that_not_every_forward_reaches(model):
    """Rows of different hooks may then differ, and `positions` must not pretend that they agree."""
    with capture(model, [NEURONS[0], "lm_head"]) as cache:
        model(tiny.tokens())
        model.model(tiny.tokens(seed=1))
    assert cache[NEURONS[0]].shape[0] == 28 and cache["lm_head"].shape[0] == 14
    with pytest.raises(ValueError, match="positions_of"):
        cache.positions  # noqa: B018
    assert cache.positions_of("lm_head").tolist() == cache.positions_of(NEURONS[0])[:14].tolist()


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_width_is_checked(model):
    """Both widths and the hook are named."""
    model.model.decoder.layers[1].fc2.in_features = 39
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.hook_post.*width 40.*width is 39"), capture(model):
        model(tiny.tokens())


@pytest.mark.parametrize(("dtype", "match"), [(torch.float64, "float64"), (torch.int64, "int64")])
def test_unsupported_dtypes(dtype, match):
    """Said before a kernel sees it, with the hook and what to do."""
    model = nn.Sequential(nn.Identity())
    with (
        pytest.raises(TypeError, match=rf"0: the input of 0 is torch\.{match}.*float32, bfloat16 or float16"),
        capture(model, "0"),
    ):
        model(torch.ones(2, 3, dtype=dtype))


def test_not_one_row_per_token(model):
    """A module that sees another number of rows (here: only the last position) is an error, not a shift."""

    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(50, 8), nn.Linear(8, 4)

        def forward(self, input_ids):
            return self.head(self.embed(input_ids)[:, -1])

    model = Last()
    with (
        pytest.raises(ValueError, match=r"head was handed 2 rows in one forward of 2 x 7 tokens"),
        capture(model, "head"),
    ):
        model(tiny.tokens())


def test_output_that_is_no_tensor():
    model = tiny.opt()
    with (
        pytest.raises(TypeError, match=r"model\.decoder:output: the output of model\.decoder is BaseModelOutput"),
        capture(model, "model.decoder:output"),
    ):
        model(tiny.tokens())


def test_an_open_capture_is_not_opened_again(model):
    """Nor does the attempt leave hooks behind."""
    opened = capture(model, "blocks.1.mlp.hook_post", select=pyfacts.topk(3))
    with opened as cache:
        with pytest.raises(RuntimeError, match="open already"), opened:
            pass
        model(tiny.tokens())
    assert len(cache["blocks.1.mlp.hook_post"]) == 14
    assert not any(module._forward_pre_hooks for module in model.modules())
    with opened:  # afterwards it may
        model(tiny.tokens())


def test_a_capture_whose_end_raises_can_be_opened_again():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    opened = capture(model, ["a", "b"])
    with pytest.raises(ValueError, match="was handed 2 rows in one forward of 4 x 1 tokens"), opened:
        model["a"](torch.ones(4, 3))
        model["b"](torch.ones(2, 3))
    with opened as cache:
        model["a"](torch.ones(4, 3))
        model["b"](torch.ones(4, 3))
    assert len(cache["a"]) == 4


def test_many_at_once_under_vmap_are_refused():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3))
    for options in ({}, {"select": pyfacts.topk(2)}):
        with pytest.raises(TypeError, match="2: .*one of many under torch.func.vmap"), capture(model, "2", **options):
            torch.func.vmap(model)(torch.randn(5, 3))
    with pytest.raises(TypeError, match="under torch.func.vmap"), capture(model, "2:output"):
        torch.func.vmap(torch.func.grad(lambda x: model(x).sum()))(torch.randn(5, 3))
    with capture(model, "2") as cache:
        torch.func.grad(lambda x: model(x).sum())(torch.randn(5, 3))
    assert len(cache["2"]) == 5


def test_rows_of_two_dtypes_are_not_mixed(model):
    with capture(model, "blocks.0.hook_attn_out") as cache:
        model(tiny.tokens())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(tiny.tokens())
    with pytest.raises(ValueError, match="another dtype cannot be joined"):
        cache["blocks.0.hook_attn_out"]


@pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 1).eval()
    padding = torch.tensor([[False, False, True], [False, False, False]])
    for context in (capture(encoder, "layers.0"), pyfacts.ablate(encoder, {"layers.0": [1]})):
        with pytest.raises(TypeError, match="nested tensor"), torch.inference_mode(), context:
            encoder(torch.randn(2, 3, 8), src_key_padding_mask=padding)


@pytest.mark.parametrize("arguments", [{"select": 3}, {"select": pyfacts.topk}, {"token_mask": 3}])
def test_bad_arguments(model, arguments):
    with pytest.raises(TypeError, match=next(iter(arguments))):
        capture(model, **arguments)


# ---- density ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
def test_dense_capture_warns_once():
    """A GELU model has no zeros: one warning with the remedy, and none with a select, for rows, or for a ReLU model."""
    gelu, select = tiny.gpt2(), importlib.import_module("pyfacts.select")
    with pytest.warns(UserWarning, match=r"100% dense.*pyfacts\.topk.*SAE") as warned, capture(gelu):
        for seed in range(3):
            gelu(tiny.tokens(seed=seed))
    assert len(warned) == 1 and warned[0].filename == __file__
    with capture(gelu, select=select.topk(4)):
        gelu(tiny.tokens())
    with capture(gelu, "blocks.0.hook_resid_pre"):
        gelu(tiny.tokens())
    relu = tiny.PlainMlp()  # about half of the neurons of a random ReLU model fire, and that is not called dense
    relu.fc1.bias.data.zero_()
    with capture(relu, "fc2") as cache:
        relu(torch.randn(8, 32, 6, generator=torch.Generator().manual_seed(0)))
    assert 0.45 < cache["fc2"].density < capture_module.DENSE_ABOVE


def test_devices_without_kernels(monkeypatch):
    """Their activations travel dense, and that is said."""
    model = tiny.opt()
    sae = TinySae(16)
    names, saes = ["blocks.0.mlp.hook_post", "blocks.0.hook_resid_pre"], {"blocks.1.hook_resid_pre": sae}
    caches = []
    for message in (None, r"no kernels for cpu: activations travel dense"):
        if message is not None:
            monkeypatch.setattr("pyfacts.stream.has_kernels", lambda device: False)
        with pytest.warns(UserWarning, match=message) if message else contextlib.nullcontext():
            with pyfacts.capture(model, names, saes=saes) as cache, torch.no_grad():
                model(tiny.tokens())
        caches.append(cache)
    for name in caches[0]:
        a, b = (cache[name] if "resid" in name and "sae" not in name else cache[name].to_dense() for cache in caches)
        assert torch.equal(a, b)


def test_data_parallel_over_several_gpus_is_refused(monkeypatch):
    model = torch.nn.DataParallel(tiny.opt())
    monkeypatch.setattr(model, "device_ids", [0, 1])
    with pytest.raises(ValueError, match="copies of the model on 2 GPUs"), pyfacts.capture(model):
        pass
