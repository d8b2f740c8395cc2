// Decodes to a dense matrix [n_tokens, n_features] in one pass, a block a run, and reports the first fault through one
// word on the device. Floor: the bytes written, 268 MB for 8,192 x 16,384 of bfloat16. Checked like encode.cu.
#include "decode.cuh"
#include "encoding.h"

namespace pyfacts::cuda {
namespace {

template <typename T>
__global__ void __launch_bounds__(kRunThreads)
    decode_kernel(cpu::Encoding encoding, uint32_t zero_mask, Matrix<T> out, FaultKey* first_fault) {
  __shared__ Shared shared;
  __shared__ StagedRows<T> staged[kRunWarps];
  decode_run(encoding, zero_mask, blockIdx.x, threadIdx.x, shared, staged[threadIdx.x / kWarpLanes], out, first_fault);
}

template <typename T>
void launch_decode(const cpu::Encoding& e, bool signed_zero, void* out, int64_t row_stride, FaultKey* first_fault,
                   cudaStream_t stream) {
  const int64_t n = n_columns(e.n_features) * n_tiles(e.n_tokens);
  const T all = static_cast<T>(~T{0});
  const bool aligned = reinterpret_cast<uintptr_t>(out) % kUnitBytes == 0 &&
                       row_stride * static_cast<int64_t>(sizeof(T)) % kUnitBytes == 0;
  decode_kernel<T><<<n, kRunThreads, 0, stream>>>(e, signed_zero ? all : all >> 1,
                                                  {static_cast<T*>(out), row_stride, aligned}, first_fault);
}

}  // namespace

cudaError_t decode(const cpu::Encoding& e, bool signed_zero, void* out, int64_t row_stride, void* scratch,
                   cpu::Status* status, cudaStream_t stream) {
  *status = {};
  if (e.n_features == 0 || e.n_tokens == 0) {
    if (e.index_bytes != 0 || e.n_values != 0) {
      *status = {e.index_bytes != 0 ? Fault::index_size : Fault::values_size, -1, -1};
    }
    return cudaSuccess;
  }
  FaultKey* first_fault = static_cast<FaultKey*>(scratch);
  cudaError_t error = cudaMemsetAsync(first_fault, 0xff, sizeof(FaultKey), stream);
  static_assert(kNoFault == 0xffffffffffffffff);
  if (error != cudaSuccess) return error;
  const auto launch = e.dtype == DType::float32 ? launch_decode<uint32_t> : launch_decode<uint16_t>;
  launch(e, signed_zero, out, row_stride, first_fault, stream);
  error = cudaGetLastError();
  FaultKey found = kNoFault;
  if (error == cudaSuccess) {
    error = cudaMemcpyAsync(&found, first_fault, sizeof(FaultKey), cudaMemcpyDeviceToHost, stream);
  }
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
  *status = status_of(found, e.n_tokens);
  return error;
}

}  // namespace pyfacts::cuda
