// AVX-512 with VBMI2 (Ice Lake, Zen 4): it compresses and expands lanes of 8 and 16 bits.
#include "avx512_common.h"

namespace pyfacts::cpu {
namespace {

struct Avx512Vbmi2 : Avx512Common {
  static constexpr int64_t kFewest = -1, kFew = -1, kSome = -1;  // pack_both costs the same at every count
  static void flush() {}

  // To registers, then whole stores: to memory vpcompressw is microcoded on Zen 4 (1.5-2 GB/s).
  template <typename T>
  static void pack(const uint8_t* x, const uint64_t* words, uint8_t* values) {
    if constexpr (sizeof(T) == 4) {
      pack32(x, words, values);
      return;
    }
    for (int64_t i = 0; i < 4; ++i) {
      for (int64_t k = 0; k < 2; ++k) {
        const auto m = static_cast<__mmask32>(words[i] >> (32 * k));
        _mm512_storeu_si512(values, _mm512_maskz_compress_epi16(m, _mm512_loadu_si512(x + 128 * i + 64 * k)));
        values += 2 * _mm_popcnt_u32(m);
      }
    }
  }

  template <typename T>
  static void pack_both(const uint8_t* x, const uint64_t* words, int64_t, uint8_t* index, uint8_t* values) {
    alignas(64) static constexpr uint8_t kFirst[64] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                                       16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31,
                                                       32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47,
                                                       48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63};
    __m512i positions = _mm512_load_si512(kFirst);
    for (int64_t i = 0; i < 4; ++i) {
      _mm512_storeu_si512(index, _mm512_maskz_compress_epi8(words[i], positions));
      index += _mm_popcnt_u64(words[i]);
      positions = _mm512_add_epi8(positions, _mm512_set1_epi8(64));
    }
    pack<T>(x, words, values);
  }

  template <typename T>
  static void unpack(const uint8_t* values, const uint64_t* words, uint8_t* out) {
    if constexpr (sizeof(T) == 4) {
      unpack32(values, words, out);
      return;
    }
    for (int64_t i = 0; i < 4; ++i) {
      for (int64_t k = 0; k < 2; ++k) {
        const auto m = static_cast<__mmask32>(words[i] >> (32 * k));
        _mm512_storeu_si512(out + 128 * i + 64 * k, _mm512_maskz_expand_epi16(m, _mm512_loadu_si512(values)));
        values += 2 * _mm_popcnt_u32(m);
      }
    }
  }
};

}  // namespace

const Kernels kKernelsAvx512Vbmi2 = make_kernels<Avx512Vbmi2>("avx512vbmi2");

}  // namespace pyfacts::cpu
