// Reading one run of the canonical form. It trusts nothing but the shapes: every segment is known to lie in bounds
// before it is read.
//
// Runs are checked independently: each starts where its tile_ptr says, must fit the planes, and must end where the next
// one starts (the first at 0, the last at the planes' ends). All of them right means that the whole layout is.
//
// A warp reads rows of positions 8 at a time, each by four lanes, and rows of bitmaps one by one, by all of them: a row
// with a bitmap has many values, and what its lanes ask for lies together.
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

// Whether a bitmap of n bits may stand behind a count byte: only 255 may be another number, 256.
__device__ __forceinline__ bool counts_agree(int n, int count_byte, int width) {
  return n == count_byte || (count_byte == kCountSaturated && n == kColumnWidth && width == kColumnWidth);
}
__device__ __forceinline__ Fault check_bitmap_count(int n, int count_byte, int width) {
  if (counts_agree(n, count_byte, width)) return Fault::none;
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

// One of the warp's 32 rows, whose books lane `number` keeps. Beyond the last token it is empty.
template <typename T>
struct Row {
  int64_t token;
  int count_byte;
  const uint8_t* index;
  const T* values;

  // All lanes take part, each for the row that it wants.
  __device__ __forceinline__ Row(const cpu::Encoding& e, const Run& run, const Segment& mine, const Sizes& start,
                                 int thread, int number) {
    const uint32_t before = __shfl_sync(kAllLanes, mine.before, number);
    token = run.first_token + (thread - thread % kWarpLanes) + number;
    count_byte = __shfl_sync(kAllLanes, mine.count_byte, number);
    index = e.index + start.index + packed_index(before);
    values = static_cast<const T*>(e.values) + start.values + packed_values(before);
  }
};

// Which of the warp's rows have bitmaps, a bit for each. All lanes take part.
__device__ __forceinline__ uint32_t rows_of_bitmaps(const Run& run, const Segment& mine) {
  return __ballot_sync(kAllLanes, !has_positions(mine.count_byte, run.width));
}

// Faults of a row in the order of the CPU's checks: the smallest is the one to report.
constexpr int kNoRowFault = INT32_MAX;
__device__ __forceinline__ int row_fault_key(int place, Fault fault) { return place << 4 | static_cast<int>(fault); }

template <typename T>
__device__ __forceinline__ void report_row(const cpu::Encoding& e, const Run& run, const Row<T>& row, Fault fault,
                                           FaultKey* first_fault) {
  atomicMin(first_fault, fault_key(true, run.column, row.token, e.n_tokens, fault));
}

// Calls put(rank, position, bits) for every fourth value of a row, beginning with `part`: four lanes share it. Lowers
// *first_fault if something is wrong with the row, and then positions may be beyond the width, but are bytes. Does
// nothing for a row with a bitmap. All lanes take part.
template <typename T, typename Put>
__device__ __forceinline__ void unpack_positions(const cpu::Encoding& e, const Run& run, const Row<T>& row, int part,
                                                 bool signed_zero, FaultKey* first_fault, Put put) {
  const T zero_mask = static_cast<T>(~T{0}) >> (signed_zero ? 0 : 1);  // x is a zero, and a fault, iff x & it is 0
  const int n = has_positions(row.count_byte, run.width) ? row.count_byte : 0;
  bool stored_zero = false;
  int key = kNoRowFault;
  for (int k = part; k < n; k += kRowLanes) {
    const int position = row.index[k];
    const bool beyond = position >= run.width;
    const bool unordered = k > 0 && position <= row.index[k - 1];
    if (key == kNoRowFault && (beyond || unordered)) {
      key = row_fault_key(k, beyond ? Fault::position_range : Fault::position_order);
    }
    const T bits = row.values[k];
    stored_zero |= (bits & zero_mask) == 0;
    put(k, position, bits);
  }
#pragma unroll
  for (int step = 1; step < kRowLanes; step *= 2) {
    const int other = __shfl_xor_sync(kAllLanes, key, step);
    key = other < key ? other : key;
  }
  // The first fault of the row's four lanes; a stored zero comes after those of the index.
  if (key != kNoRowFault) {
    report_row(e, run, row, static_cast<Fault>(key & 15), first_fault);
  } else if (stored_zero) {
    report_row(e, run, row, Fault::stored_zero, first_fault);
  }
}

// What a lane has of a row with a bitmap.
template <typename T>
struct BitmapPart {
  uint32_t bits;    // its byte of the bitmap: which of its 8 features are stored
  uint32_t rank;    // of the first of them among the row's values
  Octet<T> values;  // zeros where nothing is stored
};

// Reads it. If something is wrong with the row, *first_fault is lowered, and no lane has anything. All lanes take part,
// with the same row.
template <typename T>
__device__ __forceinline__ BitmapPart<T> unpack_bitmap(const cpu::Encoding& e, const Run& run, const Row<T>& row,
                                                       int lane, bool signed_zero, FaultKey* first_fault) {
  BitmapPart<T> part = {};
  if (lane < static_cast<int>(bitmap_bytes(run.width))) part.bits = row.index[lane];
  const int n_left = run.width - kOctet * lane;
  const bool spare_bits = n_left > 0 && n_left < kOctet && part.bits >> n_left != 0;
  uint32_t n_row;
  part.rank = exclusive_warp_sum(__popc(part.bits), lane, &n_row);
  const int n = static_cast<int>(n_row);
  bool stored_zero = false;
  if (counts_agree(n, row.count_byte, run.width)) {  // then the ranks are those of the row's values
    part.values = load_packed(row.values + part.rank, part.bits);
    stored_zero = stored_bits(part.values, Stored{0, signed_zero}) != part.bits;
  }
  const bool sound = __ballot_sync(kAllLanes, spare_bits || stored_zero) == 0;
  if (sound && counts_agree(n, row.count_byte, run.width)) return part;

  Fault fault = check_bitmap_count(n, row.count_byte, run.width);
  if (fault == Fault::none) fault = Fault::stored_zero;
  if (__ballot_sync(kAllLanes, spare_bits) != 0) fault = Fault::spare_bits;
  if (lane == 0) report_row(e, run, row, fault, first_fault);
  return {};
}

}  // namespace pyfacts::cuda
