"""A slow twin, on the CPU, of the kernels that write and read the device form: written from csrc/cuda/arena.h.

Registered as the CPU kernels of `encode_out`, `canonicalise` and `canonicalise_out`, it lets the tests run on the CPU
what is built upon these ops. Groups lie in a random order, as a GPU might place them, and what is not written stays
poisoned.
"""

import functools
import random

import torch
from torch import Tensor

GROUP, TILE, WIDTH, UNIT = 8, 128, 256, 16

_order = random.Random(0)


@functools.cache
def register() -> None:
    """Makes the functions below the ops' CPU kernels, for this process."""
    for op in (encode_out, canonicalise, canonicalise_out):
        torch.library.impl(f"pyfacts::{op.__name__}", "CPU")(op)


def encode_out(
    x: Tensor,
    min_abs: float,
    signed_zero: bool,
    threshold: Tensor | None,
    first_token: int,
    n_features: int,
    counts: Tensor,
    index: Tensor,
    values: Tensor,
    group_ptr: Tensor,
    cursor: Tensor,
) -> None:
    n_tokens = counts.shape[1]
    end_token = first_token + x.shape[0]
    assert first_token % GROUP == 0 and (end_token % GROUP == 0 or end_token == n_tokens)
    assert x.shape[1] == n_features
    if threshold is not None:
        assert threshold.shape == (len(counts) * WIDTH,) and threshold.dtype == x.dtype and min_abs == 0
        assert not threshold.signbit().any()
        x = x.where((x > threshold[:n_features]) | x.isnan(), 0)
    groups = [(token, feature) for token in range(0, x.shape[0], GROUP) for feature in range(0, x.shape[1], WIDTH)]
    _order.shuffle(groups)
    for token, feature in groups:
        part = x[token : token + GROUP, feature : feature + WIDTH]
        n, i, v, _ = torch.ops.pyfacts.encode(part, min_abs, signed_zero)
        column, start = feature // WIDTH, first_token + token
        counts[column, start : start + n.shape[1]] = n[0]
        begin = cursor.item()
        group_ptr[column, start // GROUP] = begin
        for plane, stored, at in ((index, i, begin & 0xFFFFFFFF), (values, v, begin >> 32)):
            at = at * UNIT // plane.itemsize
            if at + len(stored) <= len(plane):
                plane[at : at + len(stored)] = stored
        cursor += (-(-v.nbytes // UNIT) << 32) + -(-i.nbytes // UNIT)


def canonicalise(
    counts: Tensor, index: Tensor, values: Tensor, group_ptr: Tensor, cursor: Tensor, n_features: int
) -> tuple[Tensor, Tensor, Tensor]:
    if _overflowed(index, values, cursor):
        raise RuntimeError("the encoding did not fit its buffers")
    n_columns, n_tokens = counts.shape
    tile_ptr = torch.empty(n_columns, -(-n_tokens // TILE), 2, dtype=torch.int64)
    indices, stored = [index[:0]], [values[:0]]
    index_bytes = n_values = 0
    for column in range(n_columns):
        bitmap_bytes = -(-min(WIDTH, n_features - column * WIDTH) // 8)
        for token in range(n_tokens):
            if token % GROUP == 0:
                start = group_ptr[column, token // GROUP].item()
                i, v = (start & 0xFFFFFFFF) * UNIT, (start >> 32) * UNIT // values.itemsize
            if token % TILE == 0:
                tile_ptr[column, token // TILE] = torch.tensor([index_bytes, n_values])
            n = int(counts[column, token])
            own = index[i : i + min(n, bitmap_bytes)]
            if n == 255:
                n = sum(byte.bit_count() for byte in own.tolist())
            indices.append(own)
            stored.append(values[v : v + n])
            i, v, index_bytes, n_values = i + len(own), v + n, index_bytes + len(own), n_values + n
    return torch.cat(indices), torch.cat(stored), tile_ptr


def canonicalise_out(
    counts: Tensor,
    index: Tensor,
    values: Tensor,
    group_ptr: Tensor,
    cursor: Tensor,
    n_features: int,
    out_index: Tensor,
    out_values: Tensor,
    tile_ptr: Tensor,
    sizes: Tensor,
) -> None:
    if _overflowed(index, values, cursor):
        sizes.fill_(-1)
        return
    i, v, starts = canonicalise(counts, index, values, group_ptr, cursor, n_features)
    sizes[0], sizes[1] = len(i), len(v)
    tile_ptr.copy_(starts)
    if len(i) <= len(out_index) and len(v) <= len(out_values):
        out_index[: len(i)] = i
        out_values[: len(v)] = v


def _overflowed(index: Tensor, values: Tensor, cursor: Tensor) -> bool:
    used = cursor.item()
    return (used & 0xFFFFFFFF) * UNIT > index.nbytes or (used >> 32) * UNIT > values.nbytes
