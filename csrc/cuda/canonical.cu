// Makes the canonical form of an encoding from its device form, so that equal activations give equal bytes: sizes of
// the runs, their sums, and one copy. The host decides nothing and waits for nothing.
//
// Floor: the packed bytes, read and written: a twentieth of the dense matrix at 3 % each way. No figure here comes from
// a GPU; the device functions are checked by emulation.
#include <cub/device/device_scan.cuh>

#include "canonical.cuh"
#include "encoding.h"

namespace pyfacts::cuda {
namespace {

__global__ void __launch_bounds__(kRunThreads) measure_kernel(const Arena arena, Sizes* sizes) {
  __shared__ Shared shared;
  measure_run(arena, blockIdx.x, threadIdx.x, shared, sizes);
}

__global__ void total_kernel(const Arena arena, const Sizes* sizes, const Sizes* tile_ptr, int64_t n_runs,
                             Sizes* total) {
  *total = plane_sizes(arena, sizes, tile_ptr, n_runs);
}

template <typename T>
__global__ void __launch_bounds__(kRunThreads)
    copy_kernel(const Arena arena, const Sizes* tile_ptr, const Sizes* total, uint8_t* index, int64_t index_capacity,
                T* values, int64_t values_capacity) {
  __shared__ Shared shared;
  __shared__ uint32_t groups_before[kRunGroups + 1];
  if (total->index < 0 || total->index > index_capacity || total->values > values_capacity) return;
  copy_run(arena, tile_ptr, blockIdx.x, threadIdx.x, shared, groups_before, index, values);
}

struct Add {
  __host__ __device__ Sizes operator()(const Sizes& a, const Sizes& b) const {
    return {a.index + b.index, a.values + b.values};
  }
};

int64_t n_runs(int64_t n_tokens, int64_t n_features) { return n_columns(n_features) * n_tiles(n_tokens); }

cudaError_t sum_sizes(void* work, size_t* work_bytes, const Sizes* sizes, Sizes* sums, int64_t n, cudaStream_t stream) {
  return cub::DeviceScan::ExclusiveScan(work, *work_bytes, sizes, sums, Add{}, Sizes{0, 0}, n, stream);
}

template <typename T>
void launch_copy(int64_t n, const Arena& arena, const int64_t* tile_ptr, const int64_t* sizes, uint8_t* index,
                 int64_t index_capacity, void* values, int64_t values_capacity, cudaStream_t stream) {
  copy_kernel<T><<<n, kRunThreads, 0, stream>>>(arena, reinterpret_cast<const Sizes*>(tile_ptr),
                                                reinterpret_cast<const Sizes*>(sizes), index, index_capacity,
                                                static_cast<T*>(values), values_capacity);
}

}  // namespace

// The sizes of the runs, and CUB's own memory behind them.
cudaError_t canonical_scratch_bytes(int64_t n_tokens, int64_t n_features, int64_t* n_bytes) {
  const int64_t n = n_runs(n_tokens, n_features);
  size_t work_bytes = 0;
  const cudaError_t error = sum_sizes(nullptr, &work_bytes, nullptr, nullptr, n, nullptr);
  *n_bytes = n * static_cast<int64_t>(sizeof(Sizes)) + static_cast<int64_t>(work_bytes);
  return error;
}

cudaError_t canonical_starts(const Arena& arena, int64_t* tile_ptr, int64_t* sizes, void* scratch,
                             cudaStream_t stream) {
  const int64_t n = n_runs(arena.n_tokens, arena.n_features);
  if (n == 0) return cudaMemsetAsync(sizes, 0, sizeof(Sizes), stream);
  auto* const run_sizes = static_cast<Sizes*>(scratch);
  auto* const starts = reinterpret_cast<Sizes*>(tile_ptr);
  measure_kernel<<<n, kRunThreads, 0, stream>>>(arena, run_sizes);
  cudaError_t error = cudaGetLastError();
  size_t work_bytes = 0;
  if (error == cudaSuccess) error = sum_sizes(nullptr, &work_bytes, run_sizes, starts, n, stream);
  if (error == cudaSuccess) error = sum_sizes(run_sizes + n, &work_bytes, run_sizes, starts, n, stream);
  if (error != cudaSuccess) return error;
  total_kernel<<<1, 1, 0, stream>>>(arena, run_sizes, starts, n, reinterpret_cast<Sizes*>(sizes));
  return cudaGetLastError();
}

cudaError_t canonical_copy(const Arena& arena, const int64_t* tile_ptr, const int64_t* sizes, uint8_t* index,
                           int64_t index_capacity, void* values, int64_t values_capacity, cudaStream_t stream) {
  const int64_t n = n_runs(arena.n_tokens, arena.n_features);
  if (n == 0) return cudaSuccess;
  const auto launch = arena.dtype == DType::float32 ? launch_copy<uint32_t> : launch_copy<uint16_t>;
  launch(n, arena, tile_ptr, sizes, index, index_capacity, values, values_capacity, stream);
  return cudaGetLastError();
}

}  // namespace pyfacts::cuda
