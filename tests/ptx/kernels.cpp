// The CUDA kernels from their launchers on, for tests/test_ptx.py: compiled by nvcc, linked with runtime.cpp in place
// of the CUDA runtime. The functions have the names and arguments of tests/cuda_emulation's, so that the same tests run
// both.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "../../csrc/cuda/encoding.h"
#include "../../csrc/cuda/linear_relu_encode.h"
#include "../cuda_emulation/copies.h"

using namespace pyfacts;
using namespace pyfacts::cuda;

namespace {

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error("CUDA error " + std::to_string(static_cast<int>(error)));
}

// A copy of n items in device memory, of which not a byte beyond may be touched.
template <typename T>
class OnDevice {
 public:
  OnDevice(T* host, int64_t n) : host_(host), n_bytes_(host == nullptr ? 0 : n * static_cast<int64_t>(sizeof(T))) {
    if (host == nullptr) return;
    check(cudaMalloc(&data_, n_bytes_));
    check(cudaMemcpy(data_, host, n_bytes_, cudaMemcpyHostToDevice));
  }
  OnDevice(const OnDevice&) = delete;
  ~OnDevice() { cudaFree(data_); }
  T* data() const { return static_cast<T*>(data_); }
  void copy_back() const {
    check(cudaMemcpy(const_cast<std::remove_const_t<T>*>(host_), data_, n_bytes_, cudaMemcpyDeviceToHost));
  }

 private:
  T* host_;
  int64_t n_bytes_;
  void* data_ = nullptr;
};
using Bytes = OnDevice<const uint8_t>;

const uint8_t* bytes(const void* pointer) { return static_cast<const uint8_t*>(pointer); }

using ArenaOnDevice = ArenaCopy<OnDevice>;
using EncodingOnDevice = EncodingCopy<OnDevice>;

// What `read` finds wrong with the planes.
template <typename Read>
void report_fault(int64_t n_tokens, char* message, int64_t message_bytes, Read read) {
  FaultKey key = 0;
  const OnDevice<FaultKey> first_fault(&key, 1);
  check(read(first_fault.data()));
  cpu::Status status;
  check(verdict(first_fault.data(), n_tokens, &status, nullptr));
  write_status(status, message, message_bytes);
}

std::string wrong;

// Keeps what an exception says for emulated_error().
template <typename Body>
void guarded(Body body) {
  try {
    body();
  } catch (const std::exception& error) {
    wrong = error.what();
  }
}

}  // namespace

extern "C" {

const char* ptx_error();

// What went wrong since the last call, or "".
const char* emulated_error() {
  static std::string last;
  last = std::exchange(wrong, {});
  const std::string machine = ptx_error();
  if (!machine.empty()) last += (last.empty() ? "" : ": ") + machine;
  return last.c_str();
}

void emulated_encode(int dtype, const void* x, int64_t row_stride, int64_t n_tokens, int64_t n_features, double min_abs,
                     bool signed_zero, const void* thresholds, const Arena* out, int64_t first_token, uint32_t) {
  guarded([&] {
    const DType type = static_cast<DType>(dtype);
    // Rows stay as misaligned as they are.
    const int64_t shift = static_cast<int64_t>(reinterpret_cast<uintptr_t>(x) % kUnitBytes);
    const Bytes rows(bytes(x) - shift, shift + extent(n_tokens, row_stride, n_features) * item_bytes(type));
    ArenaOnDevice arena(*out);
    const int64_t n_thresholds = thresholds == nullptr ? 0 : n_columns(n_features) * kColumnWidth;
    const Bytes thresholds_there(bytes(thresholds), n_thresholds * item_bytes(type));
    const cpu::Keep keep = {min_abs, signed_zero, thresholds == nullptr ? nullptr : thresholds_there.data()};
    check(encode_out({type, rows.data() + shift, row_stride, n_tokens, n_features}, keep, arena.get(), first_token,
                     nullptr));
    arena.copy_back();
  });
}

void emulated_canonical_starts(const Arena* arena, int64_t* tile_ptr, int64_t* total, uint32_t) {
  guarded([&] {
    const ArenaOnDevice form(*arena);
    const OnDevice<int64_t> starts(tile_ptr, 2 * n_runs(arena->n_tokens, arena->n_features)), sizes(total, 2);
    int64_t scratch_bytes = 0;
    check(canonical_scratch_bytes(arena->n_tokens, arena->n_features, &scratch_bytes));
    std::string scratch(scratch_bytes, '\xa5');
    const OnDevice<char> scratch_on_device(scratch.data(), scratch_bytes);
    check(canonical_starts(form.get(), starts.data(), sizes.data(), scratch_on_device.data(), nullptr));
    starts.copy_back();
    sizes.copy_back();
  });
}

void emulated_canonical_copy(const Arena* arena, const int64_t* tile_ptr, const int64_t* total, uint8_t* index,
                             void* values, uint32_t) {
  guarded([&] {
    const ArenaOnDevice form(*arena);
    const OnDevice<const int64_t> starts(tile_ptr, 2 * n_runs(arena->n_tokens, arena->n_features)), sizes(total, 2);
    const OnDevice<uint8_t> index_out(index, total[0]);
    const OnDevice<uint8_t> values_out(static_cast<uint8_t*>(values), total[1] * item_bytes(arena->dtype));
    check(canonical_copy(form.get(), starts.data(), sizes.data(), index_out.data(), total[0], values_out.data(),
                         total[1], nullptr));
    index_out.copy_back();
    values_out.copy_back();
  });
}

void emulated_decode(int dtype, int64_t n_tokens, int64_t n_features, const uint8_t* counts, const uint8_t* index,
                     int64_t index_bytes, const void* values, int64_t n_values, const int64_t* tile_ptr,
                     bool signed_zero, void* out, char* message, int64_t message_bytes, uint32_t) {
  guarded([&] {
    const DType type = static_cast<DType>(dtype);
    const EncodingOnDevice e({type, n_tokens, n_features, counts, index, index_bytes, values, n_values, tile_ptr});
    const OnDevice<uint8_t> dense(static_cast<uint8_t*>(out), n_tokens * n_features * item_bytes(type));
    report_fault(n_tokens, message, message_bytes, [&](FaultKey* first_fault) {
      return decode(e.get(), signed_zero, dense.data(), n_features, first_fault, nullptr);
    });
    dense.copy_back();
  });
}

void emulated_to_csr(int dtype, int64_t n_tokens, int64_t n_features, const uint8_t* counts, const uint8_t* index,
                     int64_t index_bytes, const void* values, int64_t n_values, const int64_t* tile_ptr, int64_t* crow,
                     int64_t* col, void* row_values, char* message, int64_t message_bytes, uint32_t) {
  guarded([&] {
    const DType type = static_cast<DType>(dtype);
    const EncodingOnDevice e({type, n_tokens, n_features, counts, index, index_bytes, values, n_values, tile_ptr});
    const OnDevice<int64_t> crow_out(crow, n_tokens + 1), col_out(col, n_values);
    const OnDevice<uint8_t> values_out(static_cast<uint8_t*>(row_values), n_values * item_bytes(type));
    int64_t scratch_bytes = 0;
    check(csr_scratch_bytes(n_tokens, n_features, &scratch_bytes));
    std::string scratch(scratch_bytes, '\xa5');
    const OnDevice<char> scratch_on_device(scratch.data(), scratch_bytes);
    report_fault(n_tokens, message, message_bytes, [&](FaultKey* first_fault) {
      return to_csr(e.get(), {crow_out.data(), col_out.data(), values_out.data()}, scratch_on_device.data(),
                    first_fault, nullptr);
    });
    crow_out.copy_back();
    col_out.copy_back();
    values_out.copy_back();
  });
}

void emulated_sparse_linear(int dtype, int64_t n_tokens, int64_t n_features, const int64_t* crow, const int64_t* col,
                            const void* values, const void* weight, const void* bias, int64_t d_out, void* out,
                            uint32_t) {
  guarded([&] {
    const DType type = static_cast<DType>(dtype);
    const int64_t item = item_bytes(type), n_values = crow[n_tokens];
    const OnDevice<const int64_t> rows(crow, n_tokens + 1), columns(col, n_values);
    const Bytes row_values(bytes(values), n_values * item), weights(bytes(weight), n_features * d_out * item);
    const Bytes biases(bytes(bias), d_out * item);
    const OnDevice<uint8_t> outputs(static_cast<uint8_t*>(out), n_tokens * d_out * item);
    FaultKey key = ~FaultKey{0};
    const OnDevice<FaultKey> no_fault(&key, 1);
    const Csr csr = {const_cast<int64_t*>(rows.data()), const_cast<int64_t*>(columns.data()),
                     const_cast<uint8_t*>(row_values.data())};
    check(sparse_linear(type, n_tokens, csr, weights.data(), d_out, biases.data(), d_out, outputs.data(),
                        no_fault.data(), nullptr));
    outputs.copy_back();
  });
}

// The fused kernel, whose operands have rows of d_in + padding and whose dense result has rows of n_features + padding.
void emulated_linear_relu_encode(int dtype, int64_t n_tokens, int64_t n_features, int64_t d_in, int64_t padding,
                                 const void* x, const void* weight, const void* bias, int activation,
                                 const void* threshold, void* dense, const Arena* out) {
  guarded([&] {
    const DType type = static_cast<DType>(dtype);
    const int64_t item = item_bytes(type), stride = d_in + padding, dense_stride = n_features + padding;
    const Bytes rows(bytes(x), extent(n_tokens, stride, d_in) * item);
    const Bytes weights(bytes(weight), extent(n_features, stride, d_in) * item);
    const Bytes biases(bytes(bias), n_features * item), thresholds(bytes(threshold), n_features * item);
    const OnDevice<uint8_t> h(static_cast<uint8_t*>(dense), extent(n_tokens, dense_stride, n_features) * item);
    ArenaOnDevice arena(*out);
    const Linear linear = {type,
                           n_tokens,
                           n_features,
                           d_in,
                           rows.data(),
                           stride,
                           weights.data(),
                           stride,
                           biases.data(),
                           static_cast<Activation>(activation),
                           thresholds.data()};
    check(linear_relu_encode_out(linear, {h.data(), dense_stride}, arena.get(), nullptr));
    arena.copy_back();
    if (dense != nullptr) h.copy_back();
  });
}

}  // extern "C"
