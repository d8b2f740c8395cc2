// The epilogue of the fused linear_relu_encode on the host, for tests/test_cuda_fused.py: given the product, warpgroup
// by warpgroup. It says nothing of the product itself.
#include "lanes.h"
// The device code wants the above.
#include "../../csrc/convert.h"
#include "../../csrc/cuda/pack_product.cuh"

using namespace pyfacts;
using namespace pyfacts::cuda;

namespace {

constexpr int kTileTokens = 64;
constexpr int kWarpgroupThreads = 128;
constexpr int kWarpgroupWarps = kWarpgroupThreads / kWarpLanes;

// Pairs of numbers, one after the other, and stmatrix by what the lanes know of each other.
template <DType dtype>
struct EmulatedNumbers {
  using Number = Convert<dtype>;

  static uint32_t add(float low, float high, uint32_t bias) {
    const uint32_t sum_low = Number::narrow(low + Number::widen(static_cast<uint16_t>(bias)));
    const uint32_t sum_high = Number::narrow(high + Number::widen(static_cast<uint16_t>(bias >> 16)));
    return sum_high << 16 | sum_low;
  }

  template <Activation kActivation>
  static uint32_t activate(uint32_t z, uint32_t threshold) {
    const uint32_t low = activate_one(kActivation, static_cast<uint16_t>(z), static_cast<uint16_t>(threshold));
    const uint32_t high =
        activate_one(kActivation, static_cast<uint16_t>(z >> 16), static_cast<uint16_t>(threshold >> 16));
    return high << 16 | low;
  }

  static uint16_t activate_one(Activation activation, uint16_t bits, uint16_t threshold) {
    const float z = Number::widen(bits);
    if (z != z) return bits;
    if (!(z > 0)) return 0;
    if (activation == Activation::relu2) return Number::narrow(z * z);
    if (activation == Activation::jumprelu && !(z > Number::widen(threshold))) return 0;
    return bits;
  }

  static void stmatrix(const uint32_t* registers, uint16_t* at) {
    const int lane = emulation::Block::lane();
    if (reinterpret_cast<uintptr_t>(at) % 16 != 0) emulation::fail("unaligned stmatrix", lane, 0);
    for (int matrix = 0; matrix < 4; ++matrix) {
      const auto row = __shfl_sync(kAllLanes, reinterpret_cast<uint64_t>(at), 8 * matrix + lane / 4);
      std::memcpy(reinterpret_cast<uint8_t*>(row) + 4 * (lane % 4), &registers[matrix], 4);
    }
  }
};

struct Shared {
  Staging<uint16_t> warp[kWarpgroupWarps];
};

// Tiles in a shuffled order, and a row and a column of them more than there are. Where there is no product, or no
// longer, it is NaN.
template <DType dtype>
void pack_tiles(const ProductOut& out, const float* product, uint32_t seed) {
  const int64_t n_tokens = out.arena.n_tokens, n_features = out.arena.n_features;
  const int64_t columns = n_columns(n_features) + 1;
  std::vector<int64_t> tiles((ceil_div(n_tokens, kTileTokens) + 1) * columns);
  std::iota(tiles.begin(), tiles.end(), 0);
  std::shuffle(tiles.begin(), tiles.end(), std::mt19937(seed));
  emulation::Block block(kWarpgroupThreads, seed);
  const auto shared = std::make_unique<Shared>();
  for (const int64_t tile : tiles) {
    const int64_t column = tile % columns;
    std::memset(static_cast<void*>(shared.get()), 0xa5, sizeof(Shared));
    block.run([&](int thread) {
      const int warp = thread / kWarpLanes, lane = thread % kWarpLanes;
      const int64_t first_token = tile / columns * kTileTokens + warp * kWarpTokens;
      const auto accumulators = [&](int i) {
        const int64_t token = first_token + lane / 4 + 8 * (i / 2 % 2);
        const int64_t feature = column * kColumnWidth + 8 * (i / 4) + 2 * (lane % 4) + i % 2;
        return token < n_tokens && feature < n_features ? product[token * n_features + feature] : __builtin_nanf("");
      };
      pack_product<EmulatedNumbers<dtype>>(out, accumulators, column, first_token, lane, shared->warp[warp]);
    });
  }
}

}  // namespace

extern "C" void emulated_pack_product(const Arena* arena, const float* product, int activation, const uint16_t* bias,
                                      const uint16_t* threshold, uint16_t* dense, int64_t dense_row_stride,
                                      uint32_t seed) {
  const ProductOut out = {*arena, static_cast<Activation>(activation), bias, threshold, dense, dense_row_stride};
  arena->dtype == DType::bfloat16 ? pack_tiles<DType::bfloat16>(out, product, seed)
                                  : pack_tiles<DType::float16>(out, product, seed);
}
