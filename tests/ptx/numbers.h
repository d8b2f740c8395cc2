// Numbers of 16 bits, and how a register's 64 bits hold any type.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "module.h"

namespace ptx {

inline uint64_t low_bits(uint64_t value, Type type) {
  switch (bytes_of(type)) {
    case 1:
      return type == Type::pred ? value & 1 : value & 0xff;
    case 2:
      return value & 0xffff;
    case 4:
      return value & 0xffffffff;
    default:
      return value;
  }
}

// The integer that these bits are.
inline int64_t extend(uint64_t value, Type type) {
  switch (type) {
    case Type::s8:
      return static_cast<int8_t>(value);
    case Type::s16:
      return static_cast<int16_t>(value);
    case Type::s32:
      return static_cast<int32_t>(value);
    default:
      return static_cast<int64_t>(low_bits(value, type));
  }
}

inline float float_of(uint64_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits)); }
inline uint64_t bits_of(float value) { return std::bit_cast<uint32_t>(value); }
constexpr uint64_t kCanonicalNan = 0x7fffffff;  // of float32 arithmetic

inline bool is_half(Type type) {
  return type == Type::f16 || type == Type::bf16 || type == Type::f16x2 || type == Type::bf16x2;
}
inline bool is_bf16(Type type) { return type == Type::bf16 || type == Type::bf16x2; }
inline bool is_pair(Type type) { return type == Type::f16x2 || type == Type::bf16x2; }

inline float widen(uint16_t bits, bool bf16) {
  if (bf16) return float_of(uint64_t{bits} << 16);
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float sign = bits >> 15 != 0 ? -1.0f : 1.0f;
  if (exponent == 31) return fraction != 0 ? std::numeric_limits<float>::quiet_NaN() : sign * INFINITY;
  const int mantissa = exponent == 0 ? fraction : 1024 + fraction;
  return sign * std::ldexp(static_cast<float>(mantissa), std::max(exponent, 1) - 25);
}

// To nearest even, of what is exact as a double. A NaN becomes the canonical one.
inline uint16_t narrow(double value, bool bf16) {
  if (std::isnan(value)) return 0x7fff;
  const int fraction_bits = bf16 ? 7 : 10, least = bf16 ? -126 : -14, most = bf16 ? 127 : 15;
  const int sign = std::signbit(value) ? 0x8000 : 0, infinity = sign | (bf16 ? 0x7f80 : 0x7c00);
  if (value == 0) return static_cast<uint16_t>(sign);
  if (std::isinf(value)) return static_cast<uint16_t>(infinity);
  int exponent = std::max(std::ilogb(value), least);
  int mantissa = static_cast<int>(std::nearbyint(std::ldexp(std::fabs(value), fraction_bits - exponent)));
  if (mantissa >> (fraction_bits + 1) != 0) mantissa >>= 1, ++exponent;
  if (exponent > most) return static_cast<uint16_t>(infinity);
  const int biased = mantissa >> fraction_bits != 0 ? exponent - least + 1 : 0;
  return static_cast<uint16_t>(sign | biased << fraction_bits | (mantissa & ((1 << fraction_bits) - 1)));
}

// A 16- or 32-bit floating point number as float32.
inline float float_of(uint64_t bits, Type type) {
  return is_half(type) ? widen(static_cast<uint16_t>(bits), is_bf16(type)) : float_of(bits);
}

// The greater (or lesser) one; +0 is greater than -0. If one is NaN, the other, or a NaN if that is asked for.
inline float extreme(float a, float b, bool greater, bool keep_nan) {
  if (std::isnan(a) || std::isnan(b)) {
    if (keep_nan || (std::isnan(a) && std::isnan(b))) return std::numeric_limits<float>::quiet_NaN();
    return std::isnan(a) ? b : a;
  }
  if (a == b) return std::signbit(a) != greater ? a : b;
  return (a > b) == greater ? a : b;
}

}  // namespace ptx
