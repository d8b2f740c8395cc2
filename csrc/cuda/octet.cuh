// Eight neighbouring features of a token: what a lane reads or writes of a row at once, 16 bytes of bfloat16. A warp's
// octets are a segment. And the staging memory in which a warp holds the rows of a group.
#pragma once

#include <cstdint>

#include "arena.h"
#include "warp.cuh"

namespace pyfacts::cuda {

constexpr int kOctet = 8;
static_assert(kColumnWidth == kOctet * kWarpLanes);

// In registers, as bits. T is uint32_t or uint16_t: the bits of an element.
template <typename T>
struct Octet {
  Unit unit[kOctet * sizeof(T) / kUnitBytes];

  __device__ __forceinline__ uint32_t element(int e) const {
    const int n = e * static_cast<int>(sizeof(T));
    const uint32_t word = unit[n / kUnitBytes].word[n % kUnitBytes / 4];
    return sizeof(T) == 4 ? word : word >> 8 * (n % 4) & 0xffff;
  }
  // For one that is zero.
  __device__ __forceinline__ void set_element(int e, T bits) {
    const int n = e * static_cast<int>(sizeof(T));
    unit[n / kUnitBytes].word[n % kUnitBytes / 4] |= static_cast<uint32_t>(bits) << 8 * (n % 4);
  }
};

template <typename T>
__device__ __forceinline__ Octet<T> load_octet(const T* at) {
  return *reinterpret_cast<const Octet<T>*>(at);
}

// To shared memory.
template <typename T>
__device__ __forceinline__ void store_octet(T* at, const Octet<T>& octet) {
  *reinterpret_cast<Octet<T>*>(at) = octet;
}

// To global memory, of a matrix as a whole larger than the caches: what is written first may leave them first. (Of an
// assignment beside store_ragged() nvcc 13.0 makes four stores of 4 bytes.)
template <typename T>
__device__ __forceinline__ void store_octet_global(T* at, const Octet<T>& octet) {
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(octet) / kUnitBytes); ++i) {
    const auto& word = octet.unit[i].word;
    __stcs(reinterpret_cast<uint4*>(at) + i, make_uint4(word[0], word[1], word[2], word[3]));
  }
}

// Of a row that ends within the octet, or before it, or begins at any address: zeros, which are never stored, fill it.
template <typename T>
__device__ __forceinline__ Octet<T> load_ragged(const T* at, int n_left) {
  Octet<T> octet = {};
#pragma unroll
  for (int e = 0; e < kOctet; ++e) {
    if (e < n_left) octet.set_element(e, at[e]);
  }
  return octet;
}

template <typename T>
__device__ __forceinline__ void store_ragged(T* at, const Octet<T>& octet, int n_left) {
#pragma unroll
  for (int e = 0; e < kOctet; ++e) {
    if (e < n_left) at[e] = static_cast<T>(octet.element(e));
  }
}

// From one row to the next in staging memory: 16 bytes more than a row, so that the same features of neighbouring rows
// lie in different banks.
template <typename T>
constexpr int kStagedRow = kColumnWidth + 16 / static_cast<int>(sizeof(T));

template <typename T>
struct alignas(16) StagedRows {
  T row[kGroupTokens][kStagedRow<T>];
};

// Four lanes share a row of a group, 64 features each.
constexpr int kRowLanes = kWarpLanes / kGroupTokens;
constexpr int kLaneFeatures = kColumnWidth / kRowLanes;

}  // namespace pyfacts::cuda
