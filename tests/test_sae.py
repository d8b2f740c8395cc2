"""The SAE record against plain float64 twins: encode, decode, metrics, and what it refuses."""

import json
import math
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

import pyfacts
from pyfacts.errors import CheckpointError
from pyfacts.sae.checkpoint import Tensors
from pyfacts.sae.fold import project, row_norms, scale_rows
from pyfacts.sae.gated import gated_to_jumprelu

D_IN, D_SAE = 6, 20
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(30, D_IN, generator=GENERATOR)


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    shapes = {"W_enc": (D_IN, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


THRESHOLD = torch.linspace(-1, 2, D_SAE)
ACTIVATIONS = {
    "relu": {},
    "jumprelu": {"threshold": THRESHOLD},
    "topk": {"k": 3},
    "batch_topk": {"k": 3},
}


def make(activation: str = "relu", **changes: object) -> pyfacts.SAE:
    return pyfacts.SAE(**{**tensors(), "activation": activation, **ACTIVATIONS.get(activation, {}), **changes})


def latents(activation: str, x: torch.Tensor) -> torch.Tensor:
    """In float64, from the definition."""
    z = x.double() @ tensors()["W_enc"].double() + tensors()["b_enc"].double()
    if activation == "jumprelu":
        return z.relu() * (z > THRESHOLD.double())
    rows = z.relu().reshape(1, -1) if activation == "batch_topk" else z.relu()
    if "topk" not in activation:
        return rows
    kept = rows.topk(3 * len(x) // len(rows), dim=1)
    return torch.zeros_like(rows).scatter_(1, kept.indices, kept.values).view_as(z)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_encode_and_decode(activation):
    sae = make(activation)
    enc = sae.encode(X)
    expected = latents(activation, X)
    assert torch.equal(enc.to_dense() != 0, expected != 0)
    torch.testing.assert_close(enc.to_dense().double(), expected, rtol=1e-5, atol=1e-5)
    reconstruction = expected @ tensors()["W_dec"].double() + tensors()["b_dec"].double()
    torch.testing.assert_close(sae.decode(enc).double(), reconstruction, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("batch_size", [1, 7, 30, 4096])
def test_metrics(activation, batch_size):
    if activation == "batch_topk":
        batches = [latents(activation, batch) for batch in X.split(batch_size)]
        expected = torch.cat(batches)
    else:
        expected = latents(activation, X)
    error = X.double() - (expected @ tensors()["W_dec"].double() + tensors()["b_dec"].double())
    measured = make(activation).metrics(X.view(5, 6, D_IN), batch_size)
    fired = (expected != 0).any(dim=0)
    assert measured.n_tokens == 30
    assert measured.l0 == (expected != 0).sum().item() / 30
    assert measured.density == measured.l0 / D_SAE
    variance = (X.double() - X.double().mean(dim=0)).square().sum()
    assert measured.fvu == pytest.approx((error.square().sum() / variance).item())
    assert measured.dead.tolist() == (~fired).nonzero().flatten().tolist()
    assert measured.n_dead == int((~fired).sum())


def test_metrics_of_equal_tokens():
    for x in (torch.ones(3, D_IN), torch.full((7, D_IN), 0.1, dtype=torch.float64)):
        assert math.isnan(make().metrics(x).fvu)


def test_the_default_device_is_not_asked():
    sae, x = make(), torch.ones(3, D_IN)
    expected = sae.metrics(x).fvu
    with torch.device("meta"):
        assert sae.metrics(x).fvu == pytest.approx(expected, nan_ok=True)


def test_metrics_refuse():
    with pytest.raises(ValueError, match="at least one token"):
        make().metrics(torch.empty(0, D_IN))
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        make().metrics(X, batch_size=0)


@pytest.mark.parametrize("transposed", [False, True])
def test_training_goes_on_without_it(transposed):
    """Whatever the layout of what it was made from, no tensor is shared."""
    given = {name: torch.nn.Parameter(tensor) for name, tensor in tensors().items()}
    if transposed:
        given |= {name: torch.nn.Parameter(given[name].data.T.contiguous()).T for name in ("W_enc", "W_dec")}
    sae = pyfacts.SAE(**given)
    before = sae.encode(X).to_dense(), sae.decode(sae.encode(X))
    with torch.no_grad():
        for tensor in given.values():
            tensor.add_(1)
    assert torch.equal(sae.encode(X).to_dense(), before[0]) and torch.equal(sae.decode(sae.encode(X)), before[1])


def test_layout_is_the_kernels_and_what_has_it_can_be_taken_over():
    given = tensors()
    linear_weight = given["W_enc"].T.contiguous()
    sae = pyfacts.SAE(**{**given, "W_enc": linear_weight.T}, copy=False)
    assert sae.W_enc.data_ptr() == linear_weight.data_ptr()
    assert sae.W_dec.data_ptr() == given["W_dec"].data_ptr()
    assert make().W_enc.T.is_contiguous()
    assert make().to(torch.bfloat16).W_enc.T.is_contiguous()


def test_no_gradient_reaches_its_tensors():
    sae = pyfacts.SAE(**{name: torch.nn.Parameter(tensor) for name, tensor in tensors().items()})
    assert not any(tensor.requires_grad for tensor in sae.tensors().values())
    assert not sae.decode(sae.encode(X)).requires_grad


def test_shapes_of_x():
    sae = make("topk")
    assert sae.encode(X.view(5, 6, D_IN)).shape == (30, D_SAE)
    assert sae.encode(X[0]).shape == (1, D_SAE)
    assert sae.encode(X[:0]).shape == (0, D_SAE)
    assert sae.decode(sae.encode(X[:0])).shape == (0, D_IN)


def test_x_is_cast_to_the_dtype_of_the_sae_also_under_autocast():
    sae = make()
    with torch.autocast("cpu", torch.bfloat16):
        enc = sae.encode(X.double())
        assert enc.dtype == torch.float32
        assert torch.equal(sae.decode(enc), sae.decode(sae.encode(X)))
    assert sae.to(torch.bfloat16).encode(X).dtype == torch.bfloat16


def test_to():
    sae = make("jumprelu", hook_name="blocks.0.mlp.hook_post")
    narrow = sae.to("cpu", torch.float16)
    assert {tensor.dtype for tensor in narrow.tensors().values()} == {torch.float16}
    assert narrow.config() == sae.config()
    assert sae.to("cpu") is sae and sae.to(torch.float32) is sae
    assert sae.to(device="cpu", dtype=torch.bfloat16).dtype == torch.bfloat16


def test_tensors_and_config_define_the_sae():
    sae = make("jumprelu")
    assert set(sae.tensors()) == {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"}
    assert set(make("topk").tensors()) == {"W_enc", "b_enc", "W_dec", "b_dec"}
    config = make("topk").config()
    assert config == {
        "architecture": "topk",
        "activation": "topk",
        "k": 3,
        "d_in": D_IN,
        "d_sae": D_SAE,
        "input_norm": None,
        "hook_name": None,
        "source_format": "tensors",
    }
    assert json.loads(json.dumps(config)) == config


def test_decode_of_normalised_tokens_needs_the_tokens():
    sae = make(input_norm="layer_norm")
    enc = sae.encode(X)
    with pytest.raises(ValueError, match=r"call decode\(enc, x\)"):
        sae.decode(enc)
    with pytest.raises(ValueError, match="the 30 tokens of enc, got 29"):
        sae.decode(enc, X[1:])
    assert sae.metrics(X, batch_size=4).fvu == pytest.approx(sae.metrics(X).fvu)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"activation": "gelu"}, "activation must be 'relu', .* got 'gelu'"),
        ({"activation": "jumprelu"}, "a threshold goes with activation 'jumprelu'"),
        ({"threshold": THRESHOLD}, "a threshold goes with activation 'jumprelu'"),
        ({"activation": "topk"}, "k goes with activation 'topk'"),
        ({"k": 3}, "k goes with activation 'topk'"),
        ({"activation": "topk", "k": 0}, r"k must be 1 to d_sae \(20\), got 0"),
        ({"activation": "topk", "k": D_SAE + 1}, r"k must be 1 to d_sae \(20\), got 21"),
        (
            {"activation": "jumprelu", "threshold": THRESHOLD.log()},
            "threshold must not be NaN, and that of latent 0 is",
        ),
        ({"input_norm": "batch"}, "input_norm must be None, .* got 'batch'"),
        ({"W_enc": torch.zeros(3)}, r"W_enc must be \[d_in, d_sae\], got \[3\]"),
        ({"b_enc": torch.zeros(D_IN)}, r"b_enc must be \[20\] .* got \[6\]"),
        ({"W_dec": torch.zeros(D_IN, D_SAE)}, r"W_dec must be \[20, 6\] .* got \[6, 20\]"),
        ({"b_dec": torch.zeros(D_IN, device="meta")}, "b_dec must be on the device of W_enc, cpu, got meta"),
    ],
)
def test_refused_values(changes, message):
    with pytest.raises(ValueError, match=message):
        pyfacts.SAE(**{**tensors(), **changes})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"activation": "topk", "k": 2.0}, "k must be an int, got 2.0"),
        ({"W_enc": [1.0]}, "W_enc must be a torch.Tensor, got list"),
        ({"W_enc": torch.zeros(D_IN, D_SAE, dtype=torch.float64)}, "W_enc must be float32, bfloat16 or float16"),
        ({"b_dec": torch.zeros(D_IN, dtype=torch.float16)}, "b_dec must have the dtype of W_enc"),
        ({"b_enc": [0.0] * D_SAE}, "b_enc must be a torch.Tensor, got list"),
    ],
)
def test_refused_types(changes, message):
    with pytest.raises(TypeError, match=message):
        pyfacts.SAE(**{**tensors(), **changes})


@pytest.mark.parametrize("x, error", [(X[:, 1:], ValueError), (X.int(), TypeError), ([1.0], TypeError)])
def test_refused_x(x, error):
    with pytest.raises(error, match="x must be"):
        make().encode(x)


def test_folding_in_blocks_equals_folding_at_once(monkeypatch):
    matrix = torch.randn(23, 5, generator=GENERATOR)
    vector, scale = torch.randn(5, generator=GENERATOR), torch.rand(23, generator=GENERATOR).double()
    monkeypatch.setattr("pyfacts.sae.fold.BLOCK_ELEMENTS", 20)
    torch.testing.assert_close(project(matrix, vector), matrix.double() @ vector.double())
    torch.testing.assert_close(row_norms(matrix), matrix.double().norm(dim=1))
    scaled = matrix.clone()
    scale_rows(scaled, scale)
    assert torch.equal(scaled, (matrix.double() * scale[:, None]).float())


def test_import_is_light():
    program = "import sys, pyfacts; print([m for m in ('transformers', 'sae_lens', 'sparsify') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.strip() == "[]"


def test_saved_and_loaded_with_its_weights_only(tmp_path):
    sae = pyfacts.SAE(torch.randn(4, 9), torch.zeros(9), torch.randn(9, 4), torch.zeros(4), activation="topk", k=2)
    torch.save({"sae": sae}, tmp_path / "sae.pt")
    again = torch.load(tmp_path / "sae.pt")["sae"]
    assert again.config() == sae.config()
    assert all(torch.equal(again.tensors()[name], tensor) for name, tensor in sae.tensors().items())


def test_folding_rounds_once():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 48, generator=generator).bfloat16()
    vector = torch.randn(48, generator=generator, dtype=torch.float64)
    scale = torch.rand(64, generator=generator, dtype=torch.float64) + 0.5
    assert torch.equal(project(weight, vector), weight.double() @ vector)
    expected = (weight.double() * scale[:, None]).bfloat16()
    scale_rows(weight, scale)
    assert torch.equal(weight, expected)


def test_metrics_of_halves_are_summed_in_float64():
    generator = torch.Generator().manual_seed(0)
    W = torch.linalg.qr(torch.randn(8, 8, generator=generator))[0].bfloat16()
    sae = pyfacts.SAE(W, torch.zeros(8).bfloat16(), W.T.contiguous(), torch.zeros(8).bfloat16())
    x = torch.randn(500, 8, generator=generator).bfloat16()
    error = (x.double() - sae.decode(sae.encode(x)).double()).square().sum()
    variance = (x.double() - x.double().mean(0)).square().sum()
    assert sae.metrics(x).fvu == pytest.approx((error / variance).item(), rel=1e-9)


def test_weights_that_were_tied(tmp_path):
    """Scaling the one may not scale the other."""
    W = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)) * 2
    state = {"encoder.weight": W, "encoder.bias": torch.zeros(6), "decoder.weight": W.T, "bias": torch.zeros(4)}
    torch.save(state, tmp_path / "ae.pt")
    tied = pyfacts.load_sae(tmp_path / "ae.pt")
    torch.save({name: tensor.clone() for name, tensor in state.items()}, tmp_path / "ae.pt")
    apart = pyfacts.load_sae(tmp_path / "ae.pt")
    assert torch.equal(tied.W_enc, apart.W_enc) and torch.equal(tied.W_dec, apart.W_dec)


def test_every_latent_is_among_the_k(tmp_path):
    shapes = {"encoder.weight": (8, 4), "encoder.bias": (8,), "W_dec": (8, 4), "b_dec": (4,)}
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, tmp_path / "sae.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps({"d_in": 4, "num_latents": 8, "k": 8}))
    assert pyfacts.load_sae(tmp_path).k == 8


def test_a_gate_that_underflows():
    tensors = Tensors("x", {"r_mag": torch.tensor([0.0, -1e4]), "b_mag": torch.zeros(2), "b_gate": torch.zeros(2)})
    with pytest.raises(CheckpointError, match="positive and finite"):
        gated_to_jumprelu(tensors, torch.ones(2, 3), None)
