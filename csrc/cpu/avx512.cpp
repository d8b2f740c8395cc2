// AVX-512 without VBMI2 (Skylake-X, Cascade Lake): it compresses lanes of 32 bits only.
//
// A bf16 segment takes 70-100 cycles to pack below 50 % density, against 142 to read it from memory. Loading the lanes
// right after their stores cost 7 % at 10 % density, hence Pending.
#include "avx512_common.h"
#include "shuffle_tables.h"

namespace pyfacts::cpu {
namespace {

struct Avx512 : Avx512Common {
  static constexpr int64_t kFewest = -1, kFew = 12, kSome = kFew;
  template <typename T>
  static void pack(const uint8_t* x, const uint64_t* words, uint8_t* values) {
    if constexpr (sizeof(T) == 4) {
      pack32(x, words, values);
    } else {
      pack_by_shuffles(x, words, values);
    }
  }

  // 16-bit values travel with their positions, position << 16 | value, so that one vpcompressd moves both. Taking them
  // apart again is put off by a segment: loads right behind the overlapping stores would stall on them.
  template <typename T>
  void pack_both(const uint8_t* x, const uint64_t* words, int64_t n, uint8_t* index, uint8_t* values) {
    if constexpr (sizeof(T) == 4) {
      pack_positions(words, index);
      pack32(x, words, values);
      return;
    }
    const Pending previous = pending_;
    pending_ = {previous.lanes == lanes_[0] ? lanes_[1] : lanes_[0], n, index, values};
    uint32_t* end = pending_.lanes;
    __m512i positions = _mm512_slli_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), 16);
    for (int64_t i = 0; i < 4; ++i) {
      for (int64_t k = 0; k < 4; ++k) {
        const auto m = static_cast<__mmask16>(words[i] >> (16 * k));
        const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 128 * i + 32 * k));
        const __m512i lanes = _mm512_or_si512(_mm512_cvtepu16_epi32(half), positions);
        _mm512_storeu_si512(end, _mm512_maskz_compress_epi32(m, lanes));
        end += _mm_popcnt_u32(m);
        positions = _mm512_add_epi32(positions, _mm512_set1_epi32(16 << 16));
      }
    }
    split(previous);
  }

  void flush() { split(pending_); }

  template <typename T>
  static void unpack(const uint8_t* values, const uint64_t* words, uint8_t* out) {
    if constexpr (sizeof(T) == 4) {
      unpack32(values, words, out);
    } else {
      unpack_by_shuffles(values, words, out);
    }
  }

 private:
  struct Pending {
    uint32_t* lanes;
    int64_t n;
    uint8_t* index;
    uint8_t* values;
  };

  // Writes exactly n: later segments of the column may already lie behind.
  static void split(const Pending& p) {
    for (int64_t i = 0; i < p.n; i += 16) {
      const __m512i lanes = _mm512_load_si512(p.lanes + i);
      const auto left = static_cast<__mmask16>(_bzhi_u32(~0u, static_cast<uint32_t>(p.n - i)));
      _mm256_mask_storeu_epi16(p.values + 2 * i, left, _mm512_cvtepi32_epi16(lanes));
      _mm_mask_storeu_epi8(p.index + i, left, _mm512_cvtepi32_epi8(_mm512_srli_epi32(lanes, 16)));
    }
  }

  alignas(64) uint32_t lanes_[2][kColumnWidth / 8 + 16];
  Pending pending_ = {lanes_[0], 0, nullptr, nullptr};
};

}  // namespace

const Kernels kKernelsAvx512 = make_kernels<Avx512>("avx512");

}  // namespace pyfacts::cpu
