// The k largest positive values or magnitudes of every token, or k positive values per token of the whole batch, of a
// matrix that arrives in blocks and need not be there as a whole. NaN counts as the largest; among equals the earliest
// token, then the lowest feature, comes first.
#pragma once

#include <limits>

#include "../predicate.h"
#include "bounds.h"
#include "kernels.h"
#include "sparse_rows.h"

namespace pyfacts::cpu {

enum class Order : uint8_t { value, magnitude };

// Orders the raw bits of values that are positive or NaN, or of any by their magnitude, as the selection does.
class Rank {
 public:
  Rank(DType dtype, Order order)
      : nan_(make_predicate(dtype, std::numeric_limits<double>::infinity(), false)), order_(order) {}
  uint32_t operator()(uint32_t bits) const {
    const uint32_t magnitude = bits & nan_.mask;
    if (magnitude > nan_.floor) return nan_.mask;
    return order_ == Order::value ? bits : magnitude;
  }
  // A search for all that rank above the floor; of NaNs it may find more.
  Search above(uint32_t floor, const uint8_t* x, int64_t width, uint64_t* found) const {
    if (order_ == Order::value) return {x, width, nan_, floor, found};
    return {x, width, {nan_.mask, floor, nan_.also, false}, nan_.mask, found};
  }

 private:
  Predicate nan_;  // satisfied by NaN alone
  Order order_;
};

// The rows of blocks come in order; the blocks of a row of blocks from left to right, in whole columns.
class TopK {
 public:
  TopK(DType dtype, int64_t n_features, int64_t k, Order order);
  // Block: Dense or BoundedBlock. Returns how many of its elements were looked at one by one.
  template <typename Block>
  int64_t add(const Block& block, int64_t first_token, int64_t first_feature, ParallelFor parallel_for);
  SparseRows finish() { return std::move(rows_); }

 private:
  // The candidates of one token; once there are k, `floor` is the rank of the least, and nothing below can enter.
  struct Candidates {
    Entry* entries;
    int64_t n;
    uint32_t floor;
  };
  void keep_best(Candidates* candidates) const;
  template <typename Block>
  int64_t scan(const Block& block, int64_t row, int64_t first_feature, Candidates* candidates) const;
  void finish_rows(ParallelFor parallel_for);

  Rank rank_;
  int64_t k_;
  int64_t capacity_;  // of a token's candidates
  std::vector<Entry> entries_;
  std::vector<Candidates> candidates_;  // of the tokens of the current row of blocks
  SparseRows rows_;
};

// Blocks may come in any order.
class BatchTopK {
 public:
  BatchTopK(DType dtype, int64_t n_tokens, int64_t n_features, int64_t k);
  template <typename Block>
  int64_t add(const Block& block, int64_t first_token, int64_t first_feature, ParallelFor parallel_for);
  SparseRows finish();

 private:
  struct Candidate {
    uint32_t token;
    Entry entry;
  };
  void keep_best();

  Rank rank_;
  int64_t n_tokens_;
  int64_t n_features_;
  size_t n_kept_;       // k * n_tokens
  uint32_t floor_ = 0;  // a value must rank above this to enter
  DType dtype_;
  std::vector<Candidate> candidates_;
};

}  // namespace pyfacts::cpu
