// The device form of an encoding: what kernels write on the fly, before anybody knows how large it will be.
//
// A group is 8 tokens of one column of 256 features: what one warp packs by itself. Its index bytes and its values are
// packed as in the canonical form and lie together, wherever the cursor put them, each run padded to 16 bytes:
//
//   counts     u8   [n_columns, n_tokens]    canonical
//   index      u8   [index_capacity]
//   values     u8   [values_capacity]        elements of the dtype
//   group_ptr  u64  [n_columns, n_groups]    where a group starts: units of 16 bytes, values << 32 | index
//   cursor     u64  [1]                      where the next group would start, in the same units
//
// One atomic addition to the cursor places groups in both planes. A group that does not fit is not written, but the
// cursor counts it: past a plane's capacity the cursor says how much was needed. 32 bits of 16 bytes are 64 GiB a
// plane.
//
// Groups of 8 and not of 64 or 128 tokens: no warp waits for another, and a warp's staging memory is small enough to
// stand beside a matrix product's tiles. They cost 8 bytes of group_ptr and on average 15 of padding, 12 % at a density
// of 3 %, of memory that is written once and read once, mostly in the second-level cache.
#pragma once

#include <cstdint>

#include "../format.h"

namespace pyfacts::cuda {

constexpr int kGroupTokens = 8;
constexpr int kUnitBytes = 16;

constexpr int64_t n_groups(int64_t n_tokens) { return ceil_div(n_tokens, kGroupTokens); }

// Bytes that hold any encoding of a matrix, group for group.
constexpr int64_t worst_index_bytes(int64_t n_tokens, int64_t n_features) {
  return n_columns(n_features) * n_groups(n_tokens) * kGroupTokens * (kColumnWidth / 8);
}
constexpr int64_t worst_values_bytes(DType dtype, int64_t n_tokens, int64_t n_features) {
  return n_columns(n_features) * n_groups(n_tokens) * kGroupTokens * kColumnWidth * item_bytes(dtype);
}

struct Arena {
  DType dtype;
  int64_t n_tokens;
  int64_t n_features;
  uint8_t* counts;
  uint8_t* index;
  int64_t index_capacity;  // bytes, like values_capacity
  uint8_t* values;
  int64_t values_capacity;
  uint64_t* group_ptr;
  unsigned long long* cursor;  // the type that atomicAdd takes
};

}  // namespace pyfacts::cuda
