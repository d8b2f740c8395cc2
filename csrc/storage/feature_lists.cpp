#include "feature_lists.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "../cpu/segments.h"

namespace pyfacts::storage {
namespace {

// Calls visit(position, token, value) for every stored value of a column, in the order of its tokens.
template <typename Bits, typename Visit>
void each_value(const cpu::Encoding& encoding, int64_t column, Visit visit) {
  for (cpu::ColumnReader segment(encoding, column); segment.token() < encoding.n_tokens; segment.next()) {
    const auto* value = reinterpret_cast<const Bits*>(segment.values());
    const uint8_t* const index = segment.index();
    const int64_t n = segment.count();
    if (has_positions(n, segment.width())) {
      for (int64_t i = 0; i < n; ++i) visit(index[i], segment.token(), *value++);
      continue;
    }
    const Bits* const end = value + n;
    for (int64_t byte = 0; byte < bitmap_bytes(segment.width()); ++byte)
      for (uint32_t bits = index[byte]; bits != 0 && value != end; bits &= bits - 1)
        visit(8 * byte + std::countr_zero(bits), segment.token(), *value++);
  }
}

}  // namespace

Fault FeatureLists::assign(const cpu::Encoding& encoding) {
  const cpu::Status layout = cpu::check_layout(encoding, cpu::run_serially);
  if (!layout.ok()) return from_status(layout);
  n_features_ = encoding.n_features;
  item_ = item_bytes(encoding.dtype);
  tokens_.reset(new uint32_t[encoding.n_values]);
  values_.reset(new uint8_t[encoding.n_values * item_]);
  // Of whole columns: a position that breaks the format stays within them.
  const int64_t n_lists = n_columns(n_features_) * kColumnWidth;
  starts_.reset(new int64_t[n_lists + 1]());
  if (item_ == 4) {
    fill<uint32_t>(encoding, n_lists);
  } else {
    fill<uint16_t>(encoding, n_lists);
  }
  return {};
}

template <typename Bits>
void FeatureLists::fill(const cpu::Encoding& encoding, int64_t n_lists) {
  for (int64_t column = 0; column < n_columns(n_features_); ++column) {
    int64_t* const counts = starts_.get() + column * kColumnWidth + 1;
    each_value<Bits>(encoding, column, [&](int64_t position, int64_t, Bits) { ++counts[position]; });
  }
  for (int64_t list = 0; list < n_lists; ++list) starts_[list + 1] += starts_[list];
  const std::unique_ptr<int64_t[]> next(new int64_t[n_lists]);
  std::copy_n(starts_.get(), n_lists, next.get());
  auto* const values = reinterpret_cast<Bits*>(values_.get());
  for (int64_t column = 0; column < n_columns(n_features_); ++column) {
    int64_t* const next_of = next.get() + column * kColumnWidth;
    each_value<Bits>(encoding, column, [&](int64_t position, int64_t token, Bits value) {
      const int64_t at = next_of[position]++;
      if (at >= encoding.n_values) return;  // a mapped file has changed since
      tokens_[at] = static_cast<uint32_t>(token);
      values[at] = value;
    });
  }
}

}  // namespace pyfacts::storage
