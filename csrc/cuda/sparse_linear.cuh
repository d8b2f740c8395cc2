// sparse_linear for one token: a block sums rows of the weight, 1,024 features of d_out at a time, eight a thread.
#pragma once

#include "../convert.h"
#include "octet.cuh"

namespace pyfacts::cuda {

constexpr int kSlabThreads = 128;
constexpr int64_t kSlabOutputs = kSlabThreads * kOctet;

// The weight [n_features, d_out].
template <typename T>
struct Weight {
  const T* data;
  int64_t row_stride;  // elements
  int64_t d_out;
  bool aligned;  // rows begin at multiples of 16 bytes
};

// Entries of a row, read once for all threads of a block.
struct Entries {
  int64_t col[kSlabThreads];
  float factor[kSlabThreads];
};

// Writes out [d_out] from kSlabOutputs * slab on, for the entries [begin, end) of a row. The sum starts with the bias;
// a product rounds before it is added.
template <DType dtype, typename T = typename Convert<dtype>::Bits>
__device__ __forceinline__ void multiply_row(int64_t begin, int64_t end, const int64_t* col, const T* values,
                                             const Weight<T>& weight, const T* bias, int64_t slab, int thread,
                                             Entries& entries, T* out) {
  const int64_t first = slab * kSlabOutputs + kOctet * thread;
  const int64_t outputs_left = weight.d_out - first;
  const int n_left = outputs_left < 0 ? 0 : outputs_left < kOctet ? static_cast<int>(outputs_left) : kOctet;
  const bool whole = weight.aligned && n_left == kOctet;
  float sum[kOctet] = {};
  if (bias != nullptr) {
    const Octet<T> octet = load_ragged(bias + first, n_left);
#pragma unroll
    for (int e = 0; e < kOctet; ++e) sum[e] = Convert<dtype>::widen(static_cast<T>(octet.element(e)));
  }
  for (int64_t chunk = begin; chunk < end; chunk += kSlabThreads) {
    const int n = static_cast<int>(end - chunk < kSlabThreads ? end - chunk : kSlabThreads);
    __syncthreads();  // the readers of the last entries are done
    if (thread < n) {
      entries.col[thread] = col[chunk + thread];
      entries.factor[thread] = Convert<dtype>::widen(values[chunk + thread]);
    }
    __syncthreads();
#pragma unroll 4
    for (int i = 0; i < n; ++i) {
      const T* const row = weight.data + entries.col[i] * weight.row_stride + first;
      const Octet<T> octet = whole ? load_octet(row) : load_ragged(row, n_left);
#pragma unroll
      for (int e = 0; e < kOctet; ++e) {
        const float w = Convert<dtype>::widen(static_cast<T>(octet.element(e)));
        sum[e] = __fadd_rn(sum[e], __fmul_rn(entries.factor[i], w));
      }
    }
  }
  Octet<T> result = {};
#pragma unroll
  for (int e = 0; e < kOctet; ++e) result.set_element(e, Convert<dtype>::narrow(sum[e]));
  store_ragged(out + first, result, n_left);
}

}  // namespace pyfacts::cuda
