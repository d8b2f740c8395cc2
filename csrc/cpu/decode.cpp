// Writes the dense matrix. A task unpacks a tile: 128 tokens of a group of 16 columns, row by row, so that the output
// is written in long sequential pieces and never read.
//
// Floor: streaming zeros to the output, 20 ms for 4096 x 16384 bf16 on a core whose memcpy takes 26.8 ms. Measured into
// touched memory with AVX-512, before it prefetched what it reads, at 1, 3, 10, 50 %: 0.96, 0.92, 0.74, 0.35 x memcpy
// (fp32 1.0, 0.96, 0.8, 0.54 x); with AVX2 prefetches halved the time from 3 % on (vector_tile.h). Fresh
// memory adds 28 ms for the kernel's zeroing of huge pages, 65 ms on 4 KiB pages, without the advice.
#include "dispatch.h"
#include "encoding.h"
#include "memory.h"
#include "parallel.h"
#include "run_reader.h"
#include "segments.h"

namespace pyfacts::cpu {
namespace {

bool decode_tile(const Encoding& encoding, int64_t first_token, int64_t first_column, uint32_t zero_mask, uint8_t* out,
                 int64_t row_bytes, bool stream) {
  const int64_t item = item_bytes(encoding.dtype);
  const int64_t columns = n_columns(encoding.n_features);
  const int64_t tiles = n_tiles(encoding.n_tokens);
  const int64_t n = columns - first_column < kUnpackColumns ? columns - first_column : kUnpackColumns;
  const int64_t n_rows = tile_tokens(encoding.n_tokens, first_token / kTileTokens);

  alignas(64) uint8_t counts[kTileTokens * kUnpackColumns];
  const uint8_t* index[kUnpackColumns];
  const uint8_t* values[kUnpackColumns];
  RunReader index_runs[kUnpackColumns];
  RunReader value_runs[kUnpackColumns];
  for (int64_t c = 0; c < n; ++c) {
    const uint8_t* column_counts = encoding.counts + (first_column + c) * encoding.n_tokens + first_token;
    for (int64_t row = 0; row < n_rows; ++row) counts[row * kUnpackColumns + c] = column_counts[row];

    const int64_t run = (first_column + c) * tiles + first_token / kTileTokens;
    const PlaneSizes begin = run_start(encoding, run), end = run_start(encoding, run + 1);
    index[c] = index_runs[c].open(encoding.index, encoding.index_bytes, begin.index_bytes, end.index_bytes);
    values[c] = value_runs[c].open(static_cast<const uint8_t*>(encoding.values), encoding.n_values * item,
                                   begin.n_values * item, end.n_values * item);
  }
  const DecodeTile tile = {counts,
                           index,
                           values,
                           n_rows,
                           n,
                           column_width(encoding.n_features, first_column + n - 1),
                           out + first_token * row_bytes + first_column * kColumnWidth * item,
                           row_bytes,
                           zero_mask,
                           stream};
  return (item == 4 ? kernels().decode32 : kernels().decode16)(tile);
}

}  // namespace

Status decode(const Encoding& encoding, bool signed_zero, void* out, int64_t row_stride, ParallelFor parallel_for) {
  const Status layout = check_layout(encoding, parallel_for);
  if (!layout.ok()) return layout;
  const int64_t groups = ceil_div(n_columns(encoding.n_features), kUnpackColumns);
  const int64_t row_bytes = row_stride * item_bytes(encoding.dtype);
  const int64_t out_bytes = row_bytes * encoding.n_tokens;
  const uint32_t zero_mask = nonzero_mask(encoding.dtype, signed_zero);
  advise_huge_pages(out, out_bytes);
  const Status status = parallel_check(n_tiles(encoding.n_tokens) * groups, parallel_for, [&](int64_t task) -> Status {
    const bool ok = decode_tile(encoding, task / groups * kTileTokens, task % groups * kUnpackColumns, zero_mask,
                                static_cast<uint8_t*>(out), row_bytes, out_bytes >= kStreamBytes);
    return {ok ? Fault::none : Fault::bitmap_count, -1, -1};
  });
  // The kernels only notice that something is wrong. What and where is for the slow path to say.
  if (status.ok()) return status;
  const Status exact = check(encoding, signed_zero, parallel_for);
  return exact.ok() ? status : exact;
}

}  // namespace pyfacts::cpu
