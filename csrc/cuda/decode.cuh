// decode: a row leaves in 16 bytes a lane, which the lane has from the row's bitmap, or, where positions were
// scattered, from staging memory.
#pragma once

#include "unpack.cuh"

namespace pyfacts::cuda {

// The dense matrix [n_tokens, n_features] to be written, with unit feature stride.
template <typename T>
struct Matrix {
  T* data;
  int64_t row_stride;  // elements
  bool aligned;        // rows begin at multiples of 16 bytes
};

// This lane's octet of a row; n_left features of it are in the column.
template <typename T>
__device__ __forceinline__ void write_octet(T* to, const Octet<T>& octet, int n_left, bool aligned) {
  if (aligned && n_left >= kOctet) {
    store_octet_global(to, octet);
  } else {
    store_ragged(to, octet, n_left);
  }
}

// Writes the run's part of the dense matrix, or lowers *first_fault. staged: of the thread's warp.
template <typename T>
__device__ __forceinline__ void decode_run(const cpu::Encoding& e, bool signed_zero, int64_t block, int thread,
                                           Shared& shared, StagedRows<T>& staged, const Matrix<T>& out,
                                           FaultKey* first_fault) {
  constexpr uint32_t kAllRows = (1u << kGroupTokens) - 1;
  const Run run(block, e.n_tokens, e.n_features);
  Segment mine;
  Sizes start;
  if (!locate_segments(e, run, thread, shared, &mine, &start, first_fault)) return;

  const int lane = thread % kWarpLanes;
  const int n_left = run.width - kOctet * lane;
  const uint32_t with_bitmap = rows_of_bitmaps(run, mine);
  for (int group = 0; group < kWarpGroups; ++group) {
    const int first_row = group * kGroupTokens, first = thread - lane + first_row;
    if (first >= run.n_tokens) return;
    T* const to = out.data + (run.first_token + first) * out.row_stride + run.column * kColumnWidth + kOctet * lane;
    const uint32_t bitmaps = with_bitmap >> first_row & kAllRows;
    if (bitmaps != kAllRows) {
#pragma unroll
      for (int i = 0; i < kGroupTokens; ++i) store_octet(&staged.row[i][kOctet * lane], Octet<T>{});
      __syncwarp();
      T* const staged_row = staged.row[lane / kRowLanes];
      unpack_positions(e, run, Row<T>(e, run, mine, start, thread, first_row + lane / kRowLanes), lane % kRowLanes,
                       signed_zero, first_fault, [&](int, int j, T bits) { staged_row[j] = bits; });
      __syncwarp();
#pragma unroll
      for (int i = 0; i < kGroupTokens; ++i) {
        const Octet<T> octet = load_octet(&staged.row[i][kOctet * lane]);
        if ((bitmaps >> i & 1) != 0 || first + i >= run.n_tokens) continue;
        write_octet(to + i * out.row_stride, octet, n_left, out.aligned);
      }
    }
#pragma unroll 1
    for (uint32_t rows = bitmaps; rows != 0; rows &= rows - 1) {
      const int i = __ffs(static_cast<int>(rows)) - 1;
      const Row<T> row(e, run, mine, start, thread, first_row + i);
      const Octet<T> octet = unpack_bitmap(e, run, row, lane, signed_zero, first_fault).values;
      write_octet(to + i * out.row_stride, octet, n_left, out.aligned);
    }
  }
}

}  // namespace pyfacts::cuda
