// Packs one group, 8 tokens of one column of 256 features, with one warp, and writes it where it is told: the heart of
// encode.cu and of the fused linear_relu_encode.
//
// First every lane looks at the features 8 l ... 8 l + 7 of each row: 16 bytes of bfloat16, and their 8 bits of the
// pattern are the format's bitmap byte l. Then four lanes share a row: each learns from the 64 bits of its 64 features,
// and from the lanes before it, where their values go. In a sparse group it walks over its set bits: as many steps for
// all 8 rows as the fullest 64 features have values, 6 at a density of 3 %. In a dense one every lane writes what it
// has of each row, 8 steps a row whatever the density.
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

// Copies n_units times 16 bytes.
__device__ __forceinline__ void copy_units(const void* from, uint8_t* to, int n_units, int lane) {
#pragma unroll 1
  for (int unit = lane; unit < n_units; unit += kWarpLanes) {
    reinterpret_cast<Unit*>(to)[unit] = static_cast<const Unit*>(from)[unit];
  }
}

// atomicAdd by the first lane of a warp, which waits for its result where that is used, and not before. Of additions to
// one address ptxas makes one for the whole warp, and waits at once to share its result out: so the address is made to
// look as if it depended on the lane.
__device__ __forceinline__ unsigned long long add_to_cursor(unsigned long long* cursor, unsigned long long units) {
#ifdef __CUDA_ARCH__
  uint32_t lane;  // 0
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  unsigned long long before;
  asm volatile("atom.relaxed.gpu.global.add.u64 %0, [%1], %2;"
               : "=l"(before)
               : "l"(cursor + lane), "l"(units)
               : "memory");
  return before;
#else
  return atomicAdd(cursor, units);
#endif
}

// Where the parts of a row begin in the staging memory: index bytes << 16 | values.
__device__ __forceinline__ int index_of(uint32_t place) { return static_cast<int>(place >> 16); }
__device__ __forceinline__ int values_of(uint32_t place) { return static_cast<int>(place & 0xffff); }

// A group of more values than this is dense: more than 32 a row, where rows of a whole column have bitmaps.
constexpr int kDenseGroup = kGroupTokens * kColumnWidth / 8;

// Stages a sparse group. Four lanes share a row of n_row values, `before` is the place of this lane's 64 features.
template <typename T>
__device__ __forceinline__ void stage_by_rows(int n_row, uint32_t before, int width, int lane, Staging<T>& staging) {
  const int row = lane / kRowLanes, part = lane % kRowLanes;
  const int values_before_row = values_of(__shfl_sync(kAllLanes, before, row * kRowLanes));
  const bool positions = has_positions(n_row, width);
  T* value = staging.values + values_of(before);
  uint8_t* byte = staging.index + index_of(before);
  if (positions) {
    byte += values_of(before) - values_before_row;
  } else {
    for (int i = part * kLaneFeatures / 8; i < (part + 1) * kLaneFeatures / 8 && i < bitmap_bytes(width); ++i) {
      byte[i] = staging.bitmaps[row * kWarpLanes + i];
    }
  }
  const auto* const words = reinterpret_cast<const uint32_t*>(staging.bitmaps) + lane * kLaneWords;
#pragma unroll
  for (int i = 0; i < kLaneWords; ++i) {
    const int first = part * kLaneFeatures + 32 * i;
    for (uint32_t bits = words[i]; bits != 0; bits &= bits - 1) {
      const int j = first + __ffs(static_cast<int>(bits)) - 1;
      *value++ = staging.rows.row[row][j];
      if (positions) *byte++ = static_cast<uint8_t>(j);
    }
  }
}

// Stages a dense group: this lane's octets, one row after the other. n_row and `before` as above.
template <typename T>
__device__ __forceinline__ void stage_by_octets(int n_row, uint32_t before, int width, int lane, Staging<T>& staging) {
  constexpr int kPartOctets = kLaneFeatures / kOctet;
#pragma unroll
  for (int i = 0; i < kGroupTokens; ++i) {
    const int keeper = i * kRowLanes + lane / kPartOctets;  // of the part of the row that the octet is in
    const uint64_t part = reinterpret_cast<const uint64_t*>(staging.bitmaps)[keeper];
    const uint32_t before_row = __shfl_sync(kAllLanes, before, i * kRowLanes);
    const uint32_t before_part = __shfl_sync(kAllLanes, before, keeper);
    const bool positions = has_positions(__shfl_sync(kAllLanes, n_row, i * kRowLanes), width);
    const int n_bits_before = lane % kPartOctets * kOctet;
    const int at = values_of(before_part) + __popcll(part & ((uint64_t{1} << n_bits_before) - 1));
    const uint32_t bits = static_cast<uint32_t>(part >> n_bits_before) & 0xff;
    const Octet<T> octet = load_octet(&staging.rows.row[i][kOctet * lane]);
    const auto rank = [&](int e) { return __popc(bits & ((1u << e) - 1)); };
#pragma unroll
    for (int e = 0; e < kOctet; ++e) {
      if ((bits >> e & 1) != 0) staging.values[at + rank(e)] = static_cast<T>(octet.element(e));
    }
    uint8_t* const index = staging.index + index_of(before_row);
    if (positions) {
#pragma unroll
      for (int e = 0; e < kOctet; ++e) {
        if ((bits >> e & 1) != 0) index[at - values_of(before_row) + rank(e)] = static_cast<uint8_t>(kOctet * lane + e);
      }
    } else if (lane < bitmap_bytes(width)) {
      index[lane] = static_cast<uint8_t>(bits);
    }
  }
}

// Packs the tokens [first_token, first_token + n_tokens), 0 to 8, of a column of that width. octets[i] is this
// lane's part of the i-th of them, zeros beyond the width and beyond the last token, and staging.rows.row[i] holds it
// too: this lane's writes need not be visible to the others yet. `stored` says which values are. All lanes take part.
//
// place.ask(units) asks for room, values << 32 | index; place.start() waits for the answer, where that begins. All
// lanes call them at once.
template <typename T, typename Which, typename Place>
__device__ __forceinline__ void pack_group(const Arena& out, int64_t column, int64_t first_token, int n_tokens,
                                           int width, int lane, const Which& stored,
                                           const Octet<T> (&octets)[kGroupTokens], Staging<T>& staging, Place&& place) {
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
  // Values and index bytes before this lane's, in one sum; a row's index is counted by its last lane.
  const auto n_index = part == kRowLanes - 1 ? static_cast<uint32_t>(index_bytes(n_row, width)) : 0;
  uint32_t total;
  const uint32_t before = exclusive_warp_sum(n_index << 16 | n, lane, &total);

  const auto index_units = static_cast<int>(ceil_div(index_of(total), kUnitBytes));
  const auto values_units = static_cast<int>(ceil_div(values_of(total) * sizeof(T), kUnitBytes));
  place.ask(static_cast<uint64_t>(values_units) << 32 | index_units);
  if (part == 0 && row < n_tokens) {
    out.counts[column * out.n_tokens + first_token + row] =
        static_cast<uint8_t>(n_row < kCountSaturated ? n_row : kCountSaturated);
  }
  // While the answer travels: the staging memory has room for any group.
  if (values_of(total) > kDenseGroup) {
    stage_by_octets(n_row, before, width, lane, staging);
  } else {
    stage_by_rows(n_row, before, width, lane, staging);
  }
  __syncwarp();
  const uint64_t start = place.start();
  if (lane == 0 && n_tokens > 0) out.group_ptr[column * n_groups(out.n_tokens) + first_token / kGroupTokens] = start;
  const int64_t index_start = static_cast<int64_t>(start & 0xffffffff) * kUnitBytes;
  const int64_t values_start = static_cast<int64_t>(start >> 32) * kUnitBytes;
  if (index_start + index_units * kUnitBytes > out.index_capacity) return;
  if (values_start + values_units * kUnitBytes > out.values_capacity) return;
  copy_units(staging.index, out.index + index_start, index_units, lane);
  copy_units(staging.values, out.values + values_start, values_units, lane);
}

// `place` for a warp by itself.
struct PlaceWarp {
  unsigned long long* cursor;
  int lane;
  unsigned long long at = 0;

  __device__ __forceinline__ void ask(uint64_t units) {
    if (lane == 0) at = add_to_cursor(cursor, units);
  }
  __device__ __forceinline__ uint64_t start() const { return __shfl_sync(kAllLanes, at, 0); }
};

}  // namespace pyfacts::cuda
