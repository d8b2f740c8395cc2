// Decoding one run. It trusts nothing but the shapes: every segment is known to lie in bounds before it is read.
//
// Runs are checked independently: each starts where its tile_ptr says, must fit the planes, and must end where the next
// one starts (the first at 0, the last at the planes' ends). All of them right means that the whole layout is.
#pragma once

#include "run.cuh"

namespace pyfacts::cuda {

using FaultKey = unsigned long long;  // what atomicMin takes
constexpr FaultKey kNoFault = ~FaultKey{0};

// A fault and its place as a number that grows in the order of the CPU's checks, so that both devices report the same
// one: those of the layout before those of the contents, then by column, token (n_tokens: the column's end) and fault,
// a wrong tile start before others.
__device__ __forceinline__ FaultKey fault_key(bool content, int64_t column, int64_t token, int64_t n_tokens,
                                              Fault fault) {
  const FaultKey place = static_cast<FaultKey>(column * (n_tokens + 1) + token);
  return (content ? FaultKey{1} << 62 : 0) | place << 4 | (fault == Fault::tile_ptr ? 0 : static_cast<FaultKey>(fault));
}

inline cpu::Status status_of(FaultKey key, int64_t n_tokens) {
  if (key == kNoFault) return {};
  const Fault fault = key % 16 == 0 ? Fault::tile_ptr : static_cast<Fault>(key % 16);
  const int64_t place = static_cast<int64_t>((key & ~(FaultKey{1} << 62)) >> 4);
  const int64_t token = place % (n_tokens + 1);
  return {fault, place / (n_tokens + 1), token == n_tokens ? -1 : token};
}

// Whether any thread of the block says so. All threads take part.
__device__ __forceinline__ bool any_thread(bool flag) { return __syncthreads_or(flag) != 0; }

// Where this thread's segment lies, once the layout of the run has been found right.
struct Segment {
  int count_byte;
  uint32_t before;  // packed sizes of the run's segments before it
};

// Checks the run's layout; false, in all threads, if its segments must not be read. All threads take part.
__device__ __forceinline__ bool locate_segments(const cpu::Encoding& e, const Run& run, int thread, Shared& shared,
                                                Segment* segment, Sizes* start, FaultKey* first_fault) {
  const auto report = [&](int64_t column, int64_t token, Fault fault) {
    atomicMin(first_fault, fault_key(false, column, token, e.n_tokens, fault));
  };
  const int64_t token = run.first_token + thread;
  const int count = thread < run.n_tokens ? e.counts[run.column * e.n_tokens + token] : 0;
  *start = reinterpret_cast<const Sizes*>(e.tile_ptr)[run.number];

  const bool in_bounds =
      start->index >= 0 && start->index <= e.index_bytes && start->values >= 0 && start->values <= e.n_values;
  const bool origin = run.number != 0 || (start->index == 0 && start->values == 0);
  if (thread == 0 && run.first_token == 0 && !(in_bounds && origin)) report(run.column, 0, Fault::tile_ptr);
  if (!in_bounds || !origin) return false;  // a later tile's wrong start is for the run before it to report

  const bool too_large = count > run.width;
  if (too_large) report(run.column, token, Fault::count_too_large);
  if (any_thread(too_large)) return false;

  uint32_t index_total;
  const int64_t n_index = index_bytes(count, run.width);
  const uint32_t index_before = exclusive_sum(static_cast<uint32_t>(n_index), thread, shared, &index_total);
  if (start->index + index_total > e.index_bytes) {
    if (thread == 0) report(run.column, run.first_token, Fault::index_size);
    return false;
  }

  int n = count;
  Fault fault = Fault::none;
  if (count == kCountSaturated && run.width == kColumnWidth) {
    n = popcount(e.index + start->index + index_before, static_cast<int>(n_index));
    fault = check_bitmap_count(n, count, run.width);
    if (fault != Fault::none) report(run.column, token, fault);
  }
  if (any_thread(fault != Fault::none)) return false;

  uint32_t values_total;
  const uint32_t values_before = exclusive_sum(n, thread, shared, &values_total);
  *segment = {count, pack_sizes(index_before, values_before)};
  const Sizes end = {start->index + index_total, start->values + values_total};
  const bool fits = end.values <= e.n_values;
  if (thread != 0) return fits;

  if (!fits) report(run.column, e.n_tokens, Fault::values_size);
  const int64_t tiles = n_tiles(e.n_tokens);
  if (run.number + 1 < n_columns(e.n_features) * tiles) {
    const Sizes next = reinterpret_cast<const Sizes*>(e.tile_ptr)[run.number + 1];
    const int64_t next_run = run.number + 1;
    if (next.index != end.index || next.values != end.values) {
      report(next_run / tiles, next_run % tiles * kTileTokens, Fault::tile_ptr);
    }
  } else {
    if (end.index != e.index_bytes) report(run.column, e.n_tokens, Fault::index_size);
    if (end.values != e.n_values) report(run.column, e.n_tokens, Fault::values_size);
  }
  return fits;
}

// Writes the run's part of the dense matrix, or lowers *first_fault. A stored x is a zero, and so a fault, iff
// (x & zero_mask) == 0.
template <typename T>
__device__ __forceinline__ void decode_run(const cpu::Encoding& e, uint32_t zero_mask, int64_t block, int thread,
                                           Shared& shared, const Matrix<T>& out, FaultKey* first_fault) {
  const Run run(block, e.n_tokens, e.n_features);
  Segment mine;
  Sizes start;
  if (!locate_segments(e, run, thread, shared, &mine, &start, first_fault)) return;

  const int lane = thread % kWarpLanes;
  const int first = thread - lane;
  T* row = out.data + (run.first_token + first) * out.row_stride + run.column * kColumnWidth;
  for (int i = 0; i < kWarpLanes && first + i < run.n_tokens; ++i, row += out.row_stride) {
    const int count_byte = __shfl_sync(kAllLanes, mine.count_byte, i);
    const uint32_t before = __shfl_sync(kAllLanes, mine.before, i);
    Fault fault;
    const SegmentMask mask =
        read_index(count_byte, run.width, e.index + start.index + packed_index(before), lane, &fault);
    if (fault == Fault::none) {
      const T* values = static_cast<const T*>(e.values) + start.values + packed_values(before);
      for_each_feature(mask, lane, [&](int j, int rank) {
        const T bits = rank >= 0 ? values[rank] : 0;
        if (rank >= 0 && (bits & zero_mask) == 0) fault = Fault::stored_zero;
        if (j < run.width) row[j] = bits;
      });
    }
    if (fault != Fault::none) {
      atomicMin(first_fault, fault_key(true, run.column, run.first_token + first + i, e.n_tokens, fault));
    }
  }
}

}  // namespace pyfacts::cuda
