// decode: what is stored goes to staging memory, from where every row leaves in 16 bytes a lane.
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

// Writes the run's part of the dense matrix, or lowers *first_fault. staged: of the thread's warp.
template <typename T>
__device__ __forceinline__ void decode_run(const cpu::Encoding& e, T zero_mask, int64_t block, int thread,
                                           Shared& shared, StagedRows<T>& staged, const Matrix<T>& out,
                                           FaultKey* first_fault) {
  const Run run(block, e.n_tokens, e.n_features);
  Segment mine;
  Sizes start;
  if (!locate_segments(e, run, thread, shared, &mine, &start, first_fault)) return;

  const int lane = thread % kWarpLanes;
  for (int group = 0; group < kWarpGroups; ++group) {
    const int first = thread - lane + group * kGroupTokens;
    if (first >= run.n_tokens) return;
#pragma unroll
    for (int i = 0; i < kGroupTokens; ++i) store_octet(&staged.row[i][kOctet * lane], Octet<T>{});
    __syncwarp();
    T* const staged_row = staged.row[lane / kRowLanes];
    unpack_row(e, run, GroupRow<T>(e, run, mine, start, thread, group), zero_mask, first_fault,
               [&](int, int j, T bits) { staged_row[j] = bits; });
    __syncwarp();
    T* const to = out.data + (run.first_token + first) * out.row_stride + run.column * kColumnWidth + kOctet * lane;
    const int n_left = run.width - kOctet * lane;
#pragma unroll
    for (int i = 0; i < kGroupTokens; ++i) {
      const Octet<T> octet = load_octet(&staged.row[i][kOctet * lane]);
      if (first + i >= run.n_tokens) continue;
      if (out.aligned && n_left >= kOctet) {
        store_octet_global(to + i * out.row_stride, octet);
      } else {
        store_ragged(to + i * out.row_stride, octet, n_left);
      }
    }
    __syncwarp();
  }
}

}  // namespace pyfacts::cuda
