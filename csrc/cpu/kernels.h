// What an instruction set supplies: packing and unpacking one tile (up to 128 tokens) of one group of columns.
//
// This header is included by files compiled with -m flags. It therefore holds plain structs and constants only: an
// inline function here would be compiled once per instruction set, and the linker would keep any one of them for all.
#pragma once

#include <cstdint>

#include "../format.h"

namespace pyfacts::cpu {

// Columns packed together, and unpacked together: a row's part of a group is read (or written) in one sweep, while the
// streams of the columns' runs stay in L1 and the packed tile in L2. Packing 16 columns was 10 to 15 % slower on Zen 5,
// 4 columns 5 to 10 % (bf16).
constexpr int64_t kPackColumns = 8;
constexpr int64_t kUnpackColumns = 16;

// Kernels may write this far beyond a run that they pack, and read this far beyond a run that they unpack.
constexpr int64_t kSlackBytes = 64;

struct DenseTile {
  const uint8_t* rows;  // [n_rows, ...] any alignment
  int64_t row_bytes;    // from one row to the next
  int64_t n_rows;       // <= kTileTokens
  int64_t n_columns;
  int64_t last_width;  // width of the last of these columns; 256 of the others
  Predicate predicate;
  const uint8_t* thresholds;  // [n_columns * 256] non-negative elements, or nullptr: what is above its feature's is
                              // stored too
};

struct CountTile {
  DenseTile x;        // whole rows are read fastest
  uint8_t* counts;    // [n_rows, n_columns] out: stores to one line a column would keep its lines out of L1
  int64_t* n_values;  // [n_columns] out: a count byte of 255 may stand for 256
};

// A segment in which to find what is above a non-negative element, or satisfies the predicate.
struct Search {
  const uint8_t* x;
  int64_t width;
  Predicate predicate;
  uint32_t floor;
  uint64_t* found;  // [4] out: one bit per element
};

struct EncodeTile {
  DenseTile x;               // n_columns <= kPackColumns
  const uint8_t* next_rows;  // of the tile that is packed next, to prefetch; any address will do
  uint8_t* counts;           // [n_columns, kTileTokens] out
  uint8_t** index;           // [n_columns] write cursors, advanced
  uint8_t** values;          // [n_columns]
};

struct DecodeTile {
  const uint8_t* counts;  // [n_rows, kUnpackColumns]
  const uint8_t** index;  // [n_columns] read cursors, advanced
  const uint8_t** values;
  int64_t n_rows;
  int64_t n_columns;
  int64_t last_width;
  uint8_t* out;        // [n_rows, ...] any alignment
  int64_t row_bytes;   // from one row to the next
  uint32_t zero_mask;  // a stored x is a zero, and so an error, iff (x & zero_mask) == 0
  bool stream;         // write past the caches
};

// ---- Products with an encoding: see sparse_linear.cpp --------------------------------------------------------------

// Floats of an output row that are summed at a time, and the multiple to which narrower rows are padded.
constexpr int64_t kSlabFloats = 128;
constexpr int64_t kSlabMultiple = 16;

// Kernels may write this many entries beyond a list that they unpack.
constexpr int64_t kListSlack = 16;

// A tile of tokens as lists: the stored values of a token, and the feature of each, counted from the first column's.
struct ListTile {
  const uint8_t* counts;  // [n_rows, n_columns]
  const uint8_t** index;  // [n_columns] read cursors, advanced
  const uint8_t** values;
  int64_t n_rows;
  int64_t n_columns;
  int64_t last_width;
  uint32_t zero_mask;  // as in DecodeTile
  int64_t* starts;     // [n_rows + 1] out: where each row's list begins, and the last ends
  uint32_t* inner;     // [starts[n_rows]] out
  float* factor;       // ditto
};

// sums[row] = begin + factor[i] * dense[inner[i]] + ..., over the row's list, in order, each step rounded.
struct ListSums {
  const int64_t* starts;
  const uint32_t* inner;
  const float* factor;
  int64_t n_rows;
  const float* dense;  // [..., width]
  int64_t width;       // a multiple of kSlabMultiple, at most kSlabFloats
  const float* begin;  // [width], or nullptr: go on from what sums holds
  float* sums;         // [n_rows, width]
};

// What depends on the dtype. list is false if a segment breaks the format.
struct Conversions {
  bool (*list)(const ListTile& tile);
  void (*widen)(const uint8_t* from, int64_t n, float* to);   // fills up with zeros to a multiple of kSlabMultiple
  void (*narrow)(const float* from, int64_t n, uint8_t* to);  // to the nearest, ties to even
};

// All variants write identical bytes, but for the payloads of NaNs in sums. The number is the bits of an element.
// decode returns false if a segment breaks the format; scalar code then finds out which and why.
struct Kernels {
  const char* name;
  void (*count16)(const CountTile& tile);
  void (*count32)(const CountTile& tile);
  void (*search16)(const Search& search);
  void (*search32)(const Search& search);
  void (*encode16)(const EncodeTile& tile);
  void (*encode32)(const EncodeTile& tile);
  bool (*decode16)(const DecodeTile& tile);
  bool (*decode32)(const DecodeTile& tile);
  // memcpy past the caches; fence() makes what was copied visible to other threads.
  void (*stream)(const uint8_t* from, uint8_t* to, int64_t n_bytes);
  void (*fence)();
  Conversions conversions[3];  // by DType
  void (*sum_lists)(const ListSums& sums);
};

extern const Kernels kKernelsScalar;
#if defined(__x86_64__)
extern const Kernels kKernelsAvx2;
extern const Kernels kKernelsAvx512;
extern const Kernels kKernelsAvx512Vbmi2;
#endif

// ---- Bounds of a product: see bounds.h -----------------------------------------------------------------------------

struct RowNorms {
  double whole;
  double rounded;
  double rest;  // whole - rounded, element by element
};

struct BoundKernels {
  RowNorms (*round_row)(const float* row, int64_t n, uint16_t* rounded);  // to bfloat16
  float (*dot)(const float* x, const float* row, int64_t n);
};

#if defined(__x86_64__)
extern const BoundKernels kBoundKernelsAvx512Bf16;
#endif

}  // namespace pyfacts::cpu
