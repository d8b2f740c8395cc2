// Packs one group, 8 tokens of one column of 256 features, with one warp, and writes it where it is told: the heart of
// encode.cu and of the fused linear_relu_encode.
//
// First every lane looks at the features 8 l ... 8 l + 7 of each row: 16 bytes of bfloat16, and their 8 bits of the
// pattern are the format's bitmap byte l. Then four lanes share a row: each reads the 64 bits of its 64 features,
// learns from the lanes before it where its values go, and walks over its set bits. So looking costs about 25
// instructions a row and warp, and the walk as many steps for all 8 rows as the fullest 64 features have values: 6 at a
// density of 3 %. (Letting every lane write what it has of each row, bits or none, took 125 instructions a row.)
//
// This is CUDA without the toolkit's headers: tests/cuda_emulation compiles it as host C++, lane by lane.
#pragma once

#include <cstdint>

#include "octet.cuh"

namespace pyfacts::cuda {

constexpr int kLaneWords = kLaneFeatures / 32;

// A warp's memory: the group as it came, and as it leaves.
template <typename T>
struct alignas(16) Staging {
  StagedRows<T> rows;
  T values[kGroupTokens * kColumnWidth];
  uint8_t bitmaps[kGroupTokens * kWarpLanes];
  uint8_t index[kGroupTokens * kWarpLanes];
};

// Which values are stored: those with a magnitude above `floor`, in bits, and perhaps -0.0. A NaN's is above all.
struct Stored {
  uint32_t floor;
  bool signed_zero;
};

// Of both halves of a word at once, in their highest bits.
__device__ __forceinline__ uint32_t stored_halves(uint32_t x, const Stored& stored) {
  constexpr uint32_t kMagnitudes = 0x7fff7fff, kSigns = 0x80008000;
  const uint32_t reaches_sign = (0x7fff - stored.floor) * 0x10001;  // when a magnitude above the floor is added
  uint32_t result = (x & kMagnitudes) + reaches_sign;
  if (stored.signed_zero) result |= x & ~((x & kMagnitudes) + kMagnitudes);
  return result & kSigns;
}

// Bit e of the result: whether element e is stored.
__device__ __forceinline__ uint32_t stored_bits(const Octet<uint16_t>& octet, const Stored& stored) {
  uint32_t bits = 0;  // of elements 0, 2, 4, 6 in bits 0, 2, 4, 6, and of 1, 3, 5, 7 in bits 16, 18, 20, 22
#pragma unroll
  for (int i = 0; i < 4; ++i) bits |= stored_halves(octet.unit[0].word[i], stored) >> (15 - 2 * i);
  return (bits | bits >> 15) & 0xff;
}

__device__ __forceinline__ uint32_t stored_bits(const Octet<uint32_t>& octet, const Stored& stored) {
  constexpr uint32_t kSign = 0x80000000;
  uint32_t bits = 0;
#pragma unroll
  for (int e = 0; e < kOctet; ++e) {
    const uint32_t x = octet.element(e);
    bits |= static_cast<uint32_t>((x & ~kSign) > stored.floor || (stored.signed_zero && x == kSign)) << e;
  }
  return bits;
}

// Copies n_units times 16 bytes.
__device__ __forceinline__ void copy_units(const void* from, uint8_t* to, int n_units, int lane) {
#pragma unroll 1
  for (int unit = lane; unit < n_units; unit += kWarpLanes) {
    reinterpret_cast<Unit*>(to)[unit] = static_cast<const Unit*>(from)[unit];
  }
}

// Packs the tokens [first_token, first_token + n_tokens), 0 to 8, of a column of that width. octets[i] is this
// lane's part of the i-th of them, zeros beyond the width and beyond the last token, and staging.rows.row[i] holds it
// too: this lane's writes need not be visible to the others yet. All lanes take part.
//
// place(units) asks for room, values << 32 | index, and returns where it begins; all lanes call it at once.
template <typename T, typename Place>
__device__ __forceinline__ void pack_group(const Arena& out, int64_t column, int64_t first_token, int n_tokens,
                                           int width, int lane, const Stored& stored,
                                           const Octet<T> (&octets)[kGroupTokens], Staging<T>& staging, Place place) {
#pragma unroll
  for (int i = 0; i < kGroupTokens; ++i) {
    staging.bitmaps[i * kWarpLanes + lane] = static_cast<uint8_t>(stored_bits(octets[i], stored));
  }
  __syncwarp();

  const int row = lane / kRowLanes, part = lane % kRowLanes;
  const auto* const words = reinterpret_cast<const uint32_t*>(staging.bitmaps) + lane * kLaneWords;
  int n = 0;
#pragma unroll
  for (int i = 0; i < kLaneWords; ++i) n += __popc(words[i]);
  int n_row = n;
#pragma unroll
  for (int step = 1; step < kRowLanes; step *= 2) n_row += __shfl_xor_sync(kAllLanes, n_row, step);
  const bool positions = has_positions(n_row, width);
  // Values and index bytes before this lane's, in one sum; a row's index is counted by its last lane.
  const auto n_index = part == kRowLanes - 1 ? static_cast<uint32_t>(index_bytes(n_row, width)) : 0;
  uint32_t total;
  const uint32_t before = exclusive_warp_sum(n_index << 16 | n, lane, &total);
  const int values_before = before & 0xffff, index_before = before >> 16;
  const int values_before_row = __shfl_sync(kAllLanes, values_before, row * kRowLanes);

  const auto index_units = static_cast<int>(ceil_div(total >> 16, kUnitBytes));
  const auto values_units = static_cast<int>(ceil_div((total & 0xffff) * sizeof(T), kUnitBytes));
  const uint64_t start = place(static_cast<uint64_t>(values_units) << 32 | index_units);
  if (lane == 0 && n_tokens > 0) out.group_ptr[column * n_groups(out.n_tokens) + first_token / kGroupTokens] = start;
  if (part == 0 && row < n_tokens) {
    out.counts[column * out.n_tokens + first_token + row] =
        static_cast<uint8_t>(n_row < kCountSaturated ? n_row : kCountSaturated);
  }
  const int64_t index_start = static_cast<int64_t>(start & 0xffffffff) * kUnitBytes;
  const int64_t values_start = static_cast<int64_t>(start >> 32) * kUnitBytes;
  if (index_start + index_units * kUnitBytes > out.index_capacity) return;
  if (values_start + values_units * kUnitBytes > out.values_capacity) return;

  T* value = staging.values + values_before;
  uint8_t* byte = staging.index + index_before;
  if (positions) {
    byte += values_before - values_before_row;
  } else {
    for (int i = part * kLaneFeatures / 8; i < (part + 1) * kLaneFeatures / 8 && i < bitmap_bytes(width); ++i) {
      byte[i] = staging.bitmaps[row * kWarpLanes + i];
    }
  }
#pragma unroll
  for (int i = 0; i < kLaneWords; ++i) {
    const int first = part * kLaneFeatures + 32 * i;
    for (uint32_t bits = words[i]; bits != 0; bits &= bits - 1) {
      const int j = first + __ffs(static_cast<int>(bits)) - 1;
      *value++ = staging.rows.row[row][j];
      if (positions) *byte++ = static_cast<uint8_t>(j);
    }
  }
  __syncwarp();
  copy_units(staging.index, out.index + index_start, index_units, lane);
  copy_units(staging.values, out.values + values_start, values_units, lane);
}

// `place` for a warp by itself.
__device__ __forceinline__ uint64_t place_warp(unsigned long long* cursor, uint64_t units, int lane) {
  unsigned long long start = 0;
  if (lane == 0) start = atomicAdd(cursor, static_cast<unsigned long long>(units));
  return __shfl_sync(kAllLanes, start, 0);
}

}  // namespace pyfacts::cuda
