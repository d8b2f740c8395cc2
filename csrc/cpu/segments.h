// Reading one segment after another, in plain C++: for checks and transformations, which move packed bytes only.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>

#include "encoding.h"

namespace pyfacts::cpu {

inline int64_t popcount(const uint8_t* bitmap, int64_t n_bytes) {
  int64_t n = 0;
  for (; n_bytes >= 8; bitmap += 8, n_bytes -= 8) {
    uint64_t word;
    std::memcpy(&word, bitmap, 8);
    n += std::popcount(word);
  }
  for (; n_bytes > 0; ++bitmap, --n_bytes) n += std::popcount(*bitmap);
  return n;
}

// The number of stored values behind a count byte; a saturated one (width 256 only) asks the bitmap.
inline int64_t exact_count(uint8_t count, const uint8_t* index, int64_t width) {
  return count == kCountSaturated && width == kColumnWidth ? popcount(index, bitmap_bytes(width)) : count;
}

// Writes the positions of a valid segment of n values, ascending.
inline void unpack_positions(int64_t n, int64_t width, const uint8_t* index, uint8_t* positions) {
  if (has_positions(n, width)) {
    std::copy_n(index, n, positions);
    return;
  }
  int64_t k = 0;
  for (int64_t byte = 0; byte < bitmap_bytes(width); ++byte) {
    for (uint32_t bits = index[byte]; bits != 0; bits &= bits - 1) {
      positions[k++] = static_cast<uint8_t>(8 * byte + std::countr_zero(bits));
    }
  }
}

// Bits that make a value of this dtype nonzero: all of them, or all but the sign.
inline uint32_t nonzero_mask(DType dtype, bool signed_zero) {
  const uint32_t all = dtype == DType::float32 ? 0xffffffffu : 0xffffu;
  return signed_zero ? all : all >> 1;
}

// Where a run, a column's part of a tile, begins in the planes. Runs are counted column by column; the one behind the
// last begins where the planes end.
inline PlaneSizes run_start(const Encoding& encoding, int64_t run) {
  if (run == n_columns(encoding.n_features) * n_tiles(encoding.n_tokens)) {
    return {encoding.index_bytes, encoding.n_values};
  }
  return {encoding.tile_ptr[2 * run], encoding.tile_ptr[2 * run + 1]};
}

// What is wrong with a segment whose bytes lie in bounds, or Fault::none.
Fault check_segment(uint8_t count, int64_t width, const uint8_t* index, const uint8_t* values, int64_t item,
                    uint32_t zero_mask);

// One column of an encoding: where it starts, by tile_ptr, and its segments in order.
// The layout must have been checked, of this column at least.
class ColumnReader {
 public:
  ColumnReader(const Encoding& encoding, int64_t column, int64_t first_tile = 0)
      : width_(column_width(encoding.n_features, column)),
        item_(item_bytes(encoding.dtype)),
        counts_(encoding.counts + column * encoding.n_tokens),
        token_(first_tile * kTileTokens) {
    if (encoding.n_tokens == 0) return;
    const int64_t* start = encoding.tile_ptr + 2 * (column * n_tiles(encoding.n_tokens) + first_tile);
    index_ = encoding.index + start[0];
    values_ = static_cast<const uint8_t*>(encoding.values) + start[1] * item_;
  }

  uint8_t count_byte() const { return counts_[token_]; }
  int64_t count() const { return exact_count(count_byte(), index_, width_); }
  int64_t token() const { return token_; }
  int64_t width() const { return width_; }
  const uint8_t* index() const { return index_; }
  const uint8_t* values() const { return values_; }

  void next() {
    const int64_t n = count();
    index_ += index_bytes(n, width_);
    values_ += n * item_;
    ++token_;
  }

  Fault check(uint32_t zero_mask) const {
    return check_segment(count_byte(), width_, index_, values_, item_, zero_mask);
  }

 private:
  int64_t width_;
  int64_t item_;
  const uint8_t* counts_;
  int64_t token_;
  const uint8_t* index_ = nullptr;
  const uint8_t* values_ = nullptr;
};

// Checks one column's counts and starts, and that it ends where the next begins: after it, all its segments lie in
// bounds.
Status check_column_layout(const Encoding& encoding, int64_t column);

}  // namespace pyfacts::cpu
