#include "screen.h"

namespace pyfacts {
namespace {

using torch::stable::new_empty;

// Fewer tokens do not repay the rounding of the weight.
constexpr int64_t kMinTokens = 1;
constexpr int64_t kMinWidth = 64;

// An element that is computed alone costs four times what a product's does: up to this share the screen is worth it.
constexpr int64_t kMaxShare = 10;

Tensor whole_rows(const Tensor& x) { return x.stride(1) == 1 && x.stride(0) >= x.size(1) ? x : torch::stable::contiguous(x); }

uint16_t* bits_of(Tensor& factor) { return static_cast<uint16_t*>(factor.mutable_data_ptr()); }

std::optional<Tensor> contiguous(const std::optional<Tensor>& vector) {
  return vector ? std::optional<Tensor>(torch::stable::contiguous(*vector)) : std::nullopt;
}

const float* floats_of(const std::optional<Tensor>& vector) {
  return vector ? static_cast<const float*>(vector->const_data_ptr()) : nullptr;
}

}  // namespace

Screen::Screen(const Linear& linear, const std::optional<Tensor>& threshold)
    : linear_(&linear), threshold_(threshold) {
  const int64_t d_in = linear.x().size(1);
  on_ = linear.x().scalar_type() == ScalarType::Float && cpu::bound_kernels() != nullptr &&
        linear.n_tokens() >= kMinTokens && d_in >= kMinWidth && d_in <= cpu::kMaxBoundedWidth;
}

cpu::BoundedBlock Screen::bound(const Block& block) {
  const int64_t width = cpu::bound_width(linear_->x().size(1));
  if (left_of_token_ != block.first_token) {
    left_of_token_ = block.first_token;
    x_ = whole_rows(block.tokens_of(linear_->x()));
    left_ = new_empty(x_, {block.n_tokens, width}, ScalarType::BFloat16);
    cpu::left_factor(dense_of(x_), bits_of(left_), run_on_torch_threads);
  }
  weight_ = whole_rows(block.features_of(linear_->weight()));
  bias_ = contiguous(block.features_of(linear_->bias()));
  const std::optional<Tensor> threshold = contiguous(block.features_of(threshold_));
  Tensor right = new_empty(weight_, {block.n_features, width}, ScalarType::BFloat16);
  cpu::right_factor(dense_of(weight_), floats_of(bias_), floats_of(threshold), bits_of(right), run_on_torch_threads);
  bounds_ = linear(left_, right, std::nullopt);
  return {dense_of(bounds_), dense_of(x_), dense_of(weight_), floats_of(bias_)};
}

void Screen::computed(int64_t n) {
  n_computed_ += n;
  if (n_computed_ * kMaxShare > linear_->n_tokens() * linear_->n_features()) on_ = false;
}

Tensor Screen::operator()(const Block& block) {
  if (!on_) return (*linear_)(block);
  const cpu::BoundedBlock bounded = bound(block);
  std::vector<uint64_t> found(block.n_tokens * n_columns(block.n_features) * 4);
  const int64_t n_found = cpu::find_positive(bounded.bounds, found.data(), run_on_torch_threads);
  if (n_found * kMaxShare > block.n_tokens * block.n_features) {
    on_ = false;
    return (*linear_)(block);
  }
  Tensor out = new_empty(x_, {block.n_tokens, block.n_features}, ScalarType::Float);
  cpu::compute_found(bounded, found.data(), static_cast<float*>(out.mutable_data_ptr()), run_on_torch_threads);
  return out;
}

}  // namespace pyfacts
