// What can be known of the fused linear_relu_encode on the host; needs nvcc for its headers, but no GPU. For every lane
// and accumulator of both kernels: by CUTLASS' own description of WGMMA and of stmatrix each element of the tile
// reaches its place among its group's rows, exactly once. And for every 16-bit number: what the activations make of it,
// by the toolkit's host versions of the intrinsics. Prints what is wrong, and the kernels' stages and shared memory.
#include <cmath>
#include <cstdio>
#include <map>
#include <tuple>

#include "../../csrc/cuda/linear_relu_encode.cuh"

using namespace pyfacts::cuda;

namespace {

int n_wrong = 0;

void expect(bool right, const char* what, int thread, int half, int store, int element) {
  if (right) return;
  if (++n_wrong <= 20) {
    std::printf("%s: thread %d, half %d, store %d, element %d\n", what, thread, half, store, element);
  }
}

// Where stmatrix puts the e-th of a lane's eight elements: which lane's 16 bytes, and the byte among them.
struct Place {
  int lane;
  int byte;
};
Place stmatrix_place(int lane, int element) {
  using Traits = cute::Copy_Traits<cute::SM90_U32x4_STSM_N>;
  static const std::map<int, Place> places = [] {
    std::map<int, Place> by_bit;
    for (int l = 0; l < 32; ++l) {
      for (int byte = 0; byte < 16; ++byte) by_bit[typename Traits::DstLayout{}(l, 8 * byte)] = {l, byte};
    }
    return by_bit;
  }();
  return places.at(typename Traits::SrcLayout{}(lane, 16 * element));
}

template <typename Fused>
void check(const char* name) {
  using Kernel = typename Fused::Kernel;
  constexpr int kTokens = cute::size<0>(typename Fused::TileShape{});
  typename Kernel::TiledMma tiled_mma;
  constexpr int kThreads = cute::size(typename Kernel::TiledMma{});
  const auto tile = cute::make_identity_tensor(cute::Shape<cute::Int<kTokens>, cute::Int<pyfacts::kColumnWidth>>{});
  std::map<std::tuple<int, int, int>, int> writes;  // by group, row and feature
  for (int thread = 0; thread < kThreads; ++thread) {
    const int warp = thread / 32, lane = thread % 32;
    const auto owned = tiled_mma.get_thread_slice(thread).partition_C(tile);
    static_assert(cute::size(decltype(owned){}) == kAccumulators);
    for (int half = 0; half < kHalves; ++half) {
      const int group = warp * kHalves + half;
      for (int store = 0; store < kStores; ++store) {
        for (int element = 0; element < 8; ++element) {
          const int matrix = element / 2;
          const auto place = owned(accumulator_of(half, store, matrix) + element % 2);
          const int row = cute::get<0>(place), feature = cute::get<1>(place);
          const auto right = [&](bool is, const char* what) { expect(is, what, thread, half, store, element); };
          right(row / kGroupTokens == group, "a row of another group");
          right(feature_of(store, matrix, lane) + element % 2 == feature, "wrong feature");
          right(pair_register(store, matrix) * 32 + pair_lane(store, matrix, lane) == feature / 2, "wrong bias");
          const Place to = stmatrix_place(lane, element);
          right(store_row(to.lane) == row % kGroupTokens, "wrong row");
          right(store_feature(store, to.lane) + to.byte / 2 == feature && to.byte % 2 == 0, "wrong place");
          ++writes[{group, store_row(to.lane), store_feature(store, to.lane) + to.byte / 2}];
        }
      }
    }
    for (int store = 0; store < kStores; ++store) {
      const auto unit_of = [&](int l) {  // in units of 16 bytes
        return (store_row(l) * kStagedRow<uint16_t> + store_feature(store, l)) / kOctet;
      };
      expect(store_feature(store, lane) % kOctet == 0, "unaligned", thread, 0, store, 0);
      for (int other = lane / 8 * 8; other < lane; ++other) {
        expect(unit_of(lane) % 8 != unit_of(other) % 8, "bank conflict", thread, 0, store, other);
      }
    }
  }
  expect(static_cast<int>(writes.size()) == kTokens * pyfacts::kColumnWidth, "not every element", 0, 0, 0, 0);
  for (const auto& [place, n] : writes) expect(n == 1, "written twice", std::get<0>(place), 0, 0, 0);

  using SharedStorage = typename Kernel::SharedStorage;
  constexpr size_t operands = offsetof(SharedStorage, tensors) + offsetof(decltype(SharedStorage::tensors), mainloop);
  expect(operands % 1024 == 0, "operands not at the swizzle's period", 0, 0, 0, 0);
  std::printf("%s: %d stages, %d bytes of shared memory, %d of them for packing\n", name,
              static_cast<int>(Kernel::DispatchPolicy::Stages), Kernel::SharedStorageSize,
              static_cast<int>(sizeof(typename Fused::Epilogue::SharedStorage)));
}

template <typename Element>
Element element_of(uint32_t bits) {
  return Element::bitcast(static_cast<uint16_t>(bits));
}

// All z, two at a time and different ones, against the same in float.
template <typename Element, Activation kActivation>
void check_activation(float threshold) {
  const uint32_t threshold_bits = Element(threshold).raw();
  for (uint32_t low = 0; low < 0x10000; ++low) {
    const uint32_t high = 0xffff - low;
    const uint32_t h = Numbers<Element>::template activate<kActivation>(high << 16 | low, threshold_bits * 0x10001);
    for (const bool upper : {false, true}) {
      const float z = static_cast<float>(element_of<Element>(upper ? high : low));
      const uint32_t bits = upper ? h >> 16 : h & 0xffff;
      float expected = z > 0 ? z : 0.0f;
      if (kActivation == Activation::relu2) expected *= expected;
      if (kActivation == Activation::jumprelu && !(z > threshold)) expected = 0;
      const bool right =
          std::isnan(z) ? std::isnan(static_cast<float>(element_of<Element>(bits))) : bits == Element(expected).raw();
      expect(right, "wrong activation of", static_cast<int>(upper ? high : low), 0, static_cast<int>(kActivation), 0);
    }
  }
}

template <typename Element>
void check_activations() {
  check_activation<Element, Activation::relu>(0);
  check_activation<Element, Activation::relu2>(0);
  for (const float threshold : {0.0f, -0.0f, -2.0f, 1e-40f, 0.75f, 3000.0f, INFINITY}) {
    check_activation<Element, Activation::jumprelu>(static_cast<float>(Element(threshold)));
  }
}

}  // namespace

int main() {
  check_activations<cutlass::bfloat16_t>();
  check_activations<cutlass::half_t>();
  check<Cooperative<cutlass::bfloat16_t>>("cooperative, bfloat16");
  check<Cooperative<cutlass::half_t>>("cooperative, float16");
  check<PingPong<cutlass::bfloat16_t>>("ping-pong, bfloat16");
  check<PingPong<cutlass::half_t>>("ping-pong, float16");
  std::printf(n_wrong == 0 ? "right\n" : "%d wrong\n", n_wrong);
  return n_wrong == 0 ? 0 : 1;
}
