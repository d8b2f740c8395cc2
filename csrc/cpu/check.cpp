// Validation of canonical encodings. Counts decide all sizes, so the layout is checked first, from the counts alone
// (and the bitmaps behind saturated ones); the contents of segments after that.
#include "encoding.h"
#include "parallel.h"
#include "segments.h"

namespace pyfacts::cpu {

void run_serially(int64_t n, ParallelBody body, void* context) { body(0, n, context); }

const char* describe(Fault fault) {
  switch (fault) {
    case Fault::none:
      return "no fault";
    case Fault::index_size:
      return "the index plane has other bytes than the counts ask for";
    case Fault::values_size:
      return "the value plane has other values than the counts ask for";
    case Fault::tile_ptr:
      return "a tile start differs from the sum of the counts before it";
    case Fault::count_too_large:
      return "a count exceeds the column's width";
    case Fault::position_order:
      return "positions are not strictly ascending";
    case Fault::position_range:
      return "a position is at or beyond the column's width";
    case Fault::bitmap_count:
      return "a bitmap's popcount differs from its count";
    case Fault::bitmap_sparse:
      return "a bitmap stands where positions are due";
    case Fault::spare_bits:
      return "bits beyond the column's width are set in a bitmap";
    case Fault::stored_zero:
      return "a stored value is zero where none may be";
  }
  return "unknown fault";
}

namespace {

// A bitmap's fault, given the count byte that stands for it.
Fault check_bitmap_count(int64_t n, uint8_t count, int64_t width) {
  if (n == count || (count == kCountSaturated && n == kColumnWidth)) return Fault::none;
  return has_positions(n, width) ? Fault::bitmap_sparse : Fault::bitmap_count;
}

Fault check_bitmap(uint8_t count, int64_t width, const uint8_t* bitmap) {
  const int64_t spare = 8 * bitmap_bytes(width) - width;
  if (bitmap[bitmap_bytes(width) - 1] >> (8 - spare) != 0) return Fault::spare_bits;
  return check_bitmap_count(popcount(bitmap, bitmap_bytes(width)), count, width);
}

Fault check_positions(int64_t n, int64_t width, const uint8_t* positions) {
  for (int64_t i = 0; i < n; ++i) {
    if (positions[i] >= width) return Fault::position_range;
    if (i > 0 && positions[i] <= positions[i - 1]) return Fault::position_order;
  }
  return Fault::none;
}

template <typename T>
bool any_zero(const uint8_t* values, int64_t n, uint32_t zero_mask) {
  for (int64_t i = 0; i < n; ++i) {
    T bits;
    std::memcpy(&bits, values + i * sizeof(T), sizeof(T));
    if ((bits & zero_mask) == 0) return true;
  }
  return false;
}

// Adds the sizes of the segments [0, n_tokens) of one tile of a column. `index` points at the column's bytes.
Status add_tile_sizes(const uint8_t* counts, int64_t n_tokens, int64_t width, const uint8_t* index,
                      int64_t index_available, PlaneSizes* sizes) {
  const int64_t bitmap = bitmap_bytes(width);
  const uint8_t limit = static_cast<uint8_t>(bitmap);
  uint32_t total = 0;
  uint32_t total_index = 0;
  uint8_t largest = 0;
  for (int64_t t = 0; t < n_tokens; ++t) {
    total += counts[t];
    total_index += counts[t] < limit ? counts[t] : limit;
    largest = counts[t] > largest ? counts[t] : largest;
  }
  if (largest > width) {
    int64_t token = 0;
    while (counts[token] <= width) ++token;
    return {Fault::count_too_large, -1, token};
  }
  if (sizes->index_bytes + total_index > index_available) return {Fault::index_size, -1, 0};
  if (largest == kCountSaturated && width == kColumnWidth) {
    const uint8_t* segment = index + sizes->index_bytes;
    for (int64_t t = 0; t < n_tokens; ++t) {
      if (counts[t] == kCountSaturated) {
        const int64_t n = popcount(segment, bitmap);
        const Fault fault = check_bitmap_count(n, counts[t], width);
        if (fault != Fault::none) return {fault, -1, t};
        total += static_cast<uint32_t>(n - kCountSaturated);
      }
      segment += index_bytes(counts[t], width);
    }
  }
  sizes->index_bytes += total_index;
  sizes->n_values += total;
  return {};
}

// Walks a column tile by tile; at(tile, sizes before it) -> bool may stop the walk with a fault in tile_ptr.
template <typename At>
Status scan_column(const uint8_t* counts, const uint8_t* index, int64_t index_available, int64_t n_tokens,
                   int64_t width, PlaneSizes* sizes, At at) {
  for (int64_t tile = 0; tile < n_tiles(n_tokens); ++tile) {
    const int64_t first = tile * kTileTokens;
    if (!at(tile, *sizes)) return {Fault::tile_ptr, -1, first};
    Status status = add_tile_sizes(counts + first, tile_tokens(n_tokens, tile), width, index, index_available, sizes);
    if (!status.ok()) {
      status.token += first;
      return status;
    }
  }
  return {};
}

}  // namespace

Fault check_segment(uint8_t count, int64_t width, const uint8_t* index, const uint8_t* values, int64_t item,
                    uint32_t zero_mask) {
  const bool positions = has_positions(count, width);
  const Fault fault = positions ? check_positions(count, width, index) : check_bitmap(count, width, index);
  if (fault != Fault::none) return fault;
  const int64_t n = exact_count(count, index, width);
  const bool zero = item == 4 ? any_zero<uint32_t>(values, n, zero_mask) : any_zero<uint16_t>(values, n, zero_mask);
  return zero ? Fault::stored_zero : Fault::none;
}

Status column_starts(const uint8_t* counts, const uint8_t* index, int64_t index_available, int64_t n_tokens,
                     int64_t width, int64_t* tile_ptr, PlaneSizes* total) {
  *total = {};
  return scan_column(counts, index, index_available, n_tokens, width, total,
                     [&](int64_t tile, const PlaneSizes& before) {
                       tile_ptr[2 * tile] = before.index_bytes;
                       tile_ptr[2 * tile + 1] = before.n_values;
                       return true;
                     });
}

// A column must end where the next one begins, and the last one with the planes.
Status check_column_layout(const Encoding& encoding, int64_t column) {
  if (encoding.n_tokens == 0) return {};
  const int64_t tiles = n_tiles(encoding.n_tokens);
  const int64_t* const starts = encoding.tile_ptr + 2 * column * tiles;
  const int64_t first_index = starts[0];
  const int64_t first_value = starts[1];
  if (first_index < 0 || first_index > encoding.index_bytes || first_value < 0 || first_value > encoding.n_values) {
    return {Fault::tile_ptr, column, 0};
  }
  PlaneSizes sizes;
  Status status =
      scan_column(encoding.counts + column * encoding.n_tokens, encoding.index + first_index,
                  encoding.index_bytes - first_index, encoding.n_tokens, column_width(encoding.n_features, column),
                  &sizes, [&](int64_t tile, const PlaneSizes& before) {
                    return starts[2 * tile] == first_index + before.index_bytes &&
                           starts[2 * tile + 1] == first_value + before.n_values;
                  });
  if (!status.ok()) {
    status.column = column;
    return status;
  }
  const int64_t index_end = first_index + sizes.index_bytes, values_end = first_value + sizes.n_values;
  if (values_end > encoding.n_values) return {Fault::values_size, column, -1};
  if (column + 1 < n_columns(encoding.n_features)) {
    const int64_t* const next = starts + 2 * tiles;
    if (next[0] != index_end || next[1] != values_end) return {Fault::tile_ptr, column + 1, 0};
    return {};
  }
  if (index_end != encoding.index_bytes) return {Fault::index_size, column, -1};
  if (values_end != encoding.n_values) return {Fault::values_size, column, -1};
  return {};
}

Status check_layout(const Encoding& encoding, ParallelFor parallel_for) {
  const int64_t columns = n_columns(encoding.n_features);
  if (columns == 0 || encoding.n_tokens == 0) {
    if (encoding.index_bytes != 0) return {Fault::index_size, -1, -1};
    return {encoding.n_values != 0 ? Fault::values_size : Fault::none, -1, -1};
  }
  if (encoding.tile_ptr[0] != 0 || encoding.tile_ptr[1] != 0) return {Fault::tile_ptr, 0, 0};
  return parallel_check(columns, parallel_for, [&](int64_t column) { return check_column_layout(encoding, column); });
}

Status check(const Encoding& encoding, bool signed_zero, ParallelFor parallel_for) {
  const Status layout = check_layout(encoding, parallel_for);
  if (!layout.ok()) return layout;
  const uint32_t zero_mask = nonzero_mask(encoding.dtype, signed_zero);
  const int64_t tiles = n_tiles(encoding.n_tokens);
  return parallel_check(n_columns(encoding.n_features) * tiles, parallel_for, [&](int64_t task) -> Status {
    const int64_t column = task / tiles;
    const int64_t tile = task % tiles;
    const int64_t last = tile * kTileTokens + tile_tokens(encoding.n_tokens, tile);
    for (ColumnReader segment(encoding, column, tile); segment.token() < last; segment.next()) {
      const Fault fault = segment.check(zero_mask);
      if (fault != Fault::none) return {fault, column, segment.token()};
    }
    return {};
  });
}

}  // namespace pyfacts::cpu
