// What one block does with one run: a tile of 128 tokens of one column. Thread t keeps the books of token t.
//
// Like all of the .cuh files but those of the matrix product, this is CUDA without the toolkit's headers:
// tests/cuda_emulation compiles it as host C++, lane by lane.
#pragma once

#include <cstdint>

#include "../cpu/encoding.h"
#include "../format.h"
#include "warp.cuh"

namespace pyfacts::cuda {

using cpu::Fault;

constexpr int kRunThreads = kTileTokens;
constexpr int kRunWarps = kRunThreads / kWarpLanes;

// Bytes of index and number of values: of one run, or of all before it. An entry of tile_ptr.
struct Sizes {
  int64_t index;
  int64_t values;
};

// The run of block `block`, for a grid of n_columns * n_tiles. Blocks in flight together read whole rows.
struct Run {
  int64_t column;
  int64_t first_token;
  int64_t number;  // in the planes' order: column by column
  int width;
  int n_tokens;  // <= 128

  __device__ __forceinline__ Run(int64_t block, int64_t total_tokens, int64_t n_features) {
    const int64_t columns = n_columns(n_features);
    const int64_t tile = block / columns;
    column = block % columns;
    first_token = tile * kTileTokens;
    number = column * n_tiles(total_tokens) + tile;
    width = static_cast<int>(column_width(n_features, column));
    n_tokens = static_cast<int>(total_tokens - first_token < kTileTokens ? total_tokens - first_token : kTileTokens);
  }
};

// The memory that a block's threads share.
struct Shared {
  uint32_t warp_totals[kRunWarps];
};

// The sum of `value` over the threads before this one; *total gets the sum over the block. All threads take part.
__device__ __forceinline__ uint32_t exclusive_sum(uint32_t value, int thread, Shared& shared, uint32_t* total) {
  const int lane = thread % kWarpLanes;
  uint32_t warp_total;
  const uint32_t before_in_warp = exclusive_warp_sum(value, lane, &warp_total);
  __syncthreads();  // the readers of an earlier sum are done
  if (lane == 0) shared.warp_totals[thread / kWarpLanes] = warp_total;
  __syncthreads();
  uint32_t before = 0;
  *total = 0;
#pragma unroll
  for (int warp = 0; warp < kRunWarps; ++warp) {
    if (warp < thread / kWarpLanes) before += shared.warp_totals[warp];
    *total += shared.warp_totals[warp];
  }
  return before + before_in_warp;
}

// A segment's sizes in one word, so that one sum serves both: a run has at most 2^12 bytes of index and 2^15 values.
__device__ __forceinline__ uint32_t pack_sizes(int64_t index, int64_t values) {
  return static_cast<uint32_t>(index << 16 | values);
}
__device__ __forceinline__ int64_t packed_index(uint32_t sizes) { return sizes >> 16; }
__device__ __forceinline__ int64_t packed_values(uint32_t sizes) { return sizes & 0xffff; }

// The set bits of a bitmap.
__device__ __forceinline__ int popcount(const uint8_t* bytes, int n_bytes) {
  int n = 0;
  for (int i = 0; i < n_bytes; ++i) n += __popc(bytes[i]);
  return n;
}

}  // namespace pyfacts::cuda
