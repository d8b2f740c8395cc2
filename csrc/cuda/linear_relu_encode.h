// act(x Wᵀ + b), encoded while it is still on the chip: what the fused kernel takes and whether it can. For Hopper
// (sm_90) only; elsewhere, and for shapes it does not take, a product and encode_out do the same in two steps.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "activation.h"
#include "arena.h"

namespace pyfacts::cuda {

// x [n_tokens, d_in] and weight [n_features, d_in], as of nn.Linear, with unit stride in d_in.
struct Linear {
  DType dtype;  // of all the tensors
  int64_t n_tokens;
  int64_t n_features;
  int64_t d_in;
  const void* x;
  int64_t x_row_stride;  // elements
  const void* weight;
  int64_t weight_row_stride;
  const void* bias;  // [n_features], or null
  Activation activation;
  const void* threshold;  // [n_features], no NaN among them; null but for jumprelu
};

// Where the dense result [n_tokens, n_features] goes as well; null data for nowhere.
struct DenseOut {
  void* data;
  int64_t row_stride;  // elements
};

// Whether linear_relu_encode_out takes these: 2-byte dtype, nothing empty, everything aligned to 16 bytes (so d_in and
// n_features are multiples of 8), on the current device.
bool fused_supports(const Linear& linear, const DenseOut& dense);

// Writes the encoding to the arena, from its start: the cursor is set back first. The dense result, if asked for, holds
// the same values bit for bit. cudaErrorNotSupported, and nothing done, for what fused_supports() turns down. It needs
// no workspace, allocates nothing and does not wait for the device.
cudaError_t linear_relu_encode_out(const Linear& linear, const DenseOut& dense, const Arena& out, cudaStream_t stream);

// The two halves of it, compiled apart. The number of multiprocessors sizes the persistent grid.
cudaError_t launch_fused_bfloat16(const Linear& linear, const DenseOut& dense, const Arena& out, int n_multiprocessors,
                                  cudaStream_t stream);
cudaError_t launch_fused_float16(const Linear& linear, const DenseOut& dense, const Arena& out, int n_multiprocessors,
                                 cudaStream_t stream);

}  // namespace pyfacts::cuda
