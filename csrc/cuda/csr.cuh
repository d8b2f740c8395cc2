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
  constexpr bool kSignedZero = true;  // -0.0 may be stored
  if (is_layout_fault(*first_fault)) return;
  const Run run(block, e.n_tokens, e.n_features);
  Segment mine;
  Sizes start;
  if (!locate_segments(e, run, thread, shared, &mine, &start, first_fault)) return;
  const int lane = thread % kWarpLanes;
  // Where the row's values go, and what its columns are.
  const auto place = [&](const Row<T>& row) {
    return row.token < e.n_tokens ? crow[row.token] + before[run.column * e.n_tokens + row.token] : 0;
  };
  const auto put = [&](int64_t at, int j, T bits) {
    col[at] = run.column * kColumnWidth + j;
    row_values[at] = bits;
  };
  const uint32_t with_bitmap = rows_of_bitmaps(run, mine);
  for (int first_row = 0; first_row < kWarpLanes; first_row += kGroupTokens) {
    const Row<T> row(e, run, mine, start, thread, first_row + lane / kRowLanes);
    const int64_t at = place(row);
    unpack_positions(e, run, row, lane % kRowLanes, kSignedZero, first_fault,
                     [&](int rank, int j, T bits) { put(at + rank, j, bits); });
  }
  for (uint32_t rows = with_bitmap; rows != 0; rows &= rows - 1) {
    const Row<T> row(e, run, mine, start, thread, __ffs(static_cast<int>(rows)) - 1);
    const int64_t at = place(row);
    const BitmapPart<T> part = unpack_bitmap(e, run, row, lane, kSignedZero, first_fault);
    uint32_t rank = part.rank;
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      if ((part.bits >> i & 1) != 0) put(at + rank++, kOctet * lane + i, static_cast<T>(part.values.element(i)));
    }
  }
}

}  // namespace pyfacts::cuda
