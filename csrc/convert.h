// float32 from the dtypes' bits, exactly, and back, to the nearest, ties to even; a NaN stays one. In integers and
// normal numbers, so that every compiler, device and mode (flushed subnormals) gives the same bits. For CPU and CUDA
// alike.
#pragma once

#include <cstdint>

#include "format.h"

namespace pyfacts {

constexpr float as_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }
constexpr uint32_t as_bits(float x) { return __builtin_bit_cast(uint32_t, x); }

template <DType dtype>
struct Convert;

template <>
struct Convert<DType::float32> {
  using Bits = uint32_t;
  static constexpr float widen(uint32_t bits) { return as_float(bits); }
  static constexpr uint32_t narrow(float x) { return as_bits(x); }
};

template <>
struct Convert<DType::bfloat16> {
  using Bits = uint16_t;
  static constexpr float widen(uint16_t bits) { return as_float(uint32_t{bits} << 16); }
  static constexpr uint16_t narrow(float x) {
    const uint32_t bits = as_bits(x);
    const uint32_t rounded = x != x ? bits | 0x400000 : bits + 0x7fff + ((bits >> 16) & 1);
    return static_cast<uint16_t>(rounded >> 16);
  }
};

template <>
struct Convert<DType::float16> {
  using Bits = uint16_t;
  static constexpr float widen(uint16_t bits) {
    const uint32_t sign = (bits & 0x8000u) << 16;
    const uint32_t magnitude = bits & 0x7fffu;
    if (magnitude < 0x0400) return as_float(sign | as_bits(static_cast<float>(magnitude) * 0x1p-24f));  // subnormal
    if (magnitude > 0x7c00) return as_float(sign | magnitude << 13 | 0x7fc00000);                       // NaN
    if (magnitude == 0x7c00) return as_float(sign | 0x7f800000);
    return as_float(sign | ((magnitude << 13) + (112u << 23)));
  }
  static constexpr uint16_t narrow(float x) {
    const uint32_t sign = (as_bits(x) >> 16) & 0x8000;
    const uint32_t magnitude = as_bits(x) & 0x7fffffff;
    uint32_t bits = 0;
    if (magnitude > 0x7f800000) {
      bits = 0x7e00 | ((magnitude >> 13) & 0x3ff);  // NaN
    } else if (magnitude >= 0x47800000) {
      bits = 0x7c00;  // 65536 and more
    } else if (magnitude < 0x38800000) {
      bits = as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f);  // subnormal: the addition rounds to 2^-24
    } else {
      bits = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    }
    return static_cast<uint16_t>(sign | bits);
  }
};

}  // namespace pyfacts
