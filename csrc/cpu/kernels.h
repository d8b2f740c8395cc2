// What an instruction set supplies: packing and unpacking one tile (up to 128 tokens) of one group of columns.
//
// This header is included by files compiled with -m flags. It therefore holds plain structs and constants only: an
// inline function here would be compiled once per instruction set, and the linker would keep any one of them for all.
#pragma once

#include <cstdint>

#include "../format.h"

namespace pyfacts::cpu {

// Columns packed together: a row's part of a group is read (or written) in one sweep, while the 2 x 16 write streams
// stay in L1 and the packed tile in L2. 32 columns were 8 % slower for bf16 at 10 % density, and a little faster at 1
// %.
constexpr int64_t kGroupColumns = 16;

// Kernels may write this far beyond a run that they pack, and read this far beyond a run that they unpack.
constexpr int64_t kSlackBytes = 64;

struct DenseTile {
  const uint8_t* rows;  // [n_rows, ...] any alignment
  int64_t row_bytes;    // from one row to the next
  int64_t n_rows;       // <= kTileTokens
  int64_t n_columns;
  int64_t last_width;  // width of the last of these columns; 256 of the others
  Predicate predicate;
};

struct CountTile {
  DenseTile x;        // whole rows are read fastest
  uint8_t* counts;    // [n_rows, n_columns] out
  int64_t* n_values;  // [n_columns] out: a count byte of 255 may stand for 256
};

struct EncodeTile {
  DenseTile x;       // n_columns <= kGroupColumns
  uint8_t* counts;   // [n_rows, kGroupColumns] out
  uint8_t** index;   // [n_columns] write cursors, advanced
  uint8_t** values;  // [n_columns]
};

struct DecodeTile {
  const uint8_t* counts;  // [n_rows, kGroupColumns]
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

// All variants write identical bytes. The number is the bits of an element.
// decode returns false if a segment breaks the format; scalar code then finds out which and why.
struct Kernels {
  const char* name;
  void (*count16)(const CountTile& tile);
  void (*count32)(const CountTile& tile);
  void (*encode16)(const EncodeTile& tile);
  void (*encode32)(const EncodeTile& tile);
  bool (*decode16)(const DecodeTile& tile);
  bool (*decode32)(const DecodeTile& tile);
  // memcpy past the caches; fence() makes what was copied visible to other threads.
  void (*stream)(const uint8_t* from, uint8_t* to, int64_t n_bytes);
  void (*fence)();
};

extern const Kernels kKernelsScalar;
#if defined(__x86_64__)
extern const Kernels kKernelsAvx2;
extern const Kernels kKernelsAvx512;
extern const Kernels kKernelsAvx512Vbmi2;
#endif

}  // namespace pyfacts::cpu
