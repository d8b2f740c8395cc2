// The steps that both AVX-512 variants take: all but the moving of 16-bit elements and of positions.
#pragma once

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns of its own intrinsics (GCC bug 105593)
#endif
#include "vector_tile.h"

namespace pyfacts::cpu {
namespace {

struct Avx512Common {
  static void clear(uint8_t* out, int64_t n_bytes) {
    for (int64_t i = 0; i < n_bytes; i += 64) _mm512_storeu_si512(out + i, _mm512_setzero_si512());
  }
  static void stream_line(const uint8_t* from, uint8_t* to) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
  }
  static void end_streaming() { _mm_sfence(); }

  // As integers, non-negative elements are ordered like the numbers that they are, and negative ones are below them.
  template <typename T, Rule rule>
  static uint64_t above(__m512i x, const uint8_t* thresholds) {
    T floor;
    std::memcpy(&floor, thresholds, sizeof(T));
    if constexpr (sizeof(T) == 2) {
      const __m512i floors = _mm512_set1_epi16(static_cast<int16_t>(floor));
      return _mm512_cmpgt_epi16_mask(x, rule == Rule::floor ? floors : _mm512_loadu_si512(thresholds));
    } else {
      const __m512i floors = _mm512_set1_epi32(static_cast<int32_t>(floor));
      return _mm512_cmpgt_epi32_mask(x, rule == Rule::floor ? floors : _mm512_loadu_si512(thresholds));
    }
  }

  template <typename T, Rule rule>
  static uint64_t stored(__m512i x, const Predicate& p, const uint8_t* thresholds) {
    if constexpr (rule == Rule::threshold || rule == Rule::floor) {
      return above<T, rule>(x, thresholds) | stored<T, Rule::predicate>(x, p, nullptr);
    }
    if constexpr (sizeof(T) == 2) {
      const __m512i mask = _mm512_set1_epi16(static_cast<int16_t>(p.mask));
      if constexpr (rule == Rule::nonzero) return _mm512_test_epi16_mask(x, mask);
      return _mm512_cmpgt_epu16_mask(_mm512_and_si512(x, mask), _mm512_set1_epi16(static_cast<int16_t>(p.floor))) |
             _mm512_cmpeq_epi16_mask(x, _mm512_set1_epi16(static_cast<int16_t>(p.also)));
    } else {
      const __m512i mask = _mm512_set1_epi32(static_cast<int32_t>(p.mask));
      if constexpr (rule == Rule::nonzero) return _mm512_test_epi32_mask(x, mask);
      return _mm512_cmpgt_epu32_mask(_mm512_and_si512(x, mask), _mm512_set1_epi32(static_cast<int32_t>(p.floor))) |
             _mm512_cmpeq_epi32_mask(x, _mm512_set1_epi32(static_cast<int32_t>(p.also)));
    }
  }

  static constexpr bool kSpread = false;

  template <typename T, Rule rule>
  static uint64_t bitmap_word(const uint8_t* x, const Predicate& p, const uint8_t* thresholds) {
    uint64_t word = 0;
    for (int64_t lane = 0; lane < 64; lane += 64 / sizeof(T)) {
      const int64_t at = lane * sizeof(T);
      word |= stored<T, rule>(_mm512_loadu_si512(x + at), p, advance<rule>(thresholds, at)) << lane;
    }
    return word;
  }

  // vpcompressd to a register, then a whole store: to memory it is microcoded on Zen 4.
  static void pack32(const uint8_t* x, const uint64_t* words, uint8_t* values) {
    for (int64_t i = 0; i < 4; ++i) {
      for (int64_t k = 0; k < 4; ++k) {
        const auto m = static_cast<__mmask16>(words[i] >> (16 * k));
        _mm512_storeu_si512(values, _mm512_maskz_compress_epi32(m, _mm512_loadu_si512(x + 256 * i + 64 * k)));
        values += 4 * _mm_popcnt_u32(m);
      }
    }
  }

  static void unpack32(const uint8_t* values, const uint64_t* words, uint8_t* out) {
    for (int64_t i = 0; i < 4; ++i) {
      for (int64_t k = 0; k < 4; ++k) {
        const auto m = static_cast<__mmask16>(words[i] >> (16 * k));
        _mm512_storeu_si512(out + 256 * i + 64 * k, _mm512_maskz_expand_epi32(m, _mm512_loadu_si512(values)));
        values += 4 * _mm_popcnt_u32(m);
      }
    }
  }

  template <typename T>
  static bool any_zero(const uint8_t* values, int64_t n, uint32_t zero_mask) {
    constexpr int64_t kLanes = 64 / sizeof(T);
    uint32_t zeros = 0;
    for (int64_t i = 0; i < n; i += kLanes) {
      const __m512i v = _mm512_loadu_si512(values + i * sizeof(T));
      const uint32_t lanes = _bzhi_u32(~0u, n - i < kLanes ? static_cast<uint32_t>(n - i) : 32);
      if constexpr (sizeof(T) == 2) {
        zeros |= _mm512_testn_epi16_mask(v, _mm512_set1_epi16(static_cast<int16_t>(zero_mask))) & lanes;
      } else {
        zeros |= _mm512_testn_epi32_mask(v, _mm512_set1_epi32(static_cast<int32_t>(zero_mask))) & lanes;
      }
    }
    return zeros != 0;
  }

  static bool ascending(const uint8_t* index, int64_t n) {
    const __m256i here = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index));
    const __m256i next = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index + 1));
    return (_mm256_cmple_epu8_mask(next, here) & _bzhi_u32(~0u, static_cast<uint32_t>(n - 1))) == 0;
  }

  using Floats = __m512;
  static constexpr int64_t kLanes = 16;
  static Floats load_floats(const float* from) { return _mm512_loadu_ps(from); }
  static void store_floats(float* to, Floats x) { _mm512_storeu_ps(to, x); }
  static Floats repeat(float x) { return _mm512_set1_ps(x); }
  static Floats multiply(Floats x, Floats y) { return _mm512_mul_ps(x, y); }
  static Floats add(Floats x, Floats y) { return _mm512_add_ps(x, y); }

  static void list_positions(const uint8_t* index, uint32_t first, uint32_t* inner) {
    const __m512i positions = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(index)));
    _mm512_storeu_si512(inner, _mm512_add_epi32(positions, _mm512_set1_epi32(static_cast<int32_t>(first))));
  }

  template <DType dtype>
  static Floats widen(const uint8_t* from) {
    if constexpr (dtype == DType::float32) {
      return _mm512_castsi512_ps(_mm512_loadu_si512(from));
    } else {
      const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
      if constexpr (dtype == DType::float16) return _mm512_cvtph_ps(halves);
      return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
    }
  }

  template <DType dtype>
  static void narrow(Floats x, uint8_t* to) {
    const __m512i bits = _mm512_castps_si512(x);
    if constexpr (dtype == DType::float32) {
      _mm512_storeu_si512(to, bits);
    } else if constexpr (dtype == DType::float16) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
    } else {
      const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
      const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
      const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
      const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
      const __m512i high = _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(high));
    }
  }
};

}  // namespace
}  // namespace pyfacts::cpu
