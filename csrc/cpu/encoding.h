// The torch-free CPU interface to the encoding: what ops.cpp and the storage library call.
//
// Nothing here throws for bad data: functions that read an encoding return a Status that says what is
// wrong and where. Callers own all buffers.
#pragma once

#include <cstdint>
#include <limits>
#include <memory>

#include "../format.h"

namespace pyfacts::cpu {

// Spreads [0, n) over threads: calls body(begin, end, context) on disjoint ranges that cover it.
// The signature is that of torch_parallel_for's callback, so torch's own pool can serve.
using ParallelBody = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = void (*)(int64_t n, ParallelBody body, void* context);
void run_serially(int64_t n, ParallelBody body, void* context);

enum class Fault : uint8_t {
  none,
  index_size,       // the index plane has other bytes than the counts ask for
  values_size,      // the value plane has other values than the counts ask for
  tile_ptr,         // a tile start differs from the sum of the counts before it
  count_too_large,  // a count byte exceeds the column's width
  position_order,   // positions are not strictly ascending
  position_range,   // a position is at or beyond the column's width
  bitmap_count,     // a bitmap's popcount differs from its count byte
  bitmap_sparse,    // a bitmap stands where positions are due (popcount <= ceil(w/8) behind a larger count)
  spare_bits,       // bits beyond the column's width are set in a bitmap
  stored_zero,      // a stored value is zero where none may be
};
const char* describe(Fault fault);

struct Status {
  Fault fault = Fault::none;
  int64_t column = -1;
  int64_t token = -1;
  bool ok() const { return fault == Fault::none; }
};

// A canonical encoding in memory. Only `n_tokens`, `n_features` and the plane sizes are trusted.
struct Encoding {
  DType dtype;
  int64_t n_tokens;
  int64_t n_features;
  const uint8_t* counts;  // [n_columns, n_tokens]
  const uint8_t* index;   // [index_bytes]
  int64_t index_bytes;
  const void* values;  // [n_values] of dtype
  int64_t n_values;
  const int64_t* tile_ptr;  // [n_columns, n_tiles, 2]
};

// The planes to be written; sizes as above.
struct Planes {
  uint8_t* counts;
  uint8_t* index;
  void* values;
  int64_t* tile_ptr;
};

// How much the planes hold; also where something starts in them.
struct PlaneSizes {
  int64_t index_bytes = 0;
  int64_t n_values = 0;
};

// What a value must satisfy to be stored: |x| > min_abs or NaN, or (signed_zero) x is -0.0, or x > its feature's
// threshold. ReLU and JumpReLU are thresholds alone: `above`.
struct Keep {
  double min_abs = 0.0;  // >= 0
  bool signed_zero = false;
  const uint8_t* thresholds = nullptr;  // [n_columns * 256] of the matrix's dtype, none negative

  static Keep above(const uint8_t* thresholds) { return {std::numeric_limits<double>::infinity(), false, thresholds}; }
};

// A dense matrix [n_tokens, n_features]: unit feature stride, `row_stride` elements between rows, any alignment.
struct Dense {
  DType dtype;
  const void* data;
  int64_t row_stride;
  int64_t n_tokens;
  int64_t n_features;
};

// Encodes a matrix that arrives in blocks and whose packed size is not known beforehand; each block is read once.
// add() packs a block into staging memory, in parallel over tiles; finish() lays the columns out.
class Encoder {
 public:
  // `counts` [n_columns, n_tokens] is written by add.
  Encoder(DType dtype, int64_t n_tokens, int64_t n_features, Keep keep, uint8_t* counts);
  ~Encoder();
  // The block's place in the matrix is in whole tiles and columns; so is its size, but at the matrix's edges.
  void add(const Dense& block, int64_t first_token, int64_t first_feature, ParallelFor parallel_for);
  PlaneSizes sizes() const;
  // Writes index, values and tile_ptr once every block has come.
  void finish(uint8_t* index, void* values, int64_t* tile_ptr, ParallelFor parallel_for);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// The same bytes for a matrix that is all there, which is read twice: count() writes counts and tile_ptr and returns
// the sizes of the other planes, pack() writes those. pack() is false if the matrix has changed since in its sizes; the
// planes are then worthless.
PlaneSizes count(const Dense& x, Keep keep, uint8_t* counts, int64_t* tile_ptr, ParallelFor parallel_for);
bool pack(const Dense& x, Keep keep, const int64_t* tile_ptr, PlaneSizes sizes, uint8_t* index, void* values,
          ParallelFor parallel_for);
// Turns the sizes of the runs in tile_ptr [n_runs, 2] into their starts; returns the sums.
PlaneSizes starts_from_sizes(int64_t* tile_ptr, int64_t n_runs);
// Whether these two passes are better than an Encoder, which stages all that it packs: by the density of some rows.
bool suits_two_passes(const Dense& x, Keep keep);

// Checks counts, plane sizes and tile_ptr against each other: after it, every segment lies in bounds.
Status check_layout(const Encoding& encoding, ParallelFor parallel_for);

// Checks everything: the layout, positions, bitmaps, and that no zero is stored
// (-0.0 passes if signed_zero).
Status check(const Encoding& encoding, bool signed_zero, ParallelFor parallel_for);

// Writes the dense matrix [n_tokens, n_features] with `row_stride` elements between rows; checks all that check()
// checks on the way.
Status decode(const Encoding& encoding, bool signed_zero, void* out, int64_t row_stride, ParallelFor parallel_for);

// Tile starts of one column from its counts and index; also the column's totals. Reads no more than `index_bytes`.
// tile_ptr [n_tiles, 2] gets starts relative to the column's own.
Status column_starts(const uint8_t* counts, const uint8_t* index, int64_t index_bytes, int64_t n_tokens, int64_t width,
                     int64_t* tile_ptr, PlaneSizes* total);

// One feature: tokens [n], ascending, and values [n], each with room for n_tokens. Returns n through `n_found`. Checks
// the segments it reads.
Status neuron(const Encoding& encoding, int64_t feature, int64_t* tokens, void* values, int64_t* n_found);

// CSR: crow [n_tokens + 1], col [n_values] ascending within a row, values [n_values].
Status to_csr(const Encoding& encoding, int64_t* crow, int64_t* col, void* values, ParallelFor parallel_for);

// Tokens [start, stop): first the sizes, then the planes, of an encoding that slice_sizes has found valid.
Status slice_sizes(const Encoding& encoding, int64_t start, int64_t stop, PlaneSizes* sizes, ParallelFor parallel_for);
Status slice(const Encoding& encoding, int64_t start, int64_t stop, const Planes& out, ParallelFor parallel_for);

// n tokens in any order, each any number of times: first where each column begins in the new planes, and behind the
// last their sizes, bases [n_columns + 1]; then the planes, of an encoding and tokens that take_sizes has found valid.
Status take_sizes(const Encoding& encoding, const int64_t* tokens, int64_t n, PlaneSizes* bases,
                  ParallelFor parallel_for);
Status take(const Encoding& encoding, const int64_t* tokens, int64_t n, const PlaneSizes* bases, const Planes& out,
            ParallelFor parallel_for);

// Stacks encodings of equal dtype and n_features by token. Sizes add up.
Status cat(const Encoding* encodings, int64_t n_encodings, const Planes& out, ParallelFor parallel_for);

// The instruction set in use: "scalar", "avx2", "avx512" or "avx512vbmi2"; PYFACTS_ISA forces one.
const char* isa();
// Why PYFACTS_ISA could not be honoured, or nullptr. Then isa() is the best that the CPU has.
const char* isa_error();
// Names of those this CPU runs, best last; nullptr-terminated.
const char* const* available_isas();

}  // namespace pyfacts::cpu
