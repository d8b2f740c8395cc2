// Rows that are sparse already: lists of values, as a selection makes them, and their way into the planes.
#pragma once

#include <vector>

#include "encoding.h"

namespace pyfacts::cpu {

struct Entry {
  uint32_t feature;
  uint32_t bits;  // of the matrix's dtype
};

// Token t's values are entries[starts[t]] to entries[starts[t + 1] - 1], features ascending.
struct SparseRows {
  DType dtype;
  int64_t n_features;
  std::vector<Entry> entries;
  std::vector<int64_t> starts = {0};

  int64_t n_tokens() const { return static_cast<int64_t>(starts.size()) - 1; }
};

// As count() and pack() of a dense matrix.
PlaneSizes count(const SparseRows& rows, uint8_t* counts, int64_t* tile_ptr, ParallelFor parallel_for);
void pack(const SparseRows& rows, const int64_t* tile_ptr, uint8_t* index, void* values, ParallelFor parallel_for);

}  // namespace pyfacts::cpu
