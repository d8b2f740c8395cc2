// An arena and an encoding over copies of a caller's arrays: Copy<T>(T* original, n items) has data() and copy_back().
#pragma once

#include <cstdint>
#include <cstdio>

#include "../../csrc/cpu/encoding.h"
#include "../../csrc/cuda/arena.h"

namespace pyfacts::cuda {

inline int64_t n_runs(int64_t n_tokens, int64_t n_features) { return n_columns(n_features) * n_tiles(n_tokens); }

// Elements from the first to the last of a matrix.
inline int64_t extent(int64_t n_rows, int64_t row_stride, int64_t width) {
  return n_rows > 0 && width > 0 ? (n_rows - 1) * row_stride + width : 0;
}

template <template <typename> class Copy>
class ArenaCopy {
 public:
  explicit ArenaCopy(const Arena& a)
      : counts_(a.counts, n_columns(a.n_features) * a.n_tokens),
        index_(a.index, a.index_capacity),
        values_(a.values, a.values_capacity),
        group_ptr_(a.group_ptr, n_columns(a.n_features) * n_groups(a.n_tokens)),
        cursor_(a.cursor, 1),
        arena_(a) {
    arena_.counts = counts_.data();
    arena_.index = index_.data();
    arena_.values = values_.data();
    arena_.group_ptr = group_ptr_.data();
    arena_.cursor = cursor_.data();
  }
  const Arena& get() const { return arena_; }
  void copy_back() {
    counts_.copy_back();
    index_.copy_back();
    values_.copy_back();
    group_ptr_.copy_back();
    cursor_.copy_back();
  }

 private:
  Copy<uint8_t> counts_, index_, values_;
  Copy<uint64_t> group_ptr_;
  Copy<unsigned long long> cursor_;
  Arena arena_;
};

template <template <typename> class Copy>
class EncodingCopy {
 public:
  explicit EncodingCopy(const cpu::Encoding& e)
      : counts_(e.counts, n_columns(e.n_features) * e.n_tokens),
        index_(e.index, e.index_bytes),
        values_(static_cast<const uint8_t*>(e.values), e.n_values * item_bytes(e.dtype)),
        tile_ptr_(e.tile_ptr, 2 * n_runs(e.n_tokens, e.n_features)),
        encoding_(e) {
    encoding_.counts = counts_.data();
    encoding_.index = index_.data();
    encoding_.values = values_.data();
    encoding_.tile_ptr = tile_ptr_.data();
  }
  const cpu::Encoding& get() const { return encoding_; }

 private:
  Copy<const uint8_t> counts_, index_, values_;
  Copy<const int64_t> tile_ptr_;
  cpu::Encoding encoding_;
};

// Empty, or what check_status() says of the fault.
inline void write_status(const cpu::Status& status, char* message, int64_t message_bytes) {
  message[0] = '\0';
  if (status.ok()) return;
  std::snprintf(message, message_bytes, "%s (column %lld, token %lld)", cpu::describe(status.fault),
                static_cast<long long>(status.column), static_cast<long long>(status.token));
}

}  // namespace pyfacts::cuda
