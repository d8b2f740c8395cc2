#include "block.h"

#include <bit>
#include <cstring>

#include "../cpu/segments.h"

namespace pyfacts::storage {

Fault from_status(const cpu::Status& status) {
  if (status.ok()) return {};
  Plane plane = Plane::index;
  switch (status.fault) {
    case cpu::Fault::count_too_large:
    case cpu::Fault::tile_ptr:
      plane = Plane::counts;
      break;
    case cpu::Fault::values_size:
    case cpu::Fault::stored_zero:
      plane = Plane::values;
      break;
    default:
      break;
  }
  return {cpu::describe(status.fault), plane, status.column, status.token};
}

int64_t split_counts(const uint8_t* counts, int64_t n_columns, int64_t n_tokens, uint8_t* occupancy, uint8_t* occupied,
                     int64_t* n_occupied) {
  uint8_t* next = occupied;
  for (int64_t column = 0; column < n_columns; ++column) {
    const uint8_t* const begin = next;
    for (int64_t token = 0; token < n_tokens; token += 8) {
      const int64_t n = n_tokens - token < 8 ? n_tokens - token : 8;
      unsigned bits = 0;
      for (int64_t i = 0; i < n; ++i) {
        const uint8_t count = counts[token + i];
        bits |= unsigned{count != 0} << i;
        *next = count;  // branch-free: an empty segment's count is overwritten by the next
        next += count != 0;
      }
      *occupancy++ = static_cast<uint8_t>(bits);
    }
    counts += n_tokens;
    n_occupied[column] = next - begin;
  }
  return next - occupied;
}

namespace {

// One column's counts from its occupancy and its occupied counts.
Fault join_counts(const uint8_t* occupancy, const uint8_t* occupied, int64_t n_occupied, int64_t n_tokens,
                  int64_t width, uint8_t* counts) {
  int64_t used = 0;
  for (int64_t token = 0; token < n_tokens; token += 8, ++occupancy) {
    const int64_t n = n_tokens - token < 8 ? n_tokens - token : 8;
    const unsigned bits = *occupancy;
    if (bits >> n != 0) return {"occupancy bits beyond the last token are set", Plane::occupancy, -1, token};
    if (used + std::popcount(bits) > n_occupied)
      return {"more segments are marked occupied than there are counts", Plane::occupancy, -1, token};
    for (int64_t i = 0; i < n; ++i) {
      uint8_t count = 0;
      if (bits >> i & 1) {
        count = occupied[used++];
        if (count == 0) return {"an occupied segment has a count of 0", Plane::counts, -1, token + i};
        if (count > width) return {"a count exceeds the column's width", Plane::counts, -1, token + i};
      }
      counts[token + i] = count;
    }
  }
  if (used != n_occupied) return {"there are more counts than segments marked occupied", Plane::counts, -1, -1};
  return {};
}

}  // namespace

Fault join_block(const StoredBlock& block, bool signed_zero, uint8_t* counts, int64_t* tile_ptr) {
  const int64_t columns = n_columns(block.n_features);
  const int64_t tiles = n_tiles(block.n_tokens);
  const int64_t item = item_bytes(block.dtype);
  const uint8_t* occupancy = block.occupancy;
  const uint8_t* occupied = block.occupied;
  int64_t occupied_left = block.occupied_bytes;
  int64_t index_start = 0;
  int64_t values_start = 0;  // in values, not bytes
  if (block.occupancy_bytes != columns * occupancy_bytes(block.n_tokens))
    return {"the plane's size does not fit the block's tokens and features", Plane::occupancy};
  for (int64_t column = 0; column < columns; ++column) {
    const int64_t* const length = block.length + column * 4;
    const int64_t width = column_width(block.n_features, column);
    if (length[kOccupancy] != occupancy_bytes(block.n_tokens))
      return {"a column's length is not one bit per token", Plane::occupancy, column};
    if (length[kCounts] < 0 || length[kCounts] > occupied_left)
      return {"a column's length exceeds the plane", Plane::counts, column};
    if (length[kIndex] < 0 || length[kIndex] > block.index_bytes - index_start)
      return {"a column's length exceeds the plane", Plane::index, column};
    if (length[kValues] < 0 || length[kValues] % item != 0 ||
        length[kValues] > block.values_bytes - values_start * item)
      return {"a column's length exceeds the plane", Plane::values, column};
    Fault fault = join_counts(occupancy, occupied, length[kCounts], block.n_tokens, width, counts);
    if (!fault.ok()) {
      fault.column = column;
      return fault;
    }
    cpu::PlaneSizes total;
    const cpu::Status status =
        cpu::column_starts(counts, block.index + index_start, length[kIndex], block.n_tokens, width, tile_ptr, &total);
    if (!status.ok()) {
      fault = from_status(status);
      fault.column = column;
      return fault;
    }
    if (total.index_bytes != length[kIndex])
      return {"a column's length differs from what its counts ask for", Plane::index, column};
    if (total.n_values * item != length[kValues])
      return {"a column's length differs from what its counts ask for", Plane::values, column};
    for (int64_t tile = 0; tile < tiles; ++tile) {
      tile_ptr[2 * tile] += index_start;
      tile_ptr[2 * tile + 1] += values_start;
    }
    occupancy += length[kOccupancy];
    occupied += length[kCounts];
    occupied_left -= length[kCounts];
    index_start += total.index_bytes;
    values_start += total.n_values;
    counts += block.n_tokens;
    tile_ptr += 2 * tiles;
  }
  if (occupied_left != 0) return {"the plane is longer than its columns", Plane::counts};
  if (index_start != block.index_bytes) return {"the plane is longer than its columns", Plane::index};
  if (values_start * item != block.values_bytes) return {"the plane is longer than its columns", Plane::values};

  const cpu::Encoding encoding{
      block.dtype,       block.n_tokens, block.n_features, counts - columns * block.n_tokens, block.index,
      block.index_bytes, block.values,   values_start,     tile_ptr - columns * 2 * tiles};
  return from_status(cpu::check(encoding, signed_zero, cpu::run_serially));
}

}  // namespace pyfacts::storage
