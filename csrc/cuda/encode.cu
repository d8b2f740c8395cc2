// Encodes a dense matrix [n_tokens, n_features] to the device form in one pass: x is read once, in 16 bytes a lane, and
// what is packed is written once.
//
// Floor: those bytes over the memory's bandwidth, 268 MB and 13 MB for 8,192 x 16,384 of bfloat16 at 3 %. The device
// functions in the .cuh files are checked by emulation, lane by lane, against the CPU kernels; no figure here comes
// from a GPU.
#include "../predicate.h"
#include "encode.cuh"
#include "encoding.h"

namespace pyfacts::cuda {
namespace {

template <typename T, typename Rule>
__global__ void __launch_bounds__(kBlockGroups<T>* kWarpLanes)
    encode_kernel(const Part<T> x, const Rule rule, const Arena out) {
  __shared__ BlockShared<T> shared;
  encode_groups(x, rule, out, blockIdx.x, threadIdx.x, shared);
}

template <typename T>
cudaError_t launch(const Rows& x, const cpu::Keep& keep, const Arena& out, int64_t first_token, cudaStream_t stream) {
  const int64_t row_bytes = x.row_stride * static_cast<int64_t>(sizeof(T));
  const bool aligned = reinterpret_cast<uintptr_t>(x.data) % kUnitBytes == 0 && row_bytes % kUnitBytes == 0;
  const Part<T> part = {static_cast<const T*>(x.data), x.row_stride, x.n_tokens, x.n_features, first_token, aligned};
  if (part.n_blocks() == 0) return cudaSuccess;
  const auto launch_by = [&](const auto& rule) {
    encode_kernel<<<part.n_blocks(), kBlockGroups<T> * kWarpLanes, 0, stream>>>(part, rule, out);
  };
  const uint32_t floor = make_predicate(x.dtype, keep.min_abs, false).floor;
  if (keep.thresholds != nullptr) {  // and then min_abs is infinite
    launch_by(ByThreshold<T>{reinterpret_cast<const T*>(keep.thresholds), floor});
  } else {
    launch_by(ByMagnitude<T>{floor, keep.signed_zero});
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t encode_out(const Rows& x, const cpu::Keep& keep, const Arena& out, int64_t first_token,
                       cudaStream_t stream) {
  const auto launch_bits = x.dtype == DType::float32 ? launch<uint32_t> : launch<uint16_t>;
  return launch_bits(x, keep, out, first_token, stream);
}

}  // namespace pyfacts::cuda
