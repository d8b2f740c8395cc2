// encode: one warp a group of 8 tokens of a column; the groups of a block follow each other and are placed together, as
// so many additions to one cursor would be felt.
#pragma once

#include "pack.cuh"

namespace pyfacts::cuda {

// Groups whose staging memory is about 35 KiB: six blocks share a Hopper multiprocessor.
template <typename T>
constexpr int kBlockGroups = 8 / static_cast<int>(sizeof(T));

template <typename T>
struct BlockShared {
  Staging<T> staging[kBlockGroups<T>];
  uint64_t units[kBlockGroups<T>];  // of the groups, then where they start
};

// The part of the arena's matrix that is at hand, T being uint32_t or uint16_t: the bits of an element.
template <typename T>
struct Part {
  const T* data;       // [n_tokens, n_features] with unit feature stride
  int64_t row_stride;  // elements
  int64_t n_tokens;
  int64_t n_features;
  int64_t first_token;  // in the arena's matrix; a multiple of 8
  bool aligned;         // rows begin at multiples of 16 bytes

  int64_t n_blocks() const { return n_columns(n_features) * ceil_div(n_groups(n_tokens), kBlockGroups<T>); }
};

// `place` for the groups of a block: one addition to the cursor.
template <typename T>
struct PlaceBlock {
  unsigned long long* cursor;
  int thread;
  BlockShared<T>& shared;
  unsigned long long at = 0;

  __device__ __forceinline__ void ask(uint64_t units) {
    if (thread % kWarpLanes == 0) shared.units[thread / kWarpLanes] = units;
    __syncthreads();
    if (thread == 0) {
      unsigned long long sum = 0;
      for (int i = 0; i < kBlockGroups<T>; ++i) sum += shared.units[i];
      at = add_to_cursor(cursor, sum);
    }
  }
  __device__ __forceinline__ uint64_t start() {
    if (thread == 0) {
      for (int i = 0; i < kBlockGroups<T>; ++i) {
        const uint64_t mine = shared.units[i];
        shared.units[i] = at;
        at += mine;
      }
    }
    __syncthreads();
    return shared.units[thread / kWarpLanes];
  }
};

// What decides over the features of a lane, [kOctet * lane, kOctet * (lane + 1)) of a column.
template <typename T>
struct ByMagnitude {
  Stored stored;
  __device__ __forceinline__ Stored of(int64_t, int) const { return stored; }
};
template <typename T>
struct ByThreshold {
  const T* thresholds;  // [n_columns * 256], aligned to 16 bytes
  uint32_t infinity;
  __device__ __forceinline__ StoredAbove<T> of(int64_t column, int lane) const {
    return {load_octet(thresholds + column * kColumnWidth + kOctet * lane), infinity};
  }
};

// Blocks in flight together read whole rows: their number runs along the columns first.
template <typename T, typename Rule>
__device__ __forceinline__ void encode_groups(const Part<T>& x, const Rule& rule, const Arena& out, int64_t block,
                                              int thread, BlockShared<T>& shared) {
  const int warp = thread / kWarpLanes, lane = thread % kWarpLanes;
  const int64_t columns = n_columns(x.n_features);
  const int64_t column = block % columns;
  const int64_t token = (block / columns * kBlockGroups<T> + warp) * kGroupTokens;
  // Warps beyond the last token have none, and take part all the same.
  const int64_t tokens_left = x.n_tokens - token;
  const int n_tokens = tokens_left < 0 ? 0 : tokens_left < kGroupTokens ? static_cast<int>(tokens_left) : kGroupTokens;
  const int width = static_cast<int>(column_width(x.n_features, column));
  const T* const mine = x.data + token * x.row_stride + column * kColumnWidth + kOctet * lane;
  Octet<T> octets[kGroupTokens];
  if (n_tokens == kGroupTokens && width == kColumnWidth && x.aligned) {
#pragma unroll
    for (int i = 0; i < kGroupTokens; ++i) octets[i] = load_octet(mine + i * x.row_stride);
  } else {
#pragma unroll
    for (int i = 0; i < kGroupTokens; ++i) {
      octets[i] = load_ragged(mine + i * x.row_stride, i < n_tokens ? width - kOctet * lane : 0);
    }
  }
  Staging<T>& staging = shared.staging[warp];
#pragma unroll
  for (int i = 0; i < kGroupTokens; ++i) store_octet(&staging.rows.row[i][kOctet * lane], octets[i]);
  pack_group(out, column, x.first_token + token, n_tokens, width, lane, rule.of(column, lane), octets, staging,
             PlaceBlock<T>{out.cursor, thread, shared});
}

}  // namespace pyfacts::cuda
