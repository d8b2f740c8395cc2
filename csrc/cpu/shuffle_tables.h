// Eight 16-bit elements at a time without VBMI2: a byte of the bitmap looks up the pshufb control that moves them.
// Two tables of 4 KiB; in an anonymous namespace like everything that files with -m flags include.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace pyfacts::cpu {
namespace {

struct Shuffles {
  alignas(64) uint8_t pack[256][16];    // element k <- the k-th element whose bit is set
  alignas(64) uint8_t unpack[256][16];  // the reverse; 0x80 makes a zero
  constexpr Shuffles() : pack(), unpack() {
    for (int byte = 0; byte < 256; ++byte) {
      int n = 0;
      for (int bit = 0; bit < 8; ++bit) {
        const bool set = ((byte >> bit) & 1) != 0;
        for (int half = 0; half < 2; ++half) {
          unpack[byte][2 * bit + half] = static_cast<uint8_t>(set ? 2 * n + half : 0x80);
          if (set) pack[byte][2 * n + half] = static_cast<uint8_t>(2 * bit + half);
        }
        n += set ? 1 : 0;
      }
    }
  }
};
constexpr Shuffles kShuffles;

inline __m128i load128(const uint8_t* bytes) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)); }

inline void pack_by_shuffles(const uint8_t* x, const uint64_t* words, uint8_t* values) {
  for (int64_t i = 0; i < 4; ++i) {
    for (int64_t k = 0; k < 8; ++k) {
      const auto byte = static_cast<uint8_t>(words[i] >> (8 * k));
      const __m128i packed = _mm_shuffle_epi8(load128(x + 128 * i + 16 * k), load128(kShuffles.pack[byte]));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(values), packed);
      values += 2 * _mm_popcnt_u32(byte);
    }
  }
}

inline void unpack_by_shuffles(const uint8_t* values, const uint64_t* words, uint8_t* out) {
  for (int64_t i = 0; i < 4; ++i) {
    for (int64_t k = 0; k < 8; ++k) {
      const auto byte = static_cast<uint8_t>(words[i] >> (8 * k));
      const __m128i unpacked = _mm_shuffle_epi8(load128(values), load128(kShuffles.unpack[byte]));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 128 * i + 16 * k), unpacked);
      values += 2 * _mm_popcnt_u32(byte);
    }
  }
}

}  // namespace
}  // namespace pyfacts::cpu
