// What a warp does with its part of a matrix product, 16 tokens of a column of 256 features that it holds as
// accumulators: adds the bias, rounds, applies the activation, and packs the two groups that these are.
//
// One group goes to the warp's staging memory at once, the other waits in registers, 16 bits an element, until the
// first is packed: staging memory for both would cost the product a stage of its pipeline.
//
// This is CUDA without the toolkit's headers: tests/cuda_emulation compiles it as host C++, lane by lane. What those
// would be needed for, arithmetic on pairs of 2-byte numbers and two kinds of stores, is a parameter.
#pragma once

#include "accumulators.cuh"
#include "activation.h"
#include "pack.cuh"

namespace pyfacts::cuda {

static_assert(kWarpTokens == kHalves * kGroupTokens);

struct ProductOut {
  Arena arena;
  Activation activation;
  const uint16_t* bias;       // [n_features], as bits, aligned to 4 bytes; or null
  const uint16_t* threshold;  // likewise; for jumprelu
  uint16_t* dense;            // rows aligned to 16 bytes; or null
  int64_t dense_row_stride;   // elements
};

// The biases or thresholds of a column, spread over the lanes, which hand them to whoever is at that feature. Loaded
// where they are needed they would be 32 loads a lane, which the compiler starts early, and spills for.
struct ColumnPairs {
  uint32_t pair[kPairRegisters];

  __device__ __forceinline__ ColumnPairs(const uint16_t* row, int width, int lane) {
#pragma unroll
    for (int i = 0; i < kPairRegisters; ++i) {
      const int feature = 2 * (kWarpLanes * i + lane);
      // Features come by the octet: a pair is in the column as a whole or not at all.
      pair[i] = feature < width ? *reinterpret_cast<const uint32_t*>(row + feature) : 0;
    }
  }
  __device__ __forceinline__ uint32_t of(int store, int matrix, int lane) const {
    return __shfl_sync(kAllLanes, pair[pair_register(store, matrix)], pair_lane(store, matrix, lane));
  }
};

// Four matrices of a half, as registers, to where this lane's 16 bytes of them belong.
template <typename Numbers>
__device__ __forceinline__ void store_half(const uint32_t* registers, int store, int lane, StagedRows<uint16_t>& rows) {
  Numbers::stmatrix(registers, &rows.row[store_row(lane)][store_feature(store, lane)]);
}

// Lays the first group out in `rows`, and leaves the second one in the registers in which it will be stored.
template <typename Numbers, Activation kActivation, typename Accumulators>
__device__ __forceinline__ void stage_product(const ProductOut& out, const Accumulators& accumulators, int64_t column,
                                              int width, int lane, StagedRows<uint16_t>& rows,
                                              uint32_t (&second)[kStores * kStoreMatrices]) {
  constexpr bool kHasThreshold = kActivation == Activation::jumprelu;
  const ColumnPairs biases(out.bias + column * kColumnWidth, out.bias != nullptr ? width : 0, lane);
  const ColumnPairs thresholds(out.threshold + column * kColumnWidth, kHasThreshold ? width : 0, lane);
#pragma unroll
  for (int store = 0; store < kStores; ++store) {
    uint32_t first[kStoreMatrices];
#pragma unroll
    for (int matrix = 0; matrix < kStoreMatrices; ++matrix) {
      const uint32_t bias = biases.of(store, matrix, lane);
      const uint32_t threshold = kHasThreshold ? thresholds.of(store, matrix, lane) : 0;
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        const int i = accumulator_of(half, store, matrix);
        const uint32_t z = Numbers::add(accumulators(i), accumulators(i + 1), bias);
        uint32_t& h = half == 0 ? first[matrix] : second[store * kStoreMatrices + matrix];
        h = Numbers::template activate<kActivation>(z, threshold);
      }
    }
    store_half<Numbers>(first, store, lane, rows);
  }
}

// Packs the group in the staging memory, and writes it to the dense result as well.
template <typename Numbers>
__device__ __forceinline__ void pack_staged(const ProductOut& out, int64_t column, int64_t first_token, int n_tokens,
                                            int width, int lane, Staging<uint16_t>& staging) {
  constexpr Stored kNotZero = {0, false};
  const int feature = kOctet * lane;
  Octet<uint16_t> octets[kGroupTokens];
#pragma unroll
  for (int i = 0; i < kGroupTokens; ++i) {
    // Beyond the last token and feature the operands are zeros, but infinity * 0 is not 0.
    octets[i] = i < n_tokens && feature < width ? load_octet(&staging.rows.row[i][feature]) : Octet<uint16_t>{};
  }
  if (out.dense != nullptr && feature < width) {
    uint16_t* const dense = out.dense + first_token * out.dense_row_stride + column * kColumnWidth + feature;
#pragma unroll
    for (int i = 0; i < kGroupTokens; ++i) {
      if (i < n_tokens) store_octet_global(dense + i * out.dense_row_stride, octets[i]);
    }
  }
  pack_group(out.arena, column, first_token, n_tokens, width, lane, kNotZero, octets, staging,
             PlaceWarp{out.arena.cursor, lane});
}

// accumulators(i) is this lane's i-th. first_token and column may lie beyond the matrix, as tiles do. Numbers has
//   uint32_t add(float low, float high, uint32_t bias)         both sums, each rounded once
//   uint32_t activate<Activation>(uint32_t z, uint32_t threshold)
//   void stmatrix(const uint32_t registers[4], uint16_t* at)   by the whole warp, to shared memory
// All lanes take part.
template <typename Numbers, typename Accumulators>
__device__ __forceinline__ void pack_product(const ProductOut& out, const Accumulators& accumulators, int64_t column,
                                             int64_t first_token, int lane, Staging<uint16_t>& staging) {
  const int width = static_cast<int>(column_width(out.arena.n_features, column));
  if (width <= 0) return;
  uint32_t second[kStores * kStoreMatrices];
  switch (out.activation) {
    case Activation::relu:
      stage_product<Numbers, Activation::relu>(out, accumulators, column, width, lane, staging.rows, second);
      break;
    case Activation::relu2:
      stage_product<Numbers, Activation::relu2>(out, accumulators, column, width, lane, staging.rows, second);
      break;
    case Activation::jumprelu:
      stage_product<Numbers, Activation::jumprelu>(out, accumulators, column, width, lane, staging.rows, second);
      break;
  }
    // A loop, so that the code for packing, which is long, is there once.
#pragma unroll 1
  for (int half = 0; half < kHalves; ++half) {
    if (half == 1) {
#pragma unroll
      for (int store = 0; store < kStores; ++store) {
        store_half<Numbers>(second + store * kStoreMatrices, store, lane, staging.rows);
      }
    }
    __syncwarp();
    const int64_t token = first_token + half * kGroupTokens;
    const int64_t tokens_left = out.arena.n_tokens - token;
    if (tokens_left >= kGroupTokens && width == kColumnWidth) {
      pack_staged<Numbers>(out, column, token, kGroupTokens, kColumnWidth, lane, staging);
    } else if (tokens_left > 0) {
      const int n_tokens = static_cast<int>(tokens_left < kGroupTokens ? tokens_left : kGroupTokens);
      pack_staged<Numbers>(out, column, token, n_tokens, width, lane, staging);
    }
    __syncwarp();  // nobody reads the staging memory any more, and WGMMA wants its warps whole
  }
}

}  // namespace pyfacts::cuda
