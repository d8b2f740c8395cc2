// Decodes to a dense matrix [n_tokens, n_features] in one pass, a block a run.
//
// Floor: the bytes written, 268 MB for 8,192 x 16,384 of bfloat16. No figure here comes from a GPU; the device
// functions are checked by emulation.
#include "decode.cuh"
#include "encoding.h"

namespace pyfacts::cuda {
namespace {

template <typename T>
__global__ void __launch_bounds__(kRunThreads)
    decode_kernel(const cpu::Encoding encoding, bool signed_zero, const Matrix<T> out, FaultKey* first_fault) {
  __shared__ Shared shared;
  __shared__ StagedRows<T> staged[kRunWarps];
  decode_run(encoding, signed_zero, blockIdx.x, threadIdx.x, shared, staged[threadIdx.x / kWarpLanes], out,
             first_fault);
}

template <typename T>
void launch_decode(int64_t n, const cpu::Encoding& encoding, bool signed_zero, void* out, int64_t row_stride,
                   FaultKey* first_fault, cudaStream_t stream) {
  const bool aligned = reinterpret_cast<uintptr_t>(out) % kUnitBytes == 0 &&
                       row_stride * static_cast<int64_t>(sizeof(T)) % kUnitBytes == 0;
  decode_kernel<T>
      <<<n, kRunThreads, 0, stream>>>(encoding, signed_zero, {static_cast<T*>(out), row_stride, aligned}, first_fault);
}

}  // namespace

cudaError_t decode(const cpu::Encoding& e, bool signed_zero, void* out, int64_t row_stride, FaultKey* first_fault,
                   cudaStream_t stream) {
  const cudaError_t error = begin_checks(e, first_fault, stream);
  const int64_t n = n_columns(e.n_features) * n_tiles(e.n_tokens);
  if (error != cudaSuccess || n == 0) return error;
  const auto launch = e.dtype == DType::float32 ? launch_decode<uint32_t> : launch_decode<uint16_t>;
  launch(n, e, signed_zero, out, row_stride, first_fault, stream);
  return cudaGetLastError();
}

}  // namespace pyfacts::cuda
