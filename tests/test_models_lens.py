"""TransformerLens models: the names exist there already, and pyfacts must give what run_with_cache gives."""

import copy
import functools
import gc
import importlib
import weakref
from types import SimpleNamespace

import pytest
import tiny_models as tiny
import torch
from saes import LATENTS, TinySae
from torch import nn
from transformers import DynamicCache

import pyfacts
from pyfacts import ablate
from pyfacts.models import hook_points, resolve_hooks

capture = importlib.import_module("pyfacts.capture").capture
pytestmark = pytest.mark.filterwarnings("ignore:the captured neurons are")

RESID, MLP = ["hook_resid_pre", "hook_resid_mid", "hook_resid_post"], ["hook_mlp_in", "mlp.hook_post", "hook_mlp_out"]


@pytest.fixture(scope="module")
def bridge():
    model_bridge = pytest.importorskip("transformer_lens.model_bridge")
    config = importlib.import_module("transformer_lens.config").TransformerBridgeConfig
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_mlp": 40, "d_head": 8, "n_heads": 2, "n_layers": 2, "n_ctx": 16, "d_vocab": tiny.VOCAB}
    return model_bridge.TransformerBridge.boot_native(config(**sizes, act_fn="relu")).eval()


@pytest.fixture(scope="module")
def hooked_transformer():
    lens = pytest.importorskip("transformer_lens")
    try:
        lens.HookedTransformer  # noqa: B018  # its absence in TransformerLens 4 is an ImportError
    except ImportError:
        pytest.skip("this TransformerLens (4 or later) has no HookedTransformer")
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_mlp": 40, "d_head": 8, "n_heads": 2, "n_layers": 2, "n_ctx": 16, "d_vocab": tiny.VOCAB}
    return lens.HookedTransformer(lens.HookedTransformerConfig(**sizes, act_fn="relu", device="cpu")).eval()


def check_against_run_with_cache(model):
    points = hook_points(model)
    assert {n for n in points if n.startswith("blocks.1.")} >= {
        f"blocks.1.{short}" for short in [*RESID, *MLP, "hook_attn_out"]
    }
    assert [p.name for p in resolve_hooks(model)] == [f"blocks.{i}.mlp.hook_post" for i in range(2)]
    assert all(p.width == (40 if p.kind == "neurons" else 16) for p in points.values())
    assert points["blocks.0.mlp.hook_post"].activation == "relu"
    tokens = tiny.tokens()
    with torch.no_grad():
        plain = model(tokens)
        _, theirs = model.run_with_cache(tokens)
        with capture(model, list(points)) as ours:
            assert torch.equal(model(tokens), plain)
    for name in points:
        expected = theirs[name.replace("hook_mlp_in", "hook_resid_mid")].reshape(14, -1)
        found = ours[name] if points[name].kind == "rows" else ours[name].to_dense()
        assert torch.equal(found, expected), name


def test_transformer_bridge(bridge):
    check_against_run_with_cache(bridge)


def test_hooked_transformer(hooked_transformer):
    check_against_run_with_cache(hooked_transformer)


@pytest.mark.parametrize("compatible", [False, True])
def test_a_bridge_whose_second_norm_comes_after_the_mlp(compatible):
    """In compatibility mode BERT's first MLP layer lends its hook the name of one that must be switched on."""
    builder = pytest.importorskip("transformer_lens.model_bridge.sources._bridge_builder")
    import transformers

    config = tiny.bert().config
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(config).eval()
    bridge = builder.build_bridge_from_module(model, "BertForMaskedLM", hf_config=config).eval()
    if compatible:
        bridge.enable_compatibility_mode()
    points, tokens = hook_points(bridge), tiny.tokens()
    assert {"blocks.1.hook_mlp_in", "blocks.1.mlp.hook_in", "blocks.1.mlp.hook_post"} <= points.keys()
    with torch.no_grad():
        _, theirs = bridge.run_with_cache(tokens)
        with capture(bridge, list(points)) as ours:
            bridge(tokens)
    for name in points:
        found = ours[name] if points[name].kind == "rows" else ours[name].to_dense()
        assert torch.equal(found, theirs[name].reshape(14, -1)), name


def test_any_of_its_hooks_by_name(bridge):
    """Names that pyfacts does not list are taken from the model's own hooks, as rows."""
    with capture(bridge, "blocks.0.attn.o.hook_out") as cache, torch.no_grad():
        bridge(tiny.tokens())
    _, theirs = bridge.run_with_cache(tiny.tokens())
    assert torch.equal(cache["blocks.0.attn.o.hook_out"], theirs["blocks.0.attn.o.hook_out"].reshape(14, -1))


def test_forward_called_around_the_model(bridge):
    """`run_with_hooks` calls `forward` itself, so no hook on the model tells where one begins: two still count."""
    seen = []
    with capture(bridge) as cache, torch.no_grad():
        for seed in (0, 1):
            bridge.run_with_hooks(
                tiny.tokens(seed=seed), fwd_hooks=[("blocks.1.mlp.hook_post", lambda x, hook: seen.append(x.clone()))]
            )
    assert torch.equal(cache["blocks.1.mlp.hook_post"].to_dense(), torch.cat(seen).reshape(28, -1))
    assert cache.positions[:, 0].unique().tolist() == [0, 1, 2, 3]


# ---- stand-ins with the same modules, for whichever version is not installed -----------------------------------------


class HookPoint(nn.Module):
    def forward(self, x):
        return x


class LensMlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.W_in, self.W_out = nn.Parameter(torch.randn(16, 40)), nn.Parameter(torch.randn(40, 16))
        self.hook_pre, self.hook_post = HookPoint(), HookPoint()

    def forward(self, x):
        return self.hook_post(torch.relu(self.hook_pre(x @ self.W_in))) @ self.W_out


class LensBlock(nn.Module):
    def __init__(self, experts):
        super().__init__()
        self.ln2, self.mlp = nn.LayerNorm(16), LensMlp()
        if experts:
            self.mlp = nn.Module()
            self.mlp.experts = nn.ModuleList([LensMlp(), LensMlp()])
        self.hook_resid_pre, self.hook_mlp_in, self.hook_mlp_out = HookPoint(), HookPoint(), HookPoint()
        self.attn = nn.Module()
        self.attn.hook_z = HookPoint()

    def forward(self, x):
        x = self.hook_resid_pre(x)
        x = x + self.attn.hook_z(x.unflatten(-1, (2, 8))).flatten(2)  # of each head
        return x + self.hook_mlp_out(self.mlp(self.ln2(x)))


class LensModel(nn.Module):
    """The modules of TransformerLens 3's HookedTransformer, without attention."""

    def __init__(self, experts=False):
        super().__init__()
        torch.manual_seed(0)
        self.cfg = SimpleNamespace(d_model=16, d_mlp=40, act_fn="relu", use_hook_mlp_in=False)
        self.tokenizer = SimpleNamespace(pad_token_id=0, bos_token_id=5, padding_side="right")
        self.embed = nn.Embedding(tiny.VOCAB, 16)
        self.blocks = nn.ModuleList([LensBlock(False), LensBlock(experts)])
        for path, module in self.named_modules():
            module.name = path

    @property
    def hook_dict(self):
        return {path: module for path, module in self.named_modules() if isinstance(module, HookPoint)}

    def to_tokens(self, input, padding_side="right"):
        rows = [torch.tensor([5, *map(int, text.split())]) for text in ([input] if isinstance(input, str) else input)]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side=padding_side)

    def forward(self, input, padding_side="right", past_kv_cache=None, one_zero_attention_mask=None):
        x = self.embed(input if isinstance(input, torch.Tensor) else self.to_tokens(input, padding_side))
        for block in self.blocks:
            x = block(x)
        return x


def test_hooked_transformer_stand_in():
    """Hook modules are read at their output; `hook_mlp_in`, which is switched off, at the norm it would feed."""
    model = LensModel()
    points = hook_points(model)
    assert points["blocks.1.mlp.hook_post"].module_path == "blocks.1.mlp.hook_post"
    assert points["blocks.1.mlp.hook_post"].side == "output"
    with capture(model, list(points)) as cache, torch.no_grad():
        model(tiny.tokens())
    block, mid = model.blocks[1], 2 * cache["blocks.1.hook_resid_pre"]
    assert torch.equal(cache["blocks.1.hook_mlp_in"], mid)
    assert torch.equal(cache["blocks.1.mlp.hook_post"].to_dense(), torch.relu(block.ln2(mid) @ block.mlp.W_in))


def test_width_of_another_tensor_under_a_neurons_name():
    """A hook that hands out d_model-wide tensors as neurons (TransformerLens #1645) is an error that names both."""
    model = LensModel()
    model.blocks[1].mlp.forward = lambda x: model.blocks[1].mlp.hook_post(x)
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.hook_post.*width 16.*width is 40"), capture(model):
        model(tiny.tokens())


def test_lens_experts_are_refused():
    model = LensModel(experts=True)
    assert [p.name for p in resolve_hooks(model)] == ["blocks.0.mlp.hook_post"]
    for name in ("blocks.1.mlp.hook_post", "blocks.1.mlp.experts.0.hook_post"):
        with pytest.raises(ValueError, match="mixture of experts"):
            resolve_hooks(model, name)


def test_activations_of_heads_are_one_row():
    """[batch, pos, n_heads, d_head] of HookedTransformer; by a name that hook_points does not list."""
    model, hook, sae = LensModel(), "blocks.0.attn.hook_z", TinySae(16)
    with capture(model, hook, saes={hook: sae}) as cache, torch.no_grad():
        model(tiny.tokens())
    rows = model.embed(tiny.tokens()).flatten(0, 1)
    assert torch.equal(cache[hook], rows)
    torch.testing.assert_close(cache[f"{hook}.{LATENTS}"].to_dense(), sae.expected(rows))
    with ablate(model, {hook: [9]}), capture(model, hook) as changed, torch.no_grad():
        model(tiny.tokens())
    assert torch.equal(cache[hook], rows)
    assert torch.equal(changed[hook], rows.index_fill(1, torch.tensor([9]), 0.0))


def test_what_a_names_filter_would_miss():
    """A function is asked about the listed hooks; a pattern that matches none of these finds the others."""
    model = LensModel()
    with pytest.warns(
        UserWarning, match=r"chose 2 of the hooks.*accepts blocks\.0\.attn\.hook_z, blocks\.1\.attn\.hook_z too"
    ):
        chosen = resolve_hooks(model, lambda name: name.endswith(("hook_z", "hook_post")))
    assert [point.name for point in chosen] == [f"blocks.{i}.mlp.hook_post" for i in range(2)]
    with pytest.raises(ValueError, match=r"chose none of the model's 8 hooks.*accepts blocks\.0\.attn\.hook_z"):
        resolve_hooks(model, lambda name: name.endswith("hook_z"))
    points = hook_points(model)
    assert len(resolve_hooks(model, lambda name: points[name].kind == "rows")) == 6  # it knows no other names
    assert [point.name for point in resolve_hooks(model, "*.hook_z")] == [f"blocks.{i}.attn.hook_z" for i in range(2)]


# ---- how they are called ---------------------------------------------------------------------------------------------

POST = "blocks.1.mlp.hook_post"


@pytest.fixture
def tokenizer(tmp_path):
    """One word a token, in a directory, from where TransformerLens loads it anew."""
    tokenizers = pytest.importorskip("tokenizers")
    import transformers

    words = {word: i for i, word in enumerate("<pad> <bos> a b c d e f".split())}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<pad>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=model, **special).save_pretrained(tmp_path)
    return transformers.AutoTokenizer.from_pretrained(tmp_path)


def check_text(model, first, second):
    """The padding of text is not captured, whichever side it is on and however the model is called."""
    alone = []
    for text in (first, second):
        with capture(model, POST) as cache, torch.no_grad():
            model(text)
        alone.append(cache[POST].to_dense())
    n, m = map(len, alone)
    assert n > m
    for side, start in (("right", 0), ("left", n - m)):
        for name in ("__call__", "forward"):
            with capture(model, POST) as cache, torch.no_grad():
                getattr(model, name)([first, second], padding_side=side)
            assert cache.positions.tolist() == [[0, p] for p in range(n)] + [[1, p] for p in range(start, start + m)]
            torch.testing.assert_close(cache[POST].to_dense(), torch.cat(alone), rtol=1e-4, atol=1e-5)
    assert "forward" not in model.__dict__
    with capture(model, POST, token_mask=lambda ids: ids == model.to_tokens(second)[0, -1]) as cache, torch.no_grad():
        model([first, second])
    assert cache.positions.tolist() == [[1, m - 1]]


def test_text_on_a_transformer_bridge(bridge, tokenizer):
    before, bridge.tokenizer = bridge.tokenizer, tokenizer
    try:
        check_text(bridge, "a b c d", "e f")
    finally:
        bridge.tokenizer = before


def test_text_on_a_hooked_transformer(hooked_transformer, tokenizer):
    hooked_transformer.set_tokenizer(tokenizer)
    check_text(hooked_transformer, "a b c d", "e f")


def test_text_on_the_stand_in():
    check_text(LensModel(), "6 7 8 9", "7 8 3")


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_text_that_is_nothing_but_its_beginning(side):
    """GPT-2 begins texts with the token that pads others."""
    model = LensModel()
    model.to_tokens = lambda text, padding_side: torch.tensor([[0, 6, 7], [0, 0, 0]])
    model.tokenizer = SimpleNamespace(pad_token_id=0, bos_token_id=0, padding_side="right")
    with capture(model, POST) as cache, torch.no_grad():
        model(["6 7", ""], padding_side=side)
    assert cache.positions.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0 if side == "right" else 2]]


def test_a_hooked_transformer_that_generates(hooked_transformer):
    with capture(hooked_transformer, POST) as cache, torch.no_grad():
        hooked_transformer.generate(
            tiny.tokens(2, 3), max_new_tokens=3, use_past_kv_cache=True, stop_at_eos=False, verbose=False
        )
    assert cache.positions.tolist() == [[s, p] for s in (0, 1) for p in range(3)] + [
        [s, p] for p in (3, 4) for s in (0, 1)
    ]


def test_masks_and_caches_by_other_names():
    """HookedEncoder's mask; HookedTransformer's cache, by which a forward continues the one before."""
    model, mask = LensModel(), torch.tensor([[1, 1, 1], [1, 1, 0]])
    entry = type("Entry", (), {"past_keys": torch.zeros(2, 3, 2, 8)})()
    past = type("Cache", (), {"entries": [entry]})()
    with capture(model, POST) as cache, torch.no_grad():
        model(tiny.tokens(2, 3), one_zero_attention_mask=mask)
        model.forward(tiny.tokens(2, 1), past_kv_cache=past)
    assert cache.positions.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [0, 3], [1, 3]]


def test_a_forward_that_fails_leaves_nothing_behind():
    model = LensModel()
    with capture(model, POST) as cache, torch.no_grad():
        with pytest.raises(TypeError, match="nonsense"):
            model.forward(tiny.tokens(), nonsense=1)
        model.forward(tiny.tokens(1, 4))
    assert cache.positions.tolist() == [[0, p] for p in range(4)]


def test_captures_that_close_in_another_order():
    model, ids = LensModel(), tiny.tokens()
    mask = torch.ones_like(ids)
    mask[:, -3:] = 0
    first, second = capture(model, POST), capture(model, POST)
    first.__enter__()
    cache = second.__enter__()
    with torch.no_grad():
        model(ids, one_zero_attention_mask=mask)
        first.__exit__(None, None, None)
        model(ids, one_zero_attention_mask=mask)
    assert "forward" in model.__dict__
    second.__exit__(None, None, None)
    assert "forward" not in model.__dict__ and len(cache[POST]) == 2 * int(mask.sum())


def test_a_forward_that_others_put_in_its_place_stays():
    """As accelerate does: before a capture, and within one, over the stand-in; a copy has it too."""
    model, calls = LensModel(), []

    def put_over(model, name):
        @functools.wraps(model.forward)
        def forward(model, inner, ids):
            calls.append(name)
            return inner(ids)

        model.forward = functools.partial(forward, model, model.forward)

    put_over(model, "before")
    mine = model.forward
    with capture(model, POST) as cache, torch.no_grad():
        model(tiny.tokens())
        twin = copy.deepcopy(model)
    assert model.forward is mine and calls == ["before"] and len(cache[POST]) == 14
    twin(tiny.tokens())
    assert calls == ["before"] * 2

    with capture(model, POST):
        model(tiny.tokens())
        put_over(model, "within")
    calls.clear()
    with capture(model, POST) as cache, torch.no_grad():
        model(tiny.tokens())
    model(tiny.tokens())
    assert calls == ["within", "before"] * 2 and len(cache[POST]) == 14


def test_a_capture_that_is_never_closed_keeps_no_model():
    model = LensModel()
    capture(model, POST).__enter__()
    model = weakref.ref(model)
    gc.collect()
    assert model() is None


@pytest.mark.parametrize("make", [LensModel, tiny.opt])
def test_a_copy_made_within_a_capture_is_a_model_of_its_own(make):
    model = make()
    hook = resolve_hooks(model)[1].name
    with capture(model, hook) as cache, torch.no_grad():
        model(tiny.tokens())
        twin = copy.deepcopy(model)
        twin(tiny.tokens())
    assert len(cache[hook]) == 14
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
        outputs = [m(tiny.tokens()) for m in (model, twin)]
        assert not torch.equal(*(output if isinstance(output, torch.Tensor) else output.logits for output in outputs))
        with capture(twin, hook, select=pyfacts.topk(1)) as cache:
            twin(tiny.tokens())
    assert len(cache[hook]) == 14


def test_a_bridges_inner_model():
    """Hugging Face's own `generate` of a bridge calls that, and not the bridge."""
    builder = pytest.importorskip("transformer_lens.model_bridge.sources._bridge_builder")
    plain = tiny.gpt2()
    bridge = builder.build_bridge_from_module(tiny.gpt2(), "GPT2LMHeadModel", hf_config=plain.config).eval()
    cached = DynamicCache()
    bridge.original_model(torch.tensor([[2, 3]]), past_key_values=cached)
    if not cached.get_seq_length():
        pytest.skip("this TransformerLens does not fill the cache of this transformers")
    ids, caches = torch.tensor([[0, 0, 2, 3], [2, 3, 4, 5]]), []
    for model, generate in ((plain, plain.generate), (bridge, bridge.original_model.generate)):
        with capture(model, POST, select=pyfacts.topk(3)) as cache, torch.no_grad():
            generate(ids, attention_mask=(ids != 0).long(), max_new_tokens=3, min_new_tokens=3, do_sample=False)
        caches.append(cache)
    assert caches[0].positions.tolist() == caches[1].positions.tolist() and len(caches[0].positions) == 10
    torch.testing.assert_close(*(cache[POST].to_dense() for cache in caches), rtol=1e-4, atol=1e-5)


def test_whose_tokens_an_unlisted_hook_has():
    """In an encoder-decoder too: the decoder's hooks have its own tokens, but cross-attention's keys the encoder's."""
    builder = pytest.importorskip("transformer_lens.model_bridge.sources._bridge_builder")
    model = tiny.t5()
    bridge = builder.build_bridge_from_module(model, "T5ForConditionalGeneration", hf_config=model.config).eval()
    names = ["decoder_blocks.0.self_attn.hook_in", "decoder_blocks.0.cross_attn.k.hook_in", "encoder_blocks.0.hook_in"]
    assert [point.stream for point in resolve_hooks(bridge, names)] == ["decoder", "encoder", "encoder"]


# ---- SAEs ------------------------------------------------------------------------------------------------------------


class Attached(nn.Module):
    """SAELens' wrapper, which stands in a hook's place."""

    def __init__(self):
        super().__init__()
        self.hook_sae_input = HookPoint()

    def forward(self, x):
        return self.hook_sae_input(x) * 0.5


def test_a_hook_in_whose_place_an_sae_stands():
    """SAELens' `add_sae`: the hook is still there, with what the model computed."""
    model, plain = LensModel(), LensModel()
    model.blocks[0].mlp.hook_post = Attached()
    assert list(hook_points(model)) == list(hook_points(plain))
    caches = []
    for each in (model, plain):
        with capture(each, "blocks.0.mlp.hook_post") as cache, torch.no_grad():
            each(tiny.tokens())
        caches.append(cache["blocks.0.mlp.hook_post"].to_dense())
    assert torch.equal(*caches)
    with (
        pytest.raises(ValueError, match="an SAE stands at blocks.0.mlp.hook_post"),
        ablate(model, {POST.replace("1", "0"): [3]}),
    ):
        pass


def test_a_bridge_that_lists_no_second_names(bridge):
    """SAELens' bridge has only the first ones."""

    class SAETransformerBridge(type(bridge)):
        @property
        def hook_dict(self):
            return {name: hook for name, hook in self._hook_registry.items() if hook.name == name}

    plain, names = type(bridge), list(hook_points(bridge))
    bridge.__class__ = SAETransformerBridge
    try:
        assert POST not in bridge.hook_dict and list(hook_points(bridge)) == names
    finally:
        bridge.__class__ = plain


def test_saes_on_a_transformer_bridge(bridge):
    hook, sae = "blocks.1.hook_resid_pre", TinySae(16)
    with capture(bridge, saes={hook: sae}) as cache, torch.no_grad():
        bridge(tiny.tokens())
    with torch.no_grad():
        _, theirs = bridge.run_with_cache(tiny.tokens())
    latents = cache[f"{hook}.{LATENTS}"].to_dense()
    expected = sae.expected(theirs[hook].reshape(14, -1))
    assert torch.equal(latents != 0, expected != 0)
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-5)
