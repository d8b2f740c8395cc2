// Decides what the fused kernel takes and launches it; the kernel itself is in linear_relu_encode.cuh.
#include <array>
#include <atomic>

#include "linear_relu_encode.h"

namespace pyfacts::cuda {
namespace {

constexpr int kAlignment = 16;  // bytes: what TMA asks of its operands, and whole octets of features

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % kAlignment == 0; }

// Rows of 2-byte elements that TMA can walk; a single row has no stride to speak of.
bool rows_supported(const void* data, int64_t n_rows, int64_t row_stride, int64_t width) {
  constexpr int64_t kMaxStride = (int64_t{1} << 40) / 2;
  if (!aligned(data) || width % (kAlignment / 2) != 0) return false;
  return n_rows == 1 || (row_stride >= width && row_stride < kMaxStride && row_stride % (kAlignment / 2) == 0);
}

// Multiprocessors of the current device if it is an sm_90, else 0. Asked once per device.
cudaError_t hopper_multiprocessors(int* n) {
  constexpr int kUnknown = 0, kOther = -1;
  static std::array<std::atomic<int>, 64> known{};
  *n = 0;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess || device >= static_cast<int>(known.size())) return error;
  int count = known[device].load(std::memory_order_relaxed);
  if (count == kUnknown) {
    int major = 0, minor = 0;
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) return error;
    if (major != 9 || minor != 0) count = kOther;
    known[device].store(count, std::memory_order_relaxed);
  }
  *n = count == kOther ? 0 : count;
  return cudaSuccess;
}

}  // namespace

bool fused_supports(const Linear& linear, const DenseOut& dense) {
  // CUTLASS counts elements and tiles with 32 bits, up to a few tiles beyond the end.
  constexpr int64_t kMaxSize = int64_t{1} << 30;
  constexpr int64_t kMinTileTokens = 64;
  const int64_t sizes[] = {linear.n_tokens, linear.n_features, linear.d_in};
  for (const int64_t size : sizes) {
    if (size <= 0 || size > kMaxSize) return false;
  }
  if (ceil_div(linear.n_tokens, kMinTileTokens) * n_columns(linear.n_features) > kMaxSize) return false;
  if (linear.dtype == DType::float32 || linear.n_features % (kAlignment / 2) != 0) return false;
  if (!rows_supported(linear.x, linear.n_tokens, linear.x_row_stride, linear.d_in)) return false;
  if (!rows_supported(linear.weight, linear.n_features, linear.weight_row_stride, linear.d_in)) return false;
  if (!aligned(linear.bias) || !aligned(linear.threshold)) return false;
  if ((linear.activation == Activation::jumprelu) != (linear.threshold != nullptr)) return false;
  if (dense.data != nullptr && !rows_supported(dense.data, linear.n_tokens, dense.row_stride, linear.n_features)) {
    return false;
  }
  int n_multiprocessors = 0;
  if (hopper_multiprocessors(&n_multiprocessors) == cudaSuccess) return n_multiprocessors > 0;
  (void)cudaGetLastError();  // else the next launch would be blamed for it
  return false;
}

cudaError_t linear_relu_encode_out(const Linear& linear, const DenseOut& dense, const Arena& out, cudaStream_t stream) {
  if (!fused_supports(linear, dense)) return cudaErrorNotSupported;
  int n_multiprocessors = 0;
  cudaError_t error = hopper_multiprocessors(&n_multiprocessors);
  if (error == cudaSuccess) error = cudaMemsetAsync(out.cursor, 0, sizeof(*out.cursor), stream);
  if (error != cudaSuccess) return error;
  const auto launch = linear.dtype == DType::bfloat16 ? launch_fused_bfloat16 : launch_fused_float16;
  return launch(linear, dense, out, n_multiprocessors, stream);
}

}  // namespace pyfacts::cuda
