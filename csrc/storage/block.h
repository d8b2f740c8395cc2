// The block of a dump: the encoding as it lies in a file, and back.
//
// On disk the counts plane [C, T] is an occupancy bitmap (one bit per segment, column by column, each column padded to
// whole bytes, least significant bit first) and the counts of the occupied segments. tile_ptr is not stored: it
// follows from the counts. Everything here works on plain memory, without torch and without the GIL.
#pragma once

#include <cstdint>

#include "../cpu/encoding.h"

namespace pyfacts::storage {

enum class Plane : uint8_t { none, occupancy, counts, index, values };

// What is wrong with a block, in which plane, and where. Columns and tokens are counted from the block's first.
struct Fault {
  const char* what = nullptr;
  Plane plane = Plane::none;
  int64_t column = -1;
  int64_t token = -1;
  bool ok() const { return what == nullptr; }
};
Fault from_status(const cpu::Status& status);

constexpr int64_t occupancy_bytes(int64_t n_tokens) { return ceil_div(n_tokens, 8); }

// counts [n_columns, n_tokens] -> occupancy [n_columns, occupancy_bytes] and the occupied counts, of which column c has
// n_occupied[c]. `occupied` has room for n_columns * n_tokens bytes. Returns how many it wrote.
int64_t split_counts(const uint8_t* counts, int64_t n_columns, int64_t n_tokens, uint8_t* occupancy, uint8_t* occupied,
                     int64_t* n_occupied);

// The bytes that each column of a block claims in each plane, uncompressed: [n_columns, 4].
enum LengthColumn { kOccupancy = 0, kCounts = 1, kIndex = 2, kValues = 3 };

// A block's planes as they came from a file: nothing in them is trusted but their sizes.
struct StoredBlock {
  DType dtype;
  int64_t n_tokens;
  int64_t n_features;
  const uint8_t* occupancy;
  int64_t occupancy_bytes;
  const uint8_t* occupied;
  int64_t occupied_bytes;
  const uint8_t* index;
  int64_t index_bytes;
  const void* values;
  int64_t values_bytes;   // bytes
  const int64_t* length;  // [n_columns, 4]
};

// Rebuilds counts [C, T] and tile_ptr [C, R, 2], and checks everything, so that the result is a canonical encoding:
// lengths against planes, occupancy against counts, and all that cpu::check() checks.
Fault join_block(const StoredBlock& block, bool signed_zero, uint8_t* counts, int64_t* tile_ptr);

// Adds to per-feature statistics [n_features] of the stored values: how many, their sum, sum of squares and maximum
// (a NaN counts in nnz and the sums, never in the maximum). Checks that it reads in bounds.
Fault add_feature_stats(const cpu::Encoding& encoding, int64_t* nnz, double* sum, double* sum_sq, float* maximum);

}  // namespace pyfacts::storage
