// The matrix product of torch's own libraries.
#pragma once

#include "stable.h"

namespace pyfacts {

// x @ weight.T + bias: [n_tokens, n_features], in the operands' dtype, summed in float32.
Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias);

// Whether linear multiplies this dtype with oneDNN, which sums in float32.
bool onednn_has(ScalarType type);

}  // namespace pyfacts
