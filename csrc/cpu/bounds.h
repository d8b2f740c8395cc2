// Upper bounds of a float32 product, from a bfloat16 product, which CPUs multiply two to sixteen times as fast. What is
// bounded by its threshold is not stored, whatever it is exactly; the few others are computed in float32.
//
// With x' and w' for x and w rounded to bfloat16, and |v| for a norm,
//
//     x.w = x'.w' + (x - x').w + x'.(w - w')  <=  x'.w' + |x - x'| |w| + |x'| |w - w'|,
//
// of which the right is one product again, of rows that are three elements longer:
//
//     [x', |x - x'|, |x'|, 1] . [w', |w|, |w - w'|, bias - threshold]
//
// The norms are rounded up, and hold besides what the sums lose to rounding and to underflow. On normal x and w of
// 768 elements a bound is 0.1 standard deviations above what it bounds.
#pragma once

#include "encoding.h"
#include "kernels.h"

namespace pyfacts::cpu {

// nullptr where bfloat16 is not multiplied by the CPU itself, or PYFACTS_ISA names an instruction set before AVX-512.
const BoundKernels* bound_kernels();

// Elements of a factor's row.
constexpr int64_t bound_width(int64_t d_in) { return (d_in + 3 + 7) / 8 * 8; }

// The longest rows whose rounding errors are small beside the norms.
constexpr int64_t kMaxBoundedWidth = 1 << 15;

// left [n_tokens, bound_width] and right [n_features, bound_width], of which the product, by any order of summation in
// float32 and any rounding to bfloat16, is at least x @ weight.T + bias - threshold; or it is NaN, which says nothing.
// x and weight: float32, at most kMaxBoundedWidth wide. bias, threshold: nullptr for zeros.
void left_factor(const Dense& x, uint16_t* left, ParallelFor parallel_for);
void right_factor(const Dense& weight, const float* bias, const float* threshold, uint16_t* right,
                  ParallelFor parallel_for);

// A block of x @ weight.T + bias that is bounded, and computed where it is asked for.
struct BoundedBlock {
  Dense bounds;  // bfloat16 [n_tokens, n_features]
  Dense x;       // float32 [n_tokens, d_in]
  Dense weight;  // float32 [n_features, d_in]
  const float* bias;

  float exact(int64_t token, int64_t feature) const;
  BoundedBlock part(int64_t first_feature, int64_t n_features) const;
};

// The bounds that are positive or NaN, as bits found [n_tokens, n_columns, 4]; their number.
int64_t find_positive(const Dense& bounds, uint64_t* found, ParallelFor parallel_for);

// The block where it was found, and zeros elsewhere: out [n_tokens, n_features].
void compute_found(const BoundedBlock& block, const uint64_t* found, float* out, ParallelFor parallel_for);

}  // namespace pyfacts::cpu
