#include "screen.h"

#include <vector>

namespace pyfacts {
namespace {

using torch::stable::new_empty;

// Fewer do not repay the rounding of the weight, or what is done with each bound.
constexpr int64_t kMinTokens = 256;
constexpr int64_t kMinWidth = 256;

// An element that is computed alone costs as much as ten that are bounded save: measured at 768 inputs on Zen 4.
constexpr int64_t kMaxShare = 10;

std::optional<Tensor> contiguous(const std::optional<Tensor>& vector) {
  return vector ? std::optional<Tensor>(torch::stable::contiguous(*vector)) : std::nullopt;
}

const float* floats_of(const std::optional<Tensor>& vector) {
  return vector ? static_cast<const float*>(vector->const_data_ptr()) : nullptr;
}

// [n_rows, bound_width]
Tensor empty_factor(const Tensor& rows) {
  return new_empty(rows, {rows.size(0), cpu::bound_width(rows.size(1))}, ScalarType::BFloat16);
}

uint16_t* bits_of(Tensor& factor) { return static_cast<uint16_t*>(factor.mutable_data_ptr()); }

}  // namespace

Screen::Screen(const Linear& linear, const std::optional<Tensor>& threshold) : linear_(linear) {
  if (threshold) threshold_ = call_torch("aten::relu", "", *threshold);  // what is stored is positive
  const int64_t d_in = linear.x().size(1);
  on_ = linear.x().scalar_type() == ScalarType::Float && linear.n_tokens() >= kMinTokens && d_in >= kMinWidth &&
        d_in <= cpu::kMaxBoundedWidth && cpu::bound_kernels() != nullptr && onednn_has(ScalarType::BFloat16);
}

cpu::BoundedBlock Screen::bound(const Block& block) {
  if (first_token_ != block.first_token) {
    first_token_ = block.first_token;
    x_ = whole_rows(block.tokens_of(linear_.x()));
    left_ = empty_factor(x_);
    cpu::left_factor(dense_of(x_), bits_of(left_), run_on_torch_threads);
  }
  weight_ = whole_rows(block.features_of(linear_.weight()));
  bias_ = contiguous(block.features_of(linear_.bias()));
  const std::optional<Tensor> threshold = contiguous(block.features_of(threshold_));
  Tensor right = empty_factor(weight_);
  cpu::right_factor(dense_of(weight_), floats_of(bias_), floats_of(threshold), bits_of(right), run_on_torch_threads);
  bounds_ = linear(left_, right, std::nullopt);
  return {dense_of(bounds_), dense_of(x_), dense_of(weight_), floats_of(bias_)};
}

void Screen::count_computed(int64_t n) {
  n_computed_ += n;
  if (n_computed_ * kMaxShare > linear_.n_tokens() * linear_.n_features()) on_ = false;
}

Tensor Screen::operator()(const Block& block) {
  if (!on_) return linear_(block);
  const cpu::BoundedBlock bounded = bound(block);
  std::vector<uint64_t> found(block.n_tokens * n_columns(block.n_features) * 4);
  const int64_t n_found = cpu::find_positive(bounded.bounds, found.data(), run_on_torch_threads);
  if (n_found * kMaxShare > block.n_tokens * block.n_features) {
    on_ = false;
    return linear_(block);
  }
  Tensor out = new_empty(x_, {block.n_tokens, block.n_features}, ScalarType::Float);
  cpu::compute_found(bounded, found.data(), static_cast<float*>(out.mutable_data_ptr()), run_on_torch_threads);
  return out;
}

}  // namespace pyfacts
