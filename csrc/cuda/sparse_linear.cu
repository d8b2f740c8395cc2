// out [n_tokens, d_out] = rows @ weight + bias: one block a token and 1,024 outputs.
//
// Floor: every stored value reads a row of the weight; at 64 latents a token of a decoder of 4,096, 8,192 tokens read
// 4.3 GB, most of it from the second-level cache. No figure here comes from a GPU; the device function is checked by
// emulation.
#include "encoding.h"
#include "sparse_linear.cuh"
#include "unpack.cuh"

namespace pyfacts::cuda {
namespace {

template <DType dtype, typename T>
__global__ void __launch_bounds__(kSlabThreads)
    multiply_kernel(const int64_t* crow, const int64_t* col, const T* values, const Weight<T> weight, const T* bias,
                    T* out, const FaultKey* first_fault) {
  __shared__ Entries entries;
  if (*first_fault != kNoFault) return;
  const int64_t token = blockIdx.x;
  multiply_row<dtype>(crow[token], crow[token + 1], col, values, weight, bias, blockIdx.y, threadIdx.x, entries,
                      out + token * weight.d_out);
}

template <DType dtype>
void launch_multiply(int64_t n_tokens, const Csr& rows, const void* weight, int64_t weight_stride, const void* bias,
                     int64_t d_out, void* out, const FaultKey* first_fault, cudaStream_t stream) {
  using T = typename Convert<dtype>::Bits;
  const bool aligned = reinterpret_cast<uintptr_t>(weight) % kUnitBytes == 0 &&
                       weight_stride * static_cast<int64_t>(sizeof(T)) % kUnitBytes == 0;
  const dim3 grid(n_tokens, ceil_div(d_out, kSlabOutputs));
  multiply_kernel<dtype, T>
      <<<grid, kSlabThreads, 0, stream>>>(rows.crow, rows.col, static_cast<const T*>(rows.values),
                                          {static_cast<const T*>(weight), weight_stride, d_out, aligned},
                                          static_cast<const T*>(bias), static_cast<T*>(out), first_fault);
}

}  // namespace

cudaError_t sparse_linear(DType dtype, int64_t n_tokens, const Csr& rows, const void* weight, int64_t weight_stride,
                          const void* bias, int64_t d_out, void* out, const FaultKey* first_fault,
                          cudaStream_t stream) {
  if (n_tokens == 0 || d_out == 0) return cudaSuccess;
  const auto launch = dtype == DType::float32    ? launch_multiply<DType::float32>
                      : dtype == DType::bfloat16 ? launch_multiply<DType::bfloat16>
                                                 : launch_multiply<DType::float16>;
  launch(n_tokens, rows, weight, weight_stride, bias, d_out, out, first_fault, stream);
  return cudaGetLastError();
}

}  // namespace pyfacts::cuda
