"""Checkpoints that the libraries themselves saved, with random weights, against those libraries run in float64.

The sets of active latents are compared exactly. That may fail only where a value lies within float32 rounding (about
1e-6 here) of its threshold or of the k-th largest; the seeds are fixed, and with 2,400 latents of order 1 none does.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from sae_libraries import dictionary_learning, sae_lens, sparsify

import pyfacts

D_IN, D_SAE, N_TOKENS = 12, 48, 50
X = torch.randn(N_TOKENS, D_IN, generator=torch.Generator().manual_seed(3)) * 2 + 0.3


def randomise(module: torch.nn.Module, seed: int = 0) -> None:
    """Weights of every sign and norm; biases that matter; thresholds on both sides of 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            spread = 0.3 if parameter.dim() == 2 else 0.7
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
            if "threshold" in name:
                parameter.add_(0.4)


def check(sae: pyfacts.SAE, latents: torch.Tensor, reconstruction: torch.Tensor, x: torch.Tensor = X) -> None:
    """latents [n_tokens, d_sae] and reconstruction [n_tokens, d_in] are the library's, in float64."""
    assert latents.dtype == reconstruction.dtype == torch.float64
    enc = sae.encode(x)
    dense = enc.to_dense()
    assert torch.equal(dense != 0, latents != 0)
    assert 0.02 < enc.density < 0.9  # something is selected, and not everything
    torch.testing.assert_close(dense.double(), latents, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.decode(enc, x).double(), reconstruction, rtol=1e-5, atol=2e-5)


# ---- SAELens -----------------------------------------------------------------------------------------------------


def saved_by_sae_lens(tmp_path: Path, module: str, name: str, metadata: dict | None = None, **config: object):
    """A random SAE that SAELens saved to tmp_path, in float64."""
    classes = sae_lens(module)
    cfg = getattr(classes, f"{name}Config")(d_in=D_IN, d_sae=D_SAE, **config)
    cfg.metadata.hook_name = "blocks.3.mlp.hook_post"
    sae = getattr(classes, name)(cfg)
    randomise(sae)
    sae.save_model(tmp_path)
    return sae.to(dtype=torch.float64)


def check_sae_lens(path: Path, reference: torch.nn.Module) -> pyfacts.SAE:
    sae = pyfacts.load_sae(path)
    with torch.no_grad():
        latents = reference.encode(X.double())
        check(sae, latents, reference.decode(latents))
    return sae


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("norm", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize(
    "module, name, config",
    [
        ("standard_sae", "StandardSAE", {}),
        ("jumprelu_sae", "JumpReLUSAE", {}),
        ("gated_sae", "GatedSAE", {}),
        ("topk_sae", "TopKSAE", {"k": 5}),
        ("topk_sae", "TopKSAE", {"k": 5, "rescale_acts_by_decoder_norm": True}),
    ],
)
def test_sae_lens(tmp_path, module, name, config, norm, apply_b_dec_to_input):
    flags = {"normalize_activations": norm, "apply_b_dec_to_input": apply_b_dec_to_input}
    reference = saved_by_sae_lens(tmp_path, module, name, **config, **flags)
    sae = check_sae_lens(tmp_path, reference)
    assert sae.hook_name == "blocks.3.mlp.hook_post"
    assert sae.architecture == reference.cfg.architecture()
    assert sae.input_norm == (None if norm == "none" else norm)
    assert sae.source_format == "sae_lens"


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("matryoshka", [True, False])
def test_sae_lens_batch_topk(tmp_path, matryoshka, rescale):
    """The training checkpoint, the inference checkpoint, and SAELens on the latter agree."""
    module, name = ("matryoshka_batchtopk_sae", "MatryoshkaBatchTopK") if matryoshka else ("batchtopk_sae", "BatchTopK")
    classes = sae_lens(module)
    config = {"d_in": D_IN, "d_sae": D_SAE, "k": 5, "rescale_acts_by_decoder_norm": rescale}
    config |= {"matryoshka_widths": [16, D_SAE]} if matryoshka else {}
    trained = getattr(classes, f"{name}TrainingSAE")(getattr(classes, f"{name}TrainingSAEConfig")(**config))
    randomise(trained)
    trained.topk_threshold.fill_(0.83)
    trained.save_model(tmp_path / "training")
    trained.save_inference_model(tmp_path / "inference")

    jumprelu = sae_lens("jumprelu_sae")
    reference = jumprelu.JumpReLUSAE(jumprelu.JumpReLUSAEConfig(d_in=D_IN, d_sae=D_SAE))
    reference.load_state_dict(safetensors.torch.load_file(tmp_path / "inference" / "sae_weights.safetensors"))
    reference.cfg.apply_b_dec_to_input = trained.cfg.apply_b_dec_to_input
    reference.to(dtype=torch.float64)
    assert check_sae_lens(tmp_path / "inference", reference).architecture == "jumprelu"
    assert check_sae_lens(tmp_path / "training", reference).activation == "jumprelu"


def test_sae_lens_of_older_versions(tmp_path):
    """Configs before version 6: top-level hook name, the activation beside the architecture, scales of one."""
    reference = saved_by_sae_lens(tmp_path, "topk_sae", "TopKSAE", k=5)
    path = tmp_path / "cfg.json"
    old = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 5}, "hook_point": "blocks.0.hook_resid_pre"}
    path.write_text(json.dumps({**old, "d_in": D_IN, "d_sae": D_SAE, "dtype": "torch.float32"}))
    add_tensors(tmp_path / "sae_weights.safetensors", scaling_factor=torch.ones(D_SAE))
    assert check_sae_lens(tmp_path, reference).hook_name == "blocks.0.hook_resid_pre"

    add_tensors(tmp_path / "sae_weights.safetensors", scaling_factor=torch.full((D_SAE,), 2.0))
    with pytest.raises(pyfacts.CheckpointError, match="'scaling_factor' is not all ones"):
        pyfacts.load_sae(tmp_path)


def add_tensors(path: Path, **tensors: torch.Tensor) -> None:
    safetensors.torch.save_file({**safetensors.torch.load_file(path), **tensors}, path)


@pytest.mark.parametrize("kind", ["expected_average_only_in", "covariance_whitening"])
def test_sae_lens_refuses_scales_that_are_elsewhere(tmp_path, kind):
    saved_by_sae_lens(tmp_path, "standard_sae", "StandardSAE", normalize_activations=kind)
    with pytest.raises(pyfacts.CheckpointError, match=f"cfg.json: 'normalize_activations' is '{kind}'.*fold"):
        pyfacts.load_sae(tmp_path)


TRANSCODER = {"d_out": D_IN, "apply_b_dec_to_input": False}


@pytest.mark.parametrize(
    "module, name, config, why",
    [
        ("transcoder", "Transcoder", TRANSCODER, "another module's output"),
        ("transcoder", "SkipTranscoder", TRANSCODER, "another module's output"),
        ("transcoder", "JumpReLUTranscoder", TRANSCODER, "another module's output"),
        ("transcoder", "JumpReLUSkipTranscoder", TRANSCODER, "another module's output"),
        ("abstopk_sae", "AbsTopKSAE", {}, "negative"),
        ("matching_pursuit_sae", "MatchingPursuitSAE", {}, "one after another"),
    ],
)
def test_sae_lens_refuses_architectures(tmp_path, module, name, config, why):
    saved_by_sae_lens(tmp_path, module, name, **config)
    with pytest.raises(pyfacts.CheckpointError, match=f"cfg.json: 'architecture' is .*{why}"):
        pyfacts.load_sae(tmp_path)


def test_sae_lens_of_a_model_that_was_loaded_centred(tmp_path):
    """TransformerLens can take the mean from all that writes to the residual stream; then the SAE never saw one."""
    reference = saved_by_sae_lens(tmp_path, "standard_sae", "StandardSAE")
    config = json.loads((tmp_path / "cfg.json").read_text())
    kwargs = {"center_writing_weights": True, "n_devices": 2}
    config["metadata"] |= {"hook_name": "blocks.3.hook_resid_pre", "model_from_pretrained_kwargs": kwargs}
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match=r"with center_writing_weights=True\..*subtract sae.W_enc.mean\(dim=0\)"):
        sae = pyfacts.load_sae(tmp_path)
    sae.W_enc -= sae.W_enc.mean(dim=0)
    with torch.no_grad():
        latents = reference.encode(X.double() - X.double().mean(dim=1, keepdim=True))
        check(sae, latents, reference.decode(latents))

    config["metadata"]["hook_name"] = "blocks.3.attn.hook_z"  # which is the same in both
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    pyfacts.load_sae(tmp_path)
    kwargs |= {"fold_value_biases": True, "fold_ln": True}
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match=r"with fold_value_biases=True\."):
        pyfacts.load_sae(tmp_path)


# ---- Gemma Scope -------------------------------------------------------------------------------------------------


def gemma_scope_weights() -> dict[str, torch.Tensor]:
    """There is no library that saves them."""
    draw = np.random.default_rng(0).standard_normal
    W_enc, W_dec = draw((D_IN, D_SAE)) * 0.3, draw((D_SAE, D_IN))
    weights = {"W_enc": W_enc, "W_dec": W_dec, "b_enc": draw(D_SAE), "b_dec": draw(D_IN), "threshold": draw(D_SAE) + 1}
    return {name: torch.from_numpy(array.astype(np.float32)) for name, array in weights.items()}


def test_gemma_scope(tmp_path):
    """The numbers are those of the tutorial that came with it."""
    weights = gemma_scope_weights()
    np.savez(tmp_path / "params.npz", **{name: tensor.numpy() for name, tensor in weights.items()})

    exact = {name: tensor.double() for name, tensor in weights.items()}
    z = X.double() @ exact["W_enc"] + exact["b_enc"]
    latents = (z > exact["threshold"]) * z.relu()
    sae = pyfacts.load_sae(tmp_path / "params.npz")
    check(sae, latents, latents @ exact["W_dec"] + exact["b_dec"])
    assert (sae.source_format, sae.architecture) == ("gemma_scope", "jumprelu")


@pytest.mark.parametrize(
    ("folder", "place", "theirs", "ours"),
    [
        ("resid_post", "model.layers.5.output", "blocks.5.hook_resid_post", "blocks.5.hook_resid_post"),
        (
            "mlp_out_all",
            "model.layers.17.post_feedforward_layernorm.output",
            "blocks.17.hook_mlp_out",
            "blocks.17.hook_mlp_out",
        ),
        (
            "attn_out",
            "model.layers.5.self_attn.o_proj.input",
            "blocks.5.attn.hook_z",
            "model.layers.5.self_attn.o_proj",
        ),
    ],
)
def test_gemma_scope_2(tmp_path, monkeypatch, folder, place, theirs, ours):
    """As SAELens, which downloads it, reads it."""
    layer = place.split(".")[2]
    directory = tmp_path / folder / f"layer_{layer}_width_16k_l0_medium"
    directory.mkdir(parents=True)
    weights = {name.lower(): tensor for name, tensor in gemma_scope_weights().items()}
    safetensors.torch.save_file(weights, directory / "params.safetensors")
    config = {"architecture": "jump_relu", "model_name": "gemma-v3-1b-pt", "hf_hook_point_in": place, "l0": 60}
    (directory / "config.json").write_text(json.dumps(config))

    loaders = sae_lens("pretrained_sae_loaders", package="loading")
    monkeypatch.setattr(
        loaders, "hf_hub_download", lambda repo_id, filename, subfolder="", **_: tmp_path / subfolder / filename
    )
    shapes = {name: list(tensor.shape) for name, tensor in weights.items()}
    monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", lambda repo_id, filename: shapes)
    fields, state, _ = loaders.gemma_3_sae_huggingface_loader("google/x", str(directory.relative_to(tmp_path)))
    assert fields["hook_name"] == theirs
    classes = sae_lens("jumprelu_sae")
    fields = {name: fields[name] for name in ("d_in", "d_sae", "apply_b_dec_to_input", "normalize_activations")}
    reference = classes.JumpReLUSAE(classes.JumpReLUSAEConfig(**fields))
    reference.load_state_dict(state)
    reference.double()
    with torch.no_grad():
        latents = reference.encode(X.double())
        sae = pyfacts.load_sae(directory)
        check(sae, latents, reference.decode(latents))
    assert (sae.source_format, sae.hook_name) == ("gemma_scope", ours)


# ---- sparsify ----------------------------------------------------------------------------------------------------


def saved_by_sparsify(tmp_path: Path, **config: object):
    coder = sparsify("sparse_coder").SparseCoder(
        D_IN, sparsify("config").SparseCoderConfig(num_latents=D_SAE, k=5, **config)
    )
    randomise(coder)
    coder.save_to_disk(tmp_path)
    return coder.double()


def test_sparsify(tmp_path):
    reference = saved_by_sparsify(tmp_path)
    with torch.no_grad():
        top = reference.encode(X.double())
        latents = torch.zeros(N_TOKENS, D_SAE, dtype=torch.float64).scatter_(1, top.top_indices, top.top_acts)
        reconstruction = reference.decode(top.top_acts, top.top_indices)
    sae = pyfacts.load_sae(tmp_path)
    check(sae, latents, reconstruction)
    assert (sae.source_format, sae.k) == ("sparsify", 5)


@pytest.mark.parametrize(
    "config, field",
    [({"transcode": True}, "transcode"), ({"skip_connection": True}, "skip_connection")],
)
def test_sparsify_refuses(tmp_path, config, field):
    saved_by_sparsify(tmp_path, **config)
    with pytest.raises(pyfacts.CheckpointError, match=f"cfg.json: '{field}' must be"):
        pyfacts.load_sae(tmp_path)


def test_sparsify_refuses_groupmax(tmp_path):
    saved_by_sparsify(tmp_path, activation="groupmax")
    with pytest.raises(pyfacts.CheckpointError, match="'activation' must be 'topk', got 'groupmax'"):
        pyfacts.load_sae(tmp_path)


# ---- dictionary_learning -----------------------------------------------------------------------------------------

DICTIONARIES = {
    "AutoEncoder": ("dictionary", {}),
    "AutoEncoderNew": ("dictionary", {}),
    "GatedAutoEncoder": ("dictionary", {}),
    "JumpReluAutoEncoder": ("dictionary", {}),
    "AutoEncoderTopK": ("trainers.top_k", {"k": 5}),
    "BatchTopKSAE": ("trainers.batch_top_k", {"k": 5}),
    "MatryoshkaBatchTopKSAE": ("trainers.matryoshka_batch_top_k", {"k": 5, "group_sizes": [16, D_SAE - 16]}),
}


def saved_by_dictionary_learning(tmp_path: Path, name: str, with_config: bool = True, threshold: float = 0.83):
    """A random dictionary, saved as `trainSAE` does, and read back by the library in float64."""
    module, arguments = DICTIONARIES[name]
    dictionary_class = getattr(dictionary_learning(module), name)
    dictionary = dictionary_class(D_IN, D_SAE, **arguments)
    randomise(dictionary)
    if "k" in arguments:
        dictionary.threshold.fill_(threshold)
    torch.save(dictionary.state_dict(), tmp_path / "ae.pt")
    if with_config:
        trainer = {"dict_class": name, "activation_dim": D_IN, "dict_size": D_SAE}
        trainer |= {"k": 5} if "k" in arguments else {}
        (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
    return dictionary_class.from_pretrained(tmp_path / "ae.pt").double()


SAME_TENSORS = ("AutoEncoderTopK", "BatchTopKSAE")
CASES = [(name, True) for name in DICTIONARIES] + [(name, False) for name in DICTIONARIES if name not in SAME_TENSORS]


@pytest.mark.parametrize("name, with_config", CASES)
def test_dictionary_learning(tmp_path, name, with_config):
    reference = saved_by_dictionary_learning(tmp_path, name, with_config)
    with torch.no_grad():
        latents = reference.encode(X.double())
        sae = pyfacts.load_sae(tmp_path)
        check(sae, latents, reference.decode(latents))
    assert (sae.source_format, sae.architecture) == ("dictionary_learning", name)


def test_dictionary_learning_saved_on_the_way(tmp_path):
    """In a directory below the one that has the config.json."""
    saved_by_dictionary_learning(tmp_path, "AutoEncoderTopK", True)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "ae.pt").rename(tmp_path / "checkpoints" / "ae_5000.pt")
    assert pyfacts.load_sae(tmp_path / "checkpoints" / "ae_5000.pt").architecture == "AutoEncoderTopK"


def test_dictionary_learning_needs_its_config(tmp_path):
    saved_by_dictionary_learning(tmp_path, "AutoEncoderTopK", with_config=False)
    with pytest.raises(pyfacts.CheckpointError, match="ae.pt: may be one of .*AutoEncoderTopK.*config.json"):
        pyfacts.load_sae(tmp_path)


def test_dictionary_learning_without_an_estimate_of_the_threshold(tmp_path):
    reference = saved_by_dictionary_learning(tmp_path, "BatchTopKSAE", threshold=-1.0)
    with torch.no_grad():
        latents = reference.encode(X.double())
    assert torch.equal(pyfacts.load_sae(tmp_path).encode(X).to_dense() != 0, latents != 0)


# ---- narrow dtypes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, eps", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_loaded_in_a_narrow_dtype(tmp_path, dtype, eps):
    """A gated SAE, where most is folded: sets differ only where rounding the weights can explain it."""
    reference = saved_by_dictionary_learning(tmp_path, "GatedAutoEncoder")
    with torch.no_grad():
        latents = reference.encode(X.double())
    sae = pyfacts.load_sae(tmp_path, dtype=dtype)
    dense = sae.encode(X).to_dense().double()
    assert sae.dtype == dtype and dense.shape == latents.shape
    # x, weight, bias and result are rounded once each: an error of eps * (|x| @ |W| + |b|), a few times over.
    bound = 3 * eps * (X.double().abs() @ sae.W_enc.double().abs() + sae.b_enc.double().abs() + 1)
    z = X.double() @ sae.W_enc.double() + sae.b_enc.double()
    near = ((z - sae.threshold.double()).abs() < bound) | (z.abs() < bound)
    both = (dense != 0) == (latents != 0)
    assert bool((both | near).all()) and near.double().mean() < 0.5
    assert bool(((dense - latents).abs() <= bound)[both].all())
