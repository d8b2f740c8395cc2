// AVX-512 on CPUs that multiply bfloat16: Zen 4, Cooper Lake, Sapphire Rapids and later.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns of its own intrinsics (GCC bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include <cmath>

#include "kernels.h"

namespace pyfacts::cpu {
namespace {

constexpr int64_t kLanes = 16;

__mmask16 lanes_left(int64_t n) { return static_cast<__mmask16>(n < kLanes ? (1u << n) - 1 : 0xffff); }

// A sum of squares, in double: those of float32 neither overflow there nor underflow.
class SquareSum {
 public:
  void add(__m512 x) {
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(x));
    const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
    low_ = _mm512_fmadd_pd(low, low, low_);
    high_ = _mm512_fmadd_pd(high, high, high_);
  }
  double root() const { return std::sqrt(_mm512_reduce_add_pd(_mm512_add_pd(low_, high_))); }

 private:
  __m512d low_ = _mm512_setzero_pd();
  __m512d high_ = _mm512_setzero_pd();
};

RowNorms round_row(const float* row, int64_t n, uint16_t* rounded) {
  SquareSum whole_sum, rounded_sum, rest_sum;
  for (int64_t i = 0; i < n; i += kLanes) {
    const __mmask16 left = lanes_left(n - i);
    const __m512 x = _mm512_maskz_loadu_ps(left, row + i);
    const auto bits = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
    _mm256_mask_storeu_epi16(rounded + i, left, bits);
    const __m512 near = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    whole_sum.add(x);
    rounded_sum.add(near);
    rest_sum.add(_mm512_sub_ps(x, near));  // exact
  }
  return {whole_sum.root(), rounded_sum.root(), rest_sum.root()};
}

// Bound by the loads: several rows at once, which share those of x, are no faster.
float dot(const float* x, const float* row, int64_t n) {
  __m512 sums[4] = {};  // so that no addition waits for the one before
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    for (int64_t k = 0; k < 4; ++k) {
      const int64_t at = i + k * kLanes;
      sums[k] = _mm512_fmadd_ps(_mm512_loadu_ps(x + at), _mm512_loadu_ps(row + at), sums[k]);
    }
  }
  for (; i < n; i += kLanes) {
    const __mmask16 left = lanes_left(n - i);
    sums[0] = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(left, x + i), _mm512_maskz_loadu_ps(left, row + i), sums[0]);
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
}

}  // namespace

const BoundKernels kBoundKernelsAvx512Bf16 = {round_row, dot};

}  // namespace pyfacts::cpu
