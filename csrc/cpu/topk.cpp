// While the blocks of a token pass by, the rank of the k-th best seen so far rises, and soon nearly nothing is above
// it: k * ln(n_features / k) values in all if they come in random order. So a segment costs its search (one compare
// per element) and the few that are found are handled one by one.
#include "topk.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <mutex>

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

// found(feature, bits) for the elements of a row that rank above the floor, and NaNs; after_segment() behind those of
// each segment, which may raise the floor.
template <typename Found, typename AfterSegment>
void search_row(const Dense& block, int64_t row, int64_t first_feature, const Rank& rank, const uint32_t& floor,
                Found found, AfterSegment after_segment) {
  const int64_t item = item_bytes(block.dtype);
  const auto search = item == 4 ? kernels().search32 : kernels().search16;
  const uint8_t* const x = static_cast<const uint8_t*>(block.data) + row * block.row_stride * item;
  for (int64_t column = 0; column < n_columns(block.n_features); ++column) {
    const int64_t start = column * kColumnWidth;
    uint64_t words[4];
    search(rank.above(floor, x + start * item, column_width(block.n_features, column), words));
    if ((words[0] | words[1] | words[2] | words[3]) == 0) continue;
    for (int64_t i = 0; i < 4; ++i) {
      for (uint64_t bits = words[i]; bits != 0; bits &= bits - 1) {
        const int64_t j = start + 64 * i + std::countr_zero(bits);
        found(static_cast<uint32_t>(first_feature + j), load(x + j * item, item));
      }
    }
    after_segment();
  }
}

}  // namespace

// ---- per token
// -------------------------------------------------------------------------------------------------------

// A selection follows a segment that brought as many candidates again as are kept; a whole segment may be one more.
// Waiting for more of them makes selections fewer but larger, and the floor rises later: that costs more in all.
TopK::TopK(DType dtype, int64_t n_features, int64_t k, Order order)
    : rank_(dtype, order), k_(k), capacity_(2 * k + kColumnWidth) {
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
void TopK::scan(const Dense& block, int64_t row, int64_t first_feature, Candidates* candidates) const {
  search_row(
      block, row, first_feature, rank_, candidates->floor,
      [&](uint32_t feature, uint32_t bits) { candidates->entries[candidates->n++] = {feature, bits}; },
      [&] {
        if (candidates->n > capacity_ - kColumnWidth) keep_best(candidates);
      });
}

void TopK::add(const Dense& block, int64_t, int64_t first_feature, ParallelFor parallel_for) {
  if (first_feature == 0) {
    entries_.resize(block.n_tokens * capacity_);
    candidates_.resize(block.n_tokens);
    for (int64_t row = 0; row < block.n_tokens; ++row) candidates_[row] = {&entries_[row * capacity_], 0, 0};
  }
  parallel(block.n_tokens, parallel_for, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) scan(block, row, first_feature, &candidates_[row]);
  });
  if (first_feature + block.n_features == rows_.n_features) finish_rows(parallel_for);
}

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

// ---- over the batch
// --------------------------------------------------------------------------------------------------

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

void BatchTopK::add(const Dense& block, int64_t first_token, int64_t first_feature, ParallelFor parallel_for) {
  std::mutex mutex;  // guards candidates_
  parallel(block.n_tokens, parallel_for, [&](int64_t begin, int64_t end) {
    std::vector<Candidate> found;
    for (int64_t row = begin; row < end; ++row) {
      const auto token = static_cast<uint32_t>(first_token + row);
      search_row(
          block, row, first_feature, rank_, floor_,
          [&](uint32_t feature, uint32_t bits) { found.push_back({token, {feature, bits}}); }, [] {});
    }
    std::lock_guard<std::mutex> lock(mutex);
    candidates_.insert(candidates_.end(), found.begin(), found.end());
  });
  if (candidates_.size() > 2 * n_kept_) keep_best();
}

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
