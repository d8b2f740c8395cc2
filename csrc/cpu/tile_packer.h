// Packs a tile, 128 tokens of a group of 8 columns, into a scratch slab: a run of values and one of index bytes for
// each column. The kernel walks the rows and appends each segment to its column's runs, whose 16 write streams stay in
// the cache; whoever asked for the tile moves the runs to where they belong.
#pragma once

#include <cstring>
#include <memory>

#include "../predicate.h"
#include "dispatch.h"
#include "encoding.h"
#include "memory.h"

namespace pyfacts::cpu {

// A matrix cut into tiles of groups of columns.
class DenseGroups {
 public:
  DenseGroups(const Dense& x, Keep keep)
      : x_(x),
        predicate_(make_predicate(x.dtype, keep.min_abs, keep.signed_zero)),
        thresholds_(keep.thresholds),
        columns_(n_columns(x.n_features)) {}

  int64_t item() const { return item_bytes(x_.dtype); }
  int64_t columns() const { return columns_; }
  int64_t groups() const { return ceil_div(columns_, kPackColumns); }
  int64_t tasks() const { return n_tiles(x_.n_tokens) * groups(); }

  // Task t is a group of a tile; groups go fastest, so that rows are read nearly in order.
  int64_t tile_of(int64_t task) const { return task / groups(); }
  int64_t first_column_of(int64_t task) const { return task % groups() * kPackColumns; }

  DenseTile group(int64_t task) const {
    const int64_t first_column = first_column_of(task);
    const int64_t columns_left = columns_ - first_column;
    return part(tile_of(task) * kTileTokens, tile_tokens(x_.n_tokens, tile_of(task)), first_column,
                columns_left < kPackColumns ? columns_left : kPackColumns);
  }
  const uint8_t* rows(int64_t task) const { return group(task).rows; }
  DenseTile whole_rows(int64_t tile) const {
    return part(tile * kTileTokens, tile_tokens(x_.n_tokens, tile), 0, columns_);
  }
  DenseTile row(int64_t token) const { return part(token, 1, 0, columns_); }

 private:
  DenseTile part(int64_t first_token, int64_t n_rows, int64_t first_column, int64_t n) const {
    return {static_cast<const uint8_t*>(x_.data) + (first_token * x_.row_stride + first_column * kColumnWidth) * item(),
            x_.row_stride * item(),
            n_rows,
            n,
            column_width(x_.n_features, first_column + n - 1),
            predicate_,
            thresholds_ == nullptr ? nullptr : thresholds_ + first_column * kColumnWidth * item()};
  }

  Dense x_;
  Predicate predicate_;
  const uint8_t* thresholds_;
  int64_t columns_;
};

struct PackedRun {
  const uint8_t* values;
  int64_t value_bytes;
  const uint8_t* index;
  int64_t index_bytes;
};

// What one thread packs with. A run lives until the next pack().
class TilePacker {
 public:
  void pack(const DenseTile& x, const uint8_t* next_rows, int64_t item) {
    uint8_t* index[kPackColumns];
    uint8_t* values[kPackColumns];
    for (int64_t c = 0; c < x.n_columns; ++c) {
      values[c] = slab_.get() + c * value_stride(item);
      index[c] = slab_.get() + kPackColumns * value_stride(item) + c * kIndexStride;
      runs_[c] = {values[c], 0, index[c], 0};
    }
    (item == 4 ? kernels().encode32 : kernels().encode16)({x, next_rows, counts_, index, values});
    for (int64_t c = 0; c < x.n_columns; ++c) {
      runs_[c].value_bytes = values[c] - runs_[c].values;
      runs_[c].index_bytes = index[c] - runs_[c].index;
    }
  }
  const PackedRun& run(int64_t column) const { return runs_[column]; }
  const uint8_t* counts() const { return counts_; }  // [n_columns, kTileTokens]

 private:
  // Room for one column, whatever its density. The pad, 65 cache lines, puts the write positions of the columns into
  // different sets of L1, and spreads their runs over those of L2 (16 x 4160 bytes > 64 KiB).
  static constexpr int64_t kStridePad = 4160;
  static constexpr int64_t kIndexStride = kTileTokens * (kColumnWidth / 8) + kStridePad;
  static constexpr int64_t value_stride(int64_t item) { return kTileTokens * kColumnWidth * item + kStridePad; }
  static_assert(kStridePad >= kSlackBytes);
  static_assert(kPackColumns * (kIndexStride + kTileTokens * kColumnWidth * 4 + kStridePad) <= kSlabBytes);

  std::unique_ptr<uint8_t, void (*)(uint8_t*)> slab_{take_slab(), return_slab};
  PackedRun runs_[kPackColumns];
  alignas(64) uint8_t counts_[kPackColumns * kTileTokens];
};

// counts [n_columns, n_tokens], from the tile's first column and token on <- tile_counts [columns, kTileTokens]
inline void copy_counts(const uint8_t* tile_counts, int64_t n_rows, int64_t columns, uint8_t* counts,
                        int64_t n_tokens) {
  for (int64_t c = 0; c < columns; ++c) std::memcpy(counts + c * n_tokens, tile_counts + c * kTileTokens, n_rows);
}

// Copies to memory that will not be read soon, past the caches if there is much of it; kernels().fence() ends it.
inline void move_out(const uint8_t* from, uint8_t* to, int64_t n_bytes, bool stream) {
  if (n_bytes == 0) return;  // an empty plane has no address
  if (stream) {
    kernels().stream(from, to, n_bytes);
  } else {
    std::memcpy(to, from, n_bytes);
  }
}

}  // namespace pyfacts::cpu
