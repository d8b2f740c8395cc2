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
  static void move_line(const uint8_t* from, uint8_t* to) { _mm512_store_si512(to, _mm512_loadu_si512(from)); }
  static void stream_line(const uint8_t* from, uint8_t* to) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
  }
  static void end_streaming() { _mm_sfence(); }

  template <typename T, bool plain>
  static uint64_t stored(__m512i x, const Predicate& p) {
    if constexpr (sizeof(T) == 2) {
      const __m512i mask = _mm512_set1_epi16(static_cast<int16_t>(p.mask));
      if constexpr (plain) return _mm512_test_epi16_mask(x, mask);
      return _mm512_cmpgt_epu16_mask(_mm512_and_si512(x, mask), _mm512_set1_epi16(static_cast<int16_t>(p.floor))) |
             _mm512_cmpeq_epi16_mask(x, _mm512_set1_epi16(static_cast<int16_t>(p.also)));
    } else {
      const __m512i mask = _mm512_set1_epi32(static_cast<int32_t>(p.mask));
      if constexpr (plain) return _mm512_test_epi32_mask(x, mask);
      return _mm512_cmpgt_epu32_mask(_mm512_and_si512(x, mask), _mm512_set1_epi32(static_cast<int32_t>(p.floor))) |
             _mm512_cmpeq_epi32_mask(x, _mm512_set1_epi32(static_cast<int32_t>(p.also)));
    }
  }

  template <typename T, bool plain>
  static void make_bitmap(const uint8_t* x, const Predicate& p, uint64_t* words) {
    constexpr int64_t kLanes = 64 / sizeof(T);
    for (int64_t i = 0; i < 4; ++i) {
      words[i] = 0;
      for (int64_t lane = 0; lane < 64; lane += kLanes) {
        const int64_t at = (64 * i + lane) * sizeof(T);
        words[i] |= stored<T, plain>(_mm512_loadu_si512(x + at), p) << lane;
      }
    }
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
};

}  // namespace
}  // namespace pyfacts::cpu
