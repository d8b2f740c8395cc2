// The VBMI2 intrinsics that csrc/cpu/avx512vbmi2.cpp uses, in software, so that any AVX-512 machine can test that file:
// compile it with `-include vbmi2_emulation.h` and without the VBMI flags.
#pragma once

#include <immintrin.h>

namespace {

template <typename T, typename Mask>
__m512i emulated_compress(Mask mask, __m512i x) {
  alignas(64) T from[64 / sizeof(T)];
  alignas(64) T to[64 / sizeof(T)] = {};
  _mm512_store_si512(from, x);
  int n = 0;
  for (unsigned lane = 0; lane < 64 / sizeof(T); ++lane) {
    if ((mask >> lane) & 1) to[n++] = from[lane];
  }
  return _mm512_load_si512(to);
}

template <typename T, typename Mask>
__m512i emulated_expand(Mask mask, __m512i x) {
  alignas(64) T from[64 / sizeof(T)];
  alignas(64) T to[64 / sizeof(T)] = {};
  _mm512_store_si512(from, x);
  int n = 0;
  for (unsigned lane = 0; lane < 64 / sizeof(T); ++lane) {
    if ((mask >> lane) & 1) to[lane] = from[n++];
  }
  return _mm512_load_si512(to);
}

}  // namespace

#define _mm512_maskz_compress_epi8(mask, x) emulated_compress<unsigned char, __mmask64>(mask, x)
#define _mm512_maskz_compress_epi16(mask, x) emulated_compress<unsigned short, __mmask32>(mask, x)
#define _mm512_maskz_expand_epi16(mask, x) emulated_expand<unsigned short, __mmask32>(mask, x)
