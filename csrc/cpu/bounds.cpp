#include "bounds.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>

#include "../convert.h"
#include "../predicate.h"
#include "dispatch.h"
#include "parallel.h"

namespace pyfacts::cpu {
namespace {

constexpr double kMargin = 1.01;         // on the norms: for their own rounding, and for that of the terms they make
constexpr double kMaxNorm = 1e18;        // of rows whose products stay below float32's infinity
constexpr double kMinNorm = 0x1p-120;    // bfloat16 arithmetic takes subnormals for zeros
constexpr double kUnderflow = 0x1p-100;  // more than a sum loses to products that are subnormal

// What a sum of n products loses at most to rounding, in either of the two computations, as a share of the sum of their
// magnitudes.
double rounding_share(int64_t n) { return (2 * n + 64) * 0x1p-23; }

constexpr uint16_t kNaN = 0x7fc0;  // as bfloat16

// The least bfloat16 that is not below float(x).
uint16_t round_up(double x) {
  if (std::isnan(x)) return kNaN;
  const uint32_t bits = as_bits(static_cast<float>(x));
  return static_cast<uint16_t>((std::signbit(x) ? bits : bits + 0xffff) >> 16);  // of a negative number towards zero
}

uint16_t round_norm(double norm) { return round_up(std::max(kMargin * norm, kMinNorm)); }

// round(row, n, out [bound_width]) for all rows of a matrix.
template <typename Round>
void for_rows(const Dense& x, uint16_t* out, ParallelFor parallel_for, Round round) {
  const int64_t d_in = x.n_features, width = bound_width(d_in);
  parallel(x.n_tokens, parallel_for, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      uint16_t* const factor = out + row * width;
      std::memset(factor + d_in, 0, (width - d_in) * sizeof(uint16_t));
      const RowNorms norms =
          bound_kernels()->round_row(static_cast<const float*>(x.data) + row * x.row_stride, d_in, factor);
      round(row, norms, factor + d_in);
      if (!(norms.whole <= kMaxNorm)) factor[d_in] = kNaN;
    }
  });
}

}  // namespace

void left_factor(const Dense& x, uint16_t* left, ParallelFor parallel_for) {
  const double share = rounding_share(x.n_features);
  for_rows(x, left, parallel_for, [&](int64_t, const RowNorms& norms, uint16_t* last) {
    last[0] = round_norm(norms.rest + share * norms.whole);
    last[1] = round_norm(norms.rounded);
    last[2] = round_up(1.0);
  });
}

void right_factor(const Dense& weight, const float* bias, const float* threshold, uint16_t* right,
                  ParallelFor parallel_for) {
  const double share = rounding_share(weight.n_features);
  for_rows(weight, right, parallel_for, [&](int64_t row, const RowNorms& norms, uint16_t* last) {
    last[0] = round_norm(norms.whole);
    last[1] = round_norm(norms.rest);
    const double b = bias != nullptr ? bias[row] : 0.0;
    const double floor = threshold != nullptr ? threshold[row] : 0.0;
    const double above = b - floor;
    last[2] = round_up(std::isinf(above) ? above : above + share * (std::abs(b) + std::abs(floor)) + kUnderflow);
  });
}

float BoundedBlock::exact(int64_t token, int64_t feature) const {
  const float sum =
      bound_kernels()->dot(static_cast<const float*>(x.data) + token * x.row_stride,
                           static_cast<const float*>(weight.data) + feature * weight.row_stride, x.n_features);
  return bias != nullptr ? sum + bias[feature] : sum;
}

BoundedBlock BoundedBlock::part(int64_t first_feature, int64_t n_features) const {
  BoundedBlock part = *this;
  part.bounds.data = static_cast<const uint16_t*>(bounds.data) + first_feature;
  part.bounds.n_features = n_features;
  part.weight.data = static_cast<const float*>(weight.data) + first_feature * weight.row_stride;
  part.weight.n_tokens = n_features;
  if (bias != nullptr) part.bias = bias + first_feature;
  return part;
}

int64_t find_positive(const Dense& bounds, uint64_t* found, ParallelFor parallel_for) {
  const Predicate nan = make_predicate(DType::bfloat16, INFINITY, false);
  const int64_t columns = n_columns(bounds.n_features);
  std::atomic<int64_t> n_found = 0;
  parallel(bounds.n_tokens, parallel_for, [&](int64_t begin, int64_t end) {
    int64_t n = 0;
    for (int64_t token = begin; token < end; ++token) {
      const uint8_t* const row = static_cast<const uint8_t*>(bounds.data) + token * bounds.row_stride * 2;
      for (int64_t column = 0; column < columns; ++column) {
        uint64_t* const words = found + (token * columns + column) * 4;
        kernels().search16({row + column * kColumnWidth * 2, column_width(bounds.n_features, column), nan, 0, words});
        for (int64_t i = 0; i < 4; ++i) n += std::popcount(words[i]);
      }
    }
    n_found += n;
  });
  return n_found;
}

void compute_found(const BoundedBlock& block, const uint64_t* found, float* out, ParallelFor parallel_for) {
  const int64_t n_features = block.bounds.n_features, columns = n_columns(n_features);
  parallel(block.bounds.n_tokens, parallel_for, [&](int64_t begin, int64_t end) {
    std::memset(out + begin * n_features, 0, (end - begin) * n_features * sizeof(float));
    for (int64_t column = 0; column < columns; ++column) {  // whose rows of the weight stay in the cache
      for (int64_t token = begin; token < end; ++token) {
        for (int64_t i = 0; i < 4; ++i) {
          for (uint64_t left = found[(token * columns + column) * 4 + i]; left != 0; left &= left - 1) {
            const int64_t feature = column * kColumnWidth + 64 * i + std::countr_zero(left);
            out[token * n_features + feature] = block.exact(token, feature);
          }
        }
      }
    }
  });
}

}  // namespace pyfacts::cpu
