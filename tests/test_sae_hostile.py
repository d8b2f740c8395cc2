"""Checkpoints that are damaged, hostile, or not what they say: one clear error each, and no code is run."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import pyfacts

D_IN, D_SAE = 4, 8
MATRICES = {"W_enc": (D_IN, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}


def ones(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    return {name: torch.ones(shape) for name, shape in shapes.items()}


def sae_lens(folder: Path, config: dict | None = None, **changes: torch.Tensor | None) -> Path:
    fields = {"architecture": "jumprelu", "d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", **(config or {})}
    (folder / "cfg.json").write_text(json.dumps(fields))
    return safetensors_file(folder / "sae_weights.safetensors", {**MATRICES, "threshold": (D_SAE,)}, changes)


def sparsify(folder: Path, config: dict | None = None, **changes: torch.Tensor | None) -> Path:
    fields = {"activation": "topk", "d_in": D_IN, "num_latents": D_SAE, "k": 2, **(config or {})}
    (folder / "cfg.json").write_text(json.dumps(fields))
    shapes = {"encoder.weight": (D_SAE, D_IN), "encoder.bias": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
    return safetensors_file(folder / "sae.safetensors", shapes, changes)


def safetensors_file(path: Path, shapes: dict, changes: dict[str, torch.Tensor | None]) -> Path:
    tensors = {**ones(shapes), **changes}
    safetensors.torch.save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
    return path


def gemma_scope(folder: Path, **changes: np.ndarray) -> Path:
    arrays = {name: tensor.numpy() for name, tensor in ones({**MATRICES, "threshold": (D_SAE,)}).items()}
    np.savez(folder / "params.npz", **{**arrays, **changes})
    return folder / "params.npz"


def gemma_scope_2(folder: Path, config: dict | None = None, **changes: torch.Tensor | None) -> Path:
    fields = {"architecture": "jump_relu", "hf_hook_point_in": "model.layers.3.output", **(config or {})}
    (folder / "config.json").write_text(json.dumps(fields))
    shapes = {name.lower(): shape for name, shape in MATRICES.items()}
    return safetensors_file(folder / "params.safetensors", {**shapes, "threshold": (D_SAE,)}, changes)


def batch_topk(folder: Path, config: dict | None = None, **changes: object) -> Path:
    state = ones({"encoder.weight": (D_SAE, D_IN), "encoder.bias": (D_SAE,), "decoder.weight": (D_IN, D_SAE)})
    state |= {"b_dec": torch.ones(D_IN), "k": torch.tensor(2, dtype=torch.int), "threshold": torch.tensor(0.5)}
    torch.save({**state, **changes}, folder / "ae.pt")
    (folder / "config.json").write_text(
        json.dumps({"trainer": {"dict_class": "BatchTopKSAE", "k": 2, **(config or {})}})
    )
    return folder / "ae.pt"


FORMATS = [sae_lens, sparsify, gemma_scope, gemma_scope_2, batch_topk]
NAN = torch.full((D_SAE,), float("nan"))


def refused(path: Path, *words: str) -> None:
    with pytest.raises(pyfacts.CheckpointError) as raised:
        pyfacts.load_sae(path)
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize("save", FORMATS)
def test_whole(tmp_path, save):
    """What the rest of this file damages is sound; the file and its directory are the same SAE."""
    weights = save(tmp_path)
    assert pyfacts.load_sae(weights).config() == pyfacts.load_sae(str(tmp_path)).config()


@pytest.mark.parametrize("save", FORMATS)
@pytest.mark.parametrize("share", [0, 0.3, 0.9, 0.999])
def test_truncated(tmp_path, save, share):
    weights = save(tmp_path)
    data = weights.read_bytes()
    weights.write_bytes(data[: int(share * len(data))])
    refused(tmp_path, str(weights), "not readable")


@pytest.mark.parametrize("save", FORMATS)
def test_flipped_bytes_never_crash(tmp_path, save):
    """A flip in the numbers loads, one in the structure is an error; nothing else may happen."""
    weights = save(tmp_path)
    data = bytearray(weights.read_bytes())
    for position in range(0, len(data), max(1, len(data) // 60)):
        flipped = bytearray(data)
        flipped[position] ^= 0xFF
        weights.write_bytes(flipped)
        try:
            pyfacts.load_sae(tmp_path)
        except pyfacts.CheckpointError as error:
            assert str(weights) in str(error)


class Touch:
    """Pickles to a call that leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_with_code_is_not_run(tmp_path):
    torch.save({"encoder.weight": Touch(tmp_path / "ran")}, tmp_path / "ae.pt")
    refused(tmp_path, "ae.pt", "does not run a checkpoint's code")
    (tmp_path / "ae.pt").write_bytes(pickle.dumps(Touch(tmp_path / "ran"), protocol=2))
    refused(tmp_path, "ae.pt")
    assert not (tmp_path / "ran").exists()
    pickle.loads((tmp_path / "ae.pt").read_bytes())
    assert (tmp_path / "ran").exists()  # it would have run


def test_an_npz_with_code_is_not_run(tmp_path):
    gemma_scope(tmp_path, threshold=np.array([Touch(tmp_path / "ran")], dtype=object))
    refused(tmp_path, "params.npz", "not readable as npz")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["ae.pt", "params.npz", "sae_weights.safetensors", "sae.safetensors"])
def test_a_pointer_of_git_lfs(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 123\n")
    refused(tmp_path, name, "git lfs pull")


def test_not_a_state_dict(tmp_path):
    torch.save([torch.ones(3)], tmp_path / "ae.pt")
    refused(tmp_path, "ae.pt", "state_dict of tensors, got list")
    torch.save({"cfg": 3}, tmp_path / "ae.pt")
    refused(tmp_path, "ae.pt", "state_dict of tensors")


def test_a_foreign_npy(tmp_path):
    np.save(tmp_path / "w.npy", np.ones(3))
    os.rename(tmp_path / "w.npy", tmp_path / "params.npz")
    refused(tmp_path, "params.npz", "not readable as npz")


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00", "[" * 100_000])
def test_config_that_is_no_object(tmp_path, text):
    sae_lens(tmp_path)
    (tmp_path / "cfg.json").write_text(text)
    refused(tmp_path, str(tmp_path / "cfg.json"), "JSON")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"b_enc": None}, ["'b_enc' is missing", "W_dec"]),
        ({"W_enc": None}, ["'W_enc' is missing"]),
        ({"W_extra": torch.ones(1)}, ["do not belong there", "W_extra"]),
        ({"b_dec": torch.ones(3)}, ["'b_dec' must be [4], got [3]"]),
        ({"W_dec": torch.ones(D_IN, D_SAE)}, ["'W_dec' must be [8, 4], got [4, 8]"]),
        ({"W_enc": torch.ones(3)}, ["'W_enc' must be a matrix", "[3]"]),
        ({"W_enc": torch.ones(0, D_SAE)}, ["'W_enc' must be a matrix that is not empty"]),
        ({"threshold": NAN}, ["'threshold' must not be NaN", "element 0"]),
        ({"b_enc": NAN}, ["'b_enc' must not be NaN"]),
        ({"b_enc": torch.ones(D_SAE, dtype=torch.int32)}, ["'b_enc' must hold floats, got torch.int32"]),
    ],
)
def test_sae_lens_tensors(tmp_path, changes, words):
    refused(sae_lens(tmp_path, **changes), "sae_weights.safetensors", *words)


@pytest.mark.parametrize(
    "config, words",
    [
        ({"architecture": "magic"}, ["'architecture' must be one of standard", "'magic'"]),
        ({"architecture": 3}, ["'architecture' must be a string, got 3"]),
        ({"architecture": "temporal"}, ["'architecture' is 'temporal'", "tokens before"]),
        ({"architecture": "standard"}, ["do not belong there", "threshold"]),
        ({"d_in": 5}, ["'d_in' must be 4, got 5"]),
        ({"d_sae": 9}, ["'d_sae' must be 8, got 9"]),
        ({"dtype": "int8"}, ["'dtype' must be one of float32", "'int8'"]),
        ({"apply_b_dec_to_input": "yes"}, ["'apply_b_dec_to_input' must be true or false, got 'yes'"]),
        ({"normalize_activations": "magic"}, ["'normalize_activations' must be 'none' or one of", "'magic'"]),
        ({"activation_fn": "tanh-relu"}, ["'activation_fn' must be 'relu' or 'topk', got 'tanh-relu'"]),
        ({"metadata": []}, ["'metadata' must be an object"]),
    ],
)
def test_sae_lens_fields(tmp_path, config, words):
    refused(sae_lens(tmp_path, config), *words)


@pytest.mark.parametrize("k, words", [(0, "positive integer, got 0"), (9, "1 to 8, got 9"), (2.5, "got 2.5")])
def test_sae_lens_k(tmp_path, k, words):
    refused(sae_lens(tmp_path, {"architecture": "topk", "k": k}, threshold=None), "cfg.json", "'k' must be", words)


def test_sae_lens_gate_that_overflows(tmp_path):
    gated = {"b_gate": torch.ones(D_SAE), "b_mag": torch.ones(D_SAE), "r_mag": torch.full((D_SAE,), 1e4)}
    refused(
        sae_lens(tmp_path, {"architecture": "gated"}, b_enc=None, threshold=None, **gated), "'r_mag' must have an exp"
    )


@pytest.mark.parametrize(
    "config, words",
    [
        ({"k": -1}, ["'k' must be a positive integer, got -1"]),
        ({"k": 9}, ["'k' must be 1 to 8", "got 9"]),
        ({"d_in": 5}, ["'d_in' must be 4, got 5"]),
        ({"num_latents": 9}, ["'num_latents'", "is 9", "has 8"]),
        ({"num_latents": 0, "expansion_factor": 3}, ["is 12", "has 8"]),
        ({"signed": True}, ["'signed' must be False, got True"]),
    ],
)
def test_sparsify_fields(tmp_path, config, words):
    refused(sparsify(tmp_path, config), "cfg.json", *words)


def test_sparsify_skip_in_the_weights_alone(tmp_path):
    refused(sparsify(tmp_path, W_skip=torch.ones(D_IN, D_IN)), "do not belong there", "W_skip")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"k": torch.tensor(0)}, ["'k' must be 1 to 8", "got 0"]),
        ({"k": torch.tensor(9)}, ["'k' must be 1 to 8", "got 9"]),
        ({"k": torch.tensor(2.0)}, ["'k' must hold integers"]),
        ({"threshold": torch.tensor(float("nan"))}, ["'threshold' must not be NaN"]),
        ({"decoder.weight": torch.ones(D_IN, D_SAE).to_sparse()}, ["'decoder.weight' must be a dense CPU tensor"]),
    ],
)
def test_dictionary_learning_tensors(tmp_path, changes, words):
    refused(batch_topk(tmp_path, **changes), "ae.pt", *words)


@pytest.mark.parametrize(
    "config, words",
    [
        ({"dict_class": "CrossCoder"}, ["'trainer.dict_class' must be one of", "'CrossCoder'"]),
        ({"dict_class": "GatedAutoEncoder"}, ["'decoder_bias' is missing"]),
        ({"k": 3}, ["'k' must be 2, got 3"]),
    ],
)
def test_dictionary_learning_fields(tmp_path, config, words):
    refused(batch_topk(tmp_path, config), *words)


def test_dictionary_learning_of_no_known_class(tmp_path):
    torch.save({"W": torch.ones(2)}, tmp_path / "ae.pt")
    refused(tmp_path, "ae.pt", "no known class", "W")


def test_paths(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not there"):
        pyfacts.load_sae(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no SAE: none of sae_weights.safetensors"):
        pyfacts.load_sae(tmp_path)
    (tmp_path / "notes.txt").touch()
    refused(tmp_path / "notes.txt", "notes.txt", "must be named")
    sae_lens(tmp_path)
    gemma_scope(tmp_path)
    refused(tmp_path, "more than one SAE")
    (tmp_path / "cfg.json").unlink()
    with pytest.raises(FileNotFoundError, match="cfg.json is missing"):
        pyfacts.load_sae(tmp_path / "sae_weights.safetensors")


def test_dtype(tmp_path):
    with pytest.raises(TypeError, match="dtype must be float32, bfloat16, float16 or None, got torch.float64"):
        pyfacts.load_sae(gemma_scope(tmp_path), dtype=torch.float64)
    assert pyfacts.load_sae(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert pyfacts.load_sae(sae_lens(tmp_path, {"dtype": "torch.float16"})).dtype == torch.float16


def test_a_transcoder_of_gemma_scope(tmp_path):
    """It holds the same arrays as an SAE: only the name of its repository tells."""
    folder = tmp_path / "models--google--gemma-scope-2b-pt-transcoders" / "layer_3"
    folder.mkdir(parents=True)
    with pytest.raises(pyfacts.CheckpointError, match="is a transcoder's"):
        pyfacts.load_sae(gemma_scope(folder))


@pytest.mark.parametrize(
    "config",
    [{"hf_hook_point_out": "model.layers.3.post_feedforward_layernorm.output"}, {"affine_connection": True}],
)
def test_a_transcoder_of_gemma_scope_2(tmp_path, config):
    gemma_scope_2(tmp_path, config)
    refused(tmp_path, "params.safetensors", "is a transcoder's")


def test_gemma_scope_2_refuses(tmp_path):
    gemma_scope_2(tmp_path, {"architecture": "topk"})
    refused(tmp_path, "config.json: 'architecture' must be 'jump_relu', got 'topk'")
    gemma_scope_2(tmp_path, {"architecture": None})
    refused(tmp_path, "config.json: 'architecture' must be 'jump_relu', got None")
    gemma_scope_2(tmp_path, affine_skip_connection=torch.ones(D_IN, D_IN))
    refused(tmp_path, "affine_skip_connection")
    gemma_scope_2(tmp_path, w_enc=torch.ones(D_IN, 2, D_SAE))
    refused(tmp_path, "params.safetensors: 'w_enc' must be a matrix")
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config.json is missing"):
        pyfacts.load_sae(tmp_path)


def test_an_sae_of_gemmas_embedding(tmp_path):
    folder = tmp_path / "embedding" / "width_4k" / "average_l0_6"
    folder.mkdir(parents=True)
    with pytest.warns(UserWarning, match=r"rows of embed_tokens.weight.*sqrt\(d_model\) times"):
        pyfacts.load_sae(gemma_scope(folder))
