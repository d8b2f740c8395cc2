// The CUDA interface to the encoding: what ops_cuda.cpp calls. All pointers are on the device unless said otherwise,
// and all work goes to `stream`; a cudaError_t is the launch's. Nothing waits for the device but verdict().
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../cpu/encoding.h"
#include "arena.h"

namespace pyfacts::cuda {

// A dense matrix [n_tokens, n_features] with unit feature stride.
struct Rows {
  DType dtype;
  const void* data;
  int64_t row_stride;  // elements; rows have any alignment
  int64_t n_tokens;
  int64_t n_features;
};

// Packs x, the rows of the arena's matrix from first_token (a multiple of 8) on, behind what the cursor has placed so
// far. Whoever begins an arena sets the cursor to zero. Thresholds of `keep` are on the device, aligned to 16 bytes.
cudaError_t encode_out(const Rows& x, const cpu::Keep& keep, const Arena& out, int64_t first_token,
                       cudaStream_t stream);

// From the device form to the canonical one, first half: writes tile_ptr [n_columns, n_tiles, 2] and the planes' sizes
// [2] (index bytes, values), or sizes of -1 for an arena that overflowed.
cudaError_t canonical_scratch_bytes(int64_t n_tokens, int64_t n_features, int64_t* n_bytes);
cudaError_t canonical_starts(const Arena& arena, int64_t* tile_ptr, int64_t* sizes, void* scratch, cudaStream_t stream);

// Second half: copies the groups to where tile_ptr says. Writes nothing if the arena overflowed or the planes, with
// given capacities (bytes of index, number of values), cannot hold it.
cudaError_t canonical_copy(const Arena& arena, const int64_t* tile_ptr, const int64_t* sizes, uint8_t* index,
                           int64_t index_capacity, void* values, int64_t values_capacity, cudaStream_t stream);

// What reads an encoding checks on the way all that cpu::check() checks, and keeps the first fault in a word on the
// device, aligned to its 8 bytes. Nothing is read out of bounds; what is written means something only if the verdict,
// for which the host waits, is that all is well. Functions that are given a word to write begin the checks themselves.
using FaultKey = unsigned long long;
cudaError_t begin_checks(const cpu::Encoding& encoding, FaultKey* first_fault, cudaStream_t stream);
cudaError_t verdict(const FaultKey* first_fault, int64_t n_tokens, cpu::Status* status, cudaStream_t stream);

// Writes the dense matrix with `row_stride` elements between rows.
cudaError_t decode(const cpu::Encoding& encoding, bool signed_zero, void* out, int64_t row_stride,
                   FaultKey* first_fault, cudaStream_t stream);

// Writes compressed sparse rows: crow [n_tokens + 1], col [n_values], values [n_values] of the dtype.
struct Csr {
  int64_t* crow;
  int64_t* col;
  void* values;
};
cudaError_t csr_scratch_bytes(int64_t n_tokens, int64_t n_features, int64_t* n_bytes);
cudaError_t to_csr(const cpu::Encoding& encoding, const Csr& out, void* scratch, FaultKey* first_fault,
                   cudaStream_t stream);

// out [n_tokens, d_out] = rows @ weight [n_features, d_out] + bias [d_out] (or nullptr), all of one dtype and with unit
// stride within a row, out contiguous: products and sums in float32, ascending by feature, as on the CPU and with its
// bits (but for those of a NaN). Does nothing if first_fault holds a fault.
cudaError_t sparse_linear(DType dtype, int64_t n_tokens, const Csr& rows, const void* weight, int64_t weight_stride,
                          const void* bias, int64_t d_out, void* out, const FaultKey* first_fault, cudaStream_t stream);

}  // namespace pyfacts::cuda
