// A float32 linear layer that is computed only where it may exceed a threshold: see cpu/bounds.h.
#pragma once

#include <optional>
#include <vector>

#include "blocks.h"
#include "cpu/bounds.h"

namespace pyfacts {

class Screen {
 public:
  // threshold: [n_features] of x's dtype, or none for zeros.
  Screen(const Linear& linear, const std::optional<Tensor>& threshold);

  // The block with zeros where it does not exceed its feature's threshold, or as a whole.
  Tensor operator()(const Block& block);

  bool on() const { return on_; }
  // x @ weight.T + bias - threshold, bounded. The bounds live as long as the next block's are not asked for.
  cpu::BoundedBlock bound(const Block& block);
  // Tells how many elements of a block had to be computed: a screen that holds back too little is taken off.
  void computed(int64_t n);

 private:
  const Linear* linear_;
  std::optional<Tensor> threshold_;
  bool on_;
  int64_t n_computed_ = 0;
  int64_t left_of_token_ = -1;  // the row of blocks that left_ is of
  Tensor x_, left_, weight_, bounds_;
  std::optional<Tensor> bias_;
};

}  // namespace pyfacts
