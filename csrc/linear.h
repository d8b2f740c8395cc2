// The encoders that compute what they encode: act(x @ weight.T + bias), block by block.
#pragma once

#include <string>

#include "planes.h"

namespace pyfacts {

// activation: "relu", "relu2", or "jumprelu" with threshold [n_features].
Planes linear_relu_encode(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                          const std::string& activation, const std::optional<Tensor>& threshold);

Planes gated_relu_encode(const Tensor& x, const Tensor& w_gate, const Tensor& w_up, const std::optional<Tensor>& b_gate,
                         const std::optional<Tensor>& b_up);

// The k largest of relu(x @ weight.T + bias) of every token, or k * n_tokens of all.
Planes linear_topk_encode(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t k,
                          bool over_batch);

}  // namespace pyfacts
