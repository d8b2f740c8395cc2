// act(x Wᵀ + b), encoded while it is still on the chip: x [n_tokens, d_in] and W [n_features, d_in], both along d_in,
// bfloat16 or float16, summed up in float32.
//
// The product is CUTLASS': a persistent kernel in which one warp fetches tiles by TMA and two warpgroups multiply them
// with WGMMA. Its epilogue is ours. A tile is 256 features wide, a column of the encoding, and WGMMA leaves 16 tokens
// of it to each warp, two groups: so every warp adds the bias, rounds, applies the activation, lays the rows of one
// group and then of the other out in its own piece of shared memory, and packs them (pack_product.cuh) without waiting
// for any other warp. Dense h never exists, unless it is asked for; then it is written from those same rows.
//
// Two shapes of tile. 128 x 256 (cooperative: both warpgroups on one tile) reads fewer operand bytes per product, but
// the tensor cores idle while it packs; 64 x 256 (ping-pong: each warpgroup has a tile of its own) packs one tile while
// it multiplies the next, which matters the more the smaller d_in is.
//
// This has not run on a GPU. Known from the compiler: no spills, no serialised WGMMA. Known from its PTX, interpreted
// (tests/ptx): what it computes, and that its barriers fit together.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cutlass/arch/arch.h>
#include <cutlass/arch/memory.h>
#include <cutlass/device_kernel.h>

#include <cute/arch/copy_sm90.hpp>
#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/detail.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "linear_relu_encode.h"
#include "pack_product.cuh"

namespace pyfacts::cuda {

// From here on the ping-pong kernel gives way to the cooperative one. Not measured, but reckoned: at 512 the product of
// a 128 x 256 tile takes 4.5 us at the tensor cores' peak, and packing it 2 to 3.5. A 64 x 256 tile hides its packing
// but asks the second-level cache for half as many bytes again per product, more than it can give at that peak.
constexpr int64_t kCooperativeDIn = 512;

// Two neighbouring features of one token, in the output's dtype.
template <typename Element>
struct PairOf;
template <>
struct PairOf<cutlass::bfloat16_t> {
  using Type = __nv_bfloat162;
  static CUTLASS_HOST_DEVICE Type round(float low, float high) { return __floats2bfloat162_rn(low, high); }
  static CUTLASS_HOST_DEVICE float2 widen(Type pair) { return __bfloat1622float2(pair); }
};
template <>
struct PairOf<cutlass::half_t> {
  using Type = __half2;
  static CUTLASS_HOST_DEVICE Type round(float low, float high) { return __floats2half2_rn(low, high); }
  static CUTLASS_HOST_DEVICE float2 widen(Type pair) { return __half22float2(pair); }
};

// What pack_product() asks for, with pairs as their bits.
template <typename Element>
struct Numbers {
  using Pair = typename PairOf<Element>::Type;

  static CUTLASS_HOST_DEVICE uint32_t bits(Pair pair) { return *reinterpret_cast<const uint32_t*>(&pair); }
  static CUTLASS_HOST_DEVICE Pair pair(uint32_t bits) { return *reinterpret_cast<const Pair*>(&bits); }

  static CUTLASS_HOST_DEVICE uint32_t add(float low, float high, uint32_t bias) {
    const float2 wide = PairOf<Element>::widen(pair(bias));
    return bits(PairOf<Element>::round(low + wide.x, high + wide.y));
  }

  // __hmax2_nan keeps a NaN and takes +0.0 over -0.0; of the toolkit's host versions one does so only in this order.
  template <Activation kActivation>
  static CUTLASS_HOST_DEVICE uint32_t activate(uint32_t z, uint32_t threshold) {
    const Pair zero = pair(0);
    if constexpr (kActivation == Activation::relu) {
      return bits(__hmax2_nan(zero, pair(z)));
    } else if constexpr (kActivation == Activation::relu2) {
      const Pair h = __hmax2_nan(zero, pair(z));
      return bits(__hmul2(h, h));
    } else {
      // All ones where z > threshold or either is NaN.
      return z & __hgtu2_mask(pair(z), __hmax2(pair(threshold), zero));
    }
  }

  static CUTLASS_DEVICE void stmatrix(const uint32_t* registers, uint16_t* at) {
    cute::SM90_U32x4_STSM_N::copy(registers[0], registers[1], registers[2], registers[3],
                                  *reinterpret_cast<cute::uint128_t*>(at));
  }
};

// The epilogue, for CUTLASS' adapter of epilogues that load nothing.
template <typename Element_, int kWarps>
class PackingEpilogue {
 public:
  using ElementC = Element_;
  using ElementD = Element_;
  using StrideC = cute::Stride<int64_t, cute::Int<1>, int64_t>;
  using StrideD = StrideC;

  // One for each warp. Aligned so that the operands, which follow it, begin on the 1,024 bytes of the swizzle's period.
  struct alignas(1024) SharedStorage {
    Staging<uint16_t> warp[kWarps];
  };

  using Arguments = ProductOut;
  using Params = Arguments;

  template <typename ProblemShape>
  static constexpr Params to_underlying_arguments(const ProblemShape&, const Arguments& arguments, void*) {
    return arguments;
  }
  template <typename ProblemShape>
  static size_t get_workspace_size(const ProblemShape&, const Arguments&) {
    return 0;
  }
  template <typename ProblemShape>
  static cutlass::Status initialize_workspace(const ProblemShape&, const Arguments&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }
  template <typename ProblemShape>
  static bool can_implement(const ProblemShape&, const Arguments&) {
    return true;  // fused_supports() said so
  }

  CUTLASS_HOST_DEVICE explicit PackingEpilogue(const Params& params) : params_(params) {}

  // Thread `thread` of those that multiply, holding `accumulators` of the tile.
  template <typename ProblemShape, typename TileShape, typename TileCoord, typename Accumulators, typename TiledMma,
            typename Residue>
  CUTLASS_DEVICE void operator()(const ProblemShape&, const TileShape&, const TileCoord& tile,
                                 const Accumulators& accumulators, TiledMma, const Residue&, int thread,
                                 char* shared) const {
    static_assert(cute::size<1>(TileShape{}) == kColumnWidth);
    static_assert(cute::size<0>(TileShape{}) == kWarps * kWarpTokens);
    static_assert(cute::size(Accumulators{}) == kAccumulators);
    const int warp = thread / kWarpLanes;
    const int64_t first_token = (static_cast<int64_t>(cute::get<0>(tile)) * kWarps + warp) * kWarpTokens;
    pack_product<Numbers<Element_>>(params_, accumulators, cute::get<1>(tile), first_token, thread % kWarpLanes,
                                    reinterpret_cast<SharedStorage*>(shared)->warp[warp]);
  }

 private:
  Params params_;
};

// Tiles of kTokens x 256 features x 64 of d_in. The blocks of a cluster have tokens that follow each other and the same
// features, whose weights are fetched once for all of them.
template <typename Element, typename Schedule, int kTokens, int kClusterTokens>
struct FusedKernel {
  using TileShape = cute::Shape<cute::Int<kTokens>, cute::Int<kColumnWidth>, cute::_64>;
  using ClusterShape = cute::Shape<cute::Int<kClusterTokens>, cute::_1, cute::_1>;
  static constexpr int kAlignment = 8;  // elements
  using Epilogue = cutlass::epilogue::collective::detail::Sm90TmaWarpSpecializedAdapter<
      PackingEpilogue<Element, kTokens / kWarpTokens>>;
  // The epilogue's memory, and as much again as its alignment may waste before it.
  using Stages = cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
      sizeof(typename Epilogue::SharedStorage) + alignof(typename Epilogue::SharedStorage))>;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, cutlass::layout::RowMajor, kAlignment, Element,
      cutlass::layout::ColumnMajor, kAlignment, float, TileShape, ClusterShape, Stages, Schedule>::CollectiveOp;
  // n_tokens, n_features, d_in and a batch of one.
  using ProblemShape = cute::Shape<int, int, int, int>;
  using Kernel =
      cutlass::gemm::kernel::GemmUniversal<ProblemShape, Mainloop, Epilogue, cutlass::gemm::PersistentScheduler>;
};

template <typename Element>
using Cooperative = FusedKernel<Element, cutlass::gemm::KernelTmaWarpSpecializedCooperative, 128, 2>;
template <typename Element>
using PingPong = FusedKernel<Element, cutlass::gemm::KernelTmaWarpSpecializedPingpong, 64, 2>;

// Tiles in flight together form blocks of up to this many columns, so that they share what they read through the
// second-level cache. CUTLASS rounds the grid up to whole blocks, and computes what is beyond the end, so only a
// divisor will do.
inline int swizzle_of(int64_t n_clusters, int64_t n_columns) {
  int size = 8;
  while (n_clusters % size != 0 || n_columns % size != 0) size /= 2;
  return size;
}

template <typename Fused, typename Element>
cudaError_t launch(const Linear& linear, const DenseOut& dense, const Arena& out, int n_multiprocessors,
                   cudaStream_t stream) {
  using Kernel = typename Fused::Kernel;
  constexpr auto kClusterTokens = cute::size<0>(typename Fused::ClusterShape{});
  constexpr auto kTileTokens = cute::size<0>(typename Fused::TileShape{});
  const auto stride = [&](int64_t n_rows, int64_t row_stride) {
    return cute::make_stride(n_rows == 1 ? linear.d_in : row_stride, cute::Int<1>{}, int64_t{0});
  };

  typename Kernel::Arguments arguments{};
  arguments.mode = cutlass::gemm::GemmUniversalMode::kGemm;
  arguments.problem_shape = {static_cast<int>(linear.n_tokens), static_cast<int>(linear.n_features),
                             static_cast<int>(linear.d_in), 1};
  arguments.mainloop.ptr_A = static_cast<const Element*>(linear.x);
  arguments.mainloop.dA = stride(linear.n_tokens, linear.x_row_stride);
  arguments.mainloop.ptr_B = static_cast<const Element*>(linear.weight);
  arguments.mainloop.dB = stride(linear.n_features, linear.weight_row_stride);
  arguments.epilogue = {out,
                        linear.activation,
                        static_cast<const uint16_t*>(linear.bias),
                        static_cast<const uint16_t*>(linear.threshold),
                        static_cast<uint16_t*>(dense.data),
                        dense.row_stride};
  arguments.hw_info.sm_count = n_multiprocessors;
  arguments.scheduler.max_swizzle_size =
      swizzle_of(ceil_div(ceil_div(linear.n_tokens, kTileTokens), kClusterTokens), n_columns(linear.n_features));
  if (!Kernel::can_implement(arguments)) return cudaErrorInvalidValue;

  typename Kernel::Params params = Kernel::to_underlying_arguments(arguments, nullptr);
  const void* const kernel = reinterpret_cast<const void*>(cutlass::device_kernel<Kernel>);
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Kernel::SharedStorageSize);
  if (error != cudaSuccess) return error;

  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {kClusterTokens, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = Kernel::get_grid_shape(params);
  config.blockDim = Kernel::get_block_shape();
  config.dynamicSmemBytes = Kernel::SharedStorageSize;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  void* kernel_params[] = {&params};
  return cudaLaunchKernelExC(&config, kernel, kernel_params);
}

template <typename Element>
cudaError_t launch_fused(const Linear& linear, const DenseOut& dense, const Arena& out, int n_multiprocessors,
                         cudaStream_t stream) {
  const auto run =
      linear.d_in < kCooperativeDIn ? launch<PingPong<Element>, Element> : launch<Cooperative<Element>, Element>;
  return run(linear, dense, out, n_multiprocessors, stream);
}

}  // namespace pyfacts::cuda
