// From a warp's registers to its rows in shared memory: where the elements of a warpgroup's 64 x 256 product are, and
// where stmatrix takes them. Plain arithmetic, checked on the host against CUTLASS' own description of both
// instructions by tests/cuda_emulation/accumulators.cu.
//
// WGMMA m64n256 leaves rows 16 w ... 16 w + 15 to warp w of the warpgroup: two groups of the encoding, the halves
// h = 0 and 1. Lane l holds, in accumulator 4 q + 2 h + e, row l / 4 of a half and feature 8 q + 2 (l % 4) + e. Those
// of one half and one q are a matrix of 8 rows and 8 features, and its two elements a lane, as one register, are what
// stmatrix takes from that lane. It takes four matrices at a time, m = 0 ... 3: store s is of q = 4 s + m.
#pragma once

#include "../format.h"

namespace pyfacts::cuda {

constexpr int kWarpTokens = 16;
constexpr int kHalves = 2;
constexpr int kStoreMatrices = 4;
constexpr int kStores = kColumnWidth / 8 / kStoreMatrices;  // of a half
constexpr int kAccumulators = kHalves * kStores * kStoreMatrices * 2;

// The first of the two accumulators that make a register; the second follows it.
constexpr int accumulator_of(int half, int store, int matrix) {
  return 4 * (kStoreMatrices * store + matrix) + 2 * half;
}

// The feature of that first accumulator, within the column.
constexpr int feature_of(int store, int matrix, int lane) {
  return 8 * (kStoreMatrices * store + matrix) + 2 * (lane % 4);
}

// Lane l names the 16 bytes of row l % 8 of matrix l / 8: these, of the half's rows.
constexpr int store_row(int lane) { return lane % 8; }
constexpr int store_feature(int store, int lane) { return 8 * (kStoreMatrices * store + lane / 8); }

// Of what a column has one of per feature, as its biases, lane l keeps the pairs l, 32 + l, 64 + l and 96 + l. Where
// the pair is that belongs to a register: the keeper's register, the same for all lanes, and the keeper.
constexpr int kPairRegisters = kColumnWidth / 2 / 32;
constexpr int pair_register(int store, int matrix) { return feature_of(store, matrix, 0) / 2 / 32; }
constexpr int pair_lane(int store, int matrix, int lane) { return feature_of(store, matrix, lane) / 2 % 32; }

}  // namespace pyfacts::cuda
