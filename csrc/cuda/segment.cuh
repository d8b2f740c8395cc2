// What one warp does with one segment: a token's part of a column, up to 256 features.
//
// A segment's pattern is a mask of 8 words, the same in all 32 lanes: bit j % 32 of word j / 32 says that feature j is
// stored, so its bytes are the format's bitmap. Lane i looks after the features i, 32 + i, ..., 224 + i: neighbouring
// lanes touch neighbouring elements, and a ballot is a word of the mask.
//
// This is CUDA without the toolkit's headers: tests/cuda_emulation compiles it as host C++, lane by lane.
#pragma once

#include <cstdint>

#include "../cpu/encoding.h"
#include "../format.h"
#include "warp.cuh"

namespace pyfacts::cuda {

using cpu::Fault;

constexpr int kMaskWords = kColumnWidth / kWarpLanes;

struct SegmentMask {
  uint32_t word[kMaskWords];
};

__device__ __forceinline__ int count_stored(const SegmentMask& mask) {
  int n = 0;
#pragma unroll
  for (int k = 0; k < kMaskWords; ++k) n += __popc(mask.word[k]);
  return n;
}

// Calls body(feature, rank) for this lane's 8 features: rank among the stored values, or -1 for one that is not stored.
template <typename Body>
__device__ __forceinline__ void for_each_feature(const SegmentMask& mask, int lane, Body body) {
  const uint32_t lanes_below = (1u << lane) - 1;
  int before = 0;
#pragma unroll
  for (int k = 0; k < kMaskWords; ++k) {
    const uint32_t word = mask.word[k];
    body(kWarpLanes * k + lane, word >> lane & 1 ? before + __popc(word & lanes_below) : -1);
    before += __popc(word);
  }
}

__device__ __forceinline__ int popcount(const uint8_t* bytes, int n_bytes) {
  int n = 0;
  for (int i = 0; i < n_bytes; ++i) n += __popc(bytes[i]);
  return n;
}

// What is wrong with a bitmap of n bits behind a count byte: only 255 may stand for another number, 256.
__device__ __forceinline__ Fault check_bitmap_count(int n, int count_byte, int width) {
  if (n == count_byte || (count_byte == kCountSaturated && n == kColumnWidth)) return Fault::none;
  return has_positions(n, width) ? Fault::bitmap_sparse : Fault::bitmap_count;
}

// Reads a segment's index, of index_bytes(count_byte, width) <= 32 bytes that lie in bounds: one byte a lane, whether a
// position or a part of a bitmap. The mask can be trusted if *fault, the same in all lanes, is none. All lanes take
// part.
__device__ __forceinline__ SegmentMask read_index(int count_byte, int width, const uint8_t* index, int lane,
                                                  Fault* fault) {
  const bool positions = has_positions(count_byte, width);
  const int n_bytes = static_cast<int>(index_bytes(count_byte, width));
  const uint32_t byte = lane < n_bytes ? index[lane] : 0;
  const int word = positions ? byte / 32 : lane / 4;
  const uint32_t bits = lane >= n_bytes ? 0 : positions ? 1u << byte % 32 : byte << 8 * (lane % 4);
  SegmentMask mask;
#pragma unroll
  for (int k = 0; k < kMaskWords; ++k) mask.word[k] = __reduce_or_sync(kAllLanes, word == k ? bits : 0);

  const uint32_t previous = __shfl_up_sync(kAllLanes, byte, 1);
  const bool unordered = positions && lane > 0 && lane < n_bytes && byte <= previous;
  const int bits_left = width - 8 * lane;  // 1 to 8 in the lane of a bitmap's last byte
  const bool beyond = positions ? lane < n_bytes && byte >= static_cast<uint32_t>(width)
                                : lane == n_bytes - 1 && byte >> bits_left != 0;
  const uint32_t lanes_beyond = __ballot_sync(kAllLanes, beyond);
  const uint32_t lanes_wrong = lanes_beyond | __ballot_sync(kAllLanes, unordered);
  if (lanes_wrong != 0) {
    const bool beyond_first = (lanes_wrong & (0 - lanes_wrong) & lanes_beyond) != 0;
    *fault = !beyond_first ? Fault::position_order : positions ? Fault::position_range : Fault::spare_bits;
  } else {
    *fault = positions ? Fault::none : check_bitmap_count(count_stored(mask), count_byte, width);
  }
  return mask;
}

}  // namespace pyfacts::cuda
