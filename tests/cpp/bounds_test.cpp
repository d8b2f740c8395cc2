// The bounds of csrc/cpu/bounds.h against products in long double, whatever the order of summation and the rounding;
// also of rows that overflow, underflow, cancel, or hold what is not a number.
#include "../../csrc/cpu/bounds.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/convert.h"

using namespace pyfacts;
using namespace pyfacts::cpu;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
std::mt19937 generator(0);

void require(bool ok, const std::string& what) {
  if (ok) return;
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
  std::exit(1);
}

float normal() { return std::normal_distribution<float>()(generator); }
int below(int n) { return static_cast<int>(generator() % n); }

float any_bits() {
  float x;
  do {
    x = as_float(static_cast<uint32_t>(generator()));
  } while (!std::isfinite(x));
  return x;
}

float rounded(float x) { return Convert<DType::bfloat16>::widen(Convert<DType::bfloat16>::narrow(x)); }

const std::vector<std::function<float()>> kElements = {
    [] { return normal(); },
    [] { return rounded(normal()); },                                  // only the sums round
    [] { return std::ldexp(normal(), below(80) - 40); },               // few count
    [] { return std::ldexp(normal(), -120 - below(30)); },             // subnormals
    [] { return static_cast<float>(below(2001) - 1000); },             // sums that are exact, and often nothing
    [] { return below(50) == 0 ? std::ldexp(normal(), 60) : 1e-3f; },  // at the edge of what is bounded
    [] { return std::ldexp(normal(), 100); },                          // beyond it
    any_bits,
};

std::vector<float> some(int64_t n, const std::function<float()>& element) {
  std::vector<float> row(n);
  for (float& x : row) x = element();
  return row;
}

Dense matrix(const std::vector<float>& rows, int64_t n_rows) {
  const auto width = static_cast<int64_t>(rows.size()) / n_rows;
  return {DType::float32, rows.data(), width, n_rows, width};
}

float flushed(float x) { return std::fabs(x) < std::numeric_limits<float>::min() ? 0.0f : x; }

// The sum of a product of factors in one of many orders, subnormals flushed as bfloat16 instructions do.
float product(const uint16_t* left, const uint16_t* right, int64_t width, int lanes) {
  std::vector<float> sums(lanes);
  for (int64_t i = 0; i < width; ++i) {
    const float l = flushed(Convert<DType::bfloat16>::widen(left[i]));
    const float r = flushed(Convert<DType::bfloat16>::widen(right[i]));
    sums[i % lanes] = flushed(sums[i % lanes] + flushed(l * r));
  }
  float sum = 0;
  for (float lane : sums) sum = flushed(sum + lane);
  return sum;
}

// One pair of rows. The bound less the product, in units of the product of the norms; 0 without a bound.
double check(const std::vector<float>& x, const std::vector<float>& w, const float* bias, const float* threshold) {
  const auto n = static_cast<int64_t>(x.size());
  const int64_t width = bound_width(n);
  std::vector<uint16_t> left(width), right(width);
  left_factor(matrix(x, 1), left.data(), run_serially);
  right_factor(matrix(w, 1), bias, threshold, right.data(), run_serially);
  long double true_product = 0, x_norm = 0, w_norm = 0;
  for (int64_t i = 0; i < n; ++i) {
    true_product += static_cast<long double>(x[i]) * w[i];
    x_norm += static_cast<long double>(x[i]) * x[i];
    w_norm += static_cast<long double>(w[i]) * w[i];
  }
  const float floor = threshold != nullptr ? *threshold : 0;
  const long double truth = true_product + (bias != nullptr ? *bias : 0) - floor;
  double slack = 0;
  for (int lanes : {1, 3, 16, 64}) {
    const float bound = product(left.data(), right.data(), width, lanes);
    const uint16_t nearest = Convert<DType::bfloat16>::narrow(bound);
    const auto truncated = static_cast<uint16_t>(as_bits(bound) >> 16);
    for (uint16_t stored : {nearest, truncated}) {
      const Dense bounds = {DType::bfloat16, &stored, 1, 1, 1};
      const BoundedBlock block = {bounds, matrix(x, 1), matrix(w, 1), bias};
      uint64_t found[4];
      const bool positive = find_positive(bounds, found, run_serially) == 1;
      const float exact = block.exact(0, 0);
      require(positive || exact <= floor, "a value above its threshold was not found");
      float computed;
      compute_found(block, found, &computed, run_serially);
      require(as_bits(computed) == (positive ? as_bits(exact) : 0), "found values are computed, others are zero");
    }
    if (std::isnan(bound)) continue;
    require(bound >= truth || std::isnan(truth), "a bound lies below what it bounds");
    slack = static_cast<double>((bound - truth) / std::sqrt(x_norm * w_norm));
  }
  return slack;
}

void test_bounds() {
  for (int round = 0; round < 20000; ++round) {
    const int64_t n = 1 + below(round % 10 == 0 ? 3000 : 150);
    std::vector<float> x = some(n, kElements[below(static_cast<int>(kElements.size()))]);
    std::vector<float> w = some(n, kElements[below(static_cast<int>(kElements.size()))]);
    if (round % 5 == 0) {  // nothing but rounding errors is left of the sum
      for (int64_t i = 0; i + 1 < n; i += 2) {
        x[i + 1] = x[i];
        w[i + 1] = -w[i];
      }
    }
    const float specials[] = {kInfinity, -kInfinity, std::nanf(""), -0.0f};
    if (round % 7 == 0) x[below(static_cast<int>(n))] = specials[below(4)];
    if (round % 11 == 0) w[below(static_cast<int>(n))] = specials[below(4)];
    const float any_scale = std::ldexp(normal(), below(40) - 20);
    const float bias = below(20) == 0 ? specials[below(4)] : below(2) == 0 ? any_scale : rounded(any_scale);
    const float threshold = below(20) == 0 ? kInfinity : std::fabs(below(2) == 0 ? bias : rounded(2 * normal()));
    check(x, w, below(3) == 0 ? nullptr : &bias, below(3) == 0 ? nullptr : &threshold);
  }
}

// A threshold that is what the product is, or the number before.
void test_equality() {
  for (int round = 0; round < 1000; ++round) {
    const int64_t n = 1 + below(200);
    const std::vector<float> x = some(n, kElements[0]), w = some(n, kElements[0]);
    const BoundedBlock block = {{}, matrix(x, 1), matrix(w, 1), nullptr};
    const float exact = block.exact(0, 0);
    if (exact <= 0) continue;
    for (float threshold : {exact, std::nextafter(exact, 0.0f)}) check(x, w, nullptr, &threshold);
  }
}

// In units in which 1 / sqrt(n) is a standard deviation: it is these few above the truth that are computed in vain.
void test_tightness() {
  for (int64_t n : {256, 768, 4096}) {
    double sum = 0;
    for (int round = 0; round < 50; ++round)
      sum += check(some(n, kElements[0]), some(n, kElements[0]), nullptr, nullptr);
    const double deviations = sum / 50 * std::sqrt(n);
    std::printf("%ld elements: %.3f standard deviations above\n", static_cast<long>(n), deviations);
    require(0 < deviations && deviations < 0.005 * std::sqrt(n), "bounds are tight");
  }
}

void test_what_is_never_found() {
  const std::vector<float> x = some(300, kElements[0]), w = some(300, kElements[0]);
  std::vector<uint16_t> left(bound_width(300)), right(bound_width(300));
  left_factor(matrix(x, 1), left.data(), run_serially);
  const float minus_infinity = -kInfinity, infinity = kInfinity;
  for (auto [bias, threshold] : {std::pair{&minus_infinity, static_cast<const float*>(nullptr)},
                                 std::pair{static_cast<const float*>(nullptr), &infinity}}) {
    right_factor(matrix(w, 1), bias, threshold, right.data(), run_serially);
    require(product(left.data(), right.data(), bound_width(300), 16) == -kInfinity, "a dead feature costs nothing");
  }
}

}  // namespace

int main() {
  if (bound_kernels() == nullptr) {
    std::printf("this CPU has no bfloat16 products\n");
    return 0;
  }
  test_bounds();
  test_equality();
  test_tightness();
  test_what_is_never_found();
  std::printf("ok\n");
}
