#include "sparse_rows.h"

#include <algorithm>
#include <cstring>

#include "parallel.h"

namespace pyfacts::cpu {
namespace {

// The entries of one token in one column.
struct Run {
  const Entry* begin;
  const Entry* end;
  int64_t column;
  int64_t size() const { return end - begin; }
};

// body(token, run) for the segments of a tile that store something, token by token.
template <typename Body>
void for_runs(const SparseRows& rows, int64_t tile, Body body) {
  const int64_t last = tile * kTileTokens + tile_tokens(rows.n_tokens(), tile);
  for (int64_t token = tile * kTileTokens; token < last; ++token) {
    const Entry* at = rows.entries.data() + rows.starts[token];
    const Entry* const end = rows.entries.data() + rows.starts[token + 1];
    while (at != end) {
      Run run = {at, at, at->feature / kColumnWidth};
      while (run.end != end && run.end->feature / kColumnWidth == run.column) ++run.end;
      body(token, run);
      at = run.end;
    }
  }
}

// Appends the positions or the bitmap of a segment.
void append_index(const Run& run, int64_t width, uint8_t*& index) {
  if (has_positions(run.size(), width)) {
    for (const Entry* entry = run.begin; entry != run.end; ++entry) {
      *index++ = static_cast<uint8_t>(entry->feature % kColumnWidth);
    }
    return;
  }
  std::memset(index, 0, bitmap_bytes(width));
  for (const Entry* entry = run.begin; entry != run.end; ++entry) {
    const uint32_t j = entry->feature % kColumnWidth;
    index[j / 8] |= static_cast<uint8_t>(1u << (j % 8));
  }
  index += bitmap_bytes(width);
}

void append_values(const Run& run, int64_t item, uint8_t*& values) {
  for (const Entry* entry = run.begin; entry != run.end; ++entry, values += item) {
    std::memcpy(values, &entry->bits, item);  // little-endian, like the format
  }
}

}  // namespace

PlaneSizes count(const SparseRows& rows, uint8_t* counts, int64_t* tile_ptr, ParallelFor parallel_for) {
  const int64_t n_tokens = rows.n_tokens();
  const int64_t columns = n_columns(rows.n_features);
  const int64_t tiles = n_tiles(n_tokens);
  std::fill_n(counts, columns * n_tokens, 0);
  std::fill_n(tile_ptr, 2 * columns * tiles, 0);
  parallel(tiles, parallel_for, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      for_runs(rows, tile, [&](int64_t token, const Run& run) {
        const int64_t n = run.size();
        counts[run.column * n_tokens + token] = static_cast<uint8_t>(n < kCountSaturated ? n : kCountSaturated);
        int64_t* const size = tile_ptr + 2 * (run.column * tiles + tile);
        size[0] += index_bytes(n, column_width(rows.n_features, run.column));
        size[1] += n;
      });
    }
  });
  return starts_from_sizes(tile_ptr, columns * tiles);
}

void pack(const SparseRows& rows, const int64_t* tile_ptr, uint8_t* index, void* values, ParallelFor parallel_for) {
  struct Cursor {
    uint8_t* index;
    uint8_t* values;
  };
  const int64_t columns = n_columns(rows.n_features);
  const int64_t tiles = n_tiles(rows.n_tokens());
  const int64_t item = item_bytes(rows.dtype);
  parallel(tiles, parallel_for, [&](int64_t begin, int64_t end) {
    std::vector<Cursor> cursors(columns);
    for (int64_t tile = begin; tile < end; ++tile) {
      for (int64_t column = 0; column < columns; ++column) {
        const int64_t* const start = tile_ptr + 2 * (column * tiles + tile);
        cursors[column] = {index + start[0], static_cast<uint8_t*>(values) + start[1] * item};
      }
      for_runs(rows, tile, [&](int64_t, const Run& run) {
        Cursor& cursor = cursors[run.column];
        append_index(run, column_width(rows.n_features, run.column), cursor.index);
        append_values(run, item, cursor.values);
      });
    }
  });
}

}  // namespace pyfacts::cpu
