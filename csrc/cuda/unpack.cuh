// Reading one run of the canonical form. It trusts nothing but the shapes: every segment is known to lie in bounds
// before it is read.
//
// Runs are checked independently: each starts where its tile_ptr says, must fit the planes, and must end where the next
// one starts (the first at 0, the last at the planes' ends). All of them right means that the whole layout is. A warp
// reads 8 tokens at a time, four lanes share a row.
#pragma once

#include "octet.cuh"
#include "run.cuh"

namespace pyfacts::cuda {

using FaultKey = unsigned long long;  // what atomicMin takes; encoding.h knows it too
constexpr FaultKey kNoFault = ~FaultKey{0};

// A fault and its place as a number that grows in the order of the CPU's checks, so that both devices report the same
// one: those of the layout before those of the contents, then by column, token (n_tokens: the column's end) and fault,
// a wrong tile start before others.
__device__ __forceinline__ FaultKey fault_key(bool content, int64_t column, int64_t token, int64_t n_tokens,
                                              Fault fault) {
  const FaultKey place = static_cast<FaultKey>(column * (n_tokens + 1) + token);
  return (content ? FaultKey{1} << 62 : 0) | place << 4 | (fault == Fault::tile_ptr ? 0 : static_cast<FaultKey>(fault));
}

// Whether the layout is wrong: does not change any more once contents are checked.
__device__ __forceinline__ bool is_layout_fault(FaultKey key) { return key >> 62 == 0; }

inline cpu::Status status_of(FaultKey key, int64_t n_tokens) {
  if (key == kNoFault) return {};
  const Fault fault = key % 16 == 0 ? Fault::tile_ptr : static_cast<Fault>(key % 16);
  const int64_t place = static_cast<int64_t>((key & ~(FaultKey{1} << 62)) >> 4);
  const int64_t token = place % (n_tokens + 1);
  return {fault, place / (n_tokens + 1), token == n_tokens ? -1 : token};
}

// What is wrong with a bitmap of n bits behind a count byte: only 255 may stand for another number, 256.
__device__ __forceinline__ Fault check_bitmap_count(int n, int count_byte, int width) {
  if (n == count_byte || (count_byte == kCountSaturated && n == kColumnWidth)) return Fault::none;
  return has_positions(n, width) ? Fault::bitmap_sparse : Fault::bitmap_count;
}

// Whether any thread of the block says so. All threads take part.
__device__ __forceinline__ bool any_thread(bool flag) { return __syncthreads_or(flag) != 0; }

// Where this thread's segment lies, once the layout of the run has been found right.
struct Segment {
  int count_byte;
  int count;
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
  *segment = {count, n, pack_sizes(index_before, values_before)};
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

constexpr int kWarpGroups = kWarpLanes / kGroupTokens;

// One row of a warp's group, as its four lanes see it. Beyond the last token it is empty.
template <typename T>
struct GroupRow {
  int64_t token;
  int count_byte;
  int part;  // 0 to 3: which of the four lanes
  const uint8_t* index;
  const T* values;

  // All lanes take part.
  __device__ __forceinline__ GroupRow(const cpu::Encoding& e, const Run& run, const Segment& mine, const Sizes& start,
                                      int thread, int group) {
    const int lane = thread % kWarpLanes;
    const int source = group * kGroupTokens + lane / kRowLanes;
    const uint32_t before = __shfl_sync(kAllLanes, mine.before, source);
    token = run.first_token + (thread - lane) + source;
    count_byte = __shfl_sync(kAllLanes, mine.count_byte, source);
    part = lane % kRowLanes;
    index = e.index + start.index + packed_index(before);
    values = static_cast<const T*>(e.values) + start.values + packed_values(before);
  }
};

// Faults of a row in the order of the CPU's checks: the smallest is the one to report.
constexpr int kNoRowFault = INT32_MAX;
__device__ __forceinline__ int row_fault_key(int place, Fault fault) { return place << 4 | static_cast<int>(fault); }

// Calls put(rank, position, bits) for every fourth value of a row of positions, this lane's. Returns the key of the
// first fault that it saw; a position beyond the width is still a byte.
template <typename T, typename Put>
__device__ __forceinline__ int unpack_positions(const GroupRow<T>& row, int width, T zero_mask, bool* stored_zero,
                                                Put put) {
  int key = kNoRowFault;
  for (int k = row.part; k < row.count_byte; k += kRowLanes) {
    const int position = row.index[k];
    const bool beyond = position >= width;
    const bool unordered = k > 0 && position <= row.index[k - 1];
    if (key == kNoRowFault && (beyond || unordered)) {
      key = row_fault_key(k, beyond ? Fault::position_range : Fault::position_order);
    }
    const T bits = row.values[k];
    *stored_zero |= (bits & zero_mask) == 0;
    put(k, position, bits);
  }
  return key;
}

// This lane's 64 bits of a row's bitmap.
template <typename T>
__device__ __forceinline__ uint64_t read_bitmap(const GroupRow<T>& row, int width) {
  const int first = row.part * kLaneFeatures / 8;
  const int n_left = static_cast<int>(bitmap_bytes(width)) - first;
  uint64_t bits = 0;
#pragma unroll
  for (int i = 0; i < kLaneFeatures / 8; ++i) {
    if (i < n_left) bits |= static_cast<uint64_t>(row.index[first + i]) << 8 * i;
  }
  return bits;
}

// Calls put(rank, j, bits) for this lane's part of a row's values: feature j of the column, the rank-th that is stored.
// Lowers *first_fault if something is wrong with the row; a stored x is a zero, and so a fault, iff
// (x & zero_mask) == 0. All lanes take part.
template <typename T, typename Put>
__device__ __forceinline__ void unpack_row(const cpu::Encoding& e, const Run& run, const GroupRow<T>& row, T zero_mask,
                                           FaultKey* first_fault, Put put) {
  const int width = run.width;
  const bool positions = has_positions(row.count_byte, width);
  bool stored_zero = false;
  int key = kNoRowFault;
  uint64_t bitmap = 0;
  if (positions) {
    key = unpack_positions(row, width, zero_mask, &stored_zero, put);
  } else {
    bitmap = read_bitmap(row, width);
  }

  const int n = __popcll(bitmap);
  int n_row = n, n_before = 0;
#pragma unroll
  for (int other = 1; other < kRowLanes; ++other) {
    const int n_other = __shfl_xor_sync(kAllLanes, n, other);
    n_row += n_other;
    if ((row.part ^ other) < row.part) n_before += n_other;
  }
  if (!positions) {
    const int bits_left = width - row.part * kLaneFeatures;
    const Fault count_fault = check_bitmap_count(n_row, row.count_byte, width);
    if (bits_left > 0 && bits_left < kLaneFeatures && bitmap >> bits_left != 0) {
      key = row_fault_key(0, Fault::spare_bits);
    } else if (count_fault != Fault::none) {
      key = row_fault_key(1, count_fault);
    }
  }
#pragma unroll
  for (int step = 1; step < kRowLanes; step *= 2) {
    const int other = __shfl_xor_sync(kAllLanes, key, step);
    key = other < key ? other : key;
  }

  if (key == kNoRowFault) {  // only now are the ranks of a bitmap's values known to lie within the row's
    for (int rank = n_before; bitmap != 0; bitmap &= bitmap - 1, ++rank) {
      const T bits = row.values[rank];
      stored_zero |= (bits & zero_mask) == 0;
      put(rank, row.part * kLaneFeatures + __ffsll(static_cast<long long>(bitmap)) - 1, bits);
    }
  }
  // The first fault of the row's four lanes; a stored zero comes after those of the index.
  if (key == kNoRowFault && stored_zero) key = row_fault_key(kColumnWidth, Fault::stored_zero);
  if (key != kNoRowFault) {
    const auto fault = static_cast<Fault>(key & 15);
    atomicMin(first_fault, fault_key(true, run.column, row.token, e.n_tokens, fault));
  }
}

}  // namespace pyfacts::cuda
