// The CUDA interface to the encoding: what ops_cuda.cpp calls. All pointers are on the device unless said otherwise,
// and all work goes to `stream`; a cudaError_t is the launch's.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../cpu/encoding.h"
#include "../format.h"

namespace pyfacts::cuda {

// A dense matrix [n_tokens, n_features] with unit feature stride.
struct Rows {
  DType dtype;
  const void* data;
  int64_t row_stride;  // elements; rows have any alignment
  int64_t n_tokens;
  int64_t n_features;
};

// Bytes of scratch memory, 16-byte aligned, that carries an encoding from count() to pack(): about one bit an element.
cudaError_t scratch_bytes(const Rows& rows, int64_t* n_bytes);

// First half of encode: writes counts [n_columns, n_tokens], and to the host how large the other planes are, for which
// it waits.
cudaError_t count(const Rows& rows, cpu::Keep keep, uint8_t* counts, void* scratch, int64_t* index_bytes,
                  int64_t* n_values, cudaStream_t stream);

// Second half: writes index, values and tile_ptr.
cudaError_t pack(const Rows& rows, const void* scratch, const cpu::Planes& out, cudaStream_t stream);

// Writes the dense matrix with `row_stride` elements between rows, checks all that cpu::check() checks, and waits for
// the verdict. `scratch` holds 8 bytes, aligned.
cudaError_t decode(const cpu::Encoding& encoding, bool signed_zero, void* out, int64_t row_stride, void* scratch,
                   cpu::Status* status, cudaStream_t stream);

}  // namespace pyfacts::cuda
