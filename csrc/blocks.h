// A linear layer that is computed in blocks: part of the tokens by part of the features.
#pragma once

#include <algorithm>
#include <utility>

#include "planes.h"
#include "product.h"

namespace pyfacts {

// 4,096 tokens are enough to be worth reordering the weight for. Of fewer tokens a block takes more features: narrow
// products are slower, by 10 % at 256 features.
constexpr int64_t kBlockTokens = 4096;
constexpr int64_t kBlockElementsOfThread = 1 << 20;
constexpr int64_t kMaxBlockElements = 1 << 22;  // 16 MiB of float32; glibc keeps up to 32 MiB for the next block

inline int64_t block_features(int64_t n_tokens) {
  const int64_t n_threads = torch::stable::get_num_threads();
  const int64_t elements = std::min(kBlockElementsOfThread * n_threads, kMaxBlockElements);
  const int64_t columns = elements / std::clamp<int64_t>(n_tokens, 1, kBlockTokens) / kColumnWidth;
  return std::max<int64_t>(columns, 1) * kColumnWidth;
}

struct Block {
  int64_t first_token;
  int64_t n_tokens;
  int64_t first_feature;
  int64_t n_features;

  Tensor tokens_of(Tensor matrix) const { return torch::stable::narrow(matrix, 0, first_token, n_tokens); }
  Tensor features_of(Tensor rows) const { return torch::stable::narrow(rows, 0, first_feature, n_features); }
  std::optional<Tensor> features_of(const std::optional<Tensor>& rows) const {
    return rows ? std::optional<Tensor>(features_of(*rows)) : std::nullopt;
  }
};

// body(block) for all blocks: a row of blocks after the other, each from left to right. The first is one column wide,
// so that little is lost where it shows that a screen does not pay.
template <typename Body>
void for_blocks(int64_t n_tokens, int64_t n_features, Body body) {
  const int64_t whole = block_features(n_tokens);
  for (int64_t token = 0; token < n_tokens; token += kBlockTokens) {
    int64_t step = token == 0 ? kColumnWidth : whole;
    for (int64_t feature = 0; feature < n_features; feature += std::exchange(step, whole)) {
      body(Block{token, std::min(kBlockTokens, n_tokens - token), feature, std::min(step, n_features - feature)});
    }
  }
}

class Linear {
 public:
  Linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias)
      : x_(x), weight_(weight), bias_(bias) {
    check_matrix(x, "x");
    check_matrix(weight, "weight");
    STD_TORCH_CHECK(x.scalar_type() == weight.scalar_type(), "x and weight must have one dtype");
    STD_TORCH_CHECK(x.size(1) == weight.size(1), "x is ", x.size(1), " wide, and weight ", weight.size(1));
    STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == weight.size(0) &&
                              bias->scalar_type() == x.scalar_type() && bias->is_cpu() == x.is_cpu()),
                    "bias must be [", weight.size(0), "] of x's dtype and device");
  }

  const Tensor& x() const { return x_; }
  const Tensor& weight() const { return weight_; }
  const std::optional<Tensor>& bias() const { return bias_; }
  int64_t n_tokens() const { return x_.size(0); }
  int64_t n_features() const { return weight_.size(0); }

  Tensor operator()(const Block& block) const {
    return linear(block.tokens_of(x_), block.features_of(weight_), block.features_of(bias_));
  }

 private:
  Tensor x_;
  Tensor weight_;
  std::optional<Tensor> bias_;
};

}  // namespace pyfacts
