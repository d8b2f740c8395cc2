// To compressed sparse rows, in three kernels and a sum: count_segments (block a run) writes how many values each token
// stores in each column, sum_columns (thread a token) turns them into places within the row, and, once the rows' sizes
// are summed, list_run (block a run) moves the values.
#pragma once

#include "unpack.cuh"

namespace pyfacts::cuda {

// Writes counts [n_columns, n_tokens], exact ones, and lowers *first_fault if the layout is wrong: if no run lowers it,
// the counts of each token add up to the planes.
__device__ __forceinline__ void count_segments(const cpu::Encoding& e, int64_t block, int thread, Shared& shared,
                                               uint32_t* counts, FaultKey* first_fault) {
  const Run run(block, e.n_tokens, e.n_features);
  Segment mine;
  Sizes start;
  const bool located = locate_segments(e, run, thread, shared, &mine, &start, first_fault);
  if (located && thread < run.n_tokens) counts[run.column * e.n_tokens + run.first_token + thread] = mine.count;
}

// counts becomes what each token stores in the columns before; n_row [n_tokens] what it stores.
__device__ __forceinline__ void sum_columns(int64_t n_columns, int64_t n_tokens, int64_t token, uint32_t* counts,
                                            int64_t* n_row) {
  uint32_t sum = 0;
#pragma unroll 8
  for (int64_t column = 0; column < n_columns; ++column) {
    uint32_t& count = counts[column * n_tokens + token];
    const uint32_t n = count;
    count = sum;
    sum += n;
  }
  n_row[token] = sum;
}

// Writes the run's part of col [n_values] and row_values [n_values], unless the layout was found wrong. Lowers
// *first_fault if the contents are.
template <typename T>
__device__ __forceinline__ void list_run(const cpu::Encoding& e, const uint32_t* before, const int64_t* crow,
                                         int64_t block, int thread, Shared& shared, int64_t* col, T* row_values,
                                         FaultKey* first_fault) {
  constexpr T kNotZero = static_cast<T>(~T{0});  // -0.0 may be stored
  if (is_layout_fault(*first_fault)) return;
  const Run run(block, e.n_tokens, e.n_features);
  Segment mine;
  Sizes start;
  if (!locate_segments(e, run, thread, shared, &mine, &start, first_fault)) return;
  for (int group = 0; group < kWarpGroups; ++group) {
    const GroupRow<T> row(e, run, mine, start, thread, group);
    int64_t at = 0;
    if (row.token < e.n_tokens) at = crow[row.token] + before[run.column * e.n_tokens + row.token];
    unpack_row(e, run, row, kNotZero, first_fault, [&](int rank, int j, T bits) {
      col[at + rank] = run.column * kColumnWidth + j;
      row_values[at + rank] = bits;
    });
  }
}

}  // namespace pyfacts::cuda
