// From the device form of an encoding to its canonical form, one block a run: a tile of 128 tokens of one column.
// The tokens of a run are sixteen groups, whose bytes lie together; only the groups move.
#pragma once

#include "arena.h"
#include "run.cuh"

namespace pyfacts::cuda {

constexpr int kRunGroups = kTileTokens / kGroupTokens;

struct GroupStart {
  int64_t index;   // bytes
  int64_t values;  // elements
};

__device__ __forceinline__ GroupStart group_start(const Arena& arena, int64_t column, int64_t token) {
  const uint64_t units = arena.group_ptr[column * n_groups(arena.n_tokens) + token / kGroupTokens];
  return {static_cast<int64_t>(units & 0xffffffff) * kUnitBytes,
          static_cast<int64_t>(units >> 32) * kUnitBytes / item_bytes(arena.dtype)};
}

// Whether everything that the cursor placed was written.
__device__ __forceinline__ bool holds_all(const Arena& arena) {
  const uint64_t end = *arena.cursor;
  return static_cast<int64_t>(end & 0xffffffff) * kUnitBytes <= arena.index_capacity &&
         static_cast<int64_t>(end >> 32) * kUnitBytes <= arena.values_capacity;
}

// The packed sizes of the segments of the run before this thread's; *total of them all. The arena holds all. All
// threads take part.
__device__ __forceinline__ uint32_t sizes_before(const Arena& arena, const Run& run, int thread, Shared& shared,
                                                 uint32_t* total) {
  const int64_t token = run.first_token + thread;
  int n = thread < run.n_tokens ? arena.counts[run.column * arena.n_tokens + token] : 0;
  const auto n_index = static_cast<uint32_t>(index_bytes(n, run.width));
  const uint32_t index_before = exclusive_sum(n_index, thread, shared, total);
  const int lane = thread % kWarpLanes;
  const uint32_t group_before = __shfl_sync(kAllLanes, index_before, lane / kGroupTokens * kGroupTokens);
  if (n == kCountSaturated && run.width == kColumnWidth) {  // 255 or 256: the bitmap knows
    const int64_t start = group_start(arena, run.column, token).index + (index_before - group_before);
    n = popcount(arena.index + start, static_cast<int>(n_index));
  }
  return exclusive_sum(pack_sizes(n_index, n), thread, shared, total);
}

// Writes the run's sizes [n_columns, n_tiles]: zeros if the arena overflowed.
__device__ __forceinline__ void measure_run(const Arena& arena, int64_t block, int thread, Shared& shared,
                                            Sizes* sizes) {
  const Run run(block, arena.n_tokens, arena.n_features);
  uint32_t total = 0;
  if (holds_all(arena)) sizes_before(arena, run, thread, shared, &total);
  if (thread == 0) sizes[run.number] = {packed_index(total), packed_values(total)};
}

// What canonical_starts() tells of the planes, once tile_ptr holds the sums of the runs' sizes.
__device__ __forceinline__ Sizes plane_sizes(const Arena& arena, const Sizes* sizes, const Sizes* tile_ptr,
                                             int64_t n_runs) {
  if (!holds_all(arena)) return {-1, -1};
  const Sizes& last = tile_ptr[n_runs - 1];
  return {last.index + sizes[n_runs - 1].index, last.values + sizes[n_runs - 1].values};
}

template <typename T>
__device__ __forceinline__ void copy_elements(const T* from, T* to, int n, int lane) {
  for (int i = lane; i < n; i += kWarpLanes) to[i] = from[i];
}

// Copies the run's groups to where tile_ptr says.
template <typename T>
__device__ __forceinline__ void copy_run(const Arena& arena, const Sizes* tile_ptr, int64_t block, int thread,
                                         Shared& shared, uint32_t* groups_before, uint8_t* index, T* values) {
  const Run run(block, arena.n_tokens, arena.n_features);
  uint32_t total;
  const uint32_t before = sizes_before(arena, run, thread, shared, &total);
  if (thread % kGroupTokens == 0) groups_before[thread / kGroupTokens] = before;
  if (thread == 0) groups_before[kRunGroups] = total;
  __syncthreads();
  const Sizes to = tile_ptr[run.number];
  const int lane = thread % kWarpLanes;
  for (int group = thread / kWarpLanes; group * kGroupTokens < run.n_tokens; group += kRunWarps) {
    const GroupStart from = group_start(arena, run.column, run.first_token + group * kGroupTokens);
    const uint32_t begin = groups_before[group], end = groups_before[group + 1];
    copy_elements(arena.index + from.index, index + to.index + packed_index(begin),
                  static_cast<int>(packed_index(end) - packed_index(begin)), lane);
    copy_elements(reinterpret_cast<const T*>(arena.values) + from.values, values + to.values + packed_values(begin),
                  static_cast<int>(packed_values(end) - packed_values(begin)), lane);
  }
}

}  // namespace pyfacts::cuda
