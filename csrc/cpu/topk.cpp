// While the blocks of a token pass by, the rank of the k-th best seen so far rises, and soon nearly nothing is above
// it: k * ln(n_features / k) values in all if they come in random order. So a segment costs its search (one compare
// per element) and the few that are found are handled one by one.
#include "topk.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>
#include <mutex>

#include "../convert.h"
#include "dispatch.h"
#include "parallel.h"

namespace pyfacts::cpu {
namespace {

// A memcpy of `item` bytes would go byte by byte.
uint32_t load(const uint8_t* element, int64_t item) {
  uint32_t wide;
  uint16_t narrow;
  if (item == 4) {
    std::memcpy(&wide, element, 4);
    return wide;
  }
  std::memcpy(&narrow, element, 2);
  return narrow;
}

// What a selection asks of a block: one bit for each element of a segment that may rank above the floor, and the raw
// bits of such an element.

void search(const Dense& block, int64_t row, int64_t column, const Rank& rank, uint32_t floor, uint64_t* found) {
  const int64_t item = item_bytes(block.dtype);
  const auto search_segment = item == 4 ? kernels().search32 : kernels().search16;
  const uint8_t* const x = static_cast<const uint8_t*>(block.data) + row * block.row_stride * item;
  search_segment(rank.above(floor, x + column * kColumnWidth * item, column_width(block.n_features, column), found));
}

uint32_t bits_at(const Dense& block, int64_t row, int64_t feature) {
  const int64_t item = item_bytes(block.dtype);
  return load(static_cast<const uint8_t*>(block.data) + (row * block.row_stride + feature) * item, item);
}

// The bound of a float32 is not below its upper half, to which it may have been rounded.
void search(const BoundedBlock& block, int64_t row, int64_t column, const Rank&, uint32_t floor, uint64_t* found) {
  const uint32_t half = floor >> 16;
  search(block.bounds, row, column, Rank(DType::bfloat16, Order::value), half == 0 ? 0 : half - 1, found);
}

uint32_t bits_at(const BoundedBlock& block, int64_t row, int64_t feature) {
  const float x = block.exact(row, feature);
  return x <= 0 ? 0 : as_bits(x);
}

const Dense& shape_of(const Dense& block) { return block; }
const Dense& shape_of(const BoundedBlock& block) { return block.bounds; }

// found(feature, bits) for the elements of a row that rank above the floor; after_segment() behind those of each
// segment, which may raise the floor. How many elements were looked at.
template <typename Block, typename Found, typename AfterSegment>
int64_t search_row(const Block& block, int64_t row, int64_t first_feature, const Rank& rank, const uint32_t& floor,
                   Found found, AfterSegment after_segment) {
  int64_t n_looked_at = 0;
  for (int64_t column = 0; column < n_columns(shape_of(block).n_features); ++column) {
    uint64_t words[4];
    search(block, row, column, rank, floor, words);
    if ((words[0] | words[1] | words[2] | words[3]) == 0) continue;
    for (int64_t i = 0; i < 4; ++i) {
      n_looked_at += std::popcount(words[i]);
      for (uint64_t left = words[i]; left != 0; left &= left - 1) {
        const int64_t j = column * kColumnWidth + 64 * i + std::countr_zero(left);
        const uint32_t bits = bits_at(block, row, j);
        if (rank(bits) > floor) found(static_cast<uint32_t>(first_feature + j), bits);
      }
    }
    after_segment();
  }
  return n_looked_at;
}

}  // namespace

// ---- per token ------------------------------------------------------------------------------------------------------

// A selection follows a segment that brought as many candidates again as are kept; a whole segment may be one more.
// Waiting for more of them makes selections fewer but larger, and the floor rises later: that costs more in all.
TopK::TopK(DType dtype, int64_t n_features, int64_t k, Order order)
    : rank_(dtype, order), k_(k), capacity_(std::min(2 * k + kColumnWidth, n_columns(n_features) * kColumnWidth)) {
  rows_.dtype = dtype;
  rows_.n_features = n_features;
}

void TopK::keep_best(Candidates* candidates) const {
  if (candidates->n <= k_) return;
  Entry* const first = candidates->entries;
  std::nth_element(first, first + (k_ - 1), first + candidates->n, [&](const Entry& a, const Entry& b) {
    const uint32_t rank_a = rank_(a.bits), rank_b = rank_(b.bits);
    return rank_a != rank_b ? rank_a > rank_b : a.feature < b.feature;
  });
  candidates->n = k_;
  candidates->floor = rank_(first[k_ - 1].bits);
}

// A later value equal to the floor has a higher feature than all candidates, and loses to them.
template <typename Block>
int64_t TopK::scan(const Block& block, int64_t row, int64_t first_feature, Candidates* candidates) const {
  return search_row(
      block, row, first_feature, rank_, candidates->floor,
      [&](uint32_t feature, uint32_t bits) { candidates->entries[candidates->n++] = {feature, bits}; },
      [&] {
        if (candidates->n > capacity_ - kColumnWidth) keep_best(candidates);
      });
}

template <typename Block>
int64_t TopK::add(const Block& block, int64_t, int64_t first_feature, ParallelFor parallel_for) {
  const int64_t n_tokens = shape_of(block).n_tokens;
  if (first_feature == 0) {
    entries_.resize(n_tokens * capacity_);
    candidates_.resize(n_tokens);
    for (int64_t row = 0; row < n_tokens; ++row) candidates_[row] = {&entries_[row * capacity_], 0, 0};
  }
  std::atomic<int64_t> n_looked_at = 0;
  parallel(n_tokens, parallel_for, [&](int64_t begin, int64_t end) {
    int64_t n = 0;
    for (int64_t row = begin; row < end; ++row) n += scan(block, row, first_feature, &candidates_[row]);
    n_looked_at += n;
  });
  if (first_feature + shape_of(block).n_features == rows_.n_features) finish_rows(parallel_for);
  return n_looked_at;
}

template int64_t TopK::add(const Dense&, int64_t, int64_t, ParallelFor);
template int64_t TopK::add(const BoundedBlock&, int64_t, int64_t, ParallelFor);

void TopK::finish_rows(ParallelFor parallel_for) {
  parallel(static_cast<int64_t>(candidates_.size()), parallel_for, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      Candidates& candidates = candidates_[row];
      keep_best(&candidates);
      std::sort(candidates.entries, candidates.entries + candidates.n,
                [](const Entry& a, const Entry& b) { return a.feature < b.feature; });
    }
  });
  for (const Candidates& candidates : candidates_) {
    rows_.entries.insert(rows_.entries.end(), candidates.entries, candidates.entries + candidates.n);
    rows_.starts.push_back(static_cast<int64_t>(rows_.entries.size()));
  }
}

// ---- over the batch -------------------------------------------------------------------------------------------------

BatchTopK::BatchTopK(DType dtype, int64_t n_tokens, int64_t n_features, int64_t k)
    : rank_(dtype, Order::value),
      n_tokens_(n_tokens),
      n_features_(n_features),
      n_kept_(static_cast<size_t>(k) * static_cast<size_t>(n_tokens)),
      dtype_(dtype) {}

// Values equal to the least that is kept may still displace it: the floor is one below.
void BatchTopK::keep_best() {
  if (candidates_.size() <= n_kept_) return;
  const auto worst = candidates_.begin() + static_cast<std::ptrdiff_t>(n_kept_ - 1);
  std::nth_element(candidates_.begin(), worst, candidates_.end(), [&](const Candidate& a, const Candidate& b) {
    const uint32_t rank_a = rank_(a.entry.bits), rank_b = rank_(b.entry.bits);
    if (rank_a != rank_b) return rank_a > rank_b;
    return a.token != b.token ? a.token < b.token : a.entry.feature < b.entry.feature;
  });
  floor_ = rank_(worst->entry.bits) - 1;
  candidates_.resize(n_kept_);
}

template <typename Block>
int64_t BatchTopK::add(const Block& block, int64_t first_token, int64_t first_feature, ParallelFor parallel_for) {
  std::mutex mutex;  // guards candidates_ and n_looked_at
  int64_t n_looked_at = 0;
  parallel(shape_of(block).n_tokens, parallel_for, [&](int64_t begin, int64_t end) {
    std::vector<Candidate> found;
    int64_t n = 0;
    for (int64_t row = begin; row < end; ++row) {
      const auto token = static_cast<uint32_t>(first_token + row);
      n += search_row(
          block, row, first_feature, rank_, floor_,
          [&](uint32_t feature, uint32_t bits) { found.push_back({token, {feature, bits}}); }, [] {});
    }
    std::lock_guard<std::mutex> lock(mutex);
    candidates_.insert(candidates_.end(), found.begin(), found.end());
    n_looked_at += n;
  });
  if (candidates_.size() > 2 * n_kept_) keep_best();
  return n_looked_at;
}

template int64_t BatchTopK::add(const Dense&, int64_t, int64_t, ParallelFor);
template int64_t BatchTopK::add(const BoundedBlock&, int64_t, int64_t, ParallelFor);

SparseRows BatchTopK::finish() {
  keep_best();
  std::sort(candidates_.begin(), candidates_.end(), [](const Candidate& a, const Candidate& b) {
    return a.token != b.token ? a.token < b.token : a.entry.feature < b.entry.feature;
  });
  SparseRows rows = {dtype_, n_features_, {}, std::vector<int64_t>(n_tokens_ + 1)};
  for (const Candidate& candidate : candidates_) {
    rows.entries.push_back(candidate.entry);
    ++rows.starts[candidate.token + 1];
  }
  for (int64_t token = 0; token < n_tokens_; ++token) rows.starts[token + 1] += rows.starts[token];
  return rows;
}

}  // namespace pyfacts::cpu
