"""Which tokens are captured, in which order, at which positions: masks, caches, chunks, two stacks, early stops."""

import contextlib
import inspect
import warnings

import pytest
import tiny_models as tiny
import torch
from torch import nn
from transformers import DynamicCache, FSMTConfig, FSMTModel, XLNetConfig, XLNetModel

import pyfacts
from pyfacts.models import resolve_hooks
from pyfacts.stream import ActivationStream

pytestmark = pytest.mark.filterwarnings("ignore:the captured neurons are")

NEURONS = [f"blocks.{i}.mlp.hook_post" for i in range(tiny.LAYERS)]
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]])  # padded on the left, and on the right
KEPT = MASK.nonzero().tolist()


@pytest.fixture
def model():
    return tiny.opt()


def dense_neurons(model, ids, layer=1, **kwargs):
    """[batch, pos, d_mlp] by a plain hook."""
    seen = []
    fc2 = model.model.decoder.layers[layer].fc2
    handle = fc2.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach().clone()))
    with torch.no_grad():
        model(ids, **kwargs)
    handle.remove()
    return seen[0].reshape(*ids.shape, -1) + 0.0


# ---- "padding is dropped when an attention mask is given; token_mask= overrides; BOS may be skipped" -----------------


@pytest.mark.parametrize("positional", [False, True])
def test_padding_is_dropped(model, positional):
    """A mask given by name or by position; the values and positions are those of the tokens that it keeps."""
    ids, names = tiny.tokens(), [*NEURONS, "blocks.0.hook_resid_post"]
    with pyfacts.capture(model, names) as cache, torch.no_grad():
        model(ids, MASK) if positional else model(input_ids=ids, attention_mask=MASK)
    assert torch.equal(cache[NEURONS[1]].to_dense(), dense_neurons(model, ids, attention_mask=MASK)[MASK.bool()])
    assert cache["blocks.0.hook_resid_post"].shape == (10, 16)
    assert cache.positions.tolist() == KEPT


@pytest.mark.parametrize("as_callable", [False, True])
def test_token_mask_overrides(model, as_callable):
    """The attention mask goes on being the model's; what is captured is the token mask's choice. A callable does not
    see padding, and chooses among the tokens that are none."""
    ids = tiny.tokens()
    wanted = ids != ids[0, 0]
    with pyfacts.capture(model, token_mask=(lambda i: i != ids[0, 0]) if as_callable else wanted) as cache:
        model(ids, attention_mask=MASK)
    if as_callable:
        wanted = wanted & MASK.bool()
    expected = dense_neurons(model, ids, attention_mask=MASK)[wanted]
    assert torch.equal(cache[NEURONS[1]].to_dense(), expected)
    assert cache.positions.tolist() == wanted.nonzero().tolist()


def test_bos_is_skipped_in_every_forward(model):
    """A callable serves forwards of different shapes."""
    with pyfacts.capture(model, token_mask=lambda ids: ids != 2) as cache, torch.no_grad():
        for length in (3, 5):
            model(torch.cat([torch.full((2, 1), 2), tiny.tokens(2, length)], dim=1))
    assert cache.positions[:, 1].tolist() == [1, 2, 3] * 2 + [1, 2, 3, 4, 5] * 2
    assert len(cache[NEURONS[0]]) == 16


def test_masks_that_keep_nothing(model):
    """A forward of no wanted tokens gives an empty matrix, which later ones append to."""
    with pyfacts.capture(model, token_mask=lambda ids: ids < (0 if ids.shape[1] == 7 else 99)) as cache:
        model(tiny.tokens())
        assert cache[NEURONS[0]].shape == (0, tiny.D_MLP) and cache.positions.shape == (0, 2)
        model(tiny.tokens(1, 2))
    assert len(cache[NEURONS[0]]) == 2 and cache.positions.tolist() == [[2, 0], [2, 1]]


@pytest.mark.parametrize(
    ("mask", "error", "match"),
    [
        (torch.ones(2, 6, dtype=torch.bool), ValueError, r"token_mask has shape \(2, 6\).*\[2, 7\]"),
        (lambda ids: ids[:, 1:] > 0, ValueError, r"token_mask has shape \(2, 6\)"),
        (torch.where(MASK == 0, -torch.inf, 0.0), ValueError, "bools, or zeros and ones, got torch.float32 with"),
        (lambda ids: ids, ValueError, "bools, or zeros and ones, got torch.int64 with other values"),
        (lambda ids: None, TypeError, "NoneType"),
    ],
)
def test_token_masks_that_do_not_fit(model, mask, error, match):
    with pytest.raises(error, match=match), pyfacts.capture(model, token_mask=mask):
        model(tiny.tokens())


def test_callable_mask_needs_ids():
    model = tiny.PlainMlp()
    with (
        pytest.raises(ValueError, match="callable of input_ids"),
        pyfacts.capture(model, "fc2", token_mask=lambda ids: ids > 0),
    ):
        model(torch.randn(2, 3, 6))


def test_masks_of_other_shapes(model):
    """A 4-D attention mask tells padding by its diagonal; inputs_embeds stand for ids."""
    embeds = model.get_input_embeddings()(tiny.tokens())
    with pyfacts.capture(model) as cache, torch.no_grad():
        model(inputs_embeds=embeds, attention_mask=MASK)
    assert cache.positions.tolist() == KEPT
    llama = tiny.llama_like("Llama")
    causal = torch.ones(7, 7).tril().bool().expand(2, 1, 7, 7)
    with pyfacts.capture(llama) as cache, torch.no_grad():
        llama(tiny.tokens(), attention_mask=causal)
        llama(tiny.tokens(), attention_mask=causal & MASK[:, None, None, :].bool())
        llama(
            tiny.tokens(), attention_mask=torch.where(causal[:1], 0.0, -1e9)
        )  # added to the scores, for all sequences
    everything = [[s, p] for s in range(2) for p in range(7)]
    assert cache.positions.tolist() == [
        *everything,
        *([s + 2, p] for s, p in KEPT),
        *([s + 4, p] for s, p in everything),
    ]


# ---- positions under a cache -----------------------------------------------------------------------------------------


def test_generate_continues_the_same_sequences(model):
    """With a key-value cache each step is the next position of the same sequences, and padding stays out."""
    ids, names = tiny.tokens(2, 4), [NEURONS[1]]
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    with pyfacts.capture(model, names) as cache:
        out = model.generate(ids, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        model(tiny.tokens(1, 2))
    expected = [[0, 1], [0, 2], [0, 3], [1, 0], [1, 1], [1, 2], [1, 3]]
    expected += [[0, 4], [1, 4], [0, 5], [1, 5]]  # the last new token is never fed back
    assert cache.positions.tolist() == [*expected, [2, 0], [2, 1]]
    full = torch.cat([mask, torch.ones(2, 2, dtype=torch.long)], dim=1)
    at_once = dense_neurons(model, out[:, :6], attention_mask=full)
    where = torch.tensor(expected)
    found = cache[NEURONS[1]].to_dense()[: len(expected)]
    torch.testing.assert_close(found, at_once[where[:, 0], where[:, 1]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("argument", ["past_key_values", "cache"])
def test_a_cache_from_before_the_capture(model, argument):
    """Positions start where the cache ends, which transformers 5.24 began to call by another name."""
    if argument == "cache" and argument not in inspect.signature(model.forward).parameters:
        pytest.skip("not a name of this transformers")
    past = {argument: DynamicCache()}
    with torch.no_grad():
        model(tiny.tokens(2, 4), **past)
        with pyfacts.capture(model) as cache:
            model(tiny.tokens(2, 2), **past, attention_mask=torch.ones(2, 6, dtype=torch.long))
    assert cache.positions.tolist() == [[0, 4], [0, 5], [1, 4], [1, 5]]


@pytest.mark.parametrize("given", [True, False])
def test_conversations_in_turn(model, given):
    """Each has a cache of its own, which it was given or which it returned: that tells whose turn it is."""
    argument = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    with pyfacts.capture(model) as cache, torch.no_grad():
        pasts = []
        for seed in (0, 1, 2):
            out = model(tiny.tokens(2, 4, seed), **({argument: DynamicCache()} if given else {}))
            pasts.append(out[argument])
        for length in (1, 2):
            for past in (pasts[1], pasts[0]):
                model(tiny.tokens(2, length), **{argument: past})
        pasts[0].crop(-3)  # another continuation of the same beginning is a sequence of its own
        model(tiny.tokens(2, 1), **{argument: pasts[0]})
    turns = cache.positions[24:].tolist()
    assert turns[:8] == [[2, 4], [3, 4], [0, 4], [1, 4], [2, 5], [2, 6], [3, 5], [3, 6]]
    assert turns[8:] == [[0, 5], [0, 6], [1, 5], [1, 6], [6, 4], [7, 4]]


class PagedAttentionCache:
    """Of transformers' continuous batching, as far as a model is handed it."""


def test_continuous_batching_is_refused():
    class Packed(tiny.PlainMlp):
        def forward(self, x, cache=None):
            return super().forward(x)

    model = Packed()
    with (
        pytest.raises(ValueError, match="continuous batching packs many sequences into one row"),
        pyfacts.capture(model, "fc2"),
    ):
        model(torch.randn(1, 3, 6), cache=PagedAttentionCache())
    with (
        pytest.raises(ValueError, match="continuous batching packs many sequences into one row"),
        pyfacts.capture(model, "fc2"),
    ):
        model(torch.randn(1, 3, 6))
        with contextlib.suppress(ValueError):  # as the thread does that runs it
            model(torch.randn(1, 3, 6), cache=PagedAttentionCache())


def test_forward_past_the_hooks_is_said_to_see_no_mask():
    model, hook = tiny.llama_like("Llama").model, "layers.0.mlp.down_proj"
    with pytest.warns(UserWarning, match="no attention mask is seen, and padding is captured too"):
        with pyfacts.capture(model, hook, select=pyfacts.topk(3)) as cache:
            model.forward(tiny.tokens(), attention_mask=MASK)
    assert len(cache[hook]) == 14
    masked = pyfacts.capture(model, hook, select=pyfacts.topk(3), token_mask=MASK)
    with warnings.catch_warnings(), masked as cache:
        warnings.simplefilter("error")
        model.forward(tiny.tokens(), attention_mask=MASK)
    assert len(cache[hook]) == MASK.sum()


def generate(model, mask, n_new, cache_implementation):
    """So many tokens after a prompt as long as its mask."""
    model.generate(
        tiny.tokens(*mask.shape),
        attention_mask=mask,
        max_new_tokens=n_new,
        min_new_tokens=n_new,
        do_sample=False,
        cache_implementation=cache_implementation,
    )


@pytest.mark.parametrize("make", [tiny.opt, lambda: tiny.llama_like("Gemma2", head_dim=8)])
def test_a_static_cache_keeps_padding_out_too(make):
    """`generate` then hands the model masks [batch, 1, query, key], for Gemma one for each kind of layer."""
    model = make()
    mask, caches = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]), []
    for implementation in ("dynamic", "static"):
        with pyfacts.capture(model, NEURONS[1]) as cache:
            generate(model, mask, 3, implementation)
        caches.append(cache)
    assert caches[0].positions.tolist() == caches[1].positions.tolist() and len(caches[0].positions) == 6 + 2 * 2
    torch.testing.assert_close(*(cache[NEURONS[1]].to_dense() for cache in caches), rtol=1e-4, atol=1e-5)


def test_a_static_cache_whose_window_is_shorter_than_the_text():
    """Its masks are as wide as the window, and end with the forward's own tokens."""
    model = tiny.llama_like("Mistral", sliding_window=8)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :3] = 0
    with pyfacts.capture(model, NEURONS[1], select=pyfacts.topk(3)) as cache:
        generate(model, mask, 4, "static")
    expected = [*mask.nonzero().tolist(), *([s, p] for p in (12, 13, 14) for s in (0, 1))]
    assert cache.positions.tolist() == expected


# ---- a hook that is called several times in a forward ----------------------------------------------------------------


@pytest.mark.parametrize("select", [None, pyfacts.topk(5)])
def test_chunked_feed_forward(select):
    """BERT's chunks are some positions of every sequence: the rows must come back by sequence, then position."""
    whole, chunked = tiny.bert(), tiny.bert(chunk_size_feed_forward=2)
    ids, mask = tiny.tokens(3, 6), torch.tensor([[1] * 6, [1] * 3 + [0] * 3, [0, 1] * 3])
    names = [*NEURONS, "blocks.1.hook_mlp_out"]
    caches = []
    for model in (whole, chunked):
        with pyfacts.capture(model, names, select=select) as cache, torch.no_grad():
            model(ids, attention_mask=mask)
            model(ids)
        caches.append(cache)
    assert torch.equal(caches[0].positions, caches[1].positions)
    a, b = (cache[NEURONS[1]].to_dense() for cache in caches)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*(cache["blocks.1.hook_mlp_out"] for cache in caches), rtol=1e-4, atol=1e-5)
    assert len(a) == 12 + 18
    assert caches[0][NEURONS[0]].dropped_share == pytest.approx(caches[1][NEURONS[0]].dropped_share, rel=1e-4)


def test_positions_first_are_told_by_the_shape():
    """As many rows as tokens, but in another order."""

    class PositionsFirst(tiny.PlainMlp):
        def forward(self, input_ids):
            return super().forward(torch.nn.functional.one_hot(input_ids.T, 6).float())

    model, seen = PositionsFirst(), {}
    model.fc2.register_forward_pre_hook(lambda module, args: seen.update(h=args[0]))
    ids = torch.randint(0, 6, (2, 5))
    with pyfacts.capture(model, "fc2", token_mask=lambda ids: ids > 2) as cache:
        model(ids)
    assert torch.equal(cache["fc2"].to_dense(), seen["h"].transpose(0, 1)[ids > 2])
    assert torch.equal(cache.positions, (ids > 2).nonzero())


def test_torchs_layers_take_positions_first_unless_told_otherwise():
    """Without ids nothing but the layer says which is which."""
    for batch_first in (False, True):
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first)
        model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        x, seen = torch.randn(2, 5, 8), {}
        model.layers[0].linear2.register_forward_pre_hook(lambda module, args, seen=seen: seen.update(h=args[0]))
        with pyfacts.capture(model, "layers.0.linear2") as cache:
            model(x if batch_first else x.transpose(0, 1))
        assert cache.positions.tolist() == [[i, j] for i in range(2) for j in range(5)]
        expected = seen["h"] if batch_first else seen["h"].transpose(0, 1)
        assert torch.equal(cache["layers.0.linear2"].to_dense(), expected.flatten(0, 1))


def test_hooks_in_around_and_at_torchs_layers_agree():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)
    with pyfacts.capture(layer, "linear2") as cache:
        layer(torch.randn(5, 2, 8))
    assert cache.positions.tolist() == [[i, j] for i in range(2) for j in range(5)]
    model = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(8), enable_nested_tensor=False)
    for length in (4, 5):
        with pyfacts.capture(model, ["layers.1:output", "norm"]) as cache:
            model(torch.randn(length, 4, 8))
        assert torch.equal(cache["norm"].to_dense(), cache["layers.1:output"].to_dense())


@pytest.mark.parametrize("ids_first", ["batch", "pos"])
def test_ids_of_a_model_of_torchs_layers(ids_first):
    """They may be [batch, pos] or [pos, batch]; the shape tells, or nothing does."""

    class LanguageModel(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb = nn.Embedding(20, 8)
            layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)
            self.enc = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

        def forward(self, src):
            return self.enc(self.emb(src.T if ids_first == "batch" else src))

    model, hook, seen = LanguageModel(), "enc.layers.0.linear2", {}
    model.get_submodule(hook).register_forward_pre_hook(lambda module, args: seen.update(h=args[0]))
    ids = torch.randint(0, 20, (2, 5))
    with pyfacts.capture(model, hook, token_mask=lambda ids: ids > 6) as cache:
        model(ids)
    expected = seen["h"].transpose(0, 1) if ids_first == "batch" else seen["h"]
    assert torch.equal(cache[hook].to_dense(), expected[ids > 6])
    with pytest.raises(ValueError, match=r"as many sequences as positions \(4\)"), pyfacts.capture(model, hook):
        model(ids[:, :4].repeat(2, 1))


def test_a_layer_with_an_attention_of_its_own():
    class Layer(nn.TransformerEncoderLayer):
        def __init__(self):
            super().__init__(8, 2, 16)
            self.self_attn = nn.Identity()

        def forward(self, x):
            return self.linear2(self.linear1(x).relu())

    layer = Layer()
    with pyfacts.capture(layer, "linear2") as cache:
        layer(torch.randn(2, 5, 8))
    assert cache.positions[-1].tolist() == [1, 4]


@pytest.mark.parametrize("kind", ["fsmt", "xlnet"])
def test_models_that_take_positions_first(kind):
    """As many positions as sequences: nothing but the layer says which is which."""
    if kind == "fsmt":
        sizes = {"layers": 1, "ffn_dim": 32, "attention_heads": 2}
        sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in sizes.items()}
        config = FSMTConfig(langs=["a", "b"], src_vocab_size=50, tgt_vocab_size=50, d_model=16, **sizes)
        model, hook = FSMTModel(config), "encoder.layers.0.fc2"
    else:
        config = XLNetConfig(vocab_size=50, d_model=16, n_layer=1, n_head=2, d_inner=32)
        model, hook = XLNetModel(config), "layer.0.ff.layer_2"
    model.eval()
    seen = {}
    model.get_submodule(hook).register_forward_pre_hook(lambda module, args: seen.update(h=args[0]))
    ids = torch.randint(5, 50, (4, 4), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 2:] = 0
    with torch.no_grad(), pyfacts.capture(model, hook) as cache:
        model(input_ids=ids, attention_mask=mask)
    expected = seen["h"].transpose(0, 1)[mask.bool()]
    assert torch.equal(cache[hook].to_dense(), pyfacts.encode(expected).to_dense())
    assert cache.positions.tolist() == mask.nonzero().tolist()


# ---- encoder and decoder ---------------------------------------------------------------------------------------------


def test_each_stack_has_its_own_tokens():
    """attention_mask is the encoder's, decoder_attention_mask the decoder's; `positions` refuses to mix them."""
    model, ids, decoder_ids = tiny.t5(), tiny.tokens(), tiny.tokens(2, 4, seed=1)
    decoder_mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    encoder, decoder = "encoder_blocks.1.mlp.hook_post", "decoder_blocks.2.mlp.hook_post"
    with pyfacts.capture(model) as cache, torch.no_grad():
        model(ids, attention_mask=MASK, decoder_input_ids=decoder_ids, decoder_attention_mask=decoder_mask)
    assert len(cache[encoder]) == 10 and len(cache[decoder]) == 7
    assert cache.positions_of(encoder).tolist() == KEPT
    assert cache.positions_of(decoder).tolist() == decoder_mask.nonzero().tolist()
    with pytest.raises(ValueError, match=r"encoder's and a decoder's.*positions_of"):
        cache.positions  # noqa: B018
    with pyfacts.capture(model, lambda name: name.startswith("decoder") and "hook_post" in name) as cache:
        model(ids, attention_mask=MASK, decoder_input_ids=decoder_ids)
    assert cache.positions.tolist() == [[s, p] for s in range(2) for p in range(4)]


def test_the_head_has_the_decoders_tokens():
    """Also where source and target are of one length, and the encoder's mask would fit."""
    model, ids = tiny.t5(), tiny.tokens()
    decoder_mask = 1 - MASK.flip(0)
    decoder_mask[:, 0] = 1
    with pyfacts.capture(model, ["lm_head", "decoder.final_layer_norm"], select=pyfacts.topk(3)) as cache:
        model(ids, attention_mask=MASK, decoder_input_ids=ids, decoder_attention_mask=decoder_mask)
    assert not torch.equal(decoder_mask, MASK)
    for name in ("lm_head", "decoder.final_layer_norm"):
        assert cache.positions_of(name).tolist() == decoder_mask.nonzero().tolist()


def test_what_a_decoder_computes_of_the_encoders_states_has_the_encoders_tokens():
    model, ids = tiny.t5(), tiny.tokens()
    attention = "decoder.block.0.layer.1.EncDecAttention"
    with pyfacts.capture(model, [f"{attention}.k", f"{attention}.q"], select=pyfacts.topk(3)) as cache:
        model(ids, attention_mask=MASK, decoder_input_ids=ids)
    assert cache.positions_of(f"{attention}.k").tolist() == KEPT
    assert len(cache[f"{attention}.q"]) == ids.numel()


def test_what_stands_beside_encoder_and_decoder_is_not_masked():
    model, ids = tiny.t5(cls="T5ForSequenceClassification"), tiny.tokens()
    ids[:, -1] = model.config.eos_token_id
    mask = torch.ones_like(ids)
    mask[0, 1] = 0
    with pyfacts.capture(model, "classification_head:output", select=pyfacts.topk(1)) as cache:
        model(ids, attention_mask=mask)
    assert len(cache["classification_head:output"]) == 2


def test_token_masks_by_stream():
    model = tiny.t5()
    masks = {"encoder": MASK.bool(), "decoder": torch.tensor([[True, False], [False, True]])}
    with pyfacts.capture(model, token_mask=masks) as cache, torch.no_grad():
        model(tiny.tokens(), decoder_input_ids=tiny.tokens(2, 2))
    assert cache.positions_of("encoder_blocks.0.mlp.hook_post").tolist() == KEPT
    assert cache.positions_of("decoder_blocks.0.mlp.hook_post").tolist() == [[0, 0], [1, 1]]


@pytest.mark.parametrize("make", [tiny.opt, tiny.t5])
def test_a_token_mask_of_no_stream(make):
    with pytest.raises(ValueError, match=r"token_mask has masks for 'text', but the hooks' tokens are those of"):
        pyfacts.capture(make(), token_mask={"text": MASK})


def test_labels_and_generate():
    """The decoder's ids may exist only inside the model; in generate() the encoder runs once, outside the forward."""
    model = tiny.t5(num_decoder_layers=tiny.LAYERS)  # generate() makes its cache for as many layers as the encoder has
    encoder, decoder = "encoder_blocks.0.mlp.hook_post", "decoder_blocks.0.mlp.hook_post"
    with pyfacts.capture(model, [encoder, decoder]) as cache, torch.no_grad():
        model(tiny.tokens(), attention_mask=MASK, labels=tiny.tokens(2, 3))
    assert cache.positions_of(decoder).tolist() == [[s, p] for s in range(2) for p in range(3)]
    with pyfacts.capture(model, [encoder, decoder]) as cache:
        model.generate(tiny.tokens(), attention_mask=MASK, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert cache.positions_of(encoder).tolist() == KEPT
    assert cache.positions_of(decoder).tolist() == [[s, p] for p in range(3) for s in range(2)]


# ---- what the dump uses ----------------------------------------------------------------------------------------------


def test_run_stops_after_the_last_hook(model):
    """Neither the down-projection nor anything after it is computed; the next run works like the first."""
    reached = []
    layers = model.model.decoder.layers
    layers[0].fc2.register_forward_hook(lambda *_: reached.append("fc2 of layer 0"))
    layers[1].fc2.register_forward_hook(lambda *_: reached.append("fc2 of layer 1"))
    model.lm_head.register_forward_hook(lambda *_: reached.append("logits"))
    with ActivationStream(model, resolve_hooks(model, NEURONS), stop_early=True) as stream:
        first = stream.run(MASK.bool(), input_ids=tiny.tokens())
        second = stream.run(None, input_ids=tiny.tokens(seed=1), attention_mask=MASK)
    assert reached == ["fc2 of layer 0"] * 2
    with pyfacts.capture(model, token_mask=MASK.bool()) as cache, torch.no_grad():
        model(tiny.tokens())
        model(tiny.tokens(seed=1), attention_mask=MASK)
    for name in NEURONS:
        assert torch.equal(first[name].to_dense(), cache[name].to_dense()[:10])
        assert torch.equal(second[name].to_dense(), cache[name].to_dense()[10:])


def test_run_without_stopping_early(model):
    """In the order of the points, rows and neurons; a hook that the forward does not reach is named."""
    points = resolve_hooks(model, ["blocks.1.hook_resid_post", NEURONS[0]])
    with ActivationStream(model, points, select=pyfacts.topk(3)) as stream:
        parts = stream.run(None, tiny.tokens())
    assert list(parts) == [point.name for point in points]
    assert parts["blocks.1.hook_resid_post"].shape == (14, 16) and parts[NEURONS[0]].dropped_share > 0
    with ActivationStream(model, resolve_hooks(model, ["lm_head", NEURONS[0]]), stop_early=True) as stream:
        with pytest.raises(ValueError, match="never fired: lm_head"):
            model.lm_head, head = nn.Identity(), model.lm_head
            stream.run(None, tiny.tokens())
        model.lm_head = head
        assert len(stream.run(None, tiny.tokens())["lm_head"]) == 14


def test_run_stops_early_with_chunks():
    """The last hook has its tokens only with its last chunk."""
    model = tiny.bert(chunk_size_feed_forward=2)
    with ActivationStream(model, resolve_hooks(model), stop_early=True) as stream:
        parts = stream.run(None, tiny.tokens(2, 6))
    assert [len(parts[name]) for name in NEURONS] == [12, 12]


def test_the_default_device_is_not_asked() -> None:
    """What pyfacts makes for itself stays on the CPU, whatever `torch.set_default_device` says."""
    model, x = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)), torch.randn(2, 3, 8)
    with torch.device("meta"):
        with pyfacts.ablate(model, {"2": [5]}), pyfacts.capture(model, "2") as cache:
            model(x)
        assert cache.positions.tolist() == [[s, p] for s in range(2) for p in range(3)]
        with pyfacts.capture(model, "2") as empty:
            model(x[:0])
        assert len(empty.positions) == 0
    assert cache["2"].shape == (6, 12) and bool((cache["2"].to_dense()[:, 5] == 0).all())
