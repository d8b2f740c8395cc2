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

// What a byte of a bitmap says is stored, from where it lies packed; zeros elsewhere.
template <typename T>
__device__ __forceinline__ Octet<T> load_packed(const T* at, uint32_t bitmap) {
#ifdef __CUDA_ARCH__
  asm("" : "+l"(at));  // or nvcc 13.0 adds up again for each element what `at` was made of
  __builtin_assume(__isGlobal(at));
#endif
  Octet<T> octet = {};
#pragma unroll
  for (int e = 0; e < kOctet; ++e) {
    if ((bitmap >> e & 1) != 0) octet.set_element(e, at[__popc(bitmap & ((1u << e) - 1))]);
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

// Which values are stored: those with a magnitude above `floor`, in bits, and perhaps -0.0. A NaN's is above all.
struct Stored {
  uint32_t floor;
  bool signed_zero;
};

// Or else: those above their feature's threshold, none of which is negative, and NaN.
template <typename T>
struct StoredAbove {
  Octet<T> thresholds;
  uint32_t infinity;  // in bits
};

// Of both halves of a word at once, in their highest bits.
__device__ __forceinline__ uint32_t stored_halves(uint32_t x, const Stored& stored) {
  constexpr uint32_t kMagnitudes = 0x7fff7fff, kSigns = 0x80008000;
  const uint32_t reaches_sign = (0x7fff - stored.floor) * 0x10001;  // when a magnitude above the floor is added
  uint32_t result = (x & kMagnitudes) + reaches_sign;
  if (stored.signed_zero) result |= x & ~((x & kMagnitudes) + kMagnitudes);
  return result & kSigns;
}

__device__ __forceinline__ uint32_t halves_above(uint32_t x, uint32_t thresholds, uint32_t infinity) {
  constexpr uint32_t kMagnitudes = 0x7fff7fff, kSigns = 0x80008000;
  const uint32_t above = (x & kMagnitudes) + (kMagnitudes - thresholds);
  const uint32_t nan = (x & kMagnitudes) + (0x7fff - infinity) * 0x10001;
  return above & (~x | nan) & kSigns;
}

// The highest bits of the halves of four words, in the order of the elements.
template <typename Halves>
__device__ __forceinline__ uint32_t bits_of_halves(Halves halves) {
  uint32_t bits = 0;  // of elements 0, 2, 4, 6 in bits 0, 2, 4, 6, and of 1, 3, 5, 7 in bits 16, 18, 20, 22
#pragma unroll
  for (int i = 0; i < 4; ++i) bits |= halves(i) >> (15 - 2 * i);
  return (bits | bits >> 15) & 0xff;
}

// Bit e of the result: whether element e is stored.
__device__ __forceinline__ uint32_t stored_bits(const Octet<uint16_t>& octet, const Stored& stored) {
  return bits_of_halves([&](int i) { return stored_halves(octet.unit[0].word[i], stored); });
}

__device__ __forceinline__ uint32_t stored_bits(const Octet<uint16_t>& octet, const StoredAbove<uint16_t>& stored) {
  return bits_of_halves(
      [&](int i) { return halves_above(octet.unit[0].word[i], stored.thresholds.unit[0].word[i], stored.infinity); });
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

__device__ __forceinline__ uint32_t stored_bits(const Octet<uint32_t>& octet, const StoredAbove<uint32_t>& stored) {
  constexpr uint32_t kSign = 0x80000000;
  uint32_t bits = 0;
#pragma unroll
  for (int e = 0; e < kOctet; ++e) {
    const uint32_t x = octet.element(e), magnitude = x & ~kSign;
    const bool above = magnitude > stored.thresholds.element(e) && (x == magnitude || magnitude > stored.infinity);
    bits |= static_cast<uint32_t>(above) << e;
  }
  return bits;
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
