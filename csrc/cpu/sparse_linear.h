// An encoding times a matrix, forwards and for the weight's gradient: torch-free, like encoding.h.
#pragma once

#include "encoding.h"

namespace pyfacts::cpu {

// Dense rows: unit stride within a row, `row_stride` elements between rows, any alignment.
struct Rows {
  const void* data;
  int64_t row_stride;
};

// out [n_tokens, d_out] = encoding @ weight [n_features, d_out] + bias [d_out] (or nullptr), all of the encoding's
// dtype. Products and sums are float32, ascending by feature, whatever the instruction set and the number of threads;
// one rounding to the dtype ends them. Checks all that check() checks on the way; a stored -0.0 passes.
Status sparse_linear(const Encoding& encoding, Rows weight, const void* bias, int64_t d_out, void* out,
                     ParallelFor parallel_for);

// out [n_features, d_out] = encoding.T @ grad [n_tokens, d_out], ascending by token; otherwise as above.
Status sparse_linear_grad_weight(const Encoding& encoding, Rows grad, int64_t d_out, void* out,
                                 ParallelFor parallel_for);

}  // namespace pyfacts::cpu
