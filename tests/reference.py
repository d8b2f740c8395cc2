"""Plain, slow twins of what pyfacts computes, written from FORMAT.md alone. Never imports the ops."""

import numpy as np
import torch

BITS = {torch.float32: np.uint32, torch.bfloat16: np.uint16, torch.float16: np.uint16}
SIGN = {4: 0x8000_0000, 2: 0x8000}


def bits(x: torch.Tensor) -> np.ndarray:
    """The bit patterns of a float tensor, as unsigned integers of its width."""
    signed = torch.int32 if x.dtype == torch.float32 else torch.int16
    return x.cpu().contiguous().view(signed).numpy().view(BITS[x.dtype])


def from_bits(pattern: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """The float tensor with these bit patterns."""
    signed = np.int32 if dtype == torch.float32 else np.int16
    return torch.from_numpy(np.ascontiguousarray(pattern).view(signed)).view(dtype)


def kept(x: torch.Tensor, min_abs: float = 0.0, signed_zero: bool = False) -> np.ndarray:
    """Which elements of x are stored, decided in float64."""
    wide = x.double().numpy()
    with np.errstate(invalid="ignore"):
        keep = (np.abs(wide) > min_abs) | np.isnan(wide)
    if signed_zero:
        keep |= (wide == 0) & np.signbit(wide)
    return keep


def encode(
    x: torch.Tensor, min_abs: float = 0.0, signed_zero: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The canonical planes (counts, index, value bits, tile_ptr) of x, segment by segment."""
    n_tokens, n_features = x.shape
    pattern, keep = bits(x), kept(x, min_abs, signed_zero)
    n_columns, n_tiles = -(-n_features // 256), -(-n_tokens // 128)
    counts = np.zeros((n_columns, n_tokens), np.uint8)
    tile_ptr = np.zeros((n_columns, n_tiles, 2), np.int64)
    index: list[np.ndarray] = [np.zeros(0, np.uint8)]
    values: list[np.ndarray] = [np.zeros(0, pattern.dtype)]
    index_bytes = n_values = 0
    for column in range(n_columns):
        for token in range(n_tokens):
            if token % 128 == 0:
                tile_ptr[column, token // 128] = index_bytes, n_values
            segment = slice(256 * column, min(256 * column + 256, n_features))
            positions = np.flatnonzero(keep[token, segment])
            width = segment.stop - segment.start
            counts[column, token] = min(len(positions), 255)
            if len(positions) <= -(-width // 8):
                index.append(positions.astype(np.uint8))
            else:
                index.append(np.packbits(keep[token, segment], bitorder="little"))
            values.append(pattern[token, segment][positions])
            index_bytes += len(index[-1])
            n_values += len(values[-1])
    return counts, np.concatenate(index), np.concatenate(values), tile_ptr


def decoded(x: torch.Tensor, min_abs: float = 0.0, signed_zero: bool = False) -> torch.Tensor:
    """What decoding the encoding of x must give: x where it is kept, +0.0 elsewhere."""
    return from_bits(np.where(kept(x, min_abs, signed_zero), bits(x), 0).astype(BITS[x.dtype]), x.dtype)


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Fails unless both have the same dtype, shape and bits."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    np.testing.assert_array_equal(bits(actual), bits(expected))
