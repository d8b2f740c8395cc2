"""encode, decode and the record, against the plain twin in reference.py; bits are compared."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from conftest import DTYPES, LENGTHS, WIDTHS, sparse
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import BITS, assert_same_bits, bits, decoded, encode, from_bits

import pyfacts
from pyfacts import ops

# One bit pattern of each kind per dtype: exponent all ones with and without mantissa, subnormals, both zeros.
SPECIAL = {
    torch.float32: [
        0x7F800000,
        0xFF800000,
        0x7FC00000,
        0x7F800001,
        0xFFFFFFFF,
        1,
        0x80000001,
        0,
        0x80000000,
        0x3F800000,
    ],
    torch.bfloat16: [0x7F80, 0xFF80, 0x7FC0, 0x7F81, 0xFFFF, 1, 0x8001, 0, 0x8000, 0x3F80],
    torch.float16: [0x7C00, 0xFC00, 0x7E00, 0x7C01, 0xFFFF, 1, 0x8001, 0, 0x8000, 0x3C00],
}


def assert_canonical(enc: pyfacts.EncodedActivations, x: torch.Tensor, **options: float) -> None:
    """Every plane of enc equals the twin's, and decodes to what the twin says."""
    counts, index, values, tile_ptr = encode(x, **options)
    np.testing.assert_array_equal(enc.counts.numpy(), counts)
    np.testing.assert_array_equal(enc.index.numpy(), index)
    np.testing.assert_array_equal(bits(enc.values), values)
    np.testing.assert_array_equal(enc.tile_ptr.numpy(), tile_ptr)
    assert_same_bits(enc.to_dense(), decoded(x, **options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_planes_are_canonical_at_every_boundary(dtype: torch.dtype, width: int) -> None:
    """Widths around a column and a byte, lengths around a tile; densities on both sides of the bitmap rule."""
    for n_tokens in LENGTHS:
        for density in (0.02, 0.13, 0.6):
            x = sparse(n_tokens, width, density, dtype, seed=n_tokens)
            assert_canonical(pyfacts.encode(x), x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_count_of_a_segment(dtype: torch.dtype) -> None:
    """Row n has n values: 31, 32, 33 (positions end), 254, 255 and 256 (the count byte saturates) among them."""
    x = torch.zeros(257, 256, dtype=dtype)
    shuffle = torch.randperm(256, generator=torch.Generator().manual_seed(0))
    for n in range(257):
        x[n, shuffle[:n]] = 1 + torch.arange(n, dtype=torch.float32).to(dtype)
    assert_canonical(pyfacts.encode(x), x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("signed_zero", [False, True])
@pytest.mark.parametrize("min_abs", [0.0, 1e-40, 0.3, 1.0, float("inf")])
def test_special_values(dtype: torch.dtype, signed_zero: bool, min_abs: float) -> None:
    """NaN payloads, infinities and subnormals survive; -0.0 only by request; a threshold is strict and spares NaN."""
    pattern = np.resize(np.array(SPECIAL[dtype], BITS[dtype]), 3 * 300).reshape(3, 300)
    x = from_bits(pattern, dtype)
    assert_canonical(pyfacts.encode(x, min_abs, signed_zero), x, min_abs=min_abs, signed_zero=signed_zero)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_round_trip_of_arbitrary_bits(data: st.DataObject) -> None:
    """Any bits at all: exact with signed_zero, exact but for -0.0 without."""
    dtype = data.draw(st.sampled_from(DTYPES))
    n_tokens, width = data.draw(st.integers(0, 40)), data.draw(st.integers(0, 600))
    seed, zeros = data.draw(st.integers(0, 2**32 - 1)), data.draw(st.floats(0, 1))
    random = np.random.default_rng(seed)
    pattern = random.integers(0, np.iinfo(BITS[dtype]).max, (n_tokens, width), BITS[dtype], endpoint=True)
    pattern[random.random(pattern.shape) < zeros] = data.draw(st.sampled_from([0, SPECIAL[dtype][8]]))
    x = from_bits(pattern, dtype).reshape(n_tokens, width)
    assert_same_bits(pyfacts.encode(x, signed_zero=True).to_dense(), x)
    assert_canonical(pyfacts.encode(x), x)


def test_gated_relu_does_not_store_its_negative_zeros() -> None:
    """relu(g) * u is -0.0 wherever g <= 0 < -u: half of the zeros, none of which may be stored."""
    generator = torch.Generator().manual_seed(0)
    gate = torch.relu(torch.randn(512, 1024, generator=generator) - 1.28)
    h = gate * torch.randn(512, 1024, generator=generator)
    assert torch.signbit(h[h == 0]).float().mean() > 0.4
    enc = pyfacts.encode(h)
    assert enc.nnz == int((h != 0).sum()) and 0.08 < enc.density < 0.12


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_and_alignment(dtype: torch.dtype) -> None:
    """Transposed, row-sliced, column-offset (unaligned) and broadcast inputs encode as their contiguous copies."""
    base = sparse(300, 700, 0.1, dtype)
    for x in (base.T, base[::3], base[:, 1:600], base[5:, 3:], base[:1].expand(200, 700)):
        assert_canonical(pyfacts.encode(x), x.contiguous())


def test_concatenated_columns_of_one_neuron_lie_together() -> None:
    """The canonical order is column by column: the planes of [a | b] are those of a followed by those of b."""
    a, b = sparse(200, 256, 0.1, torch.bfloat16, 1), sparse(200, 256, 0.1, torch.bfloat16, 2)
    both = pyfacts.encode(torch.cat([a, b], dim=1))
    assert_same_bits(both.values, torch.cat([pyfacts.encode(a).values, pyfacts.encode(b).values]))


@pytest.mark.parametrize(("density", "most"), [(0.01, 3.45), (0.03, 3.15), (0.10, 3.05), (0.30, 2.45), (0.50, 2.30)])
def test_bytes_per_non_zero(density: float, most: float) -> None:
    """The sizes that README promises for bf16."""
    enc = pyfacts.encode(sparse(1024, 4096, density, torch.bfloat16))
    assert enc.nbytes / enc.nnz <= most


@pytest.mark.parametrize("density", [0.12, 0.9, 1.0])
def test_never_much_larger_than_dense(density: float) -> None:
    """At no density more than 1.07 of the dense size (whole columns, at least a tile)."""
    for dtype in DTYPES:
        x = sparse(128, 1024, density, dtype)
        assert pyfacts.encode(x).nbytes <= 1.07 * x.nbytes


# ---- the record ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_into_a_buffer(dtype: torch.dtype) -> None:
    """A poisoned buffer, and a window of a larger one whose surroundings stay as they were."""
    x = sparse(300, 520, 0.2, dtype)
    enc = pyfacts.encode(x)
    out = torch.full_like(x, float("nan"))
    assert enc.to_dense(out=out) is out
    assert_same_bits(out, x)
    wide = torch.full((300, 1000), 7.0, dtype=dtype)
    enc.to_dense(out=wide[:, 101:621])
    assert_same_bits(wide[:, 101:621], x)
    assert (wide[:, :101] == 7).all() and (wide[:, 621:] == 7).all()
    overlapping = (
        torch.zeros(1, 520, dtype=dtype).expand(300, 520),
        torch.zeros(2000, dtype=dtype).as_strided((300, 520), (1, 1)),
    )
    for bad in (
        wide,
        *overlapping,
        torch.zeros_like(x).requires_grad_(),
        x.float() if dtype != torch.float32 else x.half(),
        wide.T[:520].T[:, :520].mT,
    ):
        with pytest.raises(ValueError, match="out must"):
            enc.to_dense(out=bad)


def test_properties() -> None:
    x = sparse(1000, 4096, 0.03, torch.bfloat16)
    enc = pyfacts.encode(x)
    assert enc.shape == (1000, 4096) and enc.dtype == torch.bfloat16 and enc.device == torch.device("cpu")
    assert enc.nnz == int((x != 0).sum()) and enc.density == enc.nnz / x.numel()
    assert enc.nbytes == sum(p.nbytes for p in (enc.counts, enc.index, enc.values, enc.tile_ptr))
    assert len(enc) == 1000 and enc.dropped_share == 0.0
    share = enc.nbytes / (1000 * 4096 * 2)
    for part in ("(1000, 4096)", "bfloat16", f"{enc.density:.2%}", "kB", f"{share:.1%} of dense"):
        assert part in repr(enc)


@pytest.mark.parametrize("dtype", DTYPES)
def test_csr_and_scipy(dtype: torch.dtype) -> None:
    x = sparse(300, 600, 0.2, dtype)
    enc = pyfacts.encode(x)
    csr = enc.to_csr()
    assert csr.layout == torch.sparse_csr and csr.shape == x.shape and csr.dtype == dtype
    torch.sparse_csr_tensor(csr.crow_indices(), csr.col_indices(), csr.values(), x.shape, check_invariants=True)
    assert_same_bits(csr.to_dense(), x)
    np.testing.assert_array_equal(enc.to_scipy().toarray(), x.float().numpy())


def test_neuron_gives_tokens_and_values() -> None:
    x = sparse(700, 513, 0.3, torch.float32)
    enc = pyfacts.encode(x)
    for j in (0, 255, 256, 511, 512, -1):
        tokens, values = enc.neuron(j)
        assert torch.equal(tokens, x[:, j].nonzero()[:, 0])
        assert_same_bits(values, x[:, j][tokens])
    assert torch.equal(enc.feature(7)[0], enc.neuron(7)[0])
    for j in (513, -514):
        with pytest.raises(ValueError, match=rf"feature {j} is out of range: there are 513"):
            enc.neuron(j)


@pytest.mark.parametrize("bounds", [(0, 300), (10, 20), (127, 129), (128, 256), (5, 5), (0, 0), (290, 999), (-7, None)])
def test_a_token_slice_is_the_encoding_of_the_rows(bounds: tuple[int, int | None]) -> None:
    x = sparse(300, 520, 0.15, torch.bfloat16)
    assert_canonical(pyfacts.encode(x)[slice(*bounds)], x[slice(*bounds)])


def test_rows_by_number_and_iteration() -> None:
    x = sparse(5, 300, 0.2, torch.float32)
    enc = pyfacts.encode(x)
    assert_canonical(enc[-1], x[-1:])
    assert_same_bits(torch.cat([row.to_dense() for row in enc]), x)
    with pytest.raises(IndexError, match="token 5 is out of range"):
        enc[5]
    for other in ((slice(None), 3), (1, 2), 1.0, None, True, torch.tensor(True), "1"):
        with pytest.raises(
            TypeError, match="token must be an int, got .*; a slice, or a list, array or tensor"
        ) as caught:
            enc[other]
        assert "neuron(j) reads a feature" in str(caught.value)
    with pytest.raises(TypeError, match=r"feature must be an int, got 1\.0"):
        enc.neuron(1.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_features", [0, 5, 520])
def test_chosen_tokens(dtype: torch.dtype, n_features: int) -> None:
    """In any order, more than once, by every kind of index, of whole columns and of segments of 255 and 256 values."""
    x = sparse(300, n_features, 0.15, dtype)
    x[::7] = sparse(300, n_features, 1.0, dtype)[::7]
    enc = pyfacts.encode(x)
    for chosen in (
        [1, 5, 9],
        [299, -300, 7, 7, 7],
        [],
        slice(None, None, 2),
        slice(200, 3, -9),
        slice(5, 1, 2),
        range(4),
    ):
        rows = x[list(range(300))[chosen] if isinstance(chosen, slice) else list(chosen)]
        assert_canonical(enc[chosen], rows)
        if not isinstance(chosen, slice):
            assert_canonical(enc[np.array(chosen, np.int32)], rows)
            assert_canonical(enc[torch.tensor(chosen, dtype=torch.int16)], rows)
    for odd in (np.arange(300)[::-7], np.arange(300, dtype=">i4"), pandas.Series([5, 6], index=["a", "b"])):
        assert_canonical(enc[odd], x[[int(i) for i in odd]])
    mask = torch.rand(300) < 0.3
    for bools in (mask, mask.numpy(), mask.tolist()):
        assert_canonical(enc[bools], x[mask])
    assert_canonical(enc[torch.tensor(3)], x[3:4])
    many = pyfacts.encode(x.repeat(5, 1))  # of which a few are looked up one by one
    assert_canonical(many[[1400, 3, 127, 128, 1499]], x[[200, 3, 127, 128, 299]])


def test_chosen_tokens_keep_their_norms_and_leave_the_rest() -> None:
    x = torch.randn(300, 40)
    enc = pyfacts.encode(x, min_abs=1.0)
    assert torch.equal(enc[[7, 7, 2]].sq_norm, enc.sq_norm[[7, 7, 2]])
    assert enc[[5]].dropped_share == enc[5].dropped_share > 0


def test_saved_with_torch(tmp_path: Path) -> None:
    enc = pyfacts.encode(torch.randn(300, 40), min_abs=1.0)
    torch.save({"enc": enc}, tmp_path / "enc.pt")
    again = torch.load(tmp_path / "enc.pt")["enc"]
    assert_same_bits(again.to_dense(), enc.to_dense())
    assert torch.equal(again.sq_norm, enc.sq_norm) and again.n_features == 40


def test_what_an_encoding_is_not() -> None:
    enc = pyfacts.encode(torch.eye(5))
    assert np.asarray(enc).shape == () and np.array([enc, enc]).shape == (2,)  # objects, as SciPy's matrices are
    assert np.asarray(enc).item() is enc
    with pytest.raises(TypeError, match="values stay as they are"):
        enc.to(torch.bfloat16)


def test_tokens_that_cannot_be_chosen() -> None:
    enc = pyfacts.encode(torch.eye(5))
    for beyond in ([0, 5], torch.tensor([-6]), np.array([2**64 - 1], np.uint64)):
        with pytest.raises(IndexError, match="token (5|-6|18446744073709551615) is out of range: there are 5"):
            enc[beyond]
    with pytest.raises(ValueError, match=r"bools that choose tokens must be \[5\], got shape \(4,\)"):
        enc[[True] * 4]
    for other in ([1.5], torch.ones(2, 2, dtype=torch.int64), ["a"], {}, torch.eye(5).to_sparse()):
        with pytest.raises(TypeError, match=r"tokens must be integers or bools \[n\]"):
            enc[other]
    with pytest.raises(TypeError, match=r"torch takes uint8 for a mask: give \.bool\(\), or \.long\(\)"):
        enc[torch.tensor([0, 0, 1, 1, 0], dtype=torch.uint8)]
    assert len(enc[np.array([0, 0, 1], np.uint8)]) == 3  # NumPy's are indices
    with pytest.raises(ValueError, match="step cannot be zero"):
        enc[::0]
    with pytest.raises(RuntimeError, match="token 5 out of range for 5 tokens"):
        ops.take_tokens(enc.planes, 5, torch.tensor([5]))
    with pytest.raises(RuntimeError, match="not a valid encoding"):
        broken = enc.counts.clone()
        broken[0, 2] = 3
        ops.take_tokens((broken, *enc.planes[1:]), 5, torch.tensor([0]))


@pytest.mark.parametrize("lengths", [(128, 128), (1, 300, 0, 127), (0, 0), (5,), (129, 255, 3)])
def test_cat_is_the_encoding_of_the_stacked_rows(lengths: tuple[int, ...]) -> None:
    parts = [sparse(n, 520, 0.15, torch.float16, seed=i) for i, n in enumerate(lengths)]
    assert_canonical(pyfacts.cat([pyfacts.encode(part) for part in parts]), torch.cat(parts))


def test_cat_refuses_what_does_not_fit() -> None:
    enc = pyfacts.encode(torch.ones(2, 3))
    with pytest.raises(ValueError, match="at least one"):
        pyfacts.cat([])
    with pytest.raises(TypeError, match="got Tensor as number 1"):
        pyfacts.cat([enc, torch.ones(2, 3)])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="n_features: number 0 has 3, number 1 has 4"):
        pyfacts.cat([enc, pyfacts.encode(torch.ones(2, 4))])
    with pytest.raises(ValueError, match="one dtype"):
        pyfacts.cat([enc, pyfacts.encode(torch.ones(2, 3).half())])
    with pytest.raises(ValueError, match="one signed_zero"):
        pyfacts.cat([enc, pyfacts.encode(torch.ones(2, 3), signed_zero=True)])


def test_dropped_share_is_reported_and_survives_slices_and_cat() -> None:
    """With min_abs the share of squared norm that went is exact in float64, for the whole, a slice and a stack."""
    x = torch.randn(300, 400, generator=torch.Generator().manual_seed(0))
    enc = pyfacts.encode(x, min_abs=1.5)

    def share(rows: torch.Tensor) -> float:
        squares = rows.double().square()
        return (squares[rows.abs() <= 1.5].sum() / squares.sum()).item()

    assert enc.dropped_share == pytest.approx(share(x), rel=1e-9)
    assert enc[100:170].dropped_share == pytest.approx(share(x[100:170]), rel=1e-9)
    exact = pyfacts.encode(torch.full((7, 400), 2.0))
    expected = share(torch.cat([x, torch.full((7, 400), 2.0)]))
    assert pyfacts.cat([enc, exact]).dropped_share == pytest.approx(expected, rel=1e-9)
    assert "dropped_share" in repr(enc)
    assert enc[100:101].sq_norm.untyped_storage().nbytes() == 8  # a slice does not keep the rest alive
    for value in (float("nan"), float("inf")):  # of which no share can be told
        assert math.isnan(pyfacts.encode(torch.tensor([[1.0, 3.0, value]]), min_abs=2.0).dropped_share)


def test_to_the_same_device_is_itself() -> None:
    enc = pyfacts.encode(torch.ones(2, 3))
    assert enc.to("cpu") is enc and enc.cpu() is enc


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ([[1.0]], TypeError, "must be a torch.Tensor, got list"),
        (torch.ones(2, 3, dtype=torch.float64), TypeError, "got torch.float64"),
        (torch.ones(2, 3, dtype=torch.int32), TypeError, "got torch.int32"),
        (torch.ones(2, 3, 4), ValueError, r"got shape \(2, 3, 4\)"),
        (torch.ones(3), ValueError, r"got shape \(3,\)"),
        (torch.ones(2, 3).to_sparse_csr(), ValueError, "sparse_csr"),
        (torch.nested.nested_tensor([torch.ones(2, 3)]), ValueError, "nested"),
    ],
)
def test_encode_names_what_is_wrong(x: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pyfacts.encode(x)  # type: ignore[arg-type]


@pytest.mark.parametrize("min_abs", [-1.0, float("nan")])
def test_min_abs_must_be_a_threshold(min_abs: float) -> None:
    with pytest.raises(ValueError, match="min_abs must be at least 0"):
        pyfacts.encode(torch.ones(2, 3), min_abs=min_abs)


def test_min_abs_must_be_a_number() -> None:
    for number in (np.float32(1.5), torch.tensor(1.5), np.int64(1)):
        assert pyfacts.encode(torch.tensor([[1.0, 2.0]]), min_abs=number).nnz == 1
    with pytest.raises(TypeError, match=r"min_abs must be a number, got Tensor; pyfacts\.min_abs\(theta\)"):
        pyfacts.encode(torch.ones(2, 3), min_abs=torch.ones(3))  # type: ignore[arg-type]


def altered(plane: str, at: int, value: int) -> pyfacts.EncodedActivations:
    """A valid encoding (row 0: three positions, row 1: a bitmap) with one entry of a plane changed."""
    x = torch.zeros(2, 100)
    x[0, [3, 50, 99]] = 1.0
    x[1, :40] = 2.0
    enc = pyfacts.encode(x)
    getattr(enc, plane).view(-1)[at] = value
    return enc


@pytest.mark.parametrize(
    ("plane", "at", "value", "message"),
    [
        ("counts", 0, 2, "index"),
        ("counts", 1, 41, "values"),
        ("counts", 0, 101, "count"),
        ("index", 0, 50, "position"),
        ("index", 2, 100, "position"),
        ("index", 3, 254, "popcount|bitmap"),
        ("index", 3 + 12, 0x80, "bit"),
        ("values", 1, 0, "zero"),
        ("tile_ptr", 0, 1, "tile"),
    ],
)
def test_a_decoder_trusts_nothing(plane: str, at: int, value: int, message: str) -> None:
    with pytest.raises(RuntimeError, match=f"not a valid encoding.*({message})"):
        altered(plane, at, value).to_dense()


@pytest.mark.parametrize(
    "read", [lambda e: e.neuron(99), lambda e: e.to_csr(), lambda e: e[0:1], lambda e: pyfacts.cat([e, e])]
)
@pytest.mark.parametrize(("plane", "at", "value"), [("counts", 0, 255), ("counts", 1, 0), ("tile_ptr", 1, 10**9)])
def test_no_reader_leaves_the_planes(read: object, plane: str, at: int, value: int) -> None:
    """Counts and starts that point elsewhere are refused by every reader, not followed."""
    with pytest.raises(RuntimeError, match="not a valid encoding"):
        read(altered(plane, at, value))  # type: ignore[operator]


def test_a_slice_that_ends_before_it_begins():
    assert len(pyfacts.encode(torch.ones(6, 3))[5:3]) == 0


def test_norms_travel_too():
    enc = pyfacts.encode(torch.randn(20, 30), min_abs=1.0)
    assert enc.to("meta").sq_norm.is_meta


def test_nothing_dropped_is_zero_and_not_less():
    for seed in range(50):
        x = torch.randn(7, 33, generator=torch.Generator().manual_seed(seed))
        assert pyfacts.encode(x, min_abs=1e-9).dropped_share >= 0


def test_norms_of_a_slice_are_a_copy():
    enc = pyfacts.encode(torch.randn(20, 30), min_abs=1.0)
    part, before = enc[2:5], enc.sq_norm.clone()
    part.sq_norm.zero_()
    assert torch.equal(enc.sq_norm, before)


@pytest.mark.parametrize(
    ("dtype", "value", "min_abs"),
    [
        (torch.bfloat16, 1 + 2**-7, 1.006),
        (torch.float16, 1 + 2**-10, 1 + 0.9 * 2**-10),
        (torch.float32, 1 + 2**-23, 1 + 0.9 * 2**-23),
        (torch.float16, torch.inf, 1e6),
        (torch.bfloat16, torch.inf, 1e300),
    ],
)
def test_a_threshold_between_two_numbers_or_beyond_all(dtype, value, min_abs):
    assert pyfacts.encode(torch.tensor([[value]], dtype=dtype), min_abs=min_abs).nnz == 1


@pytest.mark.parametrize("plane", ["index", "values"])
def test_a_column_begins_where_the_one_before_ends(plane):
    """What lies between belongs to no token."""
    enc = pyfacts.encode(sparse(200, 300, 0.1, torch.float32))
    which = ("index", "values").index(plane)
    at, bytes_ = int(enc.tile_ptr[1, 0, which]), getattr(enc, plane)
    tile_ptr = enc.tile_ptr.clone()
    tile_ptr[1, :, which] += 1
    longer = torch.cat([bytes_[:at], torch.ones(1, dtype=bytes_.dtype), bytes_[at:]])
    broken = replace(enc, tile_ptr=tile_ptr, **{plane: longer})
    for read in (broken.to_dense, broken.to_csr, lambda: broken[3:5], lambda: pyfacts.cat([enc, broken])):
        with pytest.raises(RuntimeError, match="a tile start differs"):
            read()


@pytest.mark.parametrize("read", ["to_dense", "sparse_linear"])
def test_a_bit_that_was_moved_beyond_the_columns_width(read):
    """The popcount stays."""
    x = torch.zeros(1, 100)
    x[0, :60] = 1
    enc = pyfacts.encode(x)
    index = enc.index.clone()
    index[0] &= 0xFE
    index[12] |= 0x10
    broken = replace(enc, index=index)
    with pytest.raises(RuntimeError, match="beyond the column's width"):
        broken.to_dense() if read == "to_dense" else pyfacts.sparse_linear(broken, torch.ones(100, 8))


@pytest.mark.parametrize("read", ["neuron", "to_csr"])
def test_positions_out_of_order_are_refused_by_every_reader(read):
    enc = pyfacts.encode(sparse(3, 256, 0.05, torch.float32))
    broken = replace(enc, index=enc.index.flip(0))
    with pytest.raises(RuntimeError, match="strictly ascending"):
        broken.neuron(3) if read == "neuron" else broken.to_csr()
