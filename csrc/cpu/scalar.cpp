// Portable kernels: what the vector variants must agree with, byte for byte, and the only ones off x86-64.
#include <cstring>
#include <type_traits>

#include "../convert.h"
#include "kernels.h"

namespace pyfacts::cpu {
namespace {

template <typename T>
T load(const uint8_t* bytes) {
  T value;
  std::memcpy(&value, bytes, sizeof(T));
  return value;
}

bool satisfies(uint32_t bits, const Predicate& p) { return (bits & p.mask) > p.floor || bits == p.also; }

// As integers, non-negative elements are ordered like the numbers that they are, and negative ones are below them.
template <typename T>
bool above(T bits, T threshold) {
  using Signed = std::make_signed_t<T>;
  return static_cast<Signed>(bits) > static_cast<Signed>(threshold);
}

// thresholds may be nullptr.
template <typename T>
bool is_stored(T bits, int64_t j, const Predicate& p, const uint8_t* thresholds) {
  return (thresholds != nullptr && above(bits, load<T>(thresholds + j * sizeof(T)))) || satisfies(bits, p);
}

uint8_t count_byte(int64_t n) { return static_cast<uint8_t>(n < kCountSaturated ? n : kCountSaturated); }

// Packs one segment; returns its count byte.
template <typename T>
uint8_t encode_segment(const uint8_t* x, int64_t width, const Predicate& p, const uint8_t* thresholds, uint8_t*& index,
                       uint8_t*& values) {
  uint8_t positions[kColumnWidth];
  int64_t n = 0;
  for (int64_t j = 0; j < width; ++j) {
    const T bits = load<T>(x + j * sizeof(T));
    if (!is_stored(bits, j, p, thresholds)) continue;
    positions[n] = static_cast<uint8_t>(j);
    std::memcpy(values + n * sizeof(T), &bits, sizeof(T));
    ++n;
  }
  const int64_t bitmap = bitmap_bytes(width);
  if (n <= bitmap) {
    std::memcpy(index, positions, n);
    index += n;
  } else {
    std::memset(index, 0, bitmap);
    for (int64_t i = 0; i < n; ++i) index[positions[i] / 8] |= static_cast<uint8_t>(1u << positions[i] % 8);
    index += bitmap;
  }
  values += n * sizeof(T);
  return count_byte(n);
}

// body(segment, width, thresholds, row, column) for all segments of a tile.
template <typename T, typename Body>
void for_segments(const DenseTile& x, Body body) {
  for (int64_t row = 0; row < x.n_rows; ++row) {
    for (int64_t c = 0; c < x.n_columns; ++c) {
      const int64_t start = c * kColumnWidth * static_cast<int64_t>(sizeof(T));
      body(x.rows + row * x.row_bytes + start, c + 1 < x.n_columns ? kColumnWidth : x.last_width,
           x.thresholds == nullptr ? nullptr : x.thresholds + start, row, c);
    }
  }
}

template <typename T>
void encode(const EncodeTile& tile) {
  for_segments<T>(tile.x, [&](const uint8_t* x, int64_t width, const uint8_t* thresholds, int64_t row, int64_t c) {
    tile.counts[c * kTileTokens + row] =
        encode_segment<T>(x, width, tile.x.predicate, thresholds, tile.index[c], tile.values[c]);
  });
}

template <typename T>
void count(const CountTile& tile) {
  for (int64_t c = 0; c < tile.x.n_columns; ++c) tile.n_values[c] = 0;
  for_segments<T>(tile.x, [&](const uint8_t* x, int64_t width, const uint8_t* thresholds, int64_t row, int64_t c) {
    int64_t n = 0;
    for (int64_t j = 0; j < width; ++j) {
      n += is_stored(load<T>(x + j * sizeof(T)), j, tile.x.predicate, thresholds);
    }
    tile.counts[row * tile.x.n_columns + c] = count_byte(n);
    tile.n_values[c] += n;
  });
}

template <typename T>
void search(const Search& search) {
  for (int64_t i = 0; i < kColumnWidth / 64; ++i) search.found[i] = 0;
  for (int64_t j = 0; j < search.width; ++j) {
    const T bits = load<T>(search.x + j * sizeof(T));
    const uint64_t found = above(bits, static_cast<T>(search.floor)) || satisfies(bits, search.predicate);
    search.found[j / 64] |= found << (j % 64);
  }
}

// Writes one segment into `out`, zeros included; false if it breaks the format.
template <typename T>
bool decode_segment(uint8_t count, int64_t width, uint32_t zero_mask, const uint8_t*& index, const uint8_t*& values,
                    uint8_t* out) {
  uint8_t positions[kColumnWidth];
  const int64_t bitmap = bitmap_bytes(width);
  int64_t n = count;
  bool ok = true;
  if (n <= bitmap) {
    for (int64_t i = 0; i < n; ++i) {
      positions[i] = index[i];
      ok &= positions[i] < width && (i == 0 || positions[i] > positions[i - 1]);
    }
    index += n;
  } else {
    n = 0;
    for (int64_t j = 0; j < bitmap * 8; ++j) {
      if (((index[j / 8] >> (j % 8)) & 1) == 0) continue;
      ok &= j < width;
      positions[n++] = static_cast<uint8_t>(j);
    }
    ok &= n == count || (count == kCountSaturated && n == kColumnWidth);
    index += bitmap;
  }
  if (!ok) return false;
  std::memset(out, 0, width * sizeof(T));
  for (int64_t i = 0; i < n; ++i) {
    const T bits = load<T>(values + i * sizeof(T));
    ok &= (bits & zero_mask) != 0;
    std::memcpy(out + positions[i] * sizeof(T), &bits, sizeof(T));
  }
  values += n * sizeof(T);
  return ok;
}

template <typename T>
bool decode(const DecodeTile& tile) {
  for (int64_t row = 0; row < tile.n_rows; ++row) {
    uint8_t* out = tile.out + row * tile.row_bytes;
    for (int64_t c = 0; c < tile.n_columns; ++c) {
      const int64_t width = c + 1 < tile.n_columns ? kColumnWidth : tile.last_width;
      if (!decode_segment<T>(tile.counts[row * kUnpackColumns + c], width, tile.zero_mask, tile.index[c],
                             tile.values[c], out + c * kColumnWidth * sizeof(T))) {
        return false;
      }
    }
  }
  return true;
}

// ---- Products -------------------------------------------------------------------------------------------------

template <DType dtype>
void widen(const uint8_t* from, int64_t n, float* to) {
  using Bits = typename Convert<dtype>::Bits;
  int64_t i = 0;
  for (; i < n; ++i) to[i] = Convert<dtype>::widen(load<Bits>(from + i * sizeof(Bits)));
  for (; i % kSlabMultiple != 0; ++i) to[i] = 0;
}

template <DType dtype>
void narrow(const float* from, int64_t n, uint8_t* to) {
  for (int64_t i = 0; i < n; ++i) {
    const typename Convert<dtype>::Bits bits = Convert<dtype>::narrow(from[i]);
    std::memcpy(to + i * sizeof(bits), &bits, sizeof(bits));
  }
}

template <DType dtype>
bool list(const ListTile& tile) {
  using Bits = typename Convert<dtype>::Bits;
  int64_t n = 0;
  for (int64_t row = 0; row < tile.n_rows; ++row) {
    tile.starts[row] = n;
    for (int64_t c = 0; c < tile.n_columns; ++c) {
      const uint8_t count = tile.counts[row * tile.n_columns + c];
      const int64_t width = c + 1 < tile.n_columns ? kColumnWidth : tile.last_width;
      Bits segment[kColumnWidth];
      auto* out = reinterpret_cast<uint8_t*>(segment);
      if (count == 0) continue;
      if (!decode_segment<Bits>(count, width, tile.zero_mask, tile.index[c], tile.values[c], out)) return false;
      for (int64_t j = 0; j < width; ++j) {
        if (segment[j] == 0) continue;
        tile.inner[n] = static_cast<uint32_t>(c * kColumnWidth + j);
        tile.factor[n++] = Convert<dtype>::widen(segment[j]);
      }
    }
  }
  tile.starts[tile.n_rows] = n;
  return true;
}

void sum_lists(const ListSums& s) {
  for (int64_t row = 0; row < s.n_rows; ++row) {
    float* sums = s.sums + row * s.width;
    if (s.begin != nullptr) std::memcpy(sums, s.begin, s.width * sizeof(float));
    for (int64_t i = s.starts[row]; i < s.starts[row + 1]; ++i) {
      const float* dense = s.dense + s.inner[i] * s.width;
      for (int64_t k = 0; k < s.width; ++k) sums[k] += s.factor[i] * dense[k];
    }
  }
}

void stream(const uint8_t* from, uint8_t* to, int64_t n_bytes) { std::memcpy(to, from, n_bytes); }
void fence() {}

}  // namespace

const Kernels kKernelsScalar = {"scalar",
                                count<uint16_t>,
                                count<uint32_t>,
                                search<uint16_t>,
                                search<uint32_t>,
                                encode<uint16_t>,
                                encode<uint32_t>,
                                decode<uint16_t>,
                                decode<uint32_t>,
                                stream,
                                fence,
                                {{list<DType::float32>, widen<DType::float32>, narrow<DType::float32>},
                                 {list<DType::bfloat16>, widen<DType::bfloat16>, narrow<DType::bfloat16>},
                                 {list<DType::float16>, widen<DType::float16>, narrow<DType::float16>}},
                                sum_lists};

}  // namespace pyfacts::cpu
