#include "row_norms.h"

#include <cstring>

#include "../convert.h"
#include "parallel.h"

namespace pyfacts::cpu {
namespace {

constexpr int64_t kLanes = 8;  // sums at a time, so that no addition waits for the one before

template <DType dtype>
double sq_norm(const uint8_t* row, int64_t n_features) {
  using Bits = typename Convert<dtype>::Bits;
  const auto square = [&](int64_t j) {
    Bits bits;
    std::memcpy(&bits, row + j * sizeof(Bits), sizeof(Bits));
    const double x = Convert<dtype>::widen(bits);
    return x * x;
  };
  double sums[kLanes] = {};
  int64_t j = 0;
  for (; j + kLanes <= n_features; j += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += square(j + lane);
  }
  for (; j < n_features; ++j) sums[j % kLanes] += square(j);
  double sum = 0;
  for (const double lane : sums) sum += lane;
  return sum;
}

}  // namespace

void row_sq_norms(const Dense& x, double* sq_norms, ParallelFor parallel_for) {
  const auto of_row = x.dtype == DType::float32    ? sq_norm<DType::float32>
                      : x.dtype == DType::bfloat16 ? sq_norm<DType::bfloat16>
                                                   : sq_norm<DType::float16>;
  const int64_t row_bytes = x.row_stride * item_bytes(x.dtype);
  parallel(x.n_tokens, parallel_for, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      sq_norms[row] = of_row(static_cast<const uint8_t*>(x.data) + row * row_bytes, x.n_features);
    }
  });
}

}  // namespace pyfacts::cpu
