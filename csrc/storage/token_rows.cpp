#include "token_rows.h"

#include <algorithm>
#include <cstring>

#include "../cpu/dispatch.h"
#include "../cpu/memory.h"
#include "../cpu/segments.h"

namespace pyfacts::storage {
namespace {

// Calls visit(token, column, segment) for every segment; tile by tile, so that the rows of a tile, which the columns
// fill one after another, stay in the cache.
template <typename Visit>
void each_segment(const cpu::Encoding& encoding, Visit visit) {
  for (int64_t tile = 0; tile < n_tiles(encoding.n_tokens); ++tile) {
    const int64_t end = tile * kTileTokens + tile_tokens(encoding.n_tokens, tile);
    for (int64_t column = 0; column < n_columns(encoding.n_features); ++column) {
      for (cpu::ColumnReader segment(encoding, column, tile); segment.token() < end; segment.next())
        visit(segment.token(), column, segment);
    }
  }
}

std::unique_ptr<uint8_t[]> plane(int64_t n_bytes) {
  std::unique_ptr<uint8_t[]> bytes(new uint8_t[n_bytes + cpu::kSlackBytes]);
  std::memset(bytes.get() + n_bytes, 0, cpu::kSlackBytes);
  return bytes;
}

}  // namespace

Fault TokenRows::assign(const cpu::Encoding& encoding) {
  const int64_t columns = n_columns(encoding.n_features);
  const int64_t item = item_bytes(encoding.dtype);
  const cpu::Status layout = cpu::check_layout(encoding, cpu::run_serially);
  if (!layout.ok()) return from_status(layout);
  dtype_ = encoding.dtype;
  n_tokens_ = encoding.n_tokens;
  n_features_ = encoding.n_features;
  counts_.reset(new uint8_t[n_tokens_ * columns]);
  starts_.reset(new Start[n_tokens_ + 1]());
  each_segment(encoding, [&](int64_t token, int64_t column, const cpu::ColumnReader& segment) {
    counts_[token * columns + column] = segment.count_byte();
    starts_[token + 1].index += index_bytes(segment.count(), segment.width());
    starts_[token + 1].values += segment.count() * item;
  });
  for (int64_t token = 0; token < n_tokens_; ++token) {
    starts_[token + 1].index += starts_[token].index;
    starts_[token + 1].values += starts_[token].values;
  }
  index_ = plane(starts_[n_tokens_].index);
  values_ = plane(starts_[n_tokens_].values);
  const std::unique_ptr<Start[]> next(new Start[n_tokens_]);
  std::copy_n(starts_.get(), n_tokens_, next.get());
  each_segment(encoding, [&](int64_t token, int64_t, const cpu::ColumnReader& segment) {
    const int64_t n = segment.count();
    const int64_t n_index = index_bytes(n, segment.width());
    if (n == 0 || next[token].values + n * item > starts_[token + 1].values) return;  // a mapped file has changed since
    std::memcpy(index_.get() + next[token].index, segment.index(), n_index);
    std::memcpy(values_.get() + next[token].values, segment.values(), n * item);
    next[token].index += n_index;
    next[token].values += n * item;
  });
  return {};
}

void TokenRows::prefetch(int64_t token) const {
  const auto lines = [](const uint8_t* begin, int64_t n_bytes) {
    for (int64_t i = 0; i < n_bytes; i += 64) __builtin_prefetch(begin + i);
  };
  const Start& start = starts_[token];
  const Start& end = starts_[token + 1];
  lines(counts_.get() + token * n_columns(n_features_), n_columns(n_features_));
  lines(index_.get() + start.index, end.index - start.index);
  lines(values_.get() + start.values, end.values - start.values);
}

Fault TokenRows::unpack(int64_t token, void* out) const {
  const int64_t columns = n_columns(n_features_);
  const int64_t item = item_bytes(dtype_);
  const auto decode = item == 4 ? cpu::kernels().decode32 : cpu::kernels().decode16;
  const bool stream = false;  // the memory is fresh: the kernel has just filled it with zeros, in the cache
  const uint8_t* counts = counts_.get() + token * columns;
  const uint8_t* index = index_.get() + starts_[token].index;
  const uint8_t* values = values_.get() + starts_[token].values;
  auto* row = static_cast<uint8_t*>(out);
  for (int64_t first = 0; first < columns; first += cpu::kUnpackColumns) {
    const int64_t n = std::min(cpu::kUnpackColumns, columns - first);
    const uint8_t* index_at[cpu::kUnpackColumns];
    const uint8_t* values_at[cpu::kUnpackColumns];
    int64_t width = kColumnWidth;
    for (int64_t c = 0; c < n; ++c) {
      width = column_width(n_features_, first + c);
      index_at[c] = index;
      values_at[c] = values;
      const int64_t count = cpu::exact_count(counts[c], index, width);
      index += index_bytes(count, width);
      values += count * item;
    }
    const cpu::DecodeTile tile = {counts, index_at, values_at, 1, n, width, row, 0, cpu::nonzero_mask(dtype_, true),
                                  stream};
    if (!decode(tile)) return {"a segment breaks the format", Plane::index, -1, token};
    counts += n;
    row += n * kColumnWidth * item;
  }
  return {};
}

}  // namespace pyfacts::storage
