// What all vector variants share: the loops around segments, and the steps that need scalar instructions only.
//
// A class `Isa` supplies the vector steps, all on one segment of 256 elements, whose bitmap is four 64-bit words:
//
//   bitmap_word<T, rule>(x, predicate, thresholds)         one bit for each of 64 elements: whether it is stored
//   pack<T>(x, words, values)                              the stored values; writes up to 64 bytes beyond them
//   pack_both<T>(x, words, n, index, values)               and their positions; ditto; may be put off until flush()
//   unpack<T>(values, words, out)                          the reverse of pack, zeros included; reads 64 bytes beyond
//   any_zero<T>(values, n, zero_mask)                      whether one of n values is a zero; reads 64 bytes beyond
//   ascending(index, n)                                    whether 1..32 positions are; reads 33 bytes
//   Floats, kLanes                                         a vector of floats, and how many
//   load_floats(from), store_floats(to, x), repeat(x)      any alignment
//   multiply(x, y), add(x, y)                              each rounds: their results are the same everywhere
//   widen<dtype>(from), narrow<dtype>(x, to)               kLanes elements to floats, and back
//   list_positions(index, first, inner)                    kLanes positions as 32-bit numbers, counted on from first
//   clear(out, n_bytes)                                    whole lines of 64 bytes
//   stream_line(from, to)                                  one line past the caches, `to` aligned; end_streaming()
//   kFewest, kFew, kSome                                   up to so many values pack_few, of 2, 4 or 8 steps, is faster
//                                                          than pack_both
//   kSpread                                                whether to prefetch a quarter of a segment at a time
//
// Everything is in an anonymous namespace: each instruction set has its own copy, compiled with its own flags.
#pragma once

#include <immintrin.h>

#include <cstring>
#include <type_traits>

#include "kernels.h"

namespace pyfacts::cpu {
namespace {

constexpr int64_t kLineBytes = 64;
constexpr int64_t kMaxPositions = kColumnWidth / 8;  // of a segment, before it has a bitmap

// By what it is decided whether an element is stored: see DenseTile and Predicate.
enum class Rule { nonzero, predicate, threshold, floor };  // floor: one threshold for all elements

// call(constant) with the tile's rule as a compile-time constant.
template <Rule value>
struct RuleConstant {
  static constexpr Rule rule = value;
};
template <typename Call>
void with_rule(const DenseTile& tile, Call call) {
  if (tile.thresholds != nullptr) {
    call(RuleConstant<Rule::threshold>());
  } else if (tile.predicate.plain) {
    call(RuleConstant<Rule::nonzero>());
  } else {
    call(RuleConstant<Rule::predicate>());
  }
}

// The threshold of the element that lies n_bytes behind another.
template <Rule rule>
const uint8_t* advance(const uint8_t* thresholds, int64_t n_bytes) {
  return rule == Rule::threshold ? thresholds + n_bytes : thresholds;
}

// The thresholds of a column; none without a rule that asks for them.
template <Rule rule, typename T>
const uint8_t* thresholds_of(const DenseTile& tile, int64_t column) {
  return rule == Rule::threshold ? tile.thresholds + column * kColumnWidth * static_cast<int64_t>(sizeof(T)) : nullptr;
}

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

// Rows between the prefetch and the use of a row's part of a group. First into L2, where more misses can be in flight
// than in L1 (Zen 4 reads 16 columns at 21 GB/s with it, and at 10 without or into L1). Then into L1: on Zen 5, a load
// that misses L1 beside the stores of other segments may wait for them, and fp32 was read at 15 to 27 GB/s by chance of
// the addresses; in L1 already, always at 30. With AVX2, on Zen 3, it is L1 alone, a quarter of a segment before each
// quarter that is read: 10 % faster than a whole one, which keeps the work that should overlap it waiting.
constexpr int64_t kRowsToL2 = 3;
constexpr int64_t kRowsToL1 = 2;

inline void prefetch_to_l1(const uint8_t* x, int64_t n_bytes) {
  for (int64_t i = 0; i < n_bytes; i += kLineBytes) {
    _mm_prefetch(reinterpret_cast<const char*>(x + i), _MM_HINT_T0);
  }
}

inline void prefetch(const uint8_t* to_l2, const uint8_t* to_l1, int64_t n_bytes) {
  for (int64_t i = 0; i < n_bytes; i += kLineBytes) {
    _mm_prefetch(reinterpret_cast<const char*>(to_l2 + i), _MM_HINT_T1);
    prefetch_to_l1(to_l1 + i, kLineBytes);
  }
}

// next: 256 elements to prefetch on the way if kSpread, or nullptr.
template <typename Isa, typename T, Rule rule>
void make_bitmap(const uint8_t* x, const Predicate& predicate, const uint8_t* thresholds, const uint8_t* next,
                 uint64_t* words) {
  constexpr int64_t kWordBytes = 64 * sizeof(T);
  for (int64_t i = 0; i < 4; ++i) {
    const int64_t at = i * kWordBytes;
    if (Isa::kSpread && next != nullptr) prefetch_to_l1(next + at, kWordBytes);
    words[i] = Isa::template bitmap_word<T, rule>(x + at, predicate, advance<rule>(thresholds, at));
  }
}

// One value at a time. Every word of the bitmap takes kSteps steps, past its last bit too (what they write is
// overwritten), because a loop of the right length would be mispredicted once per word.
template <typename T, int64_t kSteps>
void pack_few(const uint8_t* x, const uint64_t* words, uint8_t* index, uint8_t* values) {
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
template <typename Isa, typename T, Rule rule>
int64_t encode_segment(Isa& isa, const uint8_t* x, const Predicate& predicate, const uint8_t* thresholds,
                       int64_t bitmap_bytes, const uint8_t* next, uint8_t*& index, uint8_t*& values) {
  uint64_t words[4];
  make_bitmap<Isa, T, rule>(x, predicate, thresholds, next, words);
  const int64_t n = popcount(words);
  if (n <= bitmap_bytes) {
    if (n <= Isa::kFewest) {
      if (n > 0) pack_few<T, 2>(x, words, index, values);
    } else if (n <= Isa::kFew) {
      pack_few<T, 4>(x, words, index, values);
    } else if (n <= Isa::kSome) {
      pack_few<T, 8>(x, words, index, values);
    } else if constexpr (Isa::kSome < kMaxPositions) {
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

template <typename Isa, typename T, Rule rule>
void encode_rows(const EncodeTile& tile) {
  constexpr int64_t kSegmentBytes = kColumnWidth * sizeof(T);
  const DenseTile dense = tile.x;
  const bool narrow = dense.last_width < kColumnWidth;
  const int64_t n_full = dense.n_columns - (narrow ? 1 : 0);
  // A narrow segment is encoded as a full one with zeros behind it: +0.0 is never stored.
  alignas(kLineBytes) uint8_t padded[kSegmentBytes] = {};
  uint8_t* index[kPackColumns];  // local, as the stores of bytes might change tile.index: 6 % for bf16
  uint8_t* values[kPackColumns];
  std::memcpy(index, tile.index, dense.n_columns * sizeof(index[0]));
  std::memcpy(values, tile.values, dense.n_columns * sizeof(values[0]));
  Isa isa;
  for (int64_t row = 0; row < dense.n_rows; ++row) {
    const uint8_t* x = dense.rows + row * dense.row_bytes;
    const auto ahead = [&](int64_t rows) {
      const int64_t beyond = row + rows - dense.n_rows;
      return beyond < 0 ? x + rows * dense.row_bytes : tile.next_rows + beyond * dense.row_bytes;
    };
    const uint8_t* const to_l2 = ahead(kRowsToL2);
    const uint8_t* const to_l1 = ahead(kRowsToL1);
    uint8_t* const counts = tile.counts + row;
    for (int64_t c = 0; c < n_full; ++c) {
      if (!Isa::kSpread) prefetch(to_l2 + c * kSegmentBytes, to_l1 + c * kSegmentBytes, kSegmentBytes);
      counts[c * kTileTokens] = count_byte(
          encode_segment<Isa, T, rule>(isa, x + c * kSegmentBytes, dense.predicate, thresholds_of<rule, T>(dense, c),
                                       kColumnWidth / 8, to_l1 + c * kSegmentBytes, index[c], values[c]));
    }
    if (!narrow) continue;
    std::memcpy(padded, x + n_full * kSegmentBytes, dense.last_width * sizeof(T));
    counts[n_full * kTileTokens] =
        count_byte(encode_segment<Isa, T, rule>(isa, padded, dense.predicate, thresholds_of<rule, T>(dense, n_full),
                                                (dense.last_width + 7) / 8, nullptr, index[n_full], values[n_full]));
  }
  isa.flush();
  std::memcpy(tile.index, index, dense.n_columns * sizeof(index[0]));
  std::memcpy(tile.values, values, dense.n_columns * sizeof(values[0]));
}

template <typename Isa, typename T>
void encode(const EncodeTile& tile) {
  with_rule(tile.x, [&](auto constant) { encode_rows<Isa, T, constant.rule>(tile); });
}

// Whole rows need no prefetch of ours. What the tile holds is copied, so that it is not read again behind every store:
// that kept Zen 5 from reading fp32 faster than 18 GB/s (copied: 33).
template <typename Isa, typename T, Rule rule>
void count_rows(const CountTile& tile) {
  constexpr int64_t kSegmentBytes = kColumnWidth * sizeof(T);
  const DenseTile dense = tile.x;
  uint8_t* const counts = tile.counts;
  int64_t* const n_values = tile.n_values;
  const int64_t n_full = dense.n_columns - (dense.last_width < kColumnWidth ? 1 : 0);
  alignas(kLineBytes) uint8_t padded[kSegmentBytes] = {};
  for (int64_t c = 0; c < dense.n_columns; ++c) n_values[c] = 0;
  for (int64_t row = 0; row < dense.n_rows; ++row) {
    const uint8_t* x = dense.rows + row * dense.row_bytes;
    for (int64_t c = 0; c < dense.n_columns; ++c, x += kSegmentBytes) {
      if (c == n_full) std::memcpy(padded, x, dense.last_width * sizeof(T));
      uint64_t words[4];
      make_bitmap<Isa, T, rule>(c == n_full ? padded : x, dense.predicate, thresholds_of<rule, T>(dense, c), nullptr,
                                words);
      const int64_t n = popcount(words);
      counts[row * dense.n_columns + c] = count_byte(n);
      n_values[c] += n;
    }
  }
}

template <typename Isa, typename T>
void count(const CountTile& tile) {
  with_rule(tile.x, [&](auto constant) { count_rows<Isa, T, constant.rule>(tile); });
}

template <typename Isa, typename T>
void search(const Search& search) {
  alignas(kLineBytes) uint8_t padded[kColumnWidth * sizeof(T)] = {};
  const bool narrow = search.width < kColumnWidth;
  if (narrow) std::memcpy(padded, search.x, search.width * sizeof(T));
  const auto floor = static_cast<T>(search.floor);
  make_bitmap<Isa, T, Rule::floor>(narrow ? padded : search.x, search.predicate,
                                   reinterpret_cast<const uint8_t*>(&floor), nullptr, search.found);
}

// ---- Decode ---------------------------------------------------------------------------------------------------

// Sixteen columns are two streams each, more than the hardware follows: without prefetches of ours every line of them
// is waited for (on Zen 3, 4,096 x 16,384 bf16 at 10 %: 34 ms, and 14 with them). 128 and 512 bytes ahead were slower.
constexpr int64_t kBytesAhead = 256;

// Unpacks one segment, zeros included, as 256 elements; false if it breaks the format.
template <typename Isa, typename T>
bool decode_segment(uint8_t count, int64_t width, uint32_t zero_mask, const uint8_t*& index, const uint8_t*& values,
                    uint8_t* out) {
  const int64_t bitmap_bytes = (width + 7) / 8;
  int64_t n = count;
  prefetch_to_l1(index + kBytesAhead, kLineBytes);
  prefetch_to_l1(values + kBytesAhead, n * sizeof(T));
  if (n <= bitmap_bytes) {
    Isa::clear(out, kColumnWidth * sizeof(T));
    if (n == 0) return true;
    if (!Isa::ascending(index, n) || index[n - 1] >= width) return false;
    const uint8_t* const positions = index;  // local, as the stores of bytes might change what `index` refers to
    const uint8_t* const from = values;
    for (int64_t i = 0; i < n; ++i) std::memcpy(out + positions[i] * sizeof(T), from + i * sizeof(T), sizeof(T));
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

// Copies past the caches, in whole lines of the output.
template <typename Isa>
void stream(const uint8_t* from, uint8_t* to, int64_t n_bytes) {
  const int64_t to_line = -reinterpret_cast<intptr_t>(to) & (kLineBytes - 1);
  int64_t i = to_line < n_bytes ? to_line : n_bytes;
  if (i > 0) std::memcpy(to, from, i);
  for (; i + kLineBytes <= n_bytes; i += kLineBytes) Isa::stream_line(from + i, to + i);
  if (i < n_bytes) std::memcpy(to + i, from + i, n_bytes - i);
}

// A row's part of the group is unpacked in L1 and leaves it in whole cache lines: only those can be streamed, and a
// wide load right behind the narrow stores of its line would stall. 8 columns of bf16 at a time were 17 % slower; on
// Zen 3, lines that leave while the rest of the row is unpacked take twice as long.
template <typename Isa, typename T>
bool decode_streaming(const DecodeTile& tile) {
  constexpr int64_t kSegmentBytes = kColumnWidth * sizeof(T);
  alignas(kLineBytes) uint8_t buffer[kUnpackColumns * kSegmentBytes + kLineBytes];
  const int64_t n_bytes = ((tile.n_columns - 1) * kColumnWidth + tile.last_width) * sizeof(T);
  bool ok = true;
  for (int64_t row = 0; row < tile.n_rows && ok; ++row) {
    uint8_t* const out = tile.out + row * tile.row_bytes;
    uint8_t* const x = buffer + (reinterpret_cast<uintptr_t>(out) & (kLineBytes - 1));
    for (int64_t c = 0; c < tile.n_columns && ok; ++c) {
      const int64_t width = c + 1 < tile.n_columns ? kColumnWidth : tile.last_width;
      ok = decode_segment<Isa, T>(tile.counts[row * kUnpackColumns + c], width, tile.zero_mask, tile.index[c],
                                  tile.values[c], x + c * kSegmentBytes);
    }
    stream<Isa>(x, out, n_bytes);
  }
  Isa::end_streaming();
  return ok;
}

template <typename Isa, typename T>
bool decode_in_place(const DecodeTile& tile) {
  constexpr int64_t kSegmentBytes = kColumnWidth * sizeof(T);
  const bool narrow = tile.last_width < kColumnWidth;
  const int64_t n_full = tile.n_columns - (narrow ? 1 : 0);
  uint8_t padded[kSegmentBytes];
  bool ok = true;
  for (int64_t row = 0; row < tile.n_rows && ok; ++row) {
    const uint8_t* const counts = tile.counts + row * kUnpackColumns;
    uint8_t* const out = tile.out + row * tile.row_bytes;
    for (int64_t c = 0; c < n_full && ok; ++c) {
      ok = decode_segment<Isa, T>(counts[c], kColumnWidth, tile.zero_mask, tile.index[c], tile.values[c],
                                  out + c * kSegmentBytes);
    }
    if (!narrow || !ok) continue;
    ok = decode_segment<Isa, T>(counts[n_full], tile.last_width, tile.zero_mask, tile.index[n_full],
                                tile.values[n_full], padded);
    if (ok) std::memcpy(out + n_full * kSegmentBytes, padded, tile.last_width * sizeof(T));
  }
  return ok;
}

template <typename Isa, typename T>
bool decode(const DecodeTile& tile) {
  return tile.stream ? decode_streaming<Isa, T>(tile) : decode_in_place<Isa, T>(tile);
}

// ---- Products -------------------------------------------------------------------------------------------------

template <DType dtype>
using BitsOf = std::conditional_t<dtype == DType::float32, uint32_t, uint16_t>;

// Appends one segment's values and their features to a list of n; false if it breaks the format.
template <typename Isa, DType dtype>
bool list_segment(uint8_t count, int64_t width, uint32_t first, uint32_t zero_mask, const uint8_t*& index,
                  const uint8_t*& values, uint32_t* inner, float* factor, int64_t& n) {
  using Bits = BitsOf<dtype>;
  const int64_t bitmap_bytes = (width + 7) / 8;
  int64_t found = count;
  const uint8_t* positions = index;
  uint8_t from_bitmap[kColumnWidth + kLineBytes];
  if (count == 0) return true;
  if (count <= bitmap_bytes) {
    if (!Isa::ascending(index, count) || index[count - 1] >= width) return false;
    index += count;
  } else {
    uint64_t words[4] = {};
    std::memcpy(words, index, bitmap_bytes);
    found = popcount(words);
    if (found != count && !(count == kCountSaturated && found == kColumnWidth)) return false;
    if (index[bitmap_bytes - 1] >> (8 - (8 * bitmap_bytes - width)) != 0) return false;
    pack_positions(words, from_bitmap);
    positions = from_bitmap;
    index += bitmap_bytes;
  }
  for (int64_t i = 0; i < found; i += Isa::kLanes) {
    Isa::list_positions(positions + i, first, inner + n + i);
    Isa::store_floats(factor + n + i, Isa::template widen<dtype>(values + i * sizeof(Bits)));
  }
  const bool ok = !Isa::template any_zero<Bits>(values, found, zero_mask);
  values += found * sizeof(Bits);
  n += found;
  return ok;
}

template <typename Isa, DType dtype>
bool list(const ListTile& tile) {
  int64_t n = 0;
  bool ok = true;
  for (int64_t row = 0; row < tile.n_rows && ok; ++row) {
    tile.starts[row] = n;
    const uint8_t* counts = tile.counts + row * tile.n_columns;
    for (int64_t c = 0; c < tile.n_columns && ok; ++c) {
      const int64_t width = c + 1 < tile.n_columns ? kColumnWidth : tile.last_width;
      ok = list_segment<Isa, dtype>(counts[c], width, static_cast<uint32_t>(c * kColumnWidth), tile.zero_mask,
                                    tile.index[c], tile.values[c], tile.inner, tile.factor, n);
    }
  }
  tile.starts[tile.n_rows] = n;
  return ok;
}

template <typename Isa, DType dtype>
void widen(const uint8_t* from, int64_t n, float* to) {
  constexpr int64_t kItem = sizeof(BitsOf<dtype>);
  const int64_t whole = n - n % kSlabMultiple;
  for (int64_t i = 0; i < whole; i += Isa::kLanes) {
    Isa::store_floats(to + i, Isa::template widen<dtype>(from + i * kItem));
  }
  if (whole == n) return;
  uint8_t rest[kSlabMultiple * kItem] = {};
  std::memcpy(rest, from + whole * kItem, (n - whole) * kItem);
  for (int64_t i = 0; i < kSlabMultiple; i += Isa::kLanes) {
    Isa::store_floats(to + whole + i, Isa::template widen<dtype>(rest + i * kItem));
  }
}

// `from` is filled up to a multiple of kSlabMultiple.
template <typename Isa, DType dtype>
void narrow(const float* from, int64_t n, uint8_t* to) {
  constexpr int64_t kItem = sizeof(BitsOf<dtype>);
  const int64_t whole = n - n % Isa::kLanes;
  for (int64_t i = 0; i < whole; i += Isa::kLanes) {
    Isa::template narrow<dtype>(Isa::load_floats(from + i), to + i * kItem);
  }
  if (whole == n) return;
  uint8_t rest[Isa::kLanes * kItem];
  Isa::template narrow<dtype>(Isa::load_floats(from + whole), rest);
  std::memcpy(to + whole * kItem, rest, (n - whole) * kItem);
}

// The floats [first, first + n_vectors * kLanes) of every sum, which stay in registers along a list.
template <typename Isa, int n_vectors>
void sum_lists_part(const ListSums& s, int64_t first) {
  for (int64_t row = 0; row < s.n_rows; ++row) {
    const int64_t end = s.starts[row + 1];
    if (s.starts[row] == end && s.begin == nullptr) continue;
    float* sums = s.sums + row * s.width + first;
    const float* begin = s.begin != nullptr ? s.begin + first : sums;
    typename Isa::Floats sum[n_vectors];
    for (int k = 0; k < n_vectors; ++k) sum[k] = Isa::load_floats(begin + k * Isa::kLanes);
    for (int64_t i = s.starts[row]; i < end; ++i) {
      const float* dense = s.dense + s.inner[i] * s.width + first;
      const auto factor = Isa::repeat(s.factor[i]);
      for (int k = 0; k < n_vectors; ++k) {
        sum[k] = Isa::add(sum[k], Isa::multiply(factor, Isa::load_floats(dense + k * Isa::kLanes)));
      }
    }
    for (int k = 0; k < n_vectors; ++k) Isa::store_floats(sums + k * Isa::kLanes, sum[k]);
  }
}

template <typename Isa>
void sum_lists(const ListSums& s) {
  int64_t first = 0;
  for (; first + 8 * Isa::kLanes <= s.width; first += 8 * Isa::kLanes) sum_lists_part<Isa, 8>(s, first);
  for (; first + 4 * Isa::kLanes <= s.width; first += 4 * Isa::kLanes) sum_lists_part<Isa, 4>(s, first);
  for (; first < s.width; first += Isa::kLanes) sum_lists_part<Isa, 1>(s, first);
}

template <typename Isa, DType dtype>
constexpr Conversions make_conversions() {
  return {list<Isa, dtype>, widen<Isa, dtype>, narrow<Isa, dtype>};
}

template <typename Isa>
constexpr Kernels make_kernels(const char* name) {
  return {name,
          count<Isa, uint16_t>,
          count<Isa, uint32_t>,
          search<Isa, uint16_t>,
          search<Isa, uint32_t>,
          encode<Isa, uint16_t>,
          encode<Isa, uint32_t>,
          decode<Isa, uint16_t>,
          decode<Isa, uint32_t>,
          stream<Isa>,
          Isa::end_streaming,
          {make_conversions<Isa, DType::float32>(), make_conversions<Isa, DType::bfloat16>(),
           make_conversions<Isa, DType::float16>()},
          sum_lists<Isa>};
}

}  // namespace
}  // namespace pyfacts::cpu
