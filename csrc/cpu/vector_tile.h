// What all vector variants share: the loops around segments, and the steps that need scalar instructions only.
//
// A class `Isa` supplies the vector steps, all on one segment of 256 elements, whose bitmap is four 64-bit words:
//
//   make_bitmap<T, plain>(x, predicate, words)             one bit per element: whether it is stored
//   pack<T>(x, words, values)                              the stored values; writes up to 64 bytes beyond them
//   pack_both<T>(x, words, n, index, values)               and their positions; ditto; may be put off until flush()
//   unpack<T>(values, words, out)                          the reverse of pack, zeros included; reads 64 bytes beyond
//   any_zero<T>(values, n, zero_mask)                      whether one of n values is a zero; reads 64 bytes beyond
//   ascending(index, n)                                    whether 1..32 positions are; reads 33 bytes
//   clear(out, n_bytes), move_line(from, to), stream_line(from, to), end_streaming()     lines of 64 aligned bytes at
//   `to` kFew                                                   up to this many values pack_few is faster than
//   pack_both
//
// Everything is in an anonymous namespace: each instruction set has its own copy, compiled with its own flags.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "kernels.h"

namespace pyfacts::cpu {
namespace {

constexpr int64_t kLineBytes = 64;

inline int64_t popcount(const uint64_t* words) {
  return _mm_popcnt_u64(words[0]) + _mm_popcnt_u64(words[1]) + _mm_popcnt_u64(words[2]) + _mm_popcnt_u64(words[3]);
}

// For each byte, the positions of its bits, ascending, one a byte, then zeros.
struct BitPositions {
  uint64_t of[256];
  constexpr BitPositions() : of() {
    for (int byte = 0; byte < 256; ++byte) {
      int n = 0;
      for (int bit = 0; bit < 8; ++bit) {
        if ((byte >> bit) & 1) of[byte] |= static_cast<uint64_t>(bit) << (8 * n++);
      }
    }
  }
};
constexpr BitPositions kBitPositions;

// ---- Encode ---------------------------------------------------------------------------------------------------

// Rows between the prefetch and the use of a row's part of a group. Into L2, not L1: Zen 4 keeps far more misses in
// flight there, and reads 16 columns at a time at 21 GB/s instead of 10 (25 when it reads whole rows).
constexpr int64_t kRowsAhead = 2;

inline void prefetch(const uint8_t* bytes, int64_t n_bytes) {
  for (int64_t i = 0; i < n_bytes; i += kLineBytes) {
    _mm_prefetch(reinterpret_cast<const char*>(bytes + i), _MM_HINT_T1);
  }
}

// One value at a time. Every word of the bitmap takes four steps, past its last bit too (what they write is
// overwritten), because a loop of the right length would be mispredicted once per word.
template <typename T>
void pack_few(const uint8_t* x, const uint64_t* words, uint8_t* index, uint8_t* values) {
  constexpr int64_t kSteps = 4;
  for (int64_t i = 0; i < 4; ++i) {
    uint64_t bits = words[i];
    const int64_t n = _mm_popcnt_u64(bits);
    const auto step = [&](int64_t k) {
      const auto j = static_cast<uint8_t>(64 * i + _tzcnt_u64(bits));
      index[k] = j;
      std::memcpy(values + k * sizeof(T), x + j * sizeof(T), sizeof(T));
      bits &= bits - 1;
    };
    for (int64_t k = 0; k < kSteps; ++k) step(k);
    for (int64_t k = kSteps; k < n; ++k) step(k);
    index += n;
    values += n * sizeof(T);
  }
}

// A byte of the bitmap at a time, without branches.
inline void pack_positions(const uint64_t* words, uint8_t* index) {
  for (uint64_t i = 0; i < 4; ++i) {
    uint64_t first = 64 * i * 0x0101010101010101u;
    for (uint64_t k = 0; k < 8; ++k) {
      const auto byte = static_cast<uint8_t>(words[i] >> (8 * k));
      const uint64_t positions = kBitPositions.of[byte] + first;  // at most 7 + 248 in a byte: no carry
      std::memcpy(index, &positions, 8);
      index += _mm_popcnt_u32(byte);
      first += 8 * 0x0101010101010101u;
    }
  }
}

inline uint8_t count_byte(int64_t n) { return static_cast<uint8_t>(n < kCountSaturated ? n : kCountSaturated); }

// Appends one segment to its column; returns its exact count.
template <typename Isa, typename T, bool plain>
int64_t encode_segment(Isa& isa, const uint8_t* x, const Predicate& predicate, int64_t bitmap_bytes, uint8_t*& index,
                       uint8_t*& values) {
  uint64_t words[4];
  Isa::template make_bitmap<T, plain>(x, predicate, words);
  const int64_t n = popcount(words);
  if (n <= bitmap_bytes) {
    if (n <= Isa::kFew) {
      pack_few<T>(x, words, index, values);
    } else {
      isa.template pack_both<T>(x, words, n, index, values);
    }
    index += n;
  } else {
    std::memcpy(index, words, kColumnWidth / 8);  // a narrow column's next segment overwrites what is too much
    Isa::template pack<T>(x, words, values);
    index += bitmap_bytes;
  }
  values += n * sizeof(T);
  return n;
}

template <typename Isa, typename T, bool plain>
void encode_rows(const EncodeTile& tile) {
  constexpr int64_t kSegmentBytes = kColumnWidth * sizeof(T);
  const DenseTile& dense = tile.x;
  const bool narrow = dense.last_width < kColumnWidth;
  const int64_t n_full = dense.n_columns - (narrow ? 1 : 0);
  // A narrow segment is encoded as a full one with zeros behind it: +0.0 is never stored.
  alignas(kLineBytes) uint8_t padded[kSegmentBytes] = {};
  Isa isa;
  for (int64_t row = 0; row < dense.n_rows; ++row) {
    const uint8_t* x = dense.rows + row * dense.row_bytes;
    const uint8_t* ahead = row + kRowsAhead < dense.n_rows ? x + kRowsAhead * dense.row_bytes : x;
    uint8_t* counts = tile.counts + row * kGroupColumns;
    for (int64_t c = 0; c < n_full; ++c) {
      prefetch(ahead + c * kSegmentBytes, kSegmentBytes);
      counts[c] = count_byte(encode_segment<Isa, T, plain>(isa, x + c * kSegmentBytes, dense.predicate,
                                                           kColumnWidth / 8, tile.index[c], tile.values[c]));
    }
    if (!narrow) continue;
    std::memcpy(padded, x + n_full * kSegmentBytes, dense.last_width * sizeof(T));
    counts[n_full] = count_byte(encode_segment<Isa, T, plain>(isa, padded, dense.predicate, (dense.last_width + 7) / 8,
                                                              tile.index[n_full], tile.values[n_full]));
  }
  isa.flush();
}

template <typename Isa, typename T>
void encode(const EncodeTile& tile) {
  tile.x.predicate.plain ? encode_rows<Isa, T, true>(tile) : encode_rows<Isa, T, false>(tile);
}

// Whole rows need no prefetch of ours.
template <typename Isa, typename T, bool plain>
void count_rows(const CountTile& tile) {
  constexpr int64_t kSegmentBytes = kColumnWidth * sizeof(T);
  const DenseTile& dense = tile.x;
  const int64_t n_full = dense.n_columns - (dense.last_width < kColumnWidth ? 1 : 0);
  alignas(kLineBytes) uint8_t padded[kSegmentBytes] = {};
  for (int64_t c = 0; c < dense.n_columns; ++c) tile.n_values[c] = 0;
  for (int64_t row = 0; row < dense.n_rows; ++row) {
    const uint8_t* x = dense.rows + row * dense.row_bytes;
    for (int64_t c = 0; c < dense.n_columns; ++c, x += kSegmentBytes) {
      if (c == n_full) std::memcpy(padded, x, dense.last_width * sizeof(T));
      uint64_t words[4];
      Isa::template make_bitmap<T, plain>(c == n_full ? padded : x, dense.predicate, words);
      const int64_t n = popcount(words);
      tile.counts[row * dense.n_columns + c] = count_byte(n);
      tile.n_values[c] += n;
    }
  }
}

template <typename Isa, typename T>
void count(const CountTile& tile) {
  tile.x.predicate.plain ? count_rows<Isa, T, true>(tile) : count_rows<Isa, T, false>(tile);
}

// ---- Decode ---------------------------------------------------------------------------------------------------

// Unpacks one segment, zeros included, as 256 elements; false if it breaks the format.
template <typename Isa, typename T>
bool decode_segment(uint8_t count, int64_t width, uint32_t zero_mask, const uint8_t*& index, const uint8_t*& values,
                    uint8_t* out) {
  const int64_t bitmap_bytes = (width + 7) / 8;
  int64_t n = count;
  if (n <= bitmap_bytes) {
    Isa::clear(out, kColumnWidth * sizeof(T));
    if (n == 0) return true;
    if (!Isa::ascending(index, n) || index[n - 1] >= width) return false;
    for (int64_t i = 0; i < n; ++i) std::memcpy(out + index[i] * sizeof(T), values + i * sizeof(T), sizeof(T));
    index += n;
  } else {
    uint64_t words[4] = {};
    std::memcpy(words, index, bitmap_bytes);
    n = popcount(words);
    if (n != count && !(count == kCountSaturated && n == kColumnWidth)) return false;
    if (index[bitmap_bytes - 1] >> (8 - (8 * bitmap_bytes - width)) != 0) return false;
    Isa::template unpack<T>(values, words, out);
    index += bitmap_bytes;
  }
  const bool ok = !Isa::template any_zero<T>(values, n, zero_mask);
  values += n * sizeof(T);
  return ok;
}

// Copies whole cache lines of the output as such.
template <typename Isa>
void write_out(const uint8_t* from, uint8_t* to, int64_t n_bytes, bool stream) {
  const int64_t to_line = -reinterpret_cast<intptr_t>(to) & (kLineBytes - 1);
  int64_t i = to_line < n_bytes ? to_line : n_bytes;
  if (i > 0) std::memcpy(to, from, i);
  if (stream) {
    for (; i + kLineBytes <= n_bytes; i += kLineBytes) Isa::stream_line(from + i, to + i);
  } else {
    for (; i + kLineBytes <= n_bytes; i += kLineBytes) Isa::move_line(from + i, to + i);
  }
  if (i < n_bytes) std::memcpy(to + i, from + i, n_bytes - i);
}

template <typename Isa>
void stream(const uint8_t* from, uint8_t* to, int64_t n_bytes) {
  write_out<Isa>(from, to, n_bytes, true);
}

// A row's part of the group is unpacked in L1 and leaves it in whole cache lines: only those can be streamed, and a
// wide load right behind the narrow stores of its line would stall. (8 columns of bf16 at a time were 17 % slower.)
template <typename Isa, typename T>
bool decode(const DecodeTile& tile) {
  constexpr int64_t kSegmentBytes = kColumnWidth * sizeof(T);
  alignas(kLineBytes) uint8_t buffer[kGroupColumns * kSegmentBytes + kLineBytes];
  const int64_t n_bytes = ((tile.n_columns - 1) * kColumnWidth + tile.last_width) * sizeof(T);
  bool ok = true;
  for (int64_t row = 0; row < tile.n_rows && ok; ++row) {
    uint8_t* out = tile.out + row * tile.row_bytes;
    uint8_t* x = buffer + (reinterpret_cast<uintptr_t>(out) & (kLineBytes - 1));
    for (int64_t c = 0; c < tile.n_columns && ok; ++c) {
      const int64_t width = c + 1 < tile.n_columns ? kColumnWidth : tile.last_width;
      ok = decode_segment<Isa, T>(tile.counts[row * kGroupColumns + c], width, tile.zero_mask, tile.index[c],
                                  tile.values[c], x + c * kSegmentBytes);
    }
    write_out<Isa>(x, out, n_bytes, tile.stream);
  }
  if (tile.stream) Isa::end_streaming();
  return ok;
}

template <typename Isa>
constexpr Kernels make_kernels(const char* name) {
  return {name,
          count<Isa, uint16_t>,
          count<Isa, uint32_t>,
          encode<Isa, uint16_t>,
          encode<Isa, uint32_t>,
          decode<Isa, uint16_t>,
          decode<Isa, uint32_t>,
          stream<Isa>,
          Isa::end_streaming};
}

}  // namespace
}  // namespace pyfacts::cpu
