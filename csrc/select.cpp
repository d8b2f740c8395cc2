#include "select.h"

#include <algorithm>

#include "cpu/row_norms.h"
#include "cpu/topk.h"

namespace pyfacts {
namespace {

constexpr int64_t kChunkTokens = 1024;  // whose candidates are in memory at once

}  // namespace

Planes topk_encode(const Tensor& matrix, int64_t k) {
  check_matrix(matrix, "x");
  Tensor x = whole_rows(matrix);
  const int64_t n_tokens = x.size(0), n_features = x.size(1);
  STD_TORCH_CHECK(1 <= k && k <= n_features, "k must be 1 to ", n_features, ", got ", k);
  STD_TORCH_CHECK(n_features <= UINT32_MAX, "x is too wide");
  cpu::TopK selection(dtype_of(x), n_features, k, cpu::Order::magnitude);
  for (int64_t token = 0; token < n_tokens; token += kChunkTokens) {
    const cpu::Dense chunk = dense_of(torch::stable::narrow(x, 0, token, std::min(kChunkTokens, n_tokens - token)));
    selection.add(chunk, token, 0, threads_for(chunk));
  }
  return pack_rows(selection.finish(), x);
}

Tensor row_sq_norm(const Tensor& matrix) {
  check_matrix(matrix, "x");
  const Tensor x = whole_rows(matrix);
  Tensor sq_norms = torch::stable::new_empty(x, {x.size(0)}, ScalarType::Double);
  const cpu::Dense dense = dense_of(x);
  cpu::row_sq_norms(dense, static_cast<double*>(sq_norms.mutable_data_ptr()), threads_for(dense));
  return sq_norms;
}

}  // namespace pyfacts
