// AVX2 with BMI2 (Haswell, Zen 1 and later): it has no compress, so that bytes of the bitmap look up shuffles.
#include "shuffle_tables.h"
#include "vector_tile.h"

namespace pyfacts::cpu {
namespace {

// For each byte, the lane of 8 from which each lane with its bit set comes when they are unpacked; -128 without.
struct Ranks {
  alignas(64) int8_t of[256][8];
  constexpr Ranks() : of() {
    for (int byte = 0; byte < 256; ++byte) {
      int n = 0;
      for (int bit = 0; bit < 8; ++bit) {
        of[byte][bit] = static_cast<int8_t>(((byte >> bit) & 1) != 0 ? n++ : -128);
      }
    }
  }
};
constexpr Ranks kRanks;

__m256i load256(const uint8_t* bytes) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)); }
void store256(uint8_t* bytes, __m256i x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(bytes), x); }

struct Avx2 {
  static constexpr int64_t kFewest = 4, kFew = 12, kSome = kMaxPositions;
  static constexpr bool kSpread = true;
  static void flush() {}

  static void clear(uint8_t* out, int64_t n_bytes) {
    for (int64_t i = 0; i < n_bytes; i += 32) store256(out + i, _mm256_setzero_si256());
  }
  static void stream_line(const uint8_t* from, uint8_t* to) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), load256(from));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + 32), load256(from + 32));
  }
  static void end_streaming() { _mm_sfence(); }

  template <typename T, Rule rule>
  static __m256i above(__m256i x, const uint8_t* thresholds) {
    T floor;
    std::memcpy(&floor, thresholds, sizeof(T));
    if constexpr (sizeof(T) == 2) {
      const __m256i floors = _mm256_set1_epi16(static_cast<int16_t>(floor));
      return _mm256_cmpgt_epi16(x, rule == Rule::floor ? floors : load256(thresholds));
    } else {
      const __m256i floors = _mm256_set1_epi32(static_cast<int32_t>(floor));
      return _mm256_cmpgt_epi32(x, rule == Rule::floor ? floors : load256(thresholds));
    }
  }

  // Lanes of all ones where x is not stored. Magnitudes are below the sign bit: signed compares order them.
  template <typename T, Rule rule>
  static __m256i not_stored(__m256i x, const Predicate& p, const uint8_t* thresholds) {
    constexpr bool plain = rule == Rule::nonzero;
    if constexpr (rule == Rule::threshold || rule == Rule::floor) {
      return _mm256_andnot_si256(above<T, rule>(x, thresholds), not_stored<T, Rule::predicate>(x, p, nullptr));
    }
    if constexpr (sizeof(T) == 2) {
      const __m256i masked = _mm256_and_si256(x, _mm256_set1_epi16(static_cast<int16_t>(p.mask)));
      if constexpr (plain) return _mm256_cmpeq_epi16(masked, _mm256_setzero_si256());
      const __m256i stored =
          _mm256_or_si256(_mm256_cmpgt_epi16(masked, _mm256_set1_epi16(static_cast<int16_t>(p.floor))),
                          _mm256_cmpeq_epi16(x, _mm256_set1_epi16(static_cast<int16_t>(p.also))));
      return _mm256_xor_si256(stored, _mm256_set1_epi8(-1));
    } else {
      const __m256i masked = _mm256_and_si256(x, _mm256_set1_epi32(static_cast<int32_t>(p.mask)));
      if constexpr (plain) return _mm256_cmpeq_epi32(masked, _mm256_setzero_si256());
      const __m256i stored =
          _mm256_or_si256(_mm256_cmpgt_epi32(masked, _mm256_set1_epi32(static_cast<int32_t>(p.floor))),
                          _mm256_cmpeq_epi32(x, _mm256_set1_epi32(static_cast<int32_t>(p.also))));
      return _mm256_xor_si256(stored, _mm256_set1_epi8(-1));
    }
  }

  // 32 bits of the bitmap: lanes are narrowed to bytes, whose signs movemask gathers.
  template <typename T, Rule rule>
  static uint32_t bitmap32(const uint8_t* x, const Predicate& p, const uint8_t* thresholds) {
    if constexpr (sizeof(T) == 2) {
      const __m256i bytes = _mm256_packs_epi16(not_stored<T, rule>(load256(x), p, thresholds),
                                               not_stored<T, rule>(load256(x + 32), p, advance<rule>(thresholds, 32)));
      return ~static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_permute4x64_epi64(bytes, 0b11011000)));
    } else {
      uint32_t bits = 0;
      for (int64_t k = 0; k < 4; ++k) {
        const __m256 lanes =
            _mm256_castsi256_ps(not_stored<T, rule>(load256(x + 32 * k), p, advance<rule>(thresholds, 32 * k)));
        bits |= static_cast<uint32_t>(_mm256_movemask_ps(lanes)) << (8 * k);
      }
      return ~bits;
    }
  }

  template <typename T, Rule rule>
  static uint64_t bitmap_word(const uint8_t* x, const Predicate& p, const uint8_t* thresholds) {
    constexpr int64_t kHalf = 32 * sizeof(T);
    return bitmap32<T, rule>(x, p, thresholds) |
           uint64_t{bitmap32<T, rule>(x + kHalf, p, advance<rule>(thresholds, kHalf))} << 32;
  }

  template <typename T>
  static void pack(const uint8_t* x, const uint64_t* words, uint8_t* values) {
    if constexpr (sizeof(T) == 2) {
      pack_by_shuffles(x, words, values);
      return;
    }
    for (int64_t i = 0; i < 4; ++i) {
      for (int64_t k = 0; k < 8; ++k) {
        const auto byte = static_cast<uint8_t>(words[i] >> (8 * k));
        const __m256i from = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(kBitPositions.of[byte])));
        store256(values, _mm256_permutevar8x32_epi32(load256(x + 256 * i + 32 * k), from));
        values += 4 * _mm_popcnt_u32(byte);
      }
    }
  }

  template <typename T>
  static void unpack(const uint8_t* values, const uint64_t* words, uint8_t* out) {
    if constexpr (sizeof(T) == 2) {
      unpack_by_shuffles(values, words, out);
      return;
    }
    for (int64_t i = 0; i < 4; ++i) {
      for (int64_t k = 0; k < 8; ++k) {
        const auto byte = static_cast<uint8_t>(words[i] >> (8 * k));
        const __m256i from = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kRanks.of[byte])));
        const __m256i moved = _mm256_permutevar8x32_epi32(load256(values), from);
        store256(out + 256 * i + 32 * k, _mm256_andnot_si256(_mm256_srai_epi32(from, 31), moved));
        values += 4 * _mm_popcnt_u32(byte);
      }
    }
  }

  template <typename T>
  static bool any_zero(const uint8_t* values, int64_t n, uint32_t zero_mask) {
    constexpr int64_t kLanes = 32 / sizeof(T);
    uint32_t zeros = 0;
    for (int64_t i = 0; i < n; i += kLanes) {
      const auto n_bytes = static_cast<uint32_t>(n - i < kLanes ? (n - i) * sizeof(T) : 32);
      const __m256i v = load256(values + i * sizeof(T));
      __m256i zero;
      if constexpr (sizeof(T) == 2) {
        zero = _mm256_cmpeq_epi16(_mm256_and_si256(v, _mm256_set1_epi16(static_cast<int16_t>(zero_mask))),
                                  _mm256_setzero_si256());
      } else {
        zero = _mm256_cmpeq_epi32(_mm256_and_si256(v, _mm256_set1_epi32(static_cast<int32_t>(zero_mask))),
                                  _mm256_setzero_si256());
      }
      zeros |= static_cast<uint32_t>(_mm256_movemask_epi8(zero)) & _bzhi_u32(~0u, n_bytes);
    }
    return zeros != 0;
  }

  static bool ascending(const uint8_t* index, int64_t n) {
    const __m256i here = load256(index);
    const __m256i not_above = _mm256_cmpeq_epi8(_mm256_max_epu8(here, load256(index + 1)), here);
    return (static_cast<uint32_t>(_mm256_movemask_epi8(not_above)) & _bzhi_u32(~0u, static_cast<uint32_t>(n - 1))) == 0;
  }

  using Floats = __m256;
  static constexpr int64_t kLanes = 8;
  static Floats load_floats(const float* from) { return _mm256_loadu_ps(from); }
  static void store_floats(float* to, Floats x) { _mm256_storeu_ps(to, x); }
  static Floats repeat(float x) { return _mm256_set1_ps(x); }
  static Floats multiply(Floats x, Floats y) { return _mm256_mul_ps(x, y); }
  static Floats add(Floats x, Floats y) { return _mm256_add_ps(x, y); }

  static void list_positions(const uint8_t* index, uint32_t first, uint32_t* inner) {
    const __m256i positions = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(index)));
    store256(reinterpret_cast<uint8_t*>(inner),
             _mm256_add_epi32(positions, _mm256_set1_epi32(static_cast<int32_t>(first))));
  }

  template <DType dtype>
  static Floats widen(const uint8_t* from) {
    if constexpr (dtype == DType::float32) {
      return _mm256_castsi256_ps(load256(from));
    } else {
      const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
      if constexpr (dtype == DType::float16) return _mm256_cvtph_ps(halves);
      return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
    }
  }

  template <DType dtype>
  static void narrow(Floats x, uint8_t* to) {
    const __m256i bits = _mm256_castps_si256(x);
    if constexpr (dtype == DType::float32) {
      store256(to, bits);
    } else if constexpr (dtype == DType::float16) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
    } else {
      const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
      const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
      const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
      const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
      const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
      const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0b11011000);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(packed));
    }
  }
};

}  // namespace

const Kernels kKernelsAvx2 = make_kernels<Avx2>("avx2");

}  // namespace pyfacts::cpu
