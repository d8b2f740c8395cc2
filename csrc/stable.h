// All friction with the LibTorch Stable ABI in one place: short names, and what needs the raw shim.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <optional>

#include "cpu/encoding.h"

namespace pyfacts {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// torch's own thread pool in the shape that the torch-free kernels take.
inline void run_on_torch_threads(int64_t n, cpu::ParallelBody body, void* context) {
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, n, 1, body, context));
}

// Packing fewer bytes takes some 20 us, selecting the largest of them 120. To wake threads for it gains little, takes
// milliseconds where cores are busy, and hangs in a process that was forked after OpenMP had started its threads.
constexpr int64_t kThreadedBytes = 1 << 18;
inline cpu::ParallelFor threads_for(int64_t n_bytes) {
  return n_bytes < kThreadedBytes ? cpu::run_serially : run_on_torch_threads;
}
inline cpu::ParallelFor threads_for(const cpu::Dense& x) {
  return threads_for(x.n_tokens * x.n_features * item_bytes(x.dtype));
}
inline cpu::ParallelFor threads_for(const cpu::Encoding& encoding) {
  return threads_for(n_columns(encoding.n_features) * encoding.n_tokens + encoding.index_bytes +
                     encoding.n_values * item_bytes(encoding.dtype));
}

// An op of torch's that the stable headers do not wrap, and that returns a tensor.
template <typename... Arguments>
Tensor call_torch(const char* name, const char* overload, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(Arguments)> stack{torch::stable::detail::from(arguments)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// The answer of an op of torch's without arguments; none if this torch lacks the op.
inline std::optional<bool> ask_torch(const char* name) {
  StableIValue answer = 0;
  if (torch_call_dispatcher(name, "", &answer, TORCH_ABI_VERSION) != 0) return std::nullopt;
  return torch::stable::detail::to<bool>(answer);
}

#ifdef USE_CUDA
// torch's current stream on a GPU, a cudaStream_t.
inline void* current_cuda_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}
#endif

// In place; a NaN stays, and -0.0 becomes +0.0 or stays (the encoding treats both alike).
inline Tensor relu_(const Tensor& x) { return call_torch("aten::relu_", "", x); }
inline Tensor square_(const Tensor& x) { return call_torch("aten::square_", "", x); }
inline Tensor mul_(const Tensor& x, const Tensor& other) { return call_torch("aten::mul_", "Tensor", x, other); }

}  // namespace pyfacts
