// Every instruction set against a naive reference that works on raw bits: encode, decode, checks, transformations.
//
// Prints what it ran and exits 0, or says what differs and exits 1. Without arguments it takes all instruction sets
// that this CPU runs; avx512vbmi2 is linked with its few VBMI2 instructions in software (vbmi2_emulation.h), so that
// any AVX-512 machine tests it.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/cpu/dispatch.h"
#include "../../csrc/cpu/encoding.h"

using namespace pyfacts;
using namespace pyfacts::cpu;

namespace {

using Bytes = std::vector<uint8_t>;
using Bits = std::vector<uint32_t>;  // one element each, whatever the dtype

int64_t n_checks = 0;
std::string context;

void require(bool ok, const std::string& what) {
  ++n_checks;
  if (ok) return;
  std::fprintf(stderr, "FAILED %s: %s: %s\n", isa(), context.c_str(), what.c_str());
  std::exit(1);
}

// ---- The reference --------------------------------------------------------------------------------------------

struct Reference {
  Bytes counts, index, values;
  std::vector<int64_t> tile_ptr;
};

uint32_t sign_bit(DType dtype) { return dtype == DType::float32 ? 0x80000000u : 0x8000u; }

double to_double(DType dtype, uint32_t bits) {
  const int mantissa = dtype == DType::float32 ? 23 : dtype == DType::bfloat16 ? 7 : 10;
  const int exponent_bits = dtype == DType::float16 ? 5 : 8;
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const uint32_t fraction = bits & ((1u << mantissa) - 1);
  const int exponent = static_cast<int>((bits & (sign_bit(dtype) - 1)) >> mantissa);
  double magnitude;
  if (exponent == (1 << exponent_bits) - 1) {
    magnitude = fraction != 0 ? std::nan("") : std::numeric_limits<double>::infinity();
  } else if (exponent == 0) {
    magnitude = std::ldexp(fraction, 1 - bias - mantissa);
  } else {
    magnitude = std::ldexp(fraction + (1u << mantissa), exponent - bias - mantissa);
  }
  return (bits & sign_bit(dtype)) != 0 ? -magnitude : magnitude;
}

bool is_kept(DType dtype, uint32_t bits, int64_t feature, Keep keep) {
  const double x = to_double(dtype, bits);
  if (keep.signed_zero && bits == sign_bit(dtype)) return true;
  if (keep.thresholds != nullptr) {
    uint32_t threshold = 0;
    std::memcpy(&threshold, keep.thresholds + feature * item_bytes(dtype), item_bytes(dtype));
    if (x > to_double(dtype, threshold)) return true;
  }
  return std::isnan(x) || std::fabs(x) > keep.min_abs;
}

Reference reference_encode(DType dtype, const Bits& x, int64_t n_tokens, int64_t n_features, Keep keep) {
  Reference r;
  for (int64_t first = 0; first < n_features; first += 256) {
    const int64_t width = std::min<int64_t>(256, n_features - first);
    const int64_t bitmap_size = (width + 7) / 8;
    for (int64_t t = 0; t < n_tokens; ++t) {
      if (t % 128 == 0) {
        r.tile_ptr.push_back(static_cast<int64_t>(r.index.size()));
        r.tile_ptr.push_back(static_cast<int64_t>(r.values.size()) / item_bytes(dtype));
      }
      Bytes positions, bitmap(bitmap_size, 0);
      for (int64_t j = 0; j < width; ++j) {
        const uint32_t bits = x[t * n_features + first + j];
        if (!is_kept(dtype, bits, first + j, keep)) continue;
        positions.push_back(static_cast<uint8_t>(j));
        bitmap[j / 8] |= static_cast<uint8_t>(1 << (j % 8));
        for (int64_t byte = 0; byte < item_bytes(dtype); ++byte) r.values.push_back((bits >> (8 * byte)) & 0xff);
      }
      const auto n = static_cast<int64_t>(positions.size());
      r.counts.push_back(static_cast<uint8_t>(std::min<int64_t>(n, 255)));
      const Bytes& chosen = n <= bitmap_size ? positions : bitmap;
      r.index.insert(r.index.end(), chosen.begin(), chosen.end());
    }
  }
  return r;
}

// ---- Calling the library --------------------------------------------------------------------------------------

// Bytes exactly as long as asked for, at any alignment, with a guard behind them that must stay untouched.
class Buffer {
 public:
  explicit Buffer(int64_t size, int64_t offset = 0)
      : storage_(size + offset + 64, 0xcd), offset_(offset), size_(size) {}
  uint8_t* data() { return storage_.data() + offset_; }
  Bytes bytes() const { return Bytes(storage_.begin() + offset_, storage_.begin() + offset_ + size_); }
  bool guard_intact() const {
    return std::all_of(storage_.begin() + offset_ + size_, storage_.end(), [](uint8_t b) { return b == 0xcd; }) &&
           std::all_of(storage_.begin(), storage_.begin() + offset_, [](uint8_t b) { return b == 0xcd; });
  }

 private:
  Bytes storage_;
  int64_t offset_, size_;
};

void run_in_two_threads(int64_t n, ParallelBody body, void* ctx) {
  if (n < 2) return body(0, n, ctx);
  std::thread other([=] { body(0, n / 2, ctx); });
  body(n / 2, n, ctx);
  other.join();
}

struct Encoded {
  DType dtype;
  int64_t n_tokens, n_features;
  Reference planes;
  Encoding view() const {
    return {dtype,
            n_tokens,
            n_features,
            planes.counts.data(),
            planes.index.data(),
            static_cast<int64_t>(planes.index.size()),
            planes.values.data(),
            static_cast<int64_t>(planes.values.size()) / item_bytes(dtype),
            planes.tile_ptr.data()};
  }
};

// Stores a matrix with a row stride and at an odd alignment.
Bytes dense_bytes(DType dtype, const Bits& x, int64_t n_tokens, int64_t n_features, int64_t stride, int64_t offset) {
  const int64_t item = item_bytes(dtype);
  // Between the rows, and around them, lie bytes that would be stored if they were read as elements.
  Bytes out(offset + n_tokens * stride * item + 1, 0x3f);
  for (int64_t t = 0; t < n_tokens; ++t) {
    for (int64_t f = 0; f < n_features; ++f) {
      std::memcpy(out.data() + offset + (t * stride + f) * item, &x[t * n_features + f], item);
    }
  }
  // Trim to the last element, so that a sanitizer sees reads beyond it.
  if (n_tokens > 0) out.resize(offset + ((n_tokens - 1) * stride + n_features) * item);
  return out;
}

Encoded encode(DType dtype, const Bits& x, int64_t n_tokens, int64_t n_features, Keep keep, int64_t stride,
               int64_t offset, int64_t block_tokens, int64_t block_features, ParallelFor parallel_for) {
  const Bytes dense = dense_bytes(dtype, x, n_tokens, n_features, stride, offset);
  const int64_t item = item_bytes(dtype);
  Buffer counts(n_columns(n_features) * n_tokens);
  Encoder encoder(dtype, n_tokens, n_features, keep, counts.data());
  for (int64_t row = 0; row < n_tokens; row += block_tokens) {
    for (int64_t feature = 0; feature < n_features; feature += block_features) {
      encoder.add({dtype, dense.data() + offset + (row * stride + feature) * item, stride,
                   std::min(block_tokens, n_tokens - row), std::min(block_features, n_features - feature)},
                  row, feature, parallel_for);
    }
  }
  Buffer index(encoder.sizes().index_bytes, 1);
  Buffer values(encoder.sizes().n_values * item, 3);
  std::vector<int64_t> tile_ptr(2 * n_columns(n_features) * n_tiles(n_tokens));
  encoder.finish(index.data(), values.data(), tile_ptr.data(), parallel_for);
  require(counts.guard_intact() && index.guard_intact() && values.guard_intact(), "encode wrote out of bounds");
  return {dtype, n_tokens, n_features, {counts.bytes(), index.bytes(), values.bytes(), tile_ptr}};
}

Encoded encode_in_two_passes(DType dtype, const Bits& x, int64_t n_tokens, int64_t n_features, Keep keep,
                             int64_t stride, int64_t offset, ParallelFor parallel_for) {
  const Bytes bytes = dense_bytes(dtype, x, n_tokens, n_features, stride, offset);
  const Dense dense = {dtype, bytes.data() + offset, stride, n_tokens, n_features};
  Buffer counts(n_columns(n_features) * n_tokens);
  std::vector<int64_t> tile_ptr(2 * n_columns(n_features) * n_tiles(n_tokens));
  const PlaneSizes sizes = count(dense, keep, counts.data(), tile_ptr.data(), parallel_for);
  Buffer index(sizes.index_bytes, 1);
  Buffer values(sizes.n_values * item_bytes(dtype), 3);
  require(pack(dense, keep, tile_ptr.data(), sizes, index.data(), values.data(), parallel_for), "pack");
  require(counts.guard_intact() && index.guard_intact() && values.guard_intact(), "pack wrote out of bounds");
  return {dtype, n_tokens, n_features, {counts.bytes(), index.bytes(), values.bytes(), tile_ptr}};
}

void compare(const Reference& got, const Reference& expected) {
  require(got.counts == expected.counts, "counts differ");
  require(got.index == expected.index, "index differs");
  require(got.values == expected.values, "values differ");
  require(got.tile_ptr == expected.tile_ptr, "tile_ptr differs");
}

void test_decode(const Encoded& e, const Bits& x, Keep keep, int64_t stride, int64_t offset, ParallelFor parallel_for) {
  const int64_t item = item_bytes(e.dtype);
  const int64_t size = e.n_tokens > 0 ? ((e.n_tokens - 1) * stride + e.n_features) * item : 0;
  Buffer out(size, offset);
  const Status status = decode(e.view(), keep.signed_zero, out.data(), stride, parallel_for);
  require(status.ok(), std::string("decode: ") + describe(status.fault));
  require(out.guard_intact(), "decode wrote out of bounds");
  const Bytes bytes = out.bytes();
  for (int64_t t = 0; t < e.n_tokens; ++t) {
    for (int64_t f = 0; f < stride; ++f) {
      if (f >= e.n_features && t + 1 == e.n_tokens) break;
      uint32_t got = 0;
      std::memcpy(&got, bytes.data() + (t * stride + f) * item, item);
      uint32_t expected = item == 4 ? 0xcdcdcdcdu : 0xcdcdu;  // between rows nothing is written
      if (f < e.n_features) {
        const uint32_t bits = x[t * e.n_features + f];
        expected = is_kept(e.dtype, bits, f, keep) ? bits : 0;
      }
      if (got != expected) require(false, "decode differs at " + std::to_string(t) + ", " + std::to_string(f));
    }
  }
  require(check(e.view(), keep.signed_zero, parallel_for).ok(), "check rejects a valid encoding");
}

// ---- Inputs ---------------------------------------------------------------------------------------------------

std::mt19937_64 rng(20240607);
int64_t below(int64_t n) { return static_cast<int64_t>(rng() % n); }

// Values that tempt a kernel into arithmetic: zeros, infinities, NaN payloads, subnormals, the neighbours of 1.
uint32_t special(DType dtype) {
  const uint32_t sign = sign_bit(dtype);
  const uint32_t infinity = dtype == DType::float32 ? 0x7f800000u : dtype == DType::bfloat16 ? 0x7f80u : 0x7c00u;
  const uint32_t one = dtype == DType::float32 ? 0x3f800000u : dtype == DType::bfloat16 ? 0x3f80u : 0x3c00u;
  const uint32_t magnitudes[] = {0, 1, 2, infinity, infinity + 1, infinity - 1, sign - 1, one, one - 1, one + 1};
  return magnitudes[below(10)] | (below(2) != 0 ? sign : 0);
}

uint32_t nonzero(DType dtype) {
  const uint32_t bits = static_cast<uint32_t>(rng()) & (sign_bit(dtype) | (sign_bit(dtype) - 1));
  return (bits & (sign_bit(dtype) - 1)) != 0 ? bits : bits | 1;
}

enum class Pattern { dense_mix, specials, exact_counts, blocks };

Bits make_matrix(DType dtype, Pattern pattern, double density, int64_t n_tokens, int64_t n_features) {
  Bits x(n_tokens * n_features, 0);
  const int64_t edges[] = {0, 1, 2, 8, 9, 15, 16, 17, 31, 32, 33, 64, 128, 253, 254, 255, 256};
  for (int64_t t = 0; t < n_tokens; ++t) {
    for (int64_t first = 0; first < n_features; first += 256) {
      uint32_t* segment = &x[t * n_features + first];
      const int64_t width = std::min<int64_t>(256, n_features - first);
      if (pattern == Pattern::exact_counts) {
        const int64_t n = std::min(width, edges[below(17)]);
        std::vector<int64_t> order(width);
        for (int64_t j = 0; j < width; ++j) order[j] = j;
        std::shuffle(order.begin(), order.end(), rng);
        for (int64_t i = 0; i < n; ++i) segment[order[i]] = nonzero(dtype);
      } else if (pattern == Pattern::blocks) {
        const int64_t begin = below(width + 1), end = begin + below(width - begin + 1);
        for (int64_t j = begin; j < end; ++j) segment[j] = nonzero(dtype);
      } else {
        for (int64_t j = 0; j < width; ++j) {
          if (static_cast<double>(rng() >> 11) * 0x1p-53 >= density) {
            segment[j] = below(2) != 0 ? sign_bit(dtype) : 0;
          } else {
            segment[j] = pattern == Pattern::specials ? special(dtype) : nonzero(dtype);
          }
        }
      }
    }
  }
  return x;
}

const char* name(DType dtype) {
  return dtype == DType::float32 ? "float32" : dtype == DType::bfloat16 ? "bfloat16" : "float16";
}

constexpr DType kDTypes[] = {DType::float32, DType::bfloat16, DType::float16};

// ---- Tests ----------------------------------------------------------------------------------------------------

void test_round_trip(DType dtype, Pattern pattern, double density, int64_t n_tokens, int64_t n_features, Keep keep) {
  char text[200];
  std::snprintf(text, sizeof(text), "%s pattern %d density %g T %lld F %lld min_abs %g signed_zero %d", name(dtype),
                static_cast<int>(pattern), density, static_cast<long long>(n_tokens),
                static_cast<long long>(n_features), keep.min_abs, keep.signed_zero);
  context = text;
  const Bits x = make_matrix(dtype, pattern, density, n_tokens, n_features);
  const int64_t stride = n_features + (below(2) != 0 ? below(40) : 0);
  const ParallelFor parallel_for = below(2) != 0 ? run_in_two_threads : run_serially;
  const Encoded e = encode(dtype, x, n_tokens, n_features, keep, stride, below(9), 128 * (1 + below(3)),
                           256 * (1 + below(4)), parallel_for);
  const Reference expected = reference_encode(dtype, x, n_tokens, n_features, keep);
  compare(e.planes, expected);
  compare(encode_in_two_passes(dtype, x, n_tokens, n_features, keep, stride, below(9), parallel_for).planes, expected);
  test_decode(e, x, keep, n_features + below(40), below(67), parallel_for);
}

void test_round_trips() {
  const int64_t widths[] = {1, 7, 8, 9, 31, 33, 255, 256, 257, 300, 511, 512, 513, 1000};
  const int64_t tokens[] = {0, 1, 2, 127, 128, 129, 300};
  for (const DType dtype : kDTypes) {
    for (const int64_t n_features : widths) {
      for (const int64_t n_tokens : tokens) {
        if (n_tokens > 2 && n_tokens * n_features > 100000) continue;
        test_round_trip(dtype, Pattern::exact_counts, 0, n_tokens, n_features, {});
        test_round_trip(dtype, Pattern::specials, 0.5, n_tokens, n_features, {0, below(2) != 0});
      }
    }
    for (const double density : {0.0, 0.003, 0.01, 0.03, 0.1, 0.12, 0.3, 0.5, 0.9, 1.0}) {
      test_round_trip(dtype, Pattern::dense_mix, density, 130, 600, {});
      test_round_trip(dtype, Pattern::dense_mix, density, 20, 600, {0, true});
      test_round_trip(dtype, Pattern::specials, density, 20, 600, {1.0, false});
      test_round_trip(dtype, Pattern::specials, density, 20, 600, {1.0, true});
    }
    test_round_trip(dtype, Pattern::blocks, 0, 200, 777, {});
    test_round_trip(dtype, Pattern::dense_mix, 0.04, 129, 256 * 70 + 5, {});  // several groups of columns
    const double infinity = std::numeric_limits<double>::infinity();
    // Thresholds on, between and beyond the numbers of each dtype, subnormal ones too.
    for (const double theta :
         {1e-320, 1e-46,         0x1p-149, 0x1.8p-149, 0x1p-133, 0x1p-24, 0x1.7p-24, 1e-7,   0.1,   0.999,
          1.0,    1.0 + 0x1p-30, 65504.0,  65505.0,    70000.0,  3.38e38, 3.4e38,    3.5e38, 1e300, infinity}) {
      test_round_trip(dtype, Pattern::specials, 0.9, 5, 300, {theta, false});
      test_round_trip(dtype, Pattern::dense_mix, 0.7, 5, 300, {theta, true});
    }
  }
}

// A threshold for each feature, among them zero, infinity and those that equal elements.
void test_thresholds(DType dtype) {
  const double infinity = std::numeric_limits<double>::infinity();
  for (const int64_t n_features : {1, 31, 256, 300, 1100}) {
    Bytes thresholds(n_columns(n_features) * kColumnWidth * item_bytes(dtype), 0);
    for (int64_t j = 0; j < n_features; ++j) {
      uint32_t threshold = special(dtype) & (sign_bit(dtype) - 1);
      if (std::isnan(to_double(dtype, threshold))) threshold = 0;
      std::memcpy(thresholds.data() + j * item_bytes(dtype), &threshold, item_bytes(dtype));
    }
    for (const double density : {0.01, 0.1, 0.5, 1.0}) {
      test_round_trip(dtype, Pattern::specials, density, 140, n_features, {infinity, false, thresholds.data()});
      test_round_trip(dtype, Pattern::dense_mix, density, 140, n_features, {infinity, false, thresholds.data()});
      test_round_trip(dtype, Pattern::specials, density, 20, n_features, {1.0, true, thresholds.data()});
    }
  }
}

// Large enough for streaming stores; the reference is the dense input itself.
void test_large(DType dtype) {
  context = std::string("large ") + name(dtype);
  const int64_t n_tokens = 260, n_features = 256 * 66 + 9;
  const Bits x = make_matrix(dtype, Pattern::exact_counts, 0, n_tokens, n_features);
  const Encoded e = encode(dtype, x, n_tokens, n_features, {}, n_features, 2, 256, n_features, run_in_two_threads);
  test_decode(e, x, {}, n_features + 3, 5, run_in_two_threads);
  test_decode(e, x, {}, n_features + 23, 64, run_serially);
  compare(encode_in_two_passes(dtype, x, n_tokens, n_features, {}, n_features, 6, run_in_two_threads).planes, e.planes);
}

// A matrix that another thread writes to between the passes is noticed, and nothing is written out of bounds.
void test_changed_matrix(DType dtype) {
  context = std::string("changed ") + name(dtype);
  const int64_t n_tokens = 200, n_features = 600, item = item_bytes(dtype);
  Bytes bytes(n_tokens * n_features * item, 0);
  const Dense dense = {dtype, bytes.data(), n_features, n_tokens, n_features};
  std::vector<uint8_t> counts(n_columns(n_features) * n_tokens);
  std::vector<int64_t> tile_ptr(2 * n_columns(n_features) * n_tiles(n_tokens));
  bytes[5 * n_features * item] = 1;
  const PlaneSizes sizes = count(dense, {}, counts.data(), tile_ptr.data(), run_serially);
  std::fill(bytes.begin(), bytes.end(), 1);
  Buffer index(sizes.index_bytes, 1);
  Buffer values(sizes.n_values * item, 3);
  require(!pack(dense, {}, tile_ptr.data(), sizes, index.data(), values.data(), run_in_two_threads), "not noticed");
  require(index.guard_intact() && values.guard_intact(), "pack wrote out of bounds");
}

void test_suits_two_passes() {
  context = "suits_two_passes";
  std::vector<float> row(4096, 0.0f);
  const auto suits = [&](int64_t n_tokens) {  // one row over and over
    return suits_two_passes({DType::float32, row.data(), 0, n_tokens, 4096}, {});
  };
  require(!suits(1 << 16), "a sparse matrix goes in one pass");
  for (size_t i = 0; i < row.size(); i += 2) row[i] = 1.0f;
  require(suits(1 << 16), "one that packs to 557 MB in two");
  require(!suits(1 << 13), "one that packs to 70 MB in one");
}

// One broken encoding: decode and check must both name the fault, and its place.
void expect_fault(Encoded e, Fault fault, int64_t column, int64_t token, const char* what) {
  context = what;
  Bytes out(e.n_tokens * e.n_features * item_bytes(e.dtype) + 1);
  for (int repeat = 0; repeat < 2; ++repeat) {
    const Status status = repeat == 0 ? check(e.view(), false, run_serially)
                                      : decode(e.view(), false, out.data() + 1, e.n_features, run_serially);
    require(status.fault == fault, std::string("said '") + describe(status.fault) + "', not '" + describe(fault) + "'");
    require(status.column == column, "column " + std::to_string(status.column));
    require(status.token == token, "token " + std::to_string(status.token));
  }
}

void test_faults(DType dtype) {
  context = "making faults";
  const int64_t item = item_bytes(dtype);
  const int64_t T = 200, F = 256 + 100;  // columns of 256 and of 100 (13 bitmap bytes, 4 spare bits)
  Bits x(T * F, 0);
  const auto fill = [&](int64_t token, int64_t first, int64_t n) {
    for (int64_t j = 0; j < n; ++j) x[token * F + first + j] = nonzero(dtype);
  };
  fill(3, 10, 5);       // positions, column 0
  fill(140, 0, 100);    // bitmap
  fill(150, 0, 256);    // saturated
  fill(151, 0, 255);    // saturated
  fill(4, 256 + 1, 3);  // positions, column 1
  fill(160, 256, 60);   // bitmap
  const Encoded good = encode(dtype, x, T, F, {}, F, 0, 256, F, run_serially);
  require(check(good.view(), false, run_serially).ok(), "valid");
  // Index plane: column 0: 5 positions, bitmaps at 5, 37, 69 (32 bytes each); column 1: 3 positions at 101, bitmap 104.
  const auto broken = [&](auto change) {
    Encoded e = good;
    change(e.planes);
    return e;
  };
  const auto zero_value = [item](Reference& p, int64_t i) {
    std::fill_n(p.values.begin() + i * item, item, uint8_t{0});
  };
  expect_fault(broken([](Reference& p) { p.index[1] = p.index[0]; }), Fault::position_order, 0, 3, "repeated position");
  expect_fault(broken([](Reference& p) { std::swap(p.index[3], p.index[4]); }), Fault::position_order, 0, 3, "swapped");
  expect_fault(broken([](Reference& p) { p.index[103] = 100; }), Fault::position_range, 1, 4, "position 100 of 100");
  expect_fault(broken([](Reference& p) { p.index[103] = 255; }), Fault::position_range, 1, 4, "position 255 of 100");
  expect_fault(broken([](Reference& p) { p.index[5] ^= 1; }), Fault::bitmap_count, 0, 140, "one bit less");
  expect_fault(broken([](Reference& p) { p.index[5 + 31] ^= 128; }), Fault::bitmap_count, 0, 140, "one bit more");
  expect_fault(broken([](Reference& p) { std::fill_n(p.index.begin() + 5, 30, uint8_t{0}); }), Fault::bitmap_sparse, 0,
               140, "bitmap too sparse");
  expect_fault(broken([](Reference& p) { p.index[37] ^= 3; }), Fault::bitmap_count, 0, 150, "saturated with 254");
  expect_fault(broken([](Reference& p) { p.index[104 + 12] |= 0x10; }), Fault::spare_bits, 1, 160, "first spare bit");
  expect_fault(broken([](Reference& p) { p.index[104 + 12] |= 0x80; }), Fault::spare_bits, 1, 160, "last spare bit");
  expect_fault(broken([&](Reference& p) { zero_value(p, 0); }), Fault::stored_zero, 0, 3, "zero behind a position");
  expect_fault(broken([&](Reference& p) { zero_value(p, 4); }), Fault::stored_zero, 0, 3, "zero at the last position");
  for (const int64_t i : {0, 15, 16, 63, 99}) {
    expect_fault(broken([&](Reference& p) { zero_value(p, 5 + i); }), Fault::stored_zero, 0, 140, "zero in a bitmap");
  }
  for (const int64_t i : {0, 255}) {
    expect_fault(broken([&](Reference& p) { zero_value(p, 105 + i); }), Fault::stored_zero, 0, 150, "zero, saturated");
  }
  expect_fault(broken([&](Reference& p) { zero_value(p, 5 + 3 + 100 + 256 + 255); }), Fault::stored_zero, 1, 160,
               "zero in column 1");
  expect_fault(broken([&](Reference& p) { p.values[item - 1] = 0x80, std::fill_n(p.values.begin(), item - 1, 0); }),
               Fault::stored_zero, 0, 3, "minus zero");
  expect_fault(broken([](Reference& p) { p.counts[T + 7] = 101; }), Fault::count_too_large, 1, 7, "count 101 of 100");
  expect_fault(broken([](Reference& p) { p.counts[3] = 4; }), Fault::tile_ptr, 0, 128, "count 4 for 5");
  expect_fault(broken([](Reference& p) { p.counts[190] = 1; }), Fault::tile_ptr, 1, 0, "count 1 for 0");
  expect_fault(broken([](Reference& p) { p.tile_ptr[0] = 1; }), Fault::tile_ptr, 0, 0, "first start");
  expect_fault(broken([](Reference& p) { p.tile_ptr[2] = -1; }), Fault::tile_ptr, 0, 128, "negative start");
  expect_fault(broken([](Reference& p) { p.tile_ptr[5] += 1; }), Fault::tile_ptr, 1, 0, "a column's start");
  expect_fault(broken([](Reference& p) { p.tile_ptr[4] = INT64_MIN; }), Fault::tile_ptr, 1, 0, "start far below");
  expect_fault(broken([](Reference& p) { p.tile_ptr[6] = INT64_MAX; }), Fault::tile_ptr, 1, 128, "start far beyond");
  expect_fault(broken([](Reference& p) { p.index.pop_back(); }), Fault::index_size, 1, 128, "index cut");
  expect_fault(broken([](Reference& p) { p.index.push_back(0); }), Fault::index_size, 1, -1, "index too long");
  expect_fault(broken([&](Reference& p) { p.values.resize(p.values.size() - item); }), Fault::values_size, 1, -1,
               "values cut");
  expect_fault(broken([&](Reference& p) { p.values.resize(p.values.size() + item); }), Fault::values_size, 1, -1,
               "values too long");
  Encoded minus_zero =
      broken([&](Reference& p) { p.values[item - 1] = 0x80, std::fill_n(p.values.begin(), item - 1, 0); });
  Bytes out(T * F * item);
  require(decode(minus_zero.view(), true, out.data(), F, run_serially).ok(), "minus zero may be stored if asked for");
}

// No byte sequence may crash, or decode to anything that check refuses. Most useful under a sanitizer.
void test_random_damage(DType dtype) {
  const int64_t T = 140, F = 300;
  const Bits x = make_matrix(dtype, Pattern::exact_counts, 0, T, F);
  const Encoded good = encode(dtype, x, T, F, {}, F, 0, 256, F, run_serially);
  for (int i = 0; i < 300; ++i) {
    context = "random damage " + std::to_string(i);
    Encoded e = good;
    Bytes* planes[] = {&e.planes.counts, &e.planes.index, &e.planes.values};
    for (int64_t n = 1 + below(3); n > 0; --n) {
      Bytes& plane = *planes[below(3)];
      plane[below(static_cast<int64_t>(plane.size()))] = static_cast<uint8_t>(rng());
    }
    if (below(4) == 0) e.planes.tile_ptr[below(8)] += below(300) - 150;
    if (below(4) == 0) e.planes.index.resize(below(static_cast<int64_t>(e.planes.index.size())));
    Buffer out(T * F * item_bytes(dtype), 1);
    const Status decoded = decode(e.view(), false, out.data(), F, run_serially);
    const Status checked = check(e.view(), false, run_serially);
    require(decoded.fault == checked.fault && decoded.token == checked.token, "decode and check disagree");
    require(out.guard_intact(), "decode wrote out of bounds");
    std::vector<int64_t> tokens(T);
    Buffer values(T * item_bytes(dtype), 1);
    int64_t n = 0;
    neuron(e.view(), below(F), tokens.data(), values.data(), &n);
    require(values.guard_intact(), "neuron wrote out of bounds");
    PlaneSizes sizes;
    slice_sizes(e.view(), below(T), T, &sizes, run_serially);
  }
}

void test_transforms(DType dtype) {
  context = std::string("transforms ") + name(dtype);
  const int64_t item = item_bytes(dtype);
  const int64_t T = 300, F = 600;
  const Bits x = make_matrix(dtype, Pattern::exact_counts, 0, T, F);
  const Encoded e = encode(dtype, x, T, F, {}, F, 0, 512, F, run_serially);
  const auto rows = [&](int64_t start, int64_t stop) { return Bits(x.begin() + start * F, x.begin() + stop * F); };
  const auto empty_planes = [&](int64_t n_tokens, int64_t index_size, int64_t n_values) {
    return Reference{Bytes(3 * n_tokens), Bytes(index_size), Bytes(n_values * item),
                     std::vector<int64_t>(2 * 3 * n_tiles(n_tokens))};
  };
  const auto planes = [](Reference& r) {
    return Planes{r.counts.data(), r.index.data(), r.values.data(), r.tile_ptr.data()};
  };

  std::vector<Encoded> parts;
  const int64_t cuts[] = {0, 0, 1, 127, 129, 256, 300, 300};
  for (int i = 0; i + 1 < 8; ++i) {
    PlaneSizes sizes;
    require(slice_sizes(e.view(), cuts[i], cuts[i + 1], &sizes, run_in_two_threads).ok(), "slice_sizes");
    Reference part = empty_planes(cuts[i + 1] - cuts[i], sizes.index_bytes, sizes.n_values);
    require(slice(e.view(), cuts[i], cuts[i + 1], planes(part), run_in_two_threads).ok(), "slice");
    compare(part, reference_encode(dtype, rows(cuts[i], cuts[i + 1]), cuts[i + 1] - cuts[i], F, {}));
    parts.push_back({dtype, cuts[i + 1] - cuts[i], F, part});
  }

  std::vector<int64_t> few = {299, 0}, many = {299, 0, 128, 128, 7};  // looked up one by one, and in one walk
  for (const std::vector<int64_t>& tokens : {few, many}) {
    const int64_t n = static_cast<int64_t>(tokens.size());
    PlaneSizes bases[4];
    require(take_sizes(e.view(), tokens.data(), n, bases, run_in_two_threads).ok(), "take_sizes");
    Reference part = empty_planes(n, bases[3].index_bytes, bases[3].n_values);
    require(take(e.view(), tokens.data(), n, bases, planes(part), run_in_two_threads).ok(), "take");
    Bits taken;
    for (const int64_t token : tokens) {
      const Bits row = rows(token, token + 1);
      taken.insert(taken.end(), row.begin(), row.end());
    }
    compare(part, reference_encode(dtype, taken, n, F, {}));
  }
  std::vector<Encoding> views;
  for (const Encoded& part : parts) views.push_back(part.view());
  Reference whole = empty_planes(T, e.view().index_bytes, e.view().n_values);
  require(cat(views.data(), static_cast<int64_t>(views.size()), planes(whole), run_in_two_threads).ok(), "cat");
  compare(whole, e.planes);

  for (const int64_t feature : {0, 7, 255, 256, 511, 512, 599}) {
    int64_t n = -1;
    std::vector<int64_t> tokens(T);
    Bytes values(T * item);
    require(neuron(e.view(), feature, tokens.data(), values.data(), &n).ok(), "neuron");
    int64_t found = 0;
    for (int64_t t = 0; t < T; ++t) {
      const uint32_t bits = x[t * F + feature];
      if (bits == 0) continue;
      require(found < n && tokens[found] == t && std::memcmp(&values[found * item], &bits, item) == 0,
              "neuron differs");
      ++found;
    }
    require(found == n, "neuron found too many");
  }

  std::vector<int64_t> crow(T + 1), col(e.view().n_values);
  Bytes values(e.view().n_values * item);
  require(to_csr(e.view(), crow.data(), col.data(), values.data(), run_in_two_threads).ok(), "to_csr");
  int64_t at = 0;
  for (int64_t t = 0; t < T; ++t) {
    require(crow[t] == at, "crow differs");
    for (int64_t f = 0; f < F; ++f) {
      const uint32_t bits = x[t * F + f];
      if (bits == 0) continue;
      require(col[at] == f && std::memcmp(&values[at * item], &bits, item) == 0, "CSR differs");
      ++at;
    }
  }
  require(crow[T] == at, "crow's end differs");

  std::vector<int64_t> starts(2 * n_tiles(T));
  PlaneSizes total;
  const int64_t* column_1 = e.planes.tile_ptr.data() + 2 * n_tiles(T);
  require(column_starts(e.planes.counts.data() + T, e.planes.index.data() + column_1[0],
                        e.view().index_bytes - column_1[0], T, 256, starts.data(), &total)
              .ok(),
          "column_starts");
  for (int64_t i = 0; i < 2 * n_tiles(T); ++i) require(starts[i] == column_1[i] - column_1[i % 2], "starts differ");
  require(total.index_bytes == column_1[2 * n_tiles(T)] - column_1[0], "index total differs");
}

bool cpu_runs(const Kernels& table) {
  for (const char* const* isa_name = available_isas(); *isa_name != nullptr; ++isa_name) {
    if (std::strcmp(*isa_name, table.name) == 0) return true;
#if defined(PYFACTS_VBMI2_EMULATED)
    if (std::strcmp(*isa_name, "avx512") == 0 && std::strcmp(table.name, "avx512vbmi2") == 0) return true;
#endif
  }
  return false;
}

}  // namespace

int main() {
  const Kernels* tables[] = {
      &kKernelsScalar,
#if defined(__x86_64__)
      &kKernelsAvx2,
      &kKernelsAvx512,
      &kKernelsAvx512Vbmi2,
#endif
  };
  for (const Kernels* table : tables) {
    if (!cpu_runs(*table)) {
      std::printf("%-12s not run by this CPU\n", table->name);
      continue;
    }
    use_kernels(*table);
    n_checks = 0;
    test_round_trips();
    test_suits_two_passes();
    for (const DType dtype : kDTypes) {
      test_changed_matrix(dtype);
      test_thresholds(dtype);
      test_large(dtype);
      test_faults(dtype);
      test_random_damage(dtype);
      test_transforms(dtype);
    }
    std::printf("%-12s %lld checks passed\n", table->name, static_cast<long long>(n_checks));
  }
  return 0;
}
