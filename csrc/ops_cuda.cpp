// The CUDA kernels of the ops whose schemas are in ops.cpp: check -> allocate -> call a launcher, on torch's current
// stream. Ops without one here are for the CPU.
#include <torch/csrc/stable/accelerator.h>

#include "cuda/encoding.h"
#include "planes.h"

namespace pyfacts {
namespace {

using torch::stable::new_empty;
using torch::stable::accelerator::DeviceGuard;

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_cuda(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, " failed on the GPU: ", cudaGetErrorString(error));
}

Planes encode(const Tensor& x, double min_abs, bool signed_zero) {
  check_matrix(x, "x");
  STD_TORCH_CHECK(min_abs >= 0, "min_abs must be at least 0, got ", min_abs);
  const DeviceGuard guard(x.get_device());
  const cudaStream_t stream = current_stream(x);
  const Tensor dense = x.size(1) > 1 && x.stride(1) != 1 ? torch::stable::contiguous(x) : x;
  const cuda::Rows rows = {dtype_of(x), dense.const_data_ptr(), dense.stride(0), x.size(0), x.size(1)};

  int64_t scratch_bytes = 0;
  check_cuda(cuda::scratch_bytes(rows, &scratch_bytes), "encode");
  const Tensor scratch = new_empty(x, {scratch_bytes}, ScalarType::Byte);
  Tensor counts = new_empty(x, {n_columns(rows.n_features), rows.n_tokens}, ScalarType::Byte);
  int64_t index_bytes = 0, n_values = 0;
  check_cuda(cuda::count(rows, {min_abs, signed_zero}, static_cast<uint8_t*>(counts.mutable_data_ptr()),
                         scratch.mutable_data_ptr(), &index_bytes, &n_values, stream),
             "encode");
  Planes out = {std::move(counts), new_empty(x, {index_bytes}, ScalarType::Byte),
                new_empty(x, {n_values}, x.scalar_type()),
                new_empty(x, {n_columns(rows.n_features), n_tiles(rows.n_tokens), 2}, ScalarType::Long)};
  check_cuda(cuda::pack(rows, scratch.const_data_ptr(), pointers(out), stream), "encode");
  return out;
}

Tensor decode(const Tensor& counts, const Tensor& index, const Tensor& values, const Tensor& tile_ptr,
              int64_t n_features, bool signed_zero) {
  const cpu::Encoding encoding = view(counts, index, values, tile_ptr, n_features);
  const DeviceGuard guard(values.get_device());
  Tensor out = new_empty(values, {encoding.n_tokens, n_features}, values.scalar_type());
  const Tensor scratch = new_empty(values, {1}, ScalarType::Long);
  cpu::Status status;
  check_cuda(cuda::decode(encoding, signed_zero, out.mutable_data_ptr(), n_features, scratch.mutable_data_ptr(),
                          &status, current_stream(values)),
             "decode");
  check_status(status);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyfacts, CUDA, m) {
  m.impl("encode", TORCH_BOX(&encode));
  m.impl("decode", TORCH_BOX(&decode));
}

}  // namespace pyfacts
