// A float32 linear layer that is computed only where it may exceed a threshold, and elsewhere bounded: cpu/bounds.h.
#pragma once

#include <optional>

#include "blocks.h"
#include "cpu/bounds.h"

namespace pyfacts {

class Screen {
 public:
  // threshold: [n_features] of x's dtype, or none for zeros; a negative one is as good as zero.
  Screen(const Linear& linear, const std::optional<Tensor>& threshold);

  // Whether it pays: not of few tokens or short rows, not without bfloat16 products, and not once it has let a tenth
  // of what it saw through.
  bool on() const { return on_; }

  // The block with zeros where it does not exceed its feature's threshold. While the screen is off, the whole block.
  Tensor operator()(const Block& block);

  // x @ weight.T + bias - threshold, bounded; valid until the next block is asked for. The screen must be on.
  cpu::BoundedBlock bound(const Block& block);
  // Tells how many elements of a bounded block had to be computed.
  void count_computed(int64_t n);

 private:
  const Linear& linear_;
  std::optional<Tensor> threshold_;
  bool on_;
  int64_t n_computed_ = 0;
  int64_t first_token_ = -1;  // of the row of blocks that x_ and left_ are of
  Tensor x_, left_, weight_, bounds_;
  std::optional<Tensor> bias_;
};

}  // namespace pyfacts
