// Compressed sparse rows of an encoding, as torch.sparse has them and sparse_linear wants them.
//
// Floor: the planes read twice, 4 bytes a segment written and read, 10 bytes a value written (bfloat16). No figure here
// comes from a GPU; the device functions are checked by emulation.
#include <cub/device/device_scan.cuh>

#include "csr.cuh"
#include "encoding.h"

namespace pyfacts::cuda {
namespace {

constexpr int kSumThreads = 128;

__global__ void __launch_bounds__(kRunThreads)
    count_kernel(const cpu::Encoding encoding, uint32_t* counts, FaultKey* first_fault) {
  __shared__ Shared shared;
  count_segments(encoding, blockIdx.x, threadIdx.x, shared, counts, first_fault);
}

__global__ void __launch_bounds__(kSumThreads)
    sum_kernel(int64_t n_columns, int64_t n_tokens, uint32_t* counts, int64_t* n_row) {
  const int64_t token = int64_t{blockIdx.x} * kSumThreads + threadIdx.x;
  if (token < n_tokens) sum_columns(n_columns, n_tokens, token, counts, n_row);
}

template <typename T>
__global__ void __launch_bounds__(kRunThreads)
    list_kernel(const cpu::Encoding encoding, const uint32_t* before, const int64_t* crow, int64_t* col, T* values,
                FaultKey* first_fault) {
  __shared__ Shared shared;
  list_run(encoding, before, crow, blockIdx.x, threadIdx.x, shared, col, values, first_fault);
}

template <typename T>
void launch_list(int64_t n, const cpu::Encoding& encoding, const uint32_t* before, const Csr& out,
                 FaultKey* first_fault, cudaStream_t stream) {
  list_kernel<T>
      <<<n, kRunThreads, 0, stream>>>(encoding, before, out.crow, out.col, static_cast<T*>(out.values), first_fault);
}

cudaError_t sum_rows(void* work, size_t* work_bytes, const int64_t* n_row, int64_t* crow, int64_t n_tokens,
                     cudaStream_t stream) {
  return cub::DeviceScan::InclusiveSum(work, *work_bytes, n_row, crow, n_tokens, stream);
}

}  // namespace

// n_row [n_tokens], counts [n_columns, n_tokens], and CUB's own.
cudaError_t csr_scratch_bytes(int64_t n_tokens, int64_t n_features, int64_t* n_bytes) {
  size_t work_bytes = 0;
  const cudaError_t error = sum_rows(nullptr, &work_bytes, nullptr, nullptr, n_tokens, nullptr);
  const int64_t counts_bytes = n_columns(n_features) * n_tokens * static_cast<int64_t>(sizeof(uint32_t));
  *n_bytes = n_tokens * static_cast<int64_t>(sizeof(int64_t)) + ceil_div(counts_bytes, kUnitBytes) * kUnitBytes +
             static_cast<int64_t>(work_bytes);
  return error;
}

cudaError_t to_csr(const cpu::Encoding& e, const Csr& out, void* scratch, FaultKey* first_fault, cudaStream_t stream) {
  cudaError_t error = begin_checks(e, first_fault, stream);
  if (error == cudaSuccess) error = cudaMemsetAsync(out.crow, 0, (e.n_tokens + 1) * sizeof(int64_t), stream);
  const int64_t columns = n_columns(e.n_features), n = columns * n_tiles(e.n_tokens);
  if (error != cudaSuccess || n == 0) return error;
  auto* const n_row = static_cast<int64_t*>(scratch);
  auto* const counts = reinterpret_cast<uint32_t*>(n_row + e.n_tokens);
  void* const work = counts + ceil_div(columns * e.n_tokens, kUnitBytes / 4) * (kUnitBytes / 4);
  count_kernel<<<n, kRunThreads, 0, stream>>>(e, counts, first_fault);
  sum_kernel<<<ceil_div(e.n_tokens, kSumThreads), kSumThreads, 0, stream>>>(columns, e.n_tokens, counts, n_row);
  error = cudaGetLastError();
  size_t work_bytes = 0;
  if (error == cudaSuccess) error = sum_rows(nullptr, &work_bytes, n_row, out.crow + 1, e.n_tokens, stream);
  if (error == cudaSuccess) error = sum_rows(work, &work_bytes, n_row, out.crow + 1, e.n_tokens, stream);
  if (error != cudaSuccess) return error;
  const auto launch = e.dtype == DType::float32 ? launch_list<uint32_t> : launch_list<uint16_t>;
  launch(n, e, counts, out, first_fault, stream);
  return cudaGetLastError();
}

}  // namespace pyfacts::cuda
