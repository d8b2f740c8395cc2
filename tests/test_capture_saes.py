"""`pyfacts.capture(saes=...)`: an SAE's latents against plain PyTorch on what plain hooks see."""

import gc
import weakref

import pytest
import tiny_models as tiny
import torch
from saes import LATENTS, TinySae
from torch import Tensor, nn

import pyfacts
from pyfacts.attach import SparseAutoencoder

RESID = "blocks.1.hook_resid_pre"
NEURONS = [f"blocks.{i}.mlp.hook_post" for i in range(tiny.LAYERS)]


@pytest.fixture
def model() -> nn.Module:
    return tiny.opt()


def resid_of(model: nn.Module, *calls: Tensor, **kwargs: Tensor) -> Tensor:
    """What goes into block 1 of an OPT [n_tokens, d_model], by a plain PyTorch hook, over all calls."""
    seen: list[Tensor] = []
    block = model.model.decoder.layers[1]
    handle = block.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach().clone()))
    with torch.no_grad():
        for ids in calls:
            model(ids, **kwargs)
    handle.remove()
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in seen])


def same(latents: object, expected: Tensor) -> bool:
    """The same places, and values within the rounding of the products' order of summation."""
    assert isinstance(latents, pyfacts.EncodedActivations)
    dense = latents.to_dense()
    assert dense.dtype == expected.dtype and dense.count_nonzero() > 0
    return torch.equal(dense != 0, expected != 0) and torch.allclose(dense, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("k", [None, 4])
def test_latents_of_every_token_and_nothing_else(model: nn.Module, k: int | None) -> None:
    """Neither the neurons that names_filter=None means without SAEs, nor the rows that the SAE reads."""
    sae = TinySae(16, k=k)
    calls = [tiny.tokens(2, 7, 0), tiny.tokens(3, 4, 1)]
    with pyfacts.capture(model, saes={RESID: sae}) as cache:
        for ids in calls:
            model(ids)
    assert list(cache) == [f"{RESID}.{LATENTS}"]
    assert cache[f"{RESID}.{LATENTS}"].shape == (26, 600)
    assert same(cache[f"{RESID}.{LATENTS}"], sae.expected(resid_of(model, *calls)))
    assert cache.positions.tolist()[:8] == [[0, p] for p in range(7)] + [[1, 0]]
    assert len(cache.positions) == 26


def test_names_filter_adds_hooks_and_select_is_for_neurons_only(model: nn.Module) -> None:
    sae = TinySae(16)
    with pyfacts.capture(model, [RESID, NEURONS[0]], select=pyfacts.topk(2), saes={RESID: sae}) as cache:
        model(tiny.tokens())
    assert list(cache) == [RESID, NEURONS[0], f"{RESID}.{LATENTS}"]
    assert torch.equal(cache[RESID], resid_of(model, tiny.tokens()))
    assert same(cache[f"{RESID}.{LATENTS}"], sae.expected(cache[RESID]))
    assert cache[f"{RESID}.{LATENTS}"].nnz > 2 * 14 and cache[NEURONS[0]].nnz <= 2 * 14
    with pyfacts.capture(model, saes={}) as cache:  # no SAEs: as without the argument
        model(tiny.tokens())
    assert list(cache) == NEURONS


@pytest.mark.parametrize(("names", "saes"), [(None, {RESID: TinySae(16)}), ([RESID], None)])
def test_a_select_of_nothing_is_an_error(model: nn.Module, names: list[str] | None, saes: dict | None) -> None:
    with pytest.raises(ValueError, match="select keeps less of neurons, and none are captured"):
        pyfacts.capture(model, names, select=pyfacts.topk(2), saes=saes)


@pytest.mark.parametrize(
    ("hook", "module_path", "side", "d_in"),
    [
        ("blocks.0.hook_resid_mid", "model.decoder.layers.0.final_layer_norm", "input", 16),
        ("blocks.0.hook_resid_post", "model.decoder.layers.0", "output", 16),
        ("blocks.0.hook_mlp_in", "model.decoder.layers.0.final_layer_norm", "input", 16),
        ("blocks.0.hook_mlp_out", "model.decoder.layers.0.fc2", "output", 16),
        ("blocks.0.hook_attn_out", "model.decoder.layers.0.self_attn", "output", 16),
        (NEURONS[0], "model.decoder.layers.0.fc2", "input", 40),
        ("model.decoder.layers.1.fc1:output", "model.decoder.layers.1.fc1", "output", 40),
        ("lm_head", "lm_head", "input", 16),
    ],
)
def test_every_kind_of_hook(model: nn.Module, hook: str, module_path: str, side: str, d_in: int) -> None:
    seen: list[Tensor] = []

    def look(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: object) -> None:
        value = output[0] if isinstance(output, tuple) else output
        if side == "input":
            value = args[0] if args else kwargs["hidden_states"]
        seen.append(value.detach().reshape(-1, value.shape[-1]))

    model.get_submodule(module_path).register_forward_hook(look, with_kwargs=True)
    sae = TinySae(d_in)
    with pyfacts.capture(model, saes={hook: sae}) as cache:
        model(tiny.tokens())
    assert same(cache[f"{hook}.{LATENTS}"], sae.expected(seen[0]))


def test_padding_never_reaches_the_sae(model: nn.Module) -> None:
    sae, mask = TinySae(16), torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    with pyfacts.capture(model, saes={RESID: sae}) as cache:
        model(tiny.tokens(), attention_mask=mask)
    expected = resid_of(model, tiny.tokens(), attention_mask=mask)[mask.flatten() != 0]
    assert [torch.equal(x, expected) for x in sae.seen] == [True]
    assert torch.equal(cache.positions, mask.nonzero()) and cache[f"{RESID}.{LATENTS}"].shape == (11, 600)
    with pyfacts.capture(model, saes={RESID: sae}, token_mask=lambda ids: torch.arange(7).expand(2, 7) > 0) as cache:
        model(tiny.tokens())
    assert len(sae.seen[1]) == len(cache.positions) == 12


def test_nothing_dense_stays_alive(model: nn.Module) -> None:
    """The rows that the SAE reads are gone when the forward is over."""
    handed = []
    model.model.decoder.layers[1].register_forward_pre_hook(lambda m, args: handed.append(weakref.ref(args[0])))
    with pyfacts.capture(model, saes={RESID: TinySae(16)}) as cache, torch.no_grad():
        model(tiny.tokens())
        gc.collect()
        assert handed[0]() is None
        assert not any(isinstance(value, Tensor) for value in cache.values())


def test_outputs_and_gradients_are_the_same_bit_for_bit(model: nn.Module) -> None:
    def run() -> list[Tensor]:
        model.zero_grad()
        out = model(tiny.tokens()).logits
        out.square().sum().backward()
        return [out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    sae = TinySae(16)
    sae.W_enc.requires_grad_()
    plain = run()
    with pyfacts.capture(model, saes={RESID: sae, NEURONS[1]: TinySae(40)}) as cache:
        captured = run()
    assert len(plain) > 10 and all(torch.equal(a, b) for a, b in zip(plain, captured, strict=True))
    assert sae.W_enc.grad is None and not cache[f"{RESID}.{LATENTS}"].values.requires_grad


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_grad_modes(model: nn.Module, mode: type) -> None:
    sae = TinySae(16)
    with pyfacts.capture(model, saes={RESID: sae}) as cache, mode():
        model(tiny.tokens())
    assert same(cache[f"{RESID}.{LATENTS}"], sae.expected(resid_of(model, tiny.tokens())))
    assert not cache[f"{RESID}.{LATENTS}"].values.is_inference()


def test_a_half_precision_model_with_a_float32_sae(model: nn.Module) -> None:
    """The SAE is given the model's own bits, and its latents keep its own dtype."""
    model, sae = model.bfloat16(), TinySae(16)
    with pyfacts.capture(model, saes={RESID: sae}) as cache:
        model(tiny.tokens())
    expected = resid_of(model, tiny.tokens())
    assert sae.seen[0].dtype == torch.bfloat16 and torch.equal(sae.seen[0], expected)
    assert same(cache[f"{RESID}.{LATENTS}"], sae.expected(expected))


def test_autocast_does_not_reach_the_sae(model: nn.Module) -> None:
    """Under the model's autocast a float32 SAE would compute in bfloat16."""
    sae = TinySae(40)
    with torch.autocast("cpu", torch.bfloat16), pyfacts.capture(model, saes={NEURONS[0]: sae}) as cache:
        model(tiny.tokens())
        assert torch.is_autocast_enabled("cpu")
    assert sae.seen[0].dtype == torch.bfloat16
    assert same(cache[f"{NEURONS[0]}.{LATENTS}"], sae.expected(sae.seen[0]))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_captures_once(model: nn.Module, use_reentrant: bool) -> None:
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.get_input_embeddings().register_forward_hook(lambda m, args, out: out.requires_grad_())
    recomputed: list[int] = []
    model.model.decoder.layers[0].fc2.register_forward_pre_hook(lambda m, args: recomputed.append(1))
    sae = TinySae(40)
    with pyfacts.capture(model, saes={NEURONS[0]: sae}) as cache:
        model(tiny.tokens(), use_cache=False).logits.sum().backward()
    assert len(recomputed) == 2 and len(sae.seen) == 1 and len(cache[f"{NEURONS[0]}.{LATENTS}"]) == 14


def test_nested_captures(model: nn.Module) -> None:
    a, b = TinySae(16), TinySae(16, seed=1)
    with pyfacts.capture(model, saes={RESID: a}) as outer:
        model(tiny.tokens())
        with pyfacts.capture(model, saes={RESID: b}) as inner:
            model(tiny.tokens(seed=1))
    rows = [resid_of(model, tiny.tokens(seed=seed)) for seed in range(2)]
    assert same(outer[f"{RESID}.{LATENTS}"], a.expected(torch.cat(rows)))
    assert same(inner[f"{RESID}.{LATENTS}"], b.expected(rows[1]))


def test_a_chunked_feed_forward() -> None:
    """BERT's chunks come one by one; the rows must be in the order of the tokens all the same."""
    whole, chunked = tiny.DECODERS["bert"](), tiny.DECODERS["bert"]()
    for layer in chunked.encoder.layer:
        layer.chunk_size_feed_forward = 1
    latents = []
    for model in (whole, chunked):
        sae = TinySae(tiny.D_MLP)
        with pyfacts.capture(model, saes={NEURONS[0]: sae}) as cache:
            model(tiny.tokens())
        latents.append(cache[f"{NEURONS[0]}.{LATENTS}"])
    assert len(sae.seen) == 7 and same(latents[1], latents[0].to_dense())


def test_the_sae_is_moved_to_the_activations(model: nn.Module) -> None:
    """An SAE on another device than the hook's tensor is moved there, once."""
    sae = TinySae(16)
    sae.device = torch.device("meta")
    moved = TinySae(16)
    sae.to = lambda device: sae.moved_to.append(device) or moved  # type: ignore[method-assign]
    with pyfacts.capture(model, saes={RESID: sae}) as cache:
        model(tiny.tokens())
        model(tiny.tokens())
    assert sae.moved_to == [torch.device("cpu")] and len(moved.seen) == 2 and not sae.seen
    assert len(cache[f"{RESID}.{LATENTS}"]) == 28


class TestErrors:
    def test_widths(self, model: nn.Module) -> None:
        """At once where the hook's width is known, else at the first activations; both widths are named."""
        with pytest.raises(ValueError, match=rf"{RESID} reads d_in = 17, but that hook's width is 16"):
            pyfacts.capture(model, saes={RESID: TinySae(17)})
        relu = nn.Sequential(nn.ReLU())
        with (
            pytest.raises(ValueError, match="0.hook_sae_acts_post: .* has width 3 .* the SAE there reads d_in = 4"),
            pyfacts.capture(relu, saes={"0": TinySae(4)}),
        ):
            relu(torch.ones(2, 3))

    def test_unknown_hooks(self, model: nn.Module) -> None:
        with pytest.raises(ValueError, match=r"'blocks\.1\.hook_resid_pr'.*Close matches: blocks\.1\.hook_resid_pre"):
            pyfacts.capture(model, saes={"blocks.1.hook_resid_pr": TinySae(16)})

    def test_another_hook_than_it_was_trained_on(self, model: nn.Module, recwarn: pytest.WarningsRecorder) -> None:
        """All widths of the residual stream are the same: only the checkpoint tells."""
        same = ("model.decoder.layers.1", "model.decoder.layers.0:output", "blocks.0.hook_resid_post")
        for hook in (RESID, *same, "of another library"):
            sae = TinySae(16)
            sae.hook_name = hook
            pyfacts.capture(model, saes={RESID: sae})
        assert not recwarn
        sae.hook_name = "blocks.0.hook_resid_pre"
        with pytest.warns(UserWarning, match=f"the SAE at {RESID} was trained on blocks.0.hook_resid_pre"):
            pyfacts.capture(model, saes={RESID: sae})

    def test_a_module_of_which_it_is_not_said_which_side(
        self, model: nn.Module, recwarn: pytest.WarningsRecorder
    ) -> None:
        """Input and output are equally wide, and elsewhere a hook on a module is on its output."""
        block = "model.decoder.layers.1"
        wrapped = nn.Sequential(nn.Linear(16, 4), nn.Linear(4, 40))
        wrapped.weight = model.get_submodule(f"{block}.fc1").weight
        model.wrapped = wrapped  # as adapters do: its width tells which side is meant
        for hook in (RESID, f"{block}:input", f"{block}:output", f"{block}.fc1", "wrapped"):
            pyfacts.capture(model, saes={hook: TinySae(16)})
        assert not recwarn
        with pytest.warns(UserWarning, match=f"reads that module's input.*{block}:input or {block}:output"):
            pyfacts.capture(model, saes={block: TinySae(16)})

    def test_no_saes(self, model: nn.Module) -> None:
        with pytest.raises(TypeError, match="blocks.1.hook_resid_pre.*d_sae.*got Linear"):
            pyfacts.capture(model, saes={RESID: nn.Linear(16, 3)})
        with pytest.raises(TypeError, match="d_sae.*got <class .*TinySae"):
            pyfacts.capture(model, saes={RESID: TinySae})
        with pytest.raises(TypeError, match="got a dict; SAEs by their hooks are given as saes="):
            pyfacts.capture(model, {RESID: TinySae(16)})
        with pytest.raises(TypeError, match="dict from hook names to SAEs, got TinySae"):
            pyfacts.capture(model, saes=TinySae(16))

    def test_what_encode_gives(self, model: nn.Module) -> None:
        for encode, error, message in [
            (lambda x: x, TypeError, "encode gave Tensor"),
            (lambda x: pyfacts.encode(x), ValueError, r"latents \(14, 16\) for 14 tokens and d_sae = 600"),
        ]:
            sae = TinySae(16)
            sae.encode = encode  # type: ignore[method-assign]
            with pytest.raises(error, match=message), pyfacts.capture(model, saes={RESID: sae}):
                model(tiny.tokens())

    def test_a_name_twice(self) -> None:
        """In a HookedSAETransformer the latents are a hook of the model's own, which names_filter can name."""
        model = nn.ModuleDict({"fc": nn.ModuleDict({LATENTS: nn.Identity()})})
        with pytest.raises(ValueError, match="named by names_filter and captured from saes"):
            pyfacts.capture(model, f"fc.{LATENTS}", saes={"fc": TinySae(16)})


def test_the_protocol() -> None:
    assert isinstance(TinySae(16), SparseAutoencoder) and not isinstance(nn.Linear(2, 2), SparseAutoencoder)


def test_both_streams_of_an_encoder_decoder_model() -> None:
    """Each SAE sees its stream's tokens, the encoder's 10 and the decoder's 6."""
    model = tiny.t5()
    saes = {
        f"{side}_blocks.1.hook_resid_pre": TinySae(16, seed=seed) for seed, side in enumerate(("encoder", "decoder"))
    }
    ids, decoder_ids = tiny.tokens(2, 5), tiny.tokens(2, 3)
    with pyfacts.capture(model, saes=saes) as cache, torch.no_grad():
        model(input_ids=ids, decoder_input_ids=decoder_ids)
    seen: list[Tensor] = []
    for stack in (model.encoder, model.decoder):
        stack.block[1].register_forward_pre_hook(lambda m, args: seen.append(args[0].detach().reshape(-1, 16)))
    with torch.no_grad():
        model(input_ids=ids, decoder_input_ids=decoder_ids)
    for (hook, sae), rows in zip(saes.items(), seen, strict=True):
        assert same(cache[f"{hook}.{LATENTS}"], sae.expected(rows))
    assert [len(rows) for rows in seen] == [10, 6]
