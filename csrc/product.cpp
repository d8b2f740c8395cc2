// aten::linear multiplies float32 with MKL, which does not use AVX-512 on AMD: 190 GFLOP/s on two Zen 5 cores, where
// oneDNN, which torch carries too, reaches 430 to 480. With AVX2 MKL is the faster: 160 GFLOP/s on two Zen 3 cores, and
// oneDNN 140. bfloat16 is oneDNN's either way; its inner product is 2 to 15 % faster than the matmul that aten::linear
// takes. Weights in its own order make that 5 to 15 % of either dtype, once 4,096 tokens repay the reordering; at 2,048
// it depends on d_in, at 1,024 it costs more than it gains.
//
// On CPUs without half-precision products (bfloat16 needs AVX-512 BF16, float16 AVX-512 FP16, which no AMD has)
// aten::linear takes 5 to 7 times as long for them as for float32. To widen the operands and round the product costs a
// tenth of the float32 product from 128 tokens on.
#include "product.h"

#include <string>
#include <vector>

namespace pyfacts {
namespace {

constexpr int64_t kReorderFromTokens = 4096;
constexpr int64_t kTransposeFromTokens = 512;
constexpr int64_t kWidenFromTokens = 8;  // fewer do not repay the widening of the weight

bool cpu_has_avx512() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512f");
#else
  return false;
#endif
}

bool has_whole_rows(const Tensor& matrix) { return matrix.stride(1) == 1 && matrix.stride(0) >= matrix.size(1); }

// The weight as oneDNN multiplies it fast; none where aten::linear is faster. A part of a transposed float32 weight
// would fall to oneDNN's reference code, a thousand times slower.
std::optional<Tensor> onednn_weight(const Tensor& weight, int64_t n_tokens) {
  if (!onednn_has(weight.scalar_type()) || weight.size(1) == 0) return std::nullopt;
  if (!has_whole_rows(weight)) {
    if (weight.scalar_type() != ScalarType::Float || n_tokens < kTransposeFromTokens) return std::nullopt;
    return torch::stable::contiguous(weight);
  }
  if (n_tokens < kReorderFromTokens) return weight;
  return call_torch("mkldnn::_reorder_linear_weight", "", weight, std::optional<int64_t>(n_tokens));
}

// With `out` autocast leaves the operands as they are; autograd would refuse, but is above us.
Tensor aten_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const Tensor out = torch::stable::new_empty(x, {x.size(0), weight.size(0)});
  return call_torch("aten::linear", "out", x, weight, bias, out);
}

Tensor widened_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const auto widen = [](const Tensor& narrow) { return torch::stable::to(narrow, ScalarType::Float); };
  const Tensor product = linear(widen(x), widen(weight), bias ? std::optional<Tensor>(widen(*bias)) : std::nullopt);
  return torch::stable::to(product, x.scalar_type());
}

}  // namespace

bool onednn_has(ScalarType type) {
  static const std::optional<bool> bfloat16 = ask_torch("mkldnn::_is_mkldnn_bf16_supported");
  static const std::optional<bool> float16 = ask_torch("mkldnn::_is_mkldnn_fp16_supported");
  if (type == ScalarType::Float) return bfloat16.has_value() && cpu_has_avx512();  // of a torch with oneDNN
  return (type == ScalarType::BFloat16 ? bfloat16 : float16).value_or(false);
}

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const ScalarType type = x.scalar_type();
  if (type != ScalarType::Float && !onednn_has(type) && x.size(0) >= kWidenFromTokens) {
    return widened_linear(x, weight, bias);
  }
  const std::optional<Tensor> prepared = onednn_weight(weight, x.size(0));
  if (!prepared) return aten_linear(x, weight, bias);
  std::optional<Tensor> whole_bias;  // other strides would be ignored
  if (bias) whole_bias = torch::stable::contiguous(*bias);
  return call_torch("mkldnn::_linear_pointwise", "", x, *prepared, whole_bias, std::string("none"),
                    std::vector<int64_t>{}, std::optional<std::string>{});
}

}  // namespace pyfacts
