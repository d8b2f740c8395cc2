// The k largest positive values of every token, or k per token of the whole batch, of a matrix that arrives in blocks
// and is never there as a whole. NaN counts as the largest; among equals the earliest token, then the lowest feature,
// comes first.
#pragma once

#include <limits>

#include "../predicate.h"
#include "sparse_rows.h"

namespace pyfacts::cpu {

// Orders the raw bits of values that are positive or NaN as the selection does.
class Rank {
 public:
  explicit Rank(DType dtype) : nan_(make_predicate(dtype, std::numeric_limits<double>::infinity(), false)) {}
  uint32_t operator()(uint32_t bits) const { return (bits & nan_.mask) > nan_.floor ? nan_.mask : bits; }
  const Predicate& nan() const { return nan_; }  // satisfied by NaN alone

 private:
  Predicate nan_;
};

// The rows of blocks come in order; the blocks of a row of blocks from left to right, in whole columns.
class TopK {
 public:
  TopK(DType dtype, int64_t n_features, int64_t k);
  void add(const Dense& block, int64_t first_token, int64_t first_feature, ParallelFor parallel_for);
  SparseRows finish() { return std::move(rows_); }

 private:
  // The candidates of one token; once there are k, `floor` is the rank of the least, and nothing below can enter.
  struct Candidates {
    Entry* entries;
    int64_t n;
    uint32_t floor;
  };
  void keep_best(Candidates* candidates) const;
  void scan(const Dense& block, int64_t row, int64_t first_feature, Candidates* candidates) const;
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
  void add(const Dense& block, int64_t first_token, int64_t first_feature, ParallelFor parallel_for);
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
