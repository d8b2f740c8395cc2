// The two passes of encode over one run.
#pragma once

#include "run.cuh"

namespace pyfacts::cuda {

// First pass: reads x once and leaves a bit per element. Writes counts [n_columns, n_tokens], masks [n_columns,
// n_tokens] and the run's sizes [n_columns, n_tiles].
template <typename T>
__device__ __forceinline__ void count_run(const Matrix<const T>& x, const Predicate& predicate, int64_t block,
                                          int thread, Shared& shared, uint8_t* counts, SegmentMask* masks,
                                          Sizes* sizes) {
  const Run run(block, x.n_tokens, x.n_features);
  const int lane = thread % kWarpLanes;
  const int first = thread - lane;
  const T* row = x.data + (run.first_token + first) * x.row_stride + run.column * kColumnWidth;
  SegmentMask mine = {};
  for (int i = 0; i < kWarpLanes && first + i < run.n_tokens; ++i, row += x.row_stride) {
    const SegmentMask mask = find_stored(row, run.width, predicate, lane);
    if (lane == i) mine = mask;
  }
  const int n = count_stored(mine);  // 0 beyond the last token
  if (thread < run.n_tokens) {
    const int64_t segment = run.column * x.n_tokens + run.first_token + thread;
    counts[segment] = static_cast<uint8_t>(n < kCountSaturated ? n : kCountSaturated);
    masks[segment] = mine;
  }
  uint32_t total;
  exclusive_sum(pack_sizes(index_bytes(n, run.width), n), thread, shared, &total);
  if (thread == 0) sizes[run.number] = {packed_index(total), packed_values(total)};
}

// Second pass: reads the stored values of x and puts them, and where they are, in their places. starts [n_columns,
// n_tiles] is the exclusive sum of the sizes; writes index, values and tile_ptr.
template <typename T>
__device__ __forceinline__ void pack_run(const Matrix<const T>& x, const SegmentMask* masks, const Sizes* starts,
                                         int64_t block, int thread, Shared& shared, uint8_t* index, T* values,
                                         Sizes* tile_ptr) {
  const Run run(block, x.n_tokens, x.n_features);
  const int lane = thread % kWarpLanes;
  const int first = thread - lane;
  SegmentMask mine = {};
  if (thread < run.n_tokens) mine = masks[run.column * x.n_tokens + run.first_token + thread];
  const int n = count_stored(mine);
  uint32_t total;
  const uint32_t before = exclusive_sum(pack_sizes(index_bytes(n, run.width), n), thread, shared, &total);
  const Sizes start = starts[run.number];
  if (thread == 0) tile_ptr[run.number] = start;

  const T* row = x.data + (run.first_token + first) * x.row_stride + run.column * kColumnWidth;
  for (int i = 0; i < kWarpLanes && first + i < run.n_tokens; ++i, row += x.row_stride) {
    const SegmentMask mask = broadcast(mine, i);
    const uint32_t at = __shfl_sync(kAllLanes, before, i);
    write_index(mask, count_stored(mask), run.width, lane, index + start.index + packed_index(at));
    write_values(mask, row, lane, values + start.values + packed_values(at));
  }
}

}  // namespace pyfacts::cuda
