// What can be done with an encoding without making it dense: slices, chosen tokens, stacks, one feature, CSR.
// They walk segments one by one (see segments.h) and move packed bytes.
#include <cstring>
#include <memory>

#include "encoding.h"
#include "memory.h"
#include "parallel.h"
#include "segments.h"

namespace pyfacts::cpu {
namespace {

// Where a column's segment of one token starts in the planes. token may be n_tokens. The layout must have been checked.
PlaneSizes locate(const Encoding& encoding, int64_t column, int64_t token) {
  const int64_t tiles = n_tiles(encoding.n_tokens);
  if (token == encoding.n_tokens) return run_start(encoding, (column + 1) * tiles);
  ColumnReader segment(encoding, column, token / kTileTokens);
  while (segment.token() < token) segment.next();
  const auto* values = static_cast<const uint8_t*>(encoding.values);
  return {segment.index() - encoding.index, (segment.values() - values) / item_bytes(encoding.dtype)};
}

// A column's part of the tokens [start, stop) of one encoding, to be copied.
struct Piece {
  const Encoding* encoding;
  PlaneSizes begin;
  PlaneSizes end;
  int64_t start;
  int64_t stop;
};

// Appends a piece at the cursors of the output's planes.
void copy_piece(const Piece& piece, int64_t column, int64_t item, uint8_t** counts, uint8_t** index, uint8_t** values) {
  const Encoding& e = *piece.encoding;
  const auto append = [](uint8_t** out, const void* from, int64_t first_byte, int64_t n_bytes) {
    if (n_bytes > 0) std::memcpy(*out, static_cast<const uint8_t*>(from) + first_byte, n_bytes);
    *out += n_bytes;
  };
  append(counts, e.counts, column * e.n_tokens + piece.start, piece.stop - piece.start);
  append(index, e.index, piece.begin.index_bytes, piece.end.index_bytes - piece.begin.index_bytes);
  append(values, e.values, piece.begin.n_values * item, (piece.end.n_values - piece.begin.n_values) * item);
}

// Recomputes one finished column's starts, which begin at `base` in the planes.
Status write_starts(const Planes& out, int64_t column, int64_t n_tokens, int64_t width, PlaneSizes base,
                    int64_t index_bytes) {
  PlaneSizes total;
  int64_t* starts = out.tile_ptr + 2 * column * n_tiles(n_tokens);
  const Status status = column_starts(out.counts + column * n_tokens, out.index + base.index_bytes, index_bytes,
                                      n_tokens, width, starts, &total);
  for (int64_t tile = 0; tile < n_tiles(n_tokens); ++tile) {
    starts[2 * tile] += base.index_bytes;
    starts[2 * tile + 1] += base.n_values;
  }
  return status;
}

// Lays the pieces of every column end to end. piece(i, column) gives the i-th.
template <typename MakePiece>
Status stack_pieces(int64_t n_pieces, int64_t n_tokens, int64_t n_features, DType dtype, const Planes& out,
                    ParallelFor parallel_for, MakePiece piece) {
  const int64_t item = item_bytes(dtype);
  const int64_t columns = n_columns(n_features);
  auto bases = std::make_unique<PlaneSizes[]>(columns + 1);
  for (int64_t column = 0; column < columns; ++column) {
    bases[column + 1] = bases[column];
    for (int64_t i = 0; i < n_pieces; ++i) {
      const Piece p = piece(i, column);
      bases[column + 1].index_bytes += p.end.index_bytes - p.begin.index_bytes;
      bases[column + 1].n_values += p.end.n_values - p.begin.n_values;
    }
  }
  advise_huge_pages(out.index, bases[columns].index_bytes);
  advise_huge_pages(out.values, bases[columns].n_values * item);
  return parallel_check(columns, parallel_for, [&](int64_t column) -> Status {
    uint8_t* counts = out.counts + column * n_tokens;
    uint8_t* index = out.index + bases[column].index_bytes;
    uint8_t* values = static_cast<uint8_t*>(out.values) + bases[column].n_values * item;
    for (int64_t i = 0; i < n_pieces; ++i) copy_piece(piece(i, column), column, item, &counts, &index, &values);
    return write_starts(out, column, n_tokens, column_width(n_features, column), bases[column],
                        bases[column + 1].index_bytes - bases[column].index_bytes);
  });
}

Piece make_piece(const Encoding& encoding, int64_t column, int64_t start, int64_t stop) {
  if (start >= stop) return {&encoding, {0, 0}, {0, 0}, start, start};
  return {&encoding, locate(encoding, column, start), locate(encoding, column, stop), start, stop};
}

// Single tokens of a column as pieces: where many are asked for, their places are found in one walk through the column.
class TokenPieces {
 public:
  TokenPieces(const Encoding& encoding, int64_t column, int64_t n_asked) : encoding_(encoding), column_(column) {
    if (n_asked * kTileTokens < encoding.n_tokens) return;
    starts_.reset(new PlaneSizes[encoding.n_tokens + 1]);
    const auto* const values = static_cast<const uint8_t*>(encoding.values);
    const int64_t item = item_bytes(encoding.dtype);
    for (ColumnReader segment(encoding, column);; segment.next()) {
      starts_[segment.token()] = {segment.index() - encoding.index, (segment.values() - values) / item};
      if (segment.token() == encoding.n_tokens) return;
    }
  }
  Piece operator()(int64_t token) const {
    if (starts_ == nullptr) return make_piece(encoding_, column_, token, token + 1);
    return {&encoding_, starts_[token], starts_[token + 1], token, token + 1};
  }

 private:
  const Encoding& encoding_;
  int64_t column_;
  std::unique_ptr<PlaneSizes[]> starts_;  // [n_tokens + 1], or nullptr
};

// The rank of feature j (within its column) among a segment's n stored values, or -1 if it is not stored.
int64_t find(int64_t j, int64_t n, int64_t width, const uint8_t* index) {
  if (!has_positions(n, width)) {
    const uint32_t byte = index[j / 8];
    if (((byte >> (j % 8)) & 1) == 0) return -1;
    return popcount(index, j / 8) + std::popcount(byte & ((1u << (j % 8)) - 1));
  }
  for (int64_t i = 0; i < n; ++i) {
    if (index[i] >= j) return index[i] == j ? i : -1;
  }
  return -1;
}

// Moves the segments of one tile of a column to their rows. next [tile tokens] holds each row's write position.
Status tile_to_csr(const Encoding& encoding, int64_t column, int64_t tile, int64_t* next, int64_t* col,
                   uint8_t* values) {
  const int64_t item = item_bytes(encoding.dtype);
  const uint32_t zero_mask = nonzero_mask(encoding.dtype, true);
  const int64_t first = tile * kTileTokens;
  const int64_t last = first + tile_tokens(encoding.n_tokens, tile);
  for (ColumnReader segment(encoding, column, tile); segment.token() < last; segment.next()) {
    const Fault fault = segment.check(zero_mask);
    if (fault != Fault::none) return {fault, column, segment.token()};
    const int64_t n = segment.count();
    uint8_t positions[kColumnWidth];
    unpack_positions(n, segment.width(), segment.index(), positions);
    int64_t& at = next[segment.token() - first];
    for (int64_t i = 0; i < n; ++i) col[at + i] = column * kColumnWidth + positions[i];
    if (n > 0) std::memcpy(values + at * item, segment.values(), n * item);
    at += n;
  }
  return {};
}

// crow [n_tokens + 1] from the counts.
void row_starts(const Encoding& encoding, int64_t* crow) {
  std::memset(crow, 0, (encoding.n_tokens + 1) * sizeof(int64_t));
  for (int64_t column = 0; column < n_columns(encoding.n_features); ++column) {
    for (ColumnReader segment(encoding, column); segment.token() < encoding.n_tokens; segment.next()) {
      crow[segment.token() + 1] += segment.count();
    }
  }
  for (int64_t token = 0; token < encoding.n_tokens; ++token) crow[token + 1] += crow[token];
}

}  // namespace

Status neuron(const Encoding& encoding, int64_t feature, int64_t* tokens, void* values, int64_t* n_found) {
  const int64_t column = feature / kColumnWidth;
  const int64_t item = item_bytes(encoding.dtype);
  const uint32_t zero_mask = nonzero_mask(encoding.dtype, true);
  *n_found = 0;
  const Status layout = check_column_layout(encoding, column);
  if (!layout.ok()) return layout;
  for (ColumnReader segment(encoding, column); segment.token() < encoding.n_tokens; segment.next()) {
    const Fault fault = segment.check(zero_mask);
    if (fault != Fault::none) return {fault, column, segment.token()};
    const int64_t rank = find(feature % kColumnWidth, segment.count(), segment.width(), segment.index());
    if (rank < 0) continue;
    tokens[*n_found] = segment.token();
    std::memcpy(static_cast<uint8_t*>(values) + *n_found * item, segment.values() + rank * item, item);
    ++*n_found;
  }
  return {};
}

Status to_csr(const Encoding& encoding, int64_t* crow, int64_t* col, void* values, ParallelFor parallel_for) {
  const Status layout = check_layout(encoding, parallel_for);
  if (!layout.ok()) return layout;
  advise_huge_pages(col, encoding.n_values * static_cast<int64_t>(sizeof(int64_t)));
  advise_huge_pages(values, encoding.n_values * item_bytes(encoding.dtype));
  row_starts(encoding, crow);
  return parallel_check(n_tiles(encoding.n_tokens), parallel_for, [&](int64_t tile) -> Status {
    int64_t next[kTileTokens];
    std::memcpy(next, crow + tile * kTileTokens, tile_tokens(encoding.n_tokens, tile) * sizeof(int64_t));
    for (int64_t column = 0; column < n_columns(encoding.n_features); ++column) {
      const Status status = tile_to_csr(encoding, column, tile, next, col, static_cast<uint8_t*>(values));
      if (!status.ok()) return status;
    }
    return {};
  });
}

Status slice_sizes(const Encoding& encoding, int64_t start, int64_t stop, PlaneSizes* sizes, ParallelFor parallel_for) {
  const Status layout = check_layout(encoding, parallel_for);
  if (!layout.ok()) return layout;
  *sizes = {};
  for (int64_t column = 0; column < n_columns(encoding.n_features); ++column) {
    const Piece piece = make_piece(encoding, column, start, stop);
    sizes->index_bytes += piece.end.index_bytes - piece.begin.index_bytes;
    sizes->n_values += piece.end.n_values - piece.begin.n_values;
  }
  return {};
}

Status slice(const Encoding& encoding, int64_t start, int64_t stop, const Planes& out, ParallelFor parallel_for) {
  return stack_pieces(1, stop - start, encoding.n_features, encoding.dtype, out, parallel_for,
                      [&](int64_t, int64_t column) { return make_piece(encoding, column, start, stop); });
}

Status take_sizes(const Encoding& encoding, const int64_t* tokens, int64_t n, PlaneSizes* bases,
                  ParallelFor parallel_for) {
  const Status layout = check_layout(encoding, parallel_for);
  if (!layout.ok()) return layout;
  const int64_t columns = n_columns(encoding.n_features);
  bases[0] = {};
  parallel(columns, parallel_for, [&](int64_t begin, int64_t end) {
    for (int64_t column = begin; column < end; ++column) {
      PlaneSizes& sizes = bases[column + 1] = {};
      if (n == 0) continue;
      const TokenPieces pieces(encoding, column, n);
      for (int64_t i = 0; i < n; ++i) {
        const Piece piece = pieces(tokens[i]);
        sizes.index_bytes += piece.end.index_bytes - piece.begin.index_bytes;
        sizes.n_values += piece.end.n_values - piece.begin.n_values;
      }
    }
  });
  for (int64_t column = 0; column < columns; ++column) {
    bases[column + 1].index_bytes += bases[column].index_bytes;
    bases[column + 1].n_values += bases[column].n_values;
  }
  return {};
}

Status take(const Encoding& encoding, const int64_t* tokens, int64_t n, const PlaneSizes* bases, const Planes& out,
            ParallelFor parallel_for) {
  const int64_t item = item_bytes(encoding.dtype);
  if (n == 0) return {};
  return parallel_check(n_columns(encoding.n_features), parallel_for, [&](int64_t column) -> Status {
    const TokenPieces pieces(encoding, column, n);
    uint8_t* counts = out.counts + column * n;
    uint8_t* index = out.index + bases[column].index_bytes;
    uint8_t* values = static_cast<uint8_t*>(out.values) + bases[column].n_values * item;
    for (int64_t i = 0; i < n; ++i) copy_piece(pieces(tokens[i]), column, item, &counts, &index, &values);
    return write_starts(out, column, n, column_width(encoding.n_features, column), bases[column],
                        bases[column + 1].index_bytes - bases[column].index_bytes);
  });
}

Status cat(const Encoding* encodings, int64_t n_encodings, const Planes& out, ParallelFor parallel_for) {
  if (n_encodings == 0) return {};
  int64_t n_tokens = 0;
  for (int64_t i = 0; i < n_encodings; ++i) {
    const Status layout = check_layout(encodings[i], parallel_for);
    if (!layout.ok()) return layout;
    n_tokens += encodings[i].n_tokens;
  }
  return stack_pieces(
      n_encodings, n_tokens, encodings[0].n_features, encodings[0].dtype, out, parallel_for,
      [&](int64_t i, int64_t column) { return make_piece(encodings[i], column, 0, encodings[i].n_tokens); });
}

}  // namespace pyfacts::cpu
