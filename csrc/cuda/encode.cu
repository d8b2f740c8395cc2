// Encodes a dense matrix [n_tokens, n_features] in two passes: count (a bit per element, and the size of every run),
// sum (where every run starts), pack (gather the stored values). The planes are canonical as written. The device
// functions in the .cuh files are checked by emulation, lane by lane, against the CPU kernels; no figure here comes
// from a GPU.
//
// The straightforward version: x is read once whole, then once more where values are stored, and the host waits once,
// for the sizes.
#include <cub/device/device_scan.cuh>

#include "encode.cuh"
#include "encoding.h"

namespace pyfacts::cuda {
namespace {

template <typename T>
__global__ void __launch_bounds__(kRunThreads)
    count_kernel(Matrix<const T> x, Predicate predicate, uint8_t* counts, SegmentMask* masks, Sizes* sizes) {
  __shared__ Shared shared;
  count_run(x, predicate, blockIdx.x, threadIdx.x, shared, counts, masks, sizes);
}

template <typename T>
__global__ void __launch_bounds__(kRunThreads)
    pack_kernel(Matrix<const T> x, const SegmentMask* masks, const Sizes* starts, uint8_t* index, T* values,
                Sizes* tile_ptr) {
  __shared__ Shared shared;
  pack_run(x, masks, starts, blockIdx.x, threadIdx.x, shared, index, values, tile_ptr);
}

struct Add {
  __host__ __device__ Sizes operator()(const Sizes& a, const Sizes& b) const {
    return {a.index + b.index, a.values + b.values};
  }
};

int64_t n_runs(const Rows& rows) { return n_columns(rows.n_features) * n_tiles(rows.n_tokens); }

// One entry more than there are runs: the last becomes the total.
cudaError_t sum_sizes(void* work, size_t* work_bytes, Sizes* sizes, int64_t n, cudaStream_t stream) {
  return cub::DeviceScan::ExclusiveScan(work, *work_bytes, sizes, sizes, Add{}, Sizes{0, 0}, n + 1, stream);
}

// masks [n_columns, n_tokens], sizes [n_runs + 1] (summed in place), and CUB's own.
struct Scratch {
  SegmentMask* masks;
  Sizes* sizes;
  uint8_t* work;

  Scratch(const Rows& rows, void* memory)
      : masks(static_cast<SegmentMask*>(memory)),
        sizes(reinterpret_cast<Sizes*>(masks + n_columns(rows.n_features) * rows.n_tokens)),
        work(reinterpret_cast<uint8_t*>(sizes + n_runs(rows) + 1)) {}
};

template <typename T>
Matrix<const T> matrix(const Rows& rows) {
  return {static_cast<const T*>(rows.data), rows.row_stride, rows.n_tokens, rows.n_features};
}

// f(T{}) with T the unsigned integer of the dtype's width.
template <typename F>
void with_bits(DType dtype, F f) {
  if (dtype == DType::float32) {
    f(uint32_t{});
  } else {
    f(uint16_t{});
  }
}

}  // namespace

cudaError_t scratch_bytes(const Rows& rows, int64_t* n_bytes) {
  size_t work_bytes = 0;
  const cudaError_t error = sum_sizes(nullptr, &work_bytes, nullptr, n_runs(rows), nullptr);
  *n_bytes = n_columns(rows.n_features) * rows.n_tokens * static_cast<int64_t>(sizeof(SegmentMask)) +
             (n_runs(rows) + 1) * static_cast<int64_t>(sizeof(Sizes)) + static_cast<int64_t>(work_bytes);
  return error;
}

cudaError_t count(const Rows& rows, cpu::Keep keep, uint8_t* counts, void* memory, int64_t* index_bytes,
                  int64_t* n_values, cudaStream_t stream) {
  *index_bytes = *n_values = 0;
  const int64_t n = n_runs(rows);
  if (n == 0) return cudaSuccess;
  const Scratch scratch(rows, memory);
  const Predicate predicate = make_predicate(rows.dtype, keep.min_abs, keep.signed_zero);
  with_bits(rows.dtype, [&](auto bits) {
    count_kernel<<<n, kRunThreads, 0, stream>>>(matrix<decltype(bits)>(rows), predicate, counts, scratch.masks,
                                                scratch.sizes);
  });
  cudaError_t error = cudaGetLastError();
  size_t work_bytes = 0;
  if (error == cudaSuccess) error = sum_sizes(nullptr, &work_bytes, nullptr, n, nullptr);
  if (error == cudaSuccess) error = sum_sizes(scratch.work, &work_bytes, scratch.sizes, n, stream);
  Sizes totals = {0, 0};
  if (error == cudaSuccess) {
    error = cudaMemcpyAsync(&totals, scratch.sizes + n, sizeof(Sizes), cudaMemcpyDeviceToHost, stream);
  }
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
  *index_bytes = totals.index;
  *n_values = totals.values;
  return error;
}

cudaError_t pack(const Rows& rows, const void* memory, const cpu::Planes& out, cudaStream_t stream) {
  const int64_t n = n_runs(rows);
  if (n == 0) return cudaSuccess;
  const Scratch scratch(rows, const_cast<void*>(memory));
  with_bits(rows.dtype, [&](auto bits) {
    using T = decltype(bits);
    pack_kernel<<<n, kRunThreads, 0, stream>>>(matrix<T>(rows), scratch.masks, scratch.sizes, out.index,
                                               static_cast<T*>(out.values), reinterpret_cast<Sizes*>(out.tile_ptr));
  });
  return cudaGetLastError();
}

}  // namespace pyfacts::cuda
