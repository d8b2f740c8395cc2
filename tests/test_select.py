"""Top-k and thresholds against a plain loop over rows, ties and NaN included."""

import json
import math

import numpy as np
import pytest
import torch

import pyfacts
from pyfacts import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def topk_row(row, k):
    """The k indices of largest |x|: NaN above all, then the larger, then the lower index; by sorting one row."""
    key = [math.inf if math.isnan(v) else abs(v) for v in row.tolist()]
    nan = [math.isnan(v) for v in row.tolist()]
    return sorted(range(len(key)), key=lambda j: (not nan[j], -key[j], j))[:k]


def matrix(dtype, n_tokens=37, n_features=300, seed=0):
    """Coarse values (many ties), zeros, and every special value."""
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(n_tokens, n_features, generator=generator) * 4).round() / 4
    x[3, 10:14] = torch.tensor([math.nan, math.inf, -math.inf, -0.0])
    x[4, 5:9] = math.nan
    x[5] = 0
    return x.to(dtype)


def norms(x):
    return x.double().square().sum(1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 2, 31, 300])
def test_topk(dtype, k):
    x = matrix(dtype)
    expected = torch.zeros_like(x)
    for i, row in enumerate(x):
        kept = topk_row(row, k)
        expected[i, kept] = row[kept]
    enc = pyfacts.topk(k).encode(x)
    assert enc.dtype == dtype
    assert torch.equal(enc.to_dense().nan_to_num(99), (expected + 0.0).nan_to_num(99))
    assert torch.equal(enc.to_dense().isnan(), expected.isnan())
    torch.testing.assert_close(enc.sq_norm, norms(x), equal_nan=True)


def test_topk_of_many_tokens_and_any_strides():
    """More tokens than are in memory at once; rows that are not whole, or overlap; none at all."""
    x = matrix(torch.float32, n_tokens=2100, n_features=40)
    whole = pyfacts.topk(7).encode(x).to_dense()
    by_row = torch.cat([pyfacts.topk(7).encode(row[None]).to_dense() for row in x])
    assert torch.equal(whole.nan_to_num(99), by_row.nan_to_num(99))
    transposed = x.T.contiguous().T
    assert torch.equal(pyfacts.topk(7).encode(transposed).to_dense().nan_to_num(99), whole.nan_to_num(99))
    repeated = pyfacts.topk(7).encode(x[7:8].expand(5, -1)).to_dense()
    assert torch.equal(repeated, whole[7:8].expand(5, -1))
    assert pyfacts.topk(7).encode(x[:0]).shape == (0, 40)


@pytest.mark.parametrize("dtype", DTYPES)
def test_topk_of_arbitrary_bits(dtype):
    """Every NaN, infinity, subnormal and both zeros, against sorting; the stored values keep their bits."""
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    low, high = torch.iinfo(bits).min, torch.iinfo(bits).max
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(low, high + 1, (60, 520), dtype=torch.int64, generator=generator).to(bits)
    x[::3] = x[::3] % 5 * 2**13  # ties, and few magnitudes
    x = x.view(dtype)
    for k in (1, 3, 64, 519, 520):
        expected = torch.zeros_like(x)
        for i, row in enumerate(x):
            kept = topk_row(row, k)
            expected[i, kept] = row[kept]
        for ours, theirs in zip(pyfacts.topk(k).encode(x).planes, pyfacts.encode(expected).planes, strict=True):
            assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_features", [0, 1, 7, 8, 300])
def test_row_norms_are_exact_sums(dtype, n_features):
    """Of whole numbers, whose squares add up without rounding; the same bits with one thread and with two."""
    x = torch.randint(-60, 60, (33, n_features), generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(ops.row_sq_norm(x), norms(x))
    assert torch.equal(ops.row_sq_norm(x.T.contiguous().T), norms(x))
    x = (torch.randn(33, n_features) * 3).to(dtype)
    threads, found = torch.get_num_threads(), []
    for n in (1, 2):
        torch.set_num_threads(n)
        found.append(ops.row_sq_norm(x))
    torch.set_num_threads(threads)
    assert torch.equal(*found)
    torch.testing.assert_close(found[0], norms(x), rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_min_abs_per_feature(dtype):
    """Strictly above each feature's own threshold, compared exactly and not in the activations' narrow dtype."""
    x = matrix(dtype)
    theta = torch.rand(300, generator=torch.Generator().manual_seed(1)) * 4
    theta[0], theta[1] = 1.0 + 2**-20, 0.0  # bfloat16 would round this threshold to 1.0
    x[6, 0] = 1.0
    kept = (x.double().abs() > theta.double()) | x.isnan()
    enc = pyfacts.min_abs(theta).encode(x)
    assert torch.equal(enc.to_dense().nan_to_num(99), torch.where(kept, x, 0).nan_to_num(99) + 0.0)
    assert enc.nnz == int(kept.sum())
    torch.testing.assert_close(enc.sq_norm, norms(x), equal_nan=True)


def test_min_abs_of_integers_is_exact():
    """259 would be 260 in bfloat16."""
    for dtype, theta in ((torch.bfloat16, 259), (torch.float16, 2051), (torch.float32, 2**24 + 3)):
        x = torch.tensor([[theta + 1.0, theta - 1.0]], dtype=torch.float64).to(dtype)
        assert (
            x.tolist() == [[theta + 1, x[0, 1].item()]]
            and pyfacts.min_abs(torch.tensor([theta] * 2)).encode(x).nnz == 1
        )


def test_min_abs_of_one_number():
    x = matrix(torch.float32)[6:]
    for theta in (0.5, torch.tensor(0.5)):
        assert torch.equal(pyfacts.min_abs(theta).encode(x).to_dense(), torch.where(x.abs() > 0.5, x, 0))
    assert pyfacts.min_abs(0).encode(x).dropped_share == 0.0


def test_dropped_share():
    """The share of squared norm, also over several encodings put together."""
    x = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 2.0]])
    enc = pyfacts.topk(1).encode(x)
    assert enc.dropped_share == pytest.approx(9 / 29)
    assert pyfacts.cat([enc, pyfacts.min_abs(3.5).encode(x)]).dropped_share == pytest.approx(22 / 58)
    assert enc[1:].dropped_share == 0.0


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: pyfacts.topk(0), ValueError, "at least 1, got 0"),
        (lambda: pyfacts.topk(-3), ValueError, "got -3"),
        (lambda: pyfacts.topk(2.0), TypeError, "2.0 of type float"),
        (lambda: pyfacts.topk(True), TypeError, "bool"),
        (lambda: pyfacts.topk(4).encode(torch.ones(2, 3)), ValueError, "k=4.*only 3 features"),
        (lambda: pyfacts.topk(1).encode(torch.ones(3)), ValueError, r"shape \(3,\)"),
        (lambda: pyfacts.topk(1).encode(torch.ones(2, 3, dtype=torch.float64)), TypeError, "float64"),
        (lambda: pyfacts.min_abs(np.float32(-0.5)), ValueError, "at least 0, got -0.5"),
        (lambda: pyfacts.min_abs(math.nan), ValueError, "got nan"),
        (lambda: pyfacts.min_abs(torch.tensor([1.0, -2.0])), ValueError, "got -2.0"),
        (lambda: pyfacts.min_abs(torch.tensor([1.0, math.nan])), ValueError, "got nan"),
        (lambda: pyfacts.min_abs(torch.ones(2, 2)), ValueError, r"shape \(2, 2\)"),
        (lambda: pyfacts.min_abs("0.1"), TypeError, "'0.1' of type str"),
        (lambda: pyfacts.min_abs(torch.ones(2)).encode(torch.ones(2, 3)), ValueError, "2 in all.*3 features"),
    ],
)
def test_bad_arguments(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_describe_is_json_and_tells_thresholds_apart():
    """A dump resumes only under an equal description."""
    theta = torch.tensor([0.5, 1.0])
    selects = [
        pyfacts.topk(3),
        pyfacts.topk(4),
        pyfacts.min_abs(0.5),
        pyfacts.min_abs(theta),
        pyfacts.min_abs(theta + 1),
    ]
    described = [json.dumps(select.describe(), sort_keys=True) for select in selects]
    assert len(set(described)) == len(selects)
    assert pyfacts.min_abs(theta.double()).describe() == pyfacts.min_abs(theta).describe()
    assert json.loads(described[0]) == {"kind": "topk", "k": 3}
    assert repr(selects[0]) == "pyfacts.topk(3)" and repr(selects[2]) == "pyfacts.min_abs(0.5)"


def test_thresholds_are_a_copy():
    theta = torch.tensor([0.5, 0.5])
    select = pyfacts.min_abs(theta)
    theta.fill_(9)
    assert select.encode(torch.ones(1, 2)).nnz == 2


class Custom:
    def __init__(self, encode):
        self.encode = encode

    def describe(self):
        return {"kind": "custom"}


def test_a_select_of_ones_own_drops_what_it_drops():
    """Also where it leaves the squared norms of the whole rows out, as `encode` does of what is zeroed before."""
    model = torch.nn.Sequential(torch.nn.Identity())
    x = torch.tensor([[1.0, 2.0, 2.0], [4.0, 0.0, 3.0]])
    with pyfacts.capture(model, "0", select=Custom(lambda x: pyfacts.encode(torch.where(x > 2, x, 0)))) as cache:
        model(x)
    assert cache["0"].dropped_share == pytest.approx(9 / 34)


@pytest.mark.parametrize(
    ("encode", "error", "message"),
    [
        (lambda x: pyfacts.encode(x[1:]), ValueError, r"0: <.*Custom.*> gave \(1, 3\) of activations \(2, 3\)"),
        (lambda x: x, TypeError, "0: <.*Custom.*> gave Tensor, and not EncodedActivations"),
    ],
)
def test_a_select_that_gives_something_else(encode, error, message):
    model = torch.nn.Sequential(torch.nn.Identity())
    with pytest.raises(error, match=message), pyfacts.capture(model, "0", select=Custom(encode)):
        model(torch.ones(2, 3))
