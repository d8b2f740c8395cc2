// The encoding of one activation matrix [n_tokens, n_features]: constants and size rules.
//
// The features are cut into columns of 256; one token's part of a column is a segment.
// A segment of width w with n stored values owns
//
//   1 count byte       min(n, 255)
//   index bytes        n positions, ascending, if n <= ceil(w / 8), else a bitmap of ceil(w / 8) bytes
//   n values           in the dtype of the matrix
//
// so that an index costs at most one bit per element and at most one byte per stored value.
// The canonical form holds four planes, column by column and token by token within a column:
//
//   counts    u8     [n_columns, n_tokens]
//   index     u8     [index_bytes]
//   values    dtype  [n_values]
//   tile_ptr  i64    [n_columns, n_tiles, 2]   starts in (index, values) of every 128 tokens
//
// FORMAT.md draws the bytes. This header is plain C++ for host and device alike.
#pragma once

#include <cstdint>

namespace pyfacts {

constexpr int64_t kColumnWidth = 256;               // features of a column
constexpr int64_t kTileTokens = 128;                // tokens between two entries of tile_ptr
constexpr int64_t kMaxFeatures = int64_t{1} << 32;  // that a reader goes through
constexpr int kCountSaturated = 255;                // a count byte of 255 means: 255 or 256, ask the bitmap

enum class DType : uint8_t { float32 = 0, bfloat16 = 1, float16 = 2 };

constexpr int64_t item_bytes(DType dtype) { return dtype == DType::float32 ? 4 : 2; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t n_columns(int64_t n_features) { return ceil_div(n_features, kColumnWidth); }
constexpr int64_t n_tiles(int64_t n_tokens) { return ceil_div(n_tokens, kTileTokens); }

// Width of a column: 256, or what is left for the last one.
constexpr int64_t column_width(int64_t n_features, int64_t column) {
  const int64_t left = n_features - column * kColumnWidth;
  return left < kColumnWidth ? left : kColumnWidth;
}

// Tokens of a tile: 128, or what is left for the last one.
constexpr int64_t tile_tokens(int64_t n_tokens, int64_t tile) {
  const int64_t left = n_tokens - tile * kTileTokens;
  return left < kTileTokens ? left : kTileTokens;
}

constexpr int64_t bitmap_bytes(int64_t width) { return ceil_div(width, 8); }

// Whether a segment of `count` values lists positions (true) or carries a bitmap (false).
constexpr bool has_positions(int64_t count, int64_t width) { return count <= bitmap_bytes(width); }

// Bytes a segment takes in the index plane. `count` may be the saturated count byte.
constexpr int64_t index_bytes(int64_t count, int64_t width) {
  return has_positions(count, width) ? count : bitmap_bytes(width);
}

// Which values are stored, as a test on their raw bits: x is iff (x & mask) > floor, unsigned, or x == also.
// `plain` says that the first half with floor 0 is the whole rule. predicate.h makes one.
struct Predicate {
  uint32_t mask;
  uint32_t floor;
  uint32_t also;
  bool plain;
};

}  // namespace pyfacts
