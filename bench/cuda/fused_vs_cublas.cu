// The fused linear_relu_encode on a Hopper GPU, without torch: first whether it is right, then how long it takes beside
// cuBLASLt's product with bias and ReLU, which writes the dense matrix.
//
//   nvcc -std=c++17 -O3 -DNDEBUG -t 0 -gencode=arch=compute_90a,code=sm_90a --expt-relaxed-constexpr \
//     -isystem $CUTLASS/include bench/cuda/fused_vs_cublas.cu csrc/cuda/linear_relu_encode*.cu \
//     -lcublasLt -o fused_vs_cublas
//   ./fused_vs_cublas            both; `--check` or `--time` for one of them
//
// Right means, on small ragged shapes: sums of small integers, exact in float32 in any order, so that h must be the
// reference's in every bit; NaN, infinities and -0.0 among the operands; poison around them. Every group is decoded on
// the host by a reader that trusts nothing, groups must tile what the cursor counted, and h written beside the encoding
// must be what it decodes to. Every kernel gets all of it, whatever d_in.
#include <cublasLt.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cuda/linear_relu_encode.cuh"
#include "../../csrc/predicate.h"

using namespace pyfacts;
using namespace pyfacts::cuda;

namespace {

void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("%s: %s\n", what, cudaGetErrorString(error));
  std::exit(2);
}
void check_cublas(cublasStatus_t status, const char* what) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  std::printf("%s: cuBLAS status %d\n", what, static_cast<int>(status));
  std::exit(2);
}

// Memory on the device.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t n) : n_(n) { check_cuda(cudaMalloc(&data_, std::max<int64_t>(n, 1) * sizeof(T)), "malloc"); }
  explicit Buffer(const std::vector<T>& host) : Buffer(static_cast<int64_t>(host.size())) {
    check_cuda(cudaMemcpy(data_, host.data(), n_ * sizeof(T), cudaMemcpyHostToDevice), "copy in");
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { cudaFree(data_); }
  T* data() const { return data_; }
  void fill(int byte) { check_cuda(cudaMemset(data_, byte, n_ * sizeof(T)), "memset"); }
  std::vector<T> host() const {
    std::vector<T> copy(n_);
    check_cuda(cudaMemcpy(copy.data(), data_, n_ * sizeof(T), cudaMemcpyDeviceToHost), "copy out");
    return copy;
  }

 private:
  T* data_ = nullptr;
  int64_t n_;
};

template <typename Element>
constexpr DType kDType = std::is_same_v<Element, cutlass::bfloat16_t> ? DType::bfloat16 : DType::float16;
const char* name_of(DType dtype) { return dtype == DType::bfloat16 ? "bfloat16" : "float16"; }
const char* name_of(Activation activation) {
  return activation == Activation::relu ? "relu" : activation == Activation::relu2 ? "relu2" : "jumprelu";
}

template <typename Element>
uint16_t to_bits(float x) {
  return Element(x).storage;
}
template <>
uint16_t to_bits<cutlass::half_t>(float x) {
  return cutlass::half_t(x).raw();
}

// A NaN's magnitude, as bits, is beyond infinity's.
bool is_nan(DType dtype, uint16_t bits) { return (bits & 0x7fff) > (dtype == DType::bfloat16 ? 0x7f80 : 0x7c00); }

// ---- the reference
// ---------------------------------------------------------------------------------------------------

// One thread per element: h [n_tokens, n_features], dense. In the order of d_in, each product and sum in float32.
template <typename Element>
__global__ void reference_kernel(Linear linear, uint16_t* h) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= linear.n_tokens * linear.n_features) return;
  const int64_t token = i / linear.n_features, feature = i % linear.n_features;
  const auto* x = static_cast<const Element*>(linear.x) + token * linear.x_row_stride;
  const auto* weight = static_cast<const Element*>(linear.weight) + feature * linear.weight_row_stride;
  float sum = 0;
  for (int64_t k = 0; k < linear.d_in; ++k) sum += static_cast<float>(x[k]) * static_cast<float>(weight[k]);
  if (linear.bias != nullptr) sum += static_cast<float>(static_cast<const Element*>(linear.bias)[feature]);
  const Element z(sum);
  const float rounded = static_cast<float>(z);
  float kept = rounded != rounded || rounded > 0 ? rounded : 0.0f;
  if (linear.activation == Activation::relu2) kept *= kept;
  if (linear.activation == Activation::jumprelu) {
    const float threshold = static_cast<float>(static_cast<const Element*>(linear.threshold)[feature]);
    if (kept <= threshold) kept = 0;
  }
  const Element result(kept);
  std::memcpy(h + i, &result, sizeof(uint16_t));
}

// ---- the arena, and a reader of it
// -----------------------------------------------------------------------------------

struct DeviceArena {
  DeviceArena(DType dtype, int64_t n_tokens, int64_t n_features, int64_t index_capacity, int64_t values_capacity)
      : counts(n_columns(n_features) * n_tokens),
        index(index_capacity + kUnitBytes),
        values(values_capacity + kUnitBytes),
        group_ptr(n_columns(n_features) * n_groups(n_tokens)),
        cursor(1),
        arena{dtype,          n_tokens,      n_features,      counts.data(),    index.data(),
              index_capacity, values.data(), values_capacity, group_ptr.data(), cursor.data()} {
    counts.fill(0xA5);
    index.fill(0xA5);
    values.fill(0xA5);
    group_ptr.fill(0xA5);
    cursor.fill(0xA5);
  }
  Buffer<uint8_t> counts, index, values;
  Buffer<uint64_t> group_ptr;
  Buffer<unsigned long long> cursor;
  Arena arena;
};

// The dense matrix, or what is wrong.
std::string decode_host(const DeviceArena& device, std::vector<uint16_t>* dense) {
  const Arena& arena = device.arena;
  const auto counts = device.counts.host(), index = device.index.host(), values = device.values.host();
  const auto group_ptr = device.group_ptr.host();
  const uint64_t cursor = device.cursor.host()[0];
  struct Group {
    int64_t start, units;
  };
  std::vector<Group> index_groups, values_groups;
  dense->assign(arena.n_tokens * arena.n_features, 0);
  const Predicate predicate = make_predicate(arena.dtype, 0, false);
  for (int64_t column = 0; column < n_columns(arena.n_features); ++column) {
    const int64_t width = column_width(arena.n_features, column);
    for (int64_t group = 0; group < n_groups(arena.n_tokens); ++group) {
      const uint64_t start = group_ptr[column * n_groups(arena.n_tokens) + group];
      const int64_t index_start = static_cast<int64_t>(start & 0xffffffff) * kUnitBytes;
      const int64_t values_start = static_cast<int64_t>(start >> 32) * kUnitBytes;
      int64_t i = index_start, v = values_start;
      for (int64_t token = group * kGroupTokens; token < std::min(arena.n_tokens, (group + 1) * kGroupTokens);
           ++token) {
        const int64_t count = counts[column * arena.n_tokens + token], n_index = index_bytes(count, width);
        if (i + n_index > arena.index_capacity) return "index out of bounds";
        std::vector<int64_t> features;
        if (has_positions(count, width)) {
          for (int64_t p = 0; p < count; ++p) features.push_back(index[i + p]);
        } else {
          for (int64_t j = 0; j < 8 * n_index; ++j) {
            if ((index[i + j / 8] >> j % 8 & 1) != 0) features.push_back(j);
          }
          const int64_t n = static_cast<int64_t>(features.size());
          if (std::min<int64_t>(n, kCountSaturated) != count) return "bitmap and count differ";
        }
        for (size_t p = 0; p < features.size(); ++p, v += 2) {
          if (features[p] >= width || (p > 0 && features[p] <= features[p - 1])) return "positions out of order";
          if (v + 2 > arena.values_capacity) return "values out of bounds";
          const uint16_t bits = static_cast<uint16_t>(values[v] | values[v + 1] << 8);
          if ((bits & predicate.mask) <= predicate.floor) return "a stored zero";
          (*dense)[token * arena.n_features + column * kColumnWidth + features[p]] = bits;
        }
        i += n_index;
      }
      index_groups.push_back({index_start / kUnitBytes, ceil_div(i - index_start, kUnitBytes)});
      values_groups.push_back({values_start / kUnitBytes, ceil_div(v - values_start, kUnitBytes)});
    }
  }
  for (auto* groups : {&index_groups, &values_groups}) {
    std::sort(groups->begin(), groups->end(), [](const Group& a, const Group& b) {
      return a.start != b.start ? a.start < b.start : a.units < b.units;
    });
    int64_t end = 0;
    for (const Group& group : *groups) {
      if (group.start != end) return "groups overlap or leave gaps";
      end += group.units;
    }
    if (end != static_cast<int64_t>(groups == &index_groups ? cursor & 0xffffffff : cursor >> 32)) {
      return "the cursor is not at the end";
    }
  }
  return "";
}

// ---- is it right?
// ----------------------------------------------------------------------------------------------------

using Launch = cudaError_t (*)(const Linear&, const DenseOut&, const Arena&, int, cudaStream_t);
struct Kernel {
  const char* name;
  Launch launch;
};
template <typename Element>
std::vector<Kernel> kernels() {
  // The third is not built into pyfacts: a cluster of four fetches less, but may leave multiprocessors without work.
  using PingPongOf4 = FusedKernel<Element, cutlass::gemm::KernelTmaWarpSpecializedPingpong, 64, 4>;
  return {{"ping-pong", launch<PingPong<Element>, Element>},
          {"cooperative", launch<Cooperative<Element>, Element>},
          {"ping-pong in fours", launch<PingPongOf4, Element>}};
}

int n_checked = 0, n_wrong = 0;

void report(const Kernel& kernel, const Linear& linear, bool dense, const std::string& what) {
  ++n_checked;
  if (what.empty() || ++n_wrong > 40) return;
  std::printf("WRONG %s %s %s %s%s tokens %lld features %lld d_in %lld: %s\n", kernel.name, name_of(linear.dtype),
              name_of(linear.activation), linear.bias != nullptr ? "bias" : "no bias", dense ? ", dense" : "",
              static_cast<long long>(linear.n_tokens), static_cast<long long>(linear.n_features),
              static_cast<long long>(linear.d_in), what.c_str());
}

std::string compare(DType dtype, const std::vector<uint16_t>& h, const std::vector<uint16_t>& expected,
                    int64_t n_features) {
  for (size_t i = 0; i < h.size(); ++i) {
    if (h[i] == expected[i] || (is_nan(dtype, h[i]) && is_nan(dtype, expected[i]))) continue;
    char text[120];
    std::snprintf(text, sizeof(text), "token %lld feature %lld is %04x, expected %04x",
                  static_cast<long long>(i / n_features), static_cast<long long>(i % n_features), h[i], expected[i]);
    return text;
  }
  return "";
}

// [n_rows, width] small integers in rows of `stride`, NaN beyond the width.
template <typename Element>
std::vector<uint16_t> integers(int64_t n_rows, int64_t width, int64_t stride, std::mt19937& random) {
  std::vector<uint16_t> bits(n_rows * stride, to_bits<Element>(NAN));
  for (int64_t i = 0; i < n_rows; ++i) {
    for (int64_t k = 0; k < width; ++k) {
      bits[i * stride + k] = to_bits<Element>(static_cast<float>(static_cast<int>(random() % 7) - 3));
    }
  }
  return bits;
}

template <typename Element>
void check_shape(int64_t n_tokens, int64_t n_features, int64_t d_in, bool special, int variant) {
  std::mt19937 random(static_cast<uint32_t>(n_tokens * 31 + n_features * 17 + d_in + variant));
  const int64_t padding = 8 * (variant % 2);
  const int64_t x_stride = d_in + padding, weight_stride = d_in + 2 * padding, h_stride = n_features + padding;
  auto x = integers<Element>(n_tokens, d_in, x_stride, random);
  auto weight = integers<Element>(n_features, d_in, weight_stride, random);
  std::vector<uint16_t> bias(n_features), threshold(n_features);
  for (int64_t j = 0; j < n_features; ++j) {
    bias[j] = to_bits<Element>(static_cast<float>(static_cast<int>(random() % 81) - 40));
    threshold[j] = to_bits<Element>(static_cast<float>(static_cast<int>(random() % 81) - 20));
  }
  if (special) {
    for (int64_t t = 0; t < n_tokens; ++t) {
      uint16_t* row = x.data() + t * x_stride;
      if (t % 16 == 3) row[t % d_in] = to_bits<Element>(NAN);
      if (t % 16 == 5) row[t % d_in] = to_bits<Element>(INFINITY);
      if (t % 16 == 11) row[t % d_in] = to_bits<Element>(-INFINITY);
      if (t % 16 == 9) std::fill(row, row + d_in, to_bits<Element>(-0.0f));
    }
    for (int64_t j = 0; j < n_features; ++j) {
      uint16_t* row = weight.data() + j * weight_stride;
      if (j % 64 == 7) row[j % d_in] = to_bits<Element>(INFINITY);
      if (j % 64 == 13) row[j % d_in] = to_bits<Element>(NAN);
      if (j % 32 == 2) bias[j] = threshold[j] = to_bits<Element>(-0.0f);
      if (j % 32 == 17) bias[j] = to_bits<Element>(NAN);
      if (j % 32 == 21) bias[j] = to_bits<Element>(INFINITY);
    }
  }
  const Buffer<uint16_t> device_x(x), device_weight(weight), device_bias(bias), device_threshold(threshold);
  int n_multiprocessors = 0;
  check_cuda(cudaDeviceGetAttribute(&n_multiprocessors, cudaDevAttrMultiProcessorCount, 0), "attribute");

  for (const Activation activation : {Activation::relu, Activation::relu2, Activation::jumprelu}) {
    const bool jump = activation == Activation::jumprelu;
    const Linear linear = {kDType<Element>,
                           n_tokens,
                           n_features,
                           d_in,
                           device_x.data(),
                           x_stride,
                           device_weight.data(),
                           weight_stride,
                           variant % 3 == 0 ? nullptr : device_bias.data(),
                           activation,
                           jump ? device_threshold.data() : nullptr};
    Buffer<uint16_t> reference(n_tokens * n_features);
    const int64_t n = n_tokens * n_features;
    reference_kernel<Element><<<static_cast<unsigned>(ceil_div(n, 128)), 128>>>(linear, reference.data());
    check_cuda(cudaGetLastError(), "reference");
    const auto expected = reference.host();

    for (const Kernel& kernel : kernels<Element>()) {
      uint64_t needed = 0;
      for (const bool with_dense : {false, true}) {
        DeviceArena device(linear.dtype, n_tokens, n_features, worst_index_bytes(n_tokens, n_features),
                           worst_values_bytes(linear.dtype, n_tokens, n_features));
        device.cursor.fill(0);
        Buffer<uint16_t> h(n_tokens * h_stride);
        h.fill(0xA5);
        const DenseOut dense = {with_dense ? h.data() : nullptr, h_stride};
        if (!fused_supports(linear, dense)) report(kernel, linear, with_dense, "not supported");
        check_cuda(kernel.launch(linear, dense, device.arena, n_multiprocessors, nullptr), "launch");
        check_cuda(cudaDeviceSynchronize(), "fused kernel");

        std::vector<uint16_t> decoded;
        std::string wrong = decode_host(device, &decoded);
        if (wrong.empty()) wrong = compare(linear.dtype, decoded, expected, n_features);
        const auto written = h.host();
        for (int64_t i = 0; i < static_cast<int64_t>(written.size()) && wrong.empty(); ++i) {
          const int64_t t = i / h_stride, j = i % h_stride;
          const bool inside = with_dense && j < n_features;
          if (written[i] != (inside ? decoded[t * n_features + j] : 0xA5A5)) {
            wrong = inside ? "h is not what was encoded" : "wrote where h is not";
          }
        }
        report(kernel, linear, with_dense, wrong);
        needed = device.cursor.host()[0];
      }

      // Into an arena that just fits, and into one that is 16 bytes short: nothing beyond it, and the cursor the same.
      for (const int64_t lacking : {0, 1}) {
        const int64_t index_units = static_cast<int64_t>(needed & 0xffffffff);
        const int64_t values_units = static_cast<int64_t>(needed >> 32) - lacking;
        if (values_units < 0) continue;
        DeviceArena device(linear.dtype, n_tokens, n_features, index_units * kUnitBytes, values_units * kUnitBytes);
        device.cursor.fill(0);
        check_cuda(kernel.launch(linear, {nullptr, 0}, device.arena, n_multiprocessors, nullptr), "launch");
        check_cuda(cudaDeviceSynchronize(), "fused kernel");
        std::string wrong = device.cursor.host()[0] == needed ? "" : "the cursor depends on the capacity";
        const auto index = device.index.host(), values = device.values.host();
        for (int i = 1; i <= kUnitBytes; ++i) {
          if (index[index.size() - i] != 0xA5 || values[values.size() - i] != 0xA5) wrong = "wrote beyond the capacity";
        }
        std::vector<uint16_t> decoded;
        if (lacking == 0 && wrong.empty()) wrong = decode_host(device, &decoded);
        if (lacking == 0 && wrong.empty()) wrong = compare(linear.dtype, decoded, expected, n_features);
        report(kernel, linear, false, wrong);
      }
    }
  }
}

// The public entry: resets the cursor, and turns down what it must.
template <typename Element>
void check_entry() {
  constexpr int64_t kTokens = 33, kFeatures = 264, kDIn = 72;
  Buffer<uint16_t> x(kTokens * kDIn + 8), weight(kFeatures * kDIn), h(kTokens * kFeatures);
  x.fill(0);
  weight.fill(0);
  DeviceArena device(kDType<Element>, kTokens, kFeatures, worst_index_bytes(kTokens, kFeatures),
                     worst_values_bytes(kDType<Element>, kTokens, kFeatures));
  const Linear good = {kDType<Element>, kTokens,          kFeatures, kDIn, x.data(), kDIn, weight.data(), kDIn,
                       nullptr,         Activation::relu, nullptr};
  const Kernel entry = {"linear_relu_encode_out", nullptr};
  check_cuda(linear_relu_encode_out(good, {nullptr, 0}, device.arena, nullptr), "linear_relu_encode_out");
  check_cuda(cudaDeviceSynchronize(), "linear_relu_encode_out");
  report(entry, good, false, device.cursor.host()[0] == 0 ? "" : "zeros were stored, or the cursor was not set back");

  const auto refuses = [&](const char* what, auto change, DenseOut dense = {nullptr, 0}) {
    Linear bad = good;
    change(bad);
    report(entry, bad, false, fused_supports(bad, dense) ? std::string("takes ") + what : "");
  };
  refuses("float32", [](Linear& l) { l.dtype = DType::float32; });
  refuses("no tokens", [](Linear& l) { l.n_tokens = 0; });
  refuses("d_in 68", [](Linear& l) { l.d_in = 68; });
  refuses("260 features", [](Linear& l) { l.n_features = 260; });
  refuses("unaligned x", [](Linear& l) { l.x = static_cast<const uint16_t*>(l.x) + 1; });
  refuses("unaligned rows", [](Linear& l) { l.x_row_stride = kDIn + 1; });
  refuses("expanded rows", [](Linear& l) { l.x_row_stride = 0; });
  refuses("a missing threshold", [](Linear& l) { l.activation = Activation::jumprelu; });
  refuses("unaligned h", [](Linear&) {}, {h.data() + 1, kFeatures});
}

template <typename Element>
void check_all() {
  int variant = 0;
  for (const int64_t n_tokens : {1, 17, 64, 100, 129, 1000}) {
    for (const int64_t n_features : {8, 256, 264, 1000}) {
      for (const int64_t d_in : {8, 64, 768, 1544}) {
        check_shape<Element>(n_tokens, n_features, d_in, variant % 2 == 0, variant % 6);
        ++variant;
      }
      ++variant;
    }
  }
  check_shape<Element>(1024, 2048, 136, true, 1);  // enough columns and tokens for swizzled tiles
  check_shape<Element>(5000, 4096, 72, true, 2);   // more tiles than multiprocessors, several a block
  check_entry<Element>();
}

// ---- how long does it take? -----------------------------------------------------------------------------------------

// Normal values times `scale` plus `offset`, from a hash of the place.
__global__ void fill_normal_kernel(cutlass::bfloat16_t* out, int64_t n, float scale, float offset, uint32_t seed) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const auto hash = [&](uint32_t h) {
    h ^= static_cast<uint32_t>(i) * 0x9E3779B9u;
    h = (h ^ h >> 16) * 0x85EBCA6Bu;
    h = (h ^ h >> 13) * 0xC2B2AE35u;
    return static_cast<float>((h ^ h >> 16) >> 8) / 16777216.0f;
  };
  const float radius = sqrtf(-2 * logf(hash(seed) + 1e-7f));
  out[i] = cutlass::bfloat16_t(scale * radius * cospif(2 * hash(seed + 0x51ED270Bu)) + offset);
}

// The median over runs, each with a cold second-level cache.
template <typename Run>
float median_ms(Run run) {
  constexpr int kRuns = 21;
  static Buffer<uint8_t> flush(int64_t{256} << 20);
  cudaEvent_t start, stop;
  check_cuda(cudaEventCreate(&start), "event");
  check_cuda(cudaEventCreate(&stop), "event");
  std::vector<float> times;
  for (int i = 0; i < kRuns + 3; ++i) {  // three to warm up
    flush.fill(i);
    check_cuda(cudaEventRecord(start), "event");
    run();
    check_cuda(cudaEventRecord(stop), "event");
    check_cuda(cudaEventSynchronize(stop), "run");
    float ms = 0;
    check_cuda(cudaEventElapsedTime(&ms, start, stop), "event");
    if (i >= 3) times.push_back(ms);
  }
  cudaEventDestroy(start);
  cudaEventDestroy(stop);
  std::nth_element(times.begin(), times.begin() + kRuns / 2, times.end());
  return times[kRuns / 2];
}

// h = relu(x Wᵀ + b), dense, by the fastest of the algorithms that cuBLASLt proposes.
float cublas_ms(const Linear& linear, void* h) {
  static Buffer<uint8_t> workspace(int64_t{64} << 20);
  cublasLtHandle_t handle;
  check_cublas(cublasLtCreate(&handle), "handle");
  cublasLtMatmulDesc_t product;
  check_cublas(cublasLtMatmulDescCreate(&product, CUBLAS_COMPUTE_32F, CUDA_R_32F), "descriptor");
  const auto set = [&](cublasLtMatmulDescAttributes_t attribute, auto value) {
    check_cublas(cublasLtMatmulDescSetAttribute(product, attribute, &value, sizeof(value)), "attribute");
  };
  set(CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T);
  set(CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_RELU_BIAS);
  set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, linear.bias);
  set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, CUDA_R_16BF);
  // Column-major: hᵀ [n_features, n_tokens] = W xᵀ.
  cublasLtMatrixLayout_t weight, x, out;
  check_cublas(cublasLtMatrixLayoutCreate(&weight, CUDA_R_16BF, linear.d_in, linear.n_features, linear.d_in), "layout");
  check_cublas(cublasLtMatrixLayoutCreate(&x, CUDA_R_16BF, linear.d_in, linear.n_tokens, linear.d_in), "layout");
  check_cublas(cublasLtMatrixLayoutCreate(&out, CUDA_R_16BF, linear.n_features, linear.n_tokens, linear.n_features),
               "layout");
  cublasLtMatmulPreference_t preference;
  check_cublas(cublasLtMatmulPreferenceCreate(&preference), "preference");
  const size_t workspace_bytes = size_t{64} << 20;
  check_cublas(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                                    &workspace_bytes, sizeof(workspace_bytes)),
               "preference");
  cublasLtMatmulHeuristicResult_t proposals[8];
  int n_proposals = 0;
  check_cublas(
      cublasLtMatmulAlgoGetHeuristic(handle, product, weight, x, out, out, preference, 8, proposals, &n_proposals),
      "heuristic");
  float best = INFINITY;
  const float one = 1, zero = 0;
  for (int i = 0; i < n_proposals; ++i) {
    best =
        std::min(best, median_ms([&] {
                   check_cublas(cublasLtMatmul(handle, product, &one, linear.weight, weight, linear.x, x, &zero, h, out,
                                               h, out, &proposals[i].algo, workspace.data(), workspace_bytes, nullptr),
                                "matmul");
                 }));
  }
  cublasLtMatmulPreferenceDestroy(preference);
  for (const auto layout : {weight, x, out}) cublasLtMatrixLayoutDestroy(layout);
  cublasLtMatmulDescDestroy(product);
  cublasLtDestroy(handle);
  return best;
}

void time_shape(int64_t n_tokens, int64_t d_in, int64_t n_features, double density, float offset) {
  using Element = cutlass::bfloat16_t;
  const auto normal = [](Buffer<Element>& buffer, int64_t n, float scale, float mean, uint32_t seed) {
    fill_normal_kernel<<<static_cast<unsigned>(ceil_div(n, 256)), 256>>>(buffer.data(), n, scale, mean, seed);
    check_cuda(cudaGetLastError(), "fill");
  };
  Buffer<Element> x(n_tokens * d_in), weight(n_features * d_in), bias(n_features), h(n_tokens * n_features);
  normal(x, n_tokens * d_in, 1, 0, 1);
  normal(weight, n_features * d_in, 1 / std::sqrt(static_cast<float>(d_in)), 0, 2);
  normal(bias, n_features, 0, offset, 3);
  const Linear linear = {DType::bfloat16, n_tokens,         n_features, d_in, x.data(), d_in, weight.data(), d_in,
                         bias.data(),     Activation::relu, nullptr};
  DeviceArena device(DType::bfloat16, n_tokens, n_features, worst_index_bytes(n_tokens, n_features),
                     worst_values_bytes(DType::bfloat16, n_tokens, n_features));
  const double flop = 2.0 * static_cast<double>(n_tokens) * static_cast<double>(n_features) * static_cast<double>(d_in);
  const float peer = cublas_ms(linear, h.data());
  std::printf("%lldx%lld->%lld, %.0f %%: cuBLASLt dense %.3f ms (%.0f TFLOP/s)", static_cast<long long>(n_tokens),
              static_cast<long long>(d_in), static_cast<long long>(n_features), 100 * density, peer,
              flop / peer * 1e-9);
  int n_multiprocessors = 0;
  check_cuda(cudaDeviceGetAttribute(&n_multiprocessors, cudaDevAttrMultiProcessorCount, 0), "attribute");
  for (const Kernel& kernel : kernels<Element>()) {
    for (const bool with_dense : {false, true}) {
      const DenseOut dense = {with_dense ? h.data() : nullptr, n_features};
      const float ms = median_ms([&] {
        check_cuda(cudaMemsetAsync(device.cursor.data(), 0, sizeof(unsigned long long)), "cursor");
        check_cuda(kernel.launch(linear, dense, device.arena, n_multiprocessors, nullptr), "launch");
      });
      std::printf("; %s%s %.3f ms (%.0f TFLOP/s, %.2f x)", kernel.name, with_dense ? " and dense" : "", ms,
                  flop / ms * 1e-9, ms / peer);
    }
  }
  const uint64_t units = device.cursor.host()[0];
  const double arena_bytes = 16.0 * static_cast<double>((units >> 32) + (units & 0xffffffff));
  std::printf("; cuBLASLt again %.3f ms; dense %.0f MB, encoded %.1f MB\n", cublas_ms(linear, h.data()),
              2e-6 * static_cast<double>(n_tokens * n_features), 1e-6 * arena_bytes);
}

}  // namespace

int main(int n_arguments, char** arguments) {
  const std::string only = n_arguments > 1 ? arguments[1] : "";
  cudaDeviceProp device;
  check_cuda(cudaGetDeviceProperties(&device, 0), "device");
  std::printf("%s, %d multiprocessors\n", device.name, device.multiProcessorCount);
  if (only != "--time") {
    check_all<cutlass::bfloat16_t>();
    check_all<cutlass::half_t>();
    std::printf("%d checks, %d wrong\n", n_checked, n_wrong);
    if (n_wrong > 0) return 1;
  }
  if (only != "--check") {
    for (const int64_t d_in : {768, 1024, 2048, 4096}) {
      time_shape(8192, d_in, 16384, 0.03, -1.8808f);  // the normal distribution's quantiles
      time_shape(8192, d_in, 16384, 0.10, -1.2816f);
    }
  }
  return 0;
}
