// Which values are stored, as a test on their raw bits. For CPU and CUDA alike.
#pragma once

#include <cmath>
#include <cstdint>

#include "format.h"

namespace pyfacts {

// The largest number of the dtype that is <= x, as bits: for x >= 0, |v| > x is then the same as bits(|v|) > these.
inline uint32_t floor_bits(double x, int exponent_bits, int mantissa_bits) {
  const uint32_t infinity = ((1u << exponent_bits) - 1) << mantissa_bits;
  if (std::isinf(x)) return infinity;
  const int bias = (1 << (exponent_bits - 1)) - 1;
  int exponent = x > 0 ? std::ilogb(x) : -bias;
  if (exponent > bias) return infinity - 1;
  if (exponent < 1 - bias) exponent = 1 - bias;  // subnormals share the smallest normal exponent
  // In units of the last place: exact, as a power of two scales a double.
  const uint32_t units = static_cast<uint32_t>(std::floor(std::ldexp(x, mantissa_bits - exponent)));
  return (static_cast<uint32_t>(exponent + bias - 1) << mantissa_bits) + units;
}

// min_abs >= 0. A NaN has the largest magnitudes and so is always stored; -0.0 is, with signed_zero.
inline Predicate make_predicate(DType dtype, double min_abs, bool signed_zero) {
  const uint32_t sign = dtype == DType::float32 ? 0x80000000u : 0x8000u;
  const uint32_t magnitude = sign - 1;
  const uint32_t floor = dtype == DType::float32    ? floor_bits(min_abs, 8, 23)
                         : dtype == DType::bfloat16 ? floor_bits(min_abs, 8, 7)
                                                    : floor_bits(min_abs, 5, 10);
  const uint32_t always_stored = sign | magnitude;  // a NaN
  if (floor == 0) return {signed_zero ? sign | magnitude : magnitude, 0, always_stored, true};
  return {magnitude, floor, signed_zero ? sign : always_stored, false};
}

}  // namespace pyfacts
