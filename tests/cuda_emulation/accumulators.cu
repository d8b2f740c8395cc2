// Checks csrc/cuda/accumulators.cuh on the host, for every lane and accumulator of both fused kernels: that by CUTLASS' own
// description of WGMMA and of stmatrix each element of the tile reaches its place in its warp's rows, exactly once.
// Prints what is wrong, or the kernels' stages and shared memory. Needs nvcc for the headers, but no GPU.
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

}  // namespace

int main() {
  check<Cooperative<cutlass::bfloat16_t>>("cooperative, bfloat16");
  check<Cooperative<cutlass::half_t>>("cooperative, float16");
  check<PingPong<cutlass::bfloat16_t>>("ping-pong, bfloat16");
  check<PingPong<cutlass::half_t>>("ping-pong, float16");
  std::printf(n_wrong == 0 ? "right\n" : "%d wrong\n", n_wrong);
  return n_wrong == 0 ? 0 : 1;
}
