// A block's segments token by token, for rows that are asked for in any order.
//
// In the canonical form a row lies in n_columns places of each plane, and finding them means adding up the counts of
// all tokens before it. Here a token's segments follow one another: the same bytes in another order, and two offsets
// a token. 4,096 rows of 16,384 bf16 at 3 %, out of 65,536 (Zen 4): 20 ms, 9 of them for the fresh memory of the
// output; from the canonical form 44 ms, and as much again to put the rows in order.
#pragma once

#include <memory>

#include "block.h"

namespace pyfacts::storage {

class TokenRows {
 public:
  // Copies the encoding, which is checked as far as that takes.
  Fault assign(const cpu::Encoding& encoding);

  // Asks for a token's bytes, which are about to be unpacked.
  void prefetch(int64_t token) const;

  // Unpacks a token, which must be in [0, n_tokens), to n_features elements at `out`.
  Fault unpack(int64_t token, void* out) const;

  DType dtype() const { return dtype_; }
  int64_t n_tokens() const { return n_tokens_; }
  int64_t n_features() const { return n_features_; }

 private:
  struct Start {
    int64_t index;
    int64_t values;  // bytes
  };

  DType dtype_ = DType::float32;
  int64_t n_tokens_ = 0;
  int64_t n_features_ = 0;
  std::unique_ptr<uint8_t[]> counts_;  // [n_tokens, n_columns]
  std::unique_ptr<uint8_t[]> index_;
  std::unique_ptr<uint8_t[]> values_;
  std::unique_ptr<Start[]> starts_;  // [n_tokens + 1]
};

}  // namespace pyfacts::storage
