"""The storage library on plain buffers, against NumPy; hostile planes are refused without reading out of bounds."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pyfacts
from pyfacts import _storage
from pyfacts.dump.blocks import storage_encoding
from pyfacts.dump.shard_writer import column_lengths
from pyfacts.dump.statistics import new_statistics

BITS = {torch.float32: np.uint32, torch.bfloat16: np.uint16, torch.float16: np.uint16}


@st.composite
def matrices(draw):
    """Any bits but -0.0, at any density: [n_tokens, n_features] tensors."""
    dtype = draw(st.sampled_from(list(BITS)))
    n_tokens = draw(st.sampled_from([1, 7, 8, 9, 127, 129]))
    n_features = draw(st.sampled_from([1, 8, 9, 255, 256, 300]))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    bits = rng.integers(0, 1 << (8 * BITS[dtype]().itemsize), (n_tokens, n_features), BITS[dtype])
    bits[rng.random((n_tokens, n_features)) > draw(st.sampled_from([0.0, 0.02, 0.12, 0.13, 0.5, 1.0]))] = 0
    bits[bits == 1 << (8 * bits.itemsize - 1)] = 0
    return dtype, bits


def encode(dtype, bits):
    return pyfacts.encode(torch.from_numpy(bits.view(np.int16 if bits.itemsize == 2 else np.int32)).view(dtype))


@settings(deadline=None, max_examples=60)
@given(matrices(), st.randoms(use_true_random=False))
def test_blocks_rows_slices_and_neurons(matrix, random):
    dtype, bits = matrix
    n_tokens, n_features = bits.shape
    encoding = storage_encoding(encode(dtype, bits))
    encoding.check(False)
    occupancy, counts, n_occupied = _storage.split_counts(encoding)
    segments = np.stack([(bits[:, c : c + 256] != 0).sum(1) for c in range(0, n_features, 256)])
    assert np.array_equal(np.unpackbits(occupancy, axis=1, bitorder="little")[:, :n_tokens], segments > 0)
    assert np.array_equal(counts, np.minimum(segments[segments > 0], 255))

    planes = (occupancy, counts, encoding.index, encoding.values, column_lengths(encoding, n_occupied))
    joined = _storage.join_block(*planes, n_tokens, n_features, encoding.dtype, False)
    assert np.array_equal(joined.counts, encoding.counts) and np.array_equal(joined.tile_ptr, encoding.tile_ptr)

    tokens, which = np.array([[random.randrange(n_tokens), random.randrange(2)] for _ in range(20)]).T.copy()
    out = np.full((20, n_features), 0xAB, bits.dtype)
    flipped = storage_encoding(encode(dtype, bits[::-1].copy()))
    _storage.gather_rows([_storage.TokenRows(joined), _storage.TokenRows(flipped)], which, tokens, out)
    assert np.array_equal(out, np.where(which[:, None] == 0, bits[tokens], bits[::-1][tokens]))

    j = random.randrange(n_features)
    tokens, values = joined.neuron(j)
    assert np.array_equal(tokens, bits[:, j].nonzero()[0]) and np.array_equal(values.view(bits.dtype), bits[tokens, j])

    lists = _storage.FeatureLists(joined)
    for feature in {0, j, n_features - 1}:
        tokens, values = lists.neuron(feature)
        assert np.array_equal(tokens, bits[:, feature].nonzero()[0])
        assert np.array_equal(values.view(bits.dtype), bits[tokens, feature])

    cut = random.randrange(n_tokens + 1)
    again = _storage.cat([joined.slice(0, cut), joined.slice(cut, n_tokens)])
    out = np.full(bits.shape, 0xAB, bits.dtype)
    again.decode(out, False)
    assert np.array_equal(out, bits) and again.nnz == np.count_nonzero(bits)

    chosen = np.array([random.randrange(n_tokens) for _ in range(random.randrange(9))], np.int64)
    taken, out = joined.take(chosen), np.empty((len(chosen), n_features), bits.dtype)
    taken.check(False)
    taken.decode(out, False)
    assert np.array_equal(out, bits[chosen])


@pytest.mark.parametrize("dtype", list(BITS))
def test_feature_stats(dtype):
    x = torch.randn(500, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) > 0.3] = 0
    x[3, 5], x[4, 6], x[5, 7], x[6, 8] = torch.nan, torch.inf, -torch.inf, torch.finfo(dtype).smallest_normal / 4
    x[:, 9], x[:, 10] = 0, 0
    x[7, 10] = torch.nan
    nnz, total, total_sq, maximum = stats = new_statistics(300)
    encoding = storage_encoding(pyfacts.encode(x))
    encoding.slice(0, 200).add_feature_stats(*stats)
    encoding.slice(200, 500).add_feature_stats(*stats)
    wide = x.double().numpy()
    assert np.array_equal(nnz, (wide != 0).sum(0))
    assert np.allclose(total, wide.sum(0), rtol=1e-12, atol=1e-12, equal_nan=True)
    assert np.allclose(total_sq, (wide**2).sum(0), rtol=1e-12, atol=1e-12, equal_nan=True)
    assert np.array_equal(maximum, np.where((wide != 0) & ~np.isnan(wide), wide, -np.inf).max(0))
    assert maximum[9] == maximum[10] == -np.inf


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_half_precision_value_converts(dtype):
    bits = np.arange(1 << 16, dtype=np.uint16)
    keep = (bits & 0x7FFF) != 0
    features = np.zeros((256, 256), np.uint16)
    features.reshape(-1)[keep] = bits[keep]
    for row in features.reshape(256, 1, 256):
        x = torch.from_numpy(row.view(np.int16)).view(getattr(torch, dtype))
        nnz, total, _, _ = stats = new_statistics(256)
        storage_encoding(pyfacts.encode(x)).add_feature_stats(*stats)
        assert np.array_equal(total, x[0].double().numpy(), equal_nan=True)
        assert np.array_equal(nnz, (row[0] & 0x7FFF) != 0)


def test_wrong_arguments_are_errors():
    encoding = storage_encoding(pyfacts.encode(torch.eye(10)))
    planes = encoding.counts, encoding.index, encoding.values, encoding.tile_ptr
    rows, one, out = _storage.TokenRows(encoding), np.array([0]), np.empty((1, 10), np.uint32)
    for which, token in ((0, 10), (0, -1), (1, 0), (-1, 0)):
        with pytest.raises(IndexError, match="tokens hold|which holds"):
            _storage.gather_rows([rows], np.array([which]), np.array([token]), out)
    for blocks in ([], [None]):
        with pytest.raises((IndexError, TypeError)):
            _storage.gather_rows(blocks, one, one, out)
    for call in (
        lambda: _storage.gather_rows([rows], one, np.array([0, 1]), out),
        lambda: _storage.gather_rows([rows], one, one, np.empty(11, np.uint32)),
        lambda: _storage.gather_rows(
            [rows, _storage.TokenRows(storage_encoding(pyfacts.encode(torch.eye(11))))], one, one, out
        ),
        lambda: encoding.decode(np.empty((9, 10), np.uint32), False),
        lambda: encoding.add_feature_stats(*new_statistics(9)),
        lambda: _storage.Encoding(*planes, 10, "int8"),
        lambda: _storage.Encoding(*planes[:3], encoding.tile_ptr[:0], 10, "float32"),
        lambda: _storage.Encoding(*planes[:2], encoding.values.view(np.uint8)[1:-3], encoding.tile_ptr, 10, "float32"),
        lambda: _storage.cat([]),
        lambda: _storage.cat([encoding, storage_encoding(pyfacts.encode(torch.eye(11)))]),
    ):
        with pytest.raises(ValueError):
            call()
    with pytest.raises(TypeError, match="got None"):
        _storage.cat([encoding, None])
    lists = _storage.FeatureLists(encoding)
    for call in (
        *(lambda j=j, e=e: e.neuron(j) for j in (10, -1) for e in (encoding, lists)),
        lambda: encoding.slice(3, 2),
        lambda: encoding.take(np.array([0, encoding.n_tokens])),
        lambda: encoding.take(np.array([-1])),
    ):
        with pytest.raises(IndexError):
            call()
    read_only = np.empty((10, 10), np.uint32)
    read_only.setflags(write=False)
    with pytest.raises((ValueError, BufferError)):
        encoding.decode(read_only, False)


def test_sums_that_overflow_and_a_bit_beyond_a_width_of_255():
    """What few damaged bytes happen to be."""
    encoding = storage_encoding(pyfacts.encode(torch.ones(2, 255)))
    index, tile_ptr = encoding.index.copy(), encoding.tile_ptr.copy()
    index[31] = 255
    with pytest.raises(_storage.Fault, match="popcount"):
        _storage.Encoding(encoding.counts, index, encoding.values, encoding.tile_ptr, 255, "float32").add_feature_stats(
            *new_statistics(255)
        )
    for start in (0, 1):
        tile_ptr[0, 0, :] = 0
        tile_ptr[0, 0, start] = 2**63 - 1
        damaged = _storage.Encoding(encoding.counts, encoding.index, encoding.values, tile_ptr, 255, "float32")
        with pytest.raises(_storage.Fault, match="tile start"):
            _storage.TokenRows(damaged)
        with pytest.raises(_storage.Fault, match="tile start"):
            _storage.FeatureLists(damaged)


def test_index_planes_split_and_join_with_empty_segments():
    counts, index = np.array([0, 3, 0, 40, 0], np.uint8), np.arange(35, dtype=np.uint8)
    gaps, bitmaps = _storage.split_index(counts, index, 256)
    assert gaps.tolist() == [0, 0, 0] and np.array_equal(bitmaps, index[3:])
    assert np.array_equal(_storage.join_index(counts, gaps, bitmaps, 256), index)


def gather_all(encoding, bits):
    everything = np.arange(len(bits))
    _storage.gather_rows([_storage.TokenRows(encoding)], 0 * everything, everything, np.empty(bits.shape, bits.dtype))


@settings(deadline=None, max_examples=150)
@given(matrices(), st.integers(0, 3), st.integers(0, 1 << 30), st.integers(0, 255))
def test_damaged_planes_are_refused_or_an_encoding(matrix, plane, where, byte):
    """Encodings whose planes do not fit each other: every reader reports a fault or reads in bounds."""
    dtype, bits = matrix
    good = storage_encoding(encode(dtype, bits))
    planes = [np.array(p) for p in (good.counts, good.index, good.values, good.tile_ptr)]
    flat = planes[plane].reshape(-1).view(np.uint8)
    if flat.size:
        flat[where % flat.size] = byte
    bad = _storage.Encoding(*planes, bits.shape[1], good.dtype)
    calls = [
        lambda: bad.check(False),
        lambda: bad.decode(np.empty(bits.shape, bits.dtype), False),
        lambda: gather_all(bad, bits),
        lambda: _storage.FeatureLists(bad).neuron(0),
        lambda: bad.neuron(bits.shape[1] - 1),
        lambda: bad.add_feature_stats(*new_statistics(bits.shape[1])),
        lambda: bad.slice(1, len(bits)),
        lambda: _storage.cat([bad, bad]),
    ]
    for call in calls:
        try:
            call()
        except _storage.Fault as fault:
            what, name, column, token = fault.args
            assert isinstance(what, str) and name in ("", "counts", "index", "values") and column >= -1 and token >= -1
