// The product of a block of tokens and a block of features stays in the cache, and is packed from there; the dense
// result never reaches memory.
//
// Floor: the product, 2 * n_tokens * d_in * n_features operations at the rate of product.h. What is saved beside
// relu(linear) are the dense matrix's writes and reads; and of a float32 product that is sparse, most of itself, as
// bounds in bfloat16 are enough to leave an element out (screen.h): the floor is then that product, at 1.9 times the
// rate on Zen 4.
#include "linear.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/topk.h"
#include "screen.h"

namespace pyfacts {
namespace {

// The thresholds [n_columns * 256] of Keep: zeros, or those given, of which a negative one is as good as zero, since
// the ReLU comes first.
std::vector<uint8_t> make_thresholds(DType dtype, int64_t n_features, const std::optional<Tensor>& threshold) {
  const int64_t item = item_bytes(dtype);
  std::vector<uint8_t> thresholds(n_columns(n_features) * kColumnWidth * item);
  if (!threshold) return thresholds;
  STD_TORCH_CHECK(threshold->dim() == 1 && threshold->size(0) == n_features && dtype_of(*threshold) == dtype,
                  "threshold must be [", n_features, "] of x's dtype");
  const Tensor bits = torch::stable::contiguous(*threshold);
  std::memcpy(thresholds.data(), bits.const_data_ptr(), n_features * item);
  const Predicate nan = make_predicate(dtype, std::numeric_limits<double>::infinity(), false);
  for (int64_t j = 0; j < n_features; ++j) {
    uint8_t* const element = thresholds.data() + j * item;
    uint32_t magnitude = 0;
    std::memcpy(&magnitude, element, item);
    magnitude &= nan.mask;
    STD_TORCH_CHECK(magnitude <= nan.floor, "threshold must not be NaN, and that of feature ", j, " is");
    if ((element[item - 1] & 0x80) != 0) std::memset(element, 0, item);
  }
  return thresholds;
}

// Packs what compute(block) returns for every block.
template <typename Compute>
Planes encode_blocks(const Linear& linear, cpu::Keep keep, Compute compute) {
  const Tensor& like = linear.x();
  const int64_t n_tokens = linear.n_tokens(), n_features = linear.n_features();
  Tensor counts = empty_counts(like, n_tokens, n_features);
  cpu::Encoder encoder(dtype_of(like), n_tokens, n_features, keep, static_cast<uint8_t*>(counts.mutable_data_ptr()));
  for_blocks(n_tokens, n_features, [&](const Block& block) {
    const Tensor computed = compute(block);
    const cpu::Dense dense = dense_of(computed);
    encoder.add(dense, block.first_token, block.first_feature, threads_for(dense));
  });
  return finish(encoder, std::move(counts), like, n_tokens, n_features);
}

// Bounds the block column by column, whose part of the weight stays in the cache, while the screen is on; what is left
// of the block.
template <typename Selection>
Block select_bounded(Screen* screen, Block block, Selection* selection) {
  const cpu::BoundedBlock bounded = screen->bound(block);
  for (int64_t first = 0; block.n_features > 0 && screen->on(); first += kColumnWidth) {
    const int64_t width = std::min(kColumnWidth, block.n_features);
    screen->count_computed(
        selection->add(bounded.part(first, width), block.first_token, block.first_feature, run_on_torch_threads));
    block.first_feature += width;
    block.n_features -= width;
  }
  return block;
}

// Packs what the selection keeps of relu(linear).
template <typename Selection>
Planes encode_selected(const Linear& linear, Selection selection) {
  Screen screen(linear, std::nullopt);
  for_blocks(linear.n_tokens(), linear.n_features(), [&](Block block) {
    if (screen.on()) block = select_bounded(&screen, block, &selection);
    if (block.n_features == 0) return;
    const Tensor computed = linear(block);
    const cpu::Dense dense = dense_of(computed);
    selection.add(dense, block.first_token, block.first_feature, threads_for(dense));
  });
  return pack_rows(selection.finish(), linear.x());
}

}  // namespace

Planes linear_relu_encode(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                          const std::string& activation, const std::optional<Tensor>& threshold) {
  Linear linear(x, weight, bias);
  STD_TORCH_CHECK(activation == "relu" || activation == "relu2" || activation == "jumprelu", "unknown activation ",
                  activation);
  STD_TORCH_CHECK((activation == "jumprelu") == threshold.has_value(), "jumprelu, and it alone, takes a threshold");
  const std::vector<uint8_t> thresholds = make_thresholds(dtype_of(x), linear.n_features(), threshold);
  Screen screen(linear, threshold);
  if (activation == "relu2") {
    return encode_blocks(linear, {}, [&](const Block& block) { return square_(relu_(screen(block))); });
  }
  return encode_blocks(linear, cpu::Keep::above(thresholds.data()), [&](const Block& block) { return screen(block); });
}

Planes gated_relu_encode(const Tensor& x, const Tensor& w_gate, const Tensor& w_up, const std::optional<Tensor>& b_gate,
                         const std::optional<Tensor>& b_up) {
  Linear gate(x, w_gate, b_gate);
  Linear up(x, w_up, b_up);
  STD_TORCH_CHECK(gate.n_features() == up.n_features(), "w_gate and w_up must have one shape");
  return encode_blocks(gate, {}, [&](const Block& block) { return mul_(relu_(gate(block)), up(block)); });
}

Planes linear_topk_encode(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t k,
                          bool over_batch) {
  Linear linear(x, weight, bias);
  const DType dtype = dtype_of(x);
  STD_TORCH_CHECK(1 <= k && k <= linear.n_features(), "k must be 1 to ", linear.n_features(), ", got ", k);
  STD_TORCH_CHECK(linear.n_tokens() <= UINT32_MAX && linear.n_features() <= UINT32_MAX, "x or weight is too large");
  return over_batch ? encode_selected(linear, cpu::BatchTopK(dtype, linear.n_tokens(), linear.n_features(), k))
                    : encode_selected(linear, cpu::TopK(dtype, linear.n_features(), k, cpu::Order::value));
}

}  // namespace pyfacts
