// The CUDA kernels of the ops whose schemas are in ops.cpp: check -> allocate -> call a launcher, on torch's current
// stream. What torch's own ops make out of these is in pyfacts/cuda.py.
//
// The device form (cuda/arena.h) travels as its five tensors and n_features; its index and values have the capacities
// that the caller chose.
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <string>

#include "cuda/encoding.h"
#include "cuda/linear_relu_encode.h"
#include "planes.h"

namespace pyfacts {
namespace {

using torch::stable::new_empty;
using torch::stable::accelerator::DeviceGuard;

cudaStream_t current_stream(const Tensor& tensor) {
  return static_cast<cudaStream_t>(current_cuda_stream(tensor.get_device()));
}

void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) (void)cudaGetLastError();  // else the next launch would be blamed for it
  STD_TORCH_CHECK(error == cudaSuccess, what, " failed on the GPU: ", cudaGetErrorString(error));
}

void check_alike(const Tensor& tensor, const char* name, const Tensor& values) {
  STD_TORCH_CHECK(
      tensor.is_cuda() && tensor.get_device() == values.get_device() && tensor.scalar_type() == values.scalar_type(),
      name, " must be of the values' dtype and on their GPU, ", values.get_device());
}

cuda::Rows rows(const Tensor& x) { return {dtype_of(x), x.const_data_ptr(), x.stride(0), x.size(0), x.size(1)}; }

// ---- the device form ------------------------------------------------------------------------------------------------

void check_part(const Tensor& part, const char* name, int64_t dim, ScalarType type, const Tensor& values) {
  check_plane(part, name, dim, type, values);
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(part.const_data_ptr()) % cuda::kUnitBytes == 0, name,
                  " must start at a multiple of ", cuda::kUnitBytes, " bytes");
}

// The cursor counts fewer than 2^32 units of 16 bytes.
void check_countable(DType dtype, int64_t n_tokens, int64_t n_features) {
  const int64_t values_bytes = cuda::worst_values_bytes(dtype, n_tokens, n_features);
  constexpr int64_t kMaxBytes = int64_t{cuda::kUnitBytes} << 32;
  STD_TORCH_CHECK(values_bytes < kMaxBytes, "a matrix of [", n_tokens, ", ", n_features, "] may take ", values_bytes,
                  " bytes of values, and one encoding on a GPU less than ", kMaxBytes,
                  ": encode fewer tokens at a time and pyfacts.cat the encodings");
}

cuda::Arena arena(const Tensor& counts, const Tensor& index, const Tensor& values, const Tensor& group_ptr,
                  const Tensor& cursor, int64_t n_features) {
  check_plane(counts, "counts", 2, ScalarType::Byte, values);
  check_part(index, "index", 1, ScalarType::Byte, values);
  check_part(values, "values", 1, values.scalar_type(), values);
  check_part(group_ptr, "group_ptr", 2, ScalarType::Long, values);
  check_part(cursor, "cursor", 1, ScalarType::Long, values);
  const int64_t n_tokens = counts.size(1);
  STD_TORCH_CHECK(n_features >= 0 && counts.size(0) == n_columns(n_features), "counts has ", counts.size(0),
                  " columns, expected ", n_columns(n_features), " for ", n_features, " features");
  STD_TORCH_CHECK(group_ptr.size(0) == counts.size(0) && group_ptr.size(1) == cuda::n_groups(n_tokens),
                  "group_ptr must be [", counts.size(0), ", ", cuda::n_groups(n_tokens), "], got [", group_ptr.size(0),
                  ", ", group_ptr.size(1), "]");
  STD_TORCH_CHECK(cursor.size(0) == 1, "cursor must be [1], got [", cursor.size(0), "]");
  const DType dtype = dtype_of(values);
  check_countable(dtype, n_tokens, n_features);
  return {dtype,
          n_tokens,
          n_features,
          static_cast<uint8_t*>(counts.mutable_data_ptr()),
          static_cast<uint8_t*>(index.mutable_data_ptr()),
          index.size(0),
          static_cast<uint8_t*>(values.mutable_data_ptr()),
          values.size(0) * item_bytes(dtype),
          static_cast<uint64_t*>(group_ptr.mutable_data_ptr()),
          static_cast<unsigned long long*>(cursor.mutable_data_ptr())};
}

cpu::Keep keep_above(const Tensor& threshold, const Tensor& x) {
  check_part(threshold, "threshold", 1, x.scalar_type(), x);
  const int64_t n = n_columns(x.size(1)) * kColumnWidth;
  STD_TORCH_CHECK(threshold.size(0) == n, "threshold must be [", n, "], whole columns, got [", threshold.size(0), "]");
  return cpu::Keep::above(static_cast<const uint8_t*>(threshold.const_data_ptr()));
}

void pack(const Tensor& x, const cpu::Keep& keep, const cuda::Arena& out, int64_t first_token) {
  check_cuda(cuda::encode_out(rows(x), keep, out, first_token, current_stream(x)), "encode");
}

void encode_out(const Tensor& x, double min_abs, bool signed_zero, const std::optional<Tensor>& threshold,
                int64_t first_token, int64_t n_features, Tensor counts, Tensor index, Tensor values, Tensor group_ptr,
                Tensor cursor) {
  check_matrix(x, "x");
  check_alike(x, "x", values);
  STD_TORCH_CHECK(min_abs >= 0, "min_abs must be at least 0, got ", min_abs);
  const cuda::Arena out = arena(counts, index, values, group_ptr, cursor, n_features);
  const int64_t end_token = first_token + x.size(0);
  STD_TORCH_CHECK(first_token >= 0 && first_token % cuda::kGroupTokens == 0 && end_token <= out.n_tokens &&
                      (end_token % cuda::kGroupTokens == 0 || end_token == out.n_tokens),
                  "tokens [", first_token, ", ", end_token, ") of ", out.n_tokens, ": x must begin at a multiple of ",
                  cuda::kGroupTokens, " and end at one or with the matrix");
  STD_TORCH_CHECK(x.size(1) == n_features, "x has ", x.size(1), " features, the matrix ", n_features);
  const cpu::Keep keep = threshold ? keep_above(*threshold, x) : cpu::Keep{min_abs, signed_zero};
  const DeviceGuard guard(values.get_device());
  pack(whole_rows(x), keep, out, first_token);
}

// ---- from there to the canonical form -------------------------------------------------------------------------------

// Writes tile_ptr and sizes [2].
void find_starts(const cuda::Arena& form, const Tensor& tile_ptr, const Tensor& sizes, cudaStream_t stream) {
  int64_t scratch_bytes = 0;
  check_cuda(cuda::canonical_scratch_bytes(form.n_tokens, form.n_features, &scratch_bytes), "canonicalise");
  const Tensor scratch = new_empty(sizes, {scratch_bytes}, ScalarType::Byte);
  check_cuda(
      cuda::canonical_starts(form, static_cast<int64_t*>(tile_ptr.mutable_data_ptr()),
                             static_cast<int64_t*>(sizes.mutable_data_ptr()), scratch.mutable_data_ptr(), stream),
      "canonicalise");
}

void copy_groups(const cuda::Arena& form, const Tensor& index, const Tensor& values, const Tensor& tile_ptr,
                 const Tensor& sizes, cudaStream_t stream) {
  check_cuda(cuda::canonical_copy(form, static_cast<const int64_t*>(tile_ptr.const_data_ptr()),
                                  static_cast<const int64_t*>(sizes.const_data_ptr()),
                                  static_cast<uint8_t*>(index.mutable_data_ptr()), index.size(0),
                                  values.mutable_data_ptr(), values.size(0), stream),
             "canonicalise");
}

// Waits for the sizes: the one synchronisation of an encoding.
Planes canonical(Tensor counts, const cuda::Arena& form, const Tensor& like) {
  const cudaStream_t stream = current_stream(like);
  Tensor tile_ptr = empty_tile_ptr(like, form.n_tokens, form.n_features);
  const Tensor sizes_on_gpu = new_empty(like, {2}, ScalarType::Long);
  find_starts(form, tile_ptr, sizes_on_gpu, stream);
  int64_t sizes[2] = {0, 0};
  check_cuda(cudaMemcpyAsync(sizes, sizes_on_gpu.const_data_ptr(), sizeof(sizes), cudaMemcpyDeviceToHost, stream),
             "canonicalise");
  check_cuda(cudaStreamSynchronize(stream), "canonicalise");
  STD_TORCH_CHECK(sizes[0] >= 0 && sizes[1] >= 0, "the encoding did not fit its buffers of ", form.index_capacity,
                  " bytes of index and ", form.values_capacity, " bytes of values: encode again into larger ones");
  Planes planes = empty_planes(std::move(counts), std::move(tile_ptr), like, {sizes[0], sizes[1]});
  copy_groups(form, std::get<1>(planes), std::get<2>(planes), std::get<3>(planes), sizes_on_gpu, stream);
  return planes;
}

std::tuple<Tensor, Tensor, Tensor> canonicalise(const Tensor& counts, const Tensor& index, const Tensor& values,
                                                const Tensor& group_ptr, const Tensor& cursor, int64_t n_features) {
  const cuda::Arena form = arena(counts, index, values, group_ptr, cursor, n_features);
  const DeviceGuard guard(values.get_device());
  auto [_, canonical_index, canonical_values, tile_ptr] = canonical(counts, form, values);
  return {std::move(canonical_index), std::move(canonical_values), std::move(tile_ptr)};
}

// Without waiting: `sizes` [2] gets the bytes of index and the number of values, or -1 where the encoding did not fit
// its buffers; planes that are too short for them are not written.
void canonicalise_out(const Tensor& counts, const Tensor& index, const Tensor& values, const Tensor& group_ptr,
                      const Tensor& cursor, int64_t n_features, Tensor out_index, Tensor out_values, Tensor tile_ptr,
                      Tensor sizes) {
  const cuda::Arena form = arena(counts, index, values, group_ptr, cursor, n_features);
  view(counts, out_index, out_values, tile_ptr, n_features);
  check_plane(sizes, "sizes", 1, ScalarType::Long, values);
  STD_TORCH_CHECK(sizes.size(0) == 2, "sizes must be [2], got [", sizes.size(0), "]");
  check_alike(out_values, "out_values", values);
  const DeviceGuard guard(values.get_device());
  const cudaStream_t stream = current_stream(values);
  find_starts(form, tile_ptr, sizes, stream);
  copy_groups(form, out_index, out_values, tile_ptr, sizes, stream);
}

// ---- encode and decode ----------------------------------------------------------------------------------------------

// Packs x into buffers that hold any matrix of its shape, then copies what is used.
Planes encode(const Tensor& x, double min_abs, bool signed_zero) {
  check_matrix(x, "x");
  STD_TORCH_CHECK(min_abs >= 0, "min_abs must be at least 0, got ", min_abs);
  const int64_t n_tokens = x.size(0), n_features = x.size(1);
  const DType dtype = dtype_of(x);
  check_countable(dtype, n_tokens, n_features);
  const DeviceGuard guard(x.get_device());
  Tensor counts = empty_counts(x, n_tokens, n_features);
  const Tensor index = new_empty(x, {cuda::worst_index_bytes(n_tokens, n_features)}, ScalarType::Byte);
  const Tensor values =
      new_empty(x, {cuda::worst_values_bytes(dtype, n_tokens, n_features) / item_bytes(dtype)}, x.scalar_type());
  const Tensor group_ptr = new_empty(x, {n_columns(n_features), cuda::n_groups(n_tokens)}, ScalarType::Long);
  const Tensor cursor = new_empty(x, {1}, ScalarType::Long);
  const cuda::Arena form = arena(counts, index, values, group_ptr, cursor, n_features);
  check_cuda(cudaMemsetAsync(form.cursor, 0, sizeof(*form.cursor), current_stream(x)), "encode");
  pack(whole_rows(x), {min_abs, signed_zero}, form, 0);
  return canonical(std::move(counts), form, x);
}

// The word on the GPU in which a kernel that reads an encoding reports what is wrong with it.
class FaultWord {
 public:
  explicit FaultWord(const Tensor& like) : word_(new_empty(like, {1}, ScalarType::Long)) {}
  cuda::FaultKey* word() const { return static_cast<cuda::FaultKey*>(word_.mutable_data_ptr()); }
  // Waits, and complains.
  void check(const cpu::Encoding& encoding, cudaStream_t stream, const char* what) const {
    cpu::Status status;
    check_cuda(cuda::verdict(word(), encoding.n_tokens, &status, stream), what);
    check_status(status);
  }

 private:
  Tensor word_;
};

void decode_out(const Tensor& counts, const Tensor& index, const Tensor& values, const Tensor& tile_ptr,
                int64_t n_features, bool signed_zero, Tensor out) {
  const cpu::Encoding encoding = view(counts, index, values, tile_ptr, n_features);
  check_matrix(out, "out");
  check_alike(out, "out", values);
  STD_TORCH_CHECK(out.size(0) == encoding.n_tokens && out.size(1) == n_features && has_rows_apart(out), "out must be [",
                  encoding.n_tokens, ", ", n_features, "] with whole rows");
  const DeviceGuard guard(values.get_device());
  const cudaStream_t stream = current_stream(values);
  const FaultWord fault(values);
  check_cuda(cuda::decode(encoding, signed_zero, out.mutable_data_ptr(), out.stride(0), fault.word(), stream),
             "decode");
  fault.check(encoding, stream, "decode");
}

Tensor decode(const Tensor& counts, const Tensor& index, const Tensor& values, const Tensor& tile_ptr,
              int64_t n_features, bool signed_zero) {
  check_matrix(counts, "counts");
  Tensor out = new_empty(values, {counts.size(1), n_features}, values.scalar_type());
  decode_out(counts, index, values, tile_ptr, n_features, signed_zero, out);
  return out;
}

// ---- the up-projection, fused ---------------------------------------------------------------------------------------

cuda::Activation activation_of(const std::string& name) {
  if (name == "relu") return cuda::Activation::relu;
  if (name == "relu2") return cuda::Activation::relu2;
  STD_TORCH_CHECK(name == "jumprelu", "unknown activation ", name);
  return cuda::Activation::jumprelu;
}

// A tensor [n_features], or nothing, as the kernel wants it.
std::optional<Tensor> features_of(const std::optional<Tensor>& tensor, const char* name, const Tensor& like,
                                  int64_t n_features) {
  if (!tensor.has_value()) return std::nullopt;
  check_alike(*tensor, name, like);
  STD_TORCH_CHECK(tensor->dim() == 1 && tensor->size(0) == n_features, name, " must be [", n_features, "]");
  return torch::stable::contiguous(*tensor);
}

const void* pointer(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr() : nullptr;
}

// False, and nothing done, for what the kernel does not take. It does not wait.
bool fused_linear_relu_encode_out(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                  const std::string& activation, const std::optional<Tensor>& threshold,
                                  std::optional<Tensor> h, Tensor counts, Tensor index, Tensor values, Tensor group_ptr,
                                  Tensor cursor) {
  check_matrix(x, "x");
  check_matrix(weight, "weight");
  check_alike(x, "x", values);
  check_alike(weight, "weight", values);
  const int64_t n_tokens = x.size(0), n_features = weight.size(0), d_in = x.size(1);
  const cuda::Arena out = arena(counts, index, values, group_ptr, cursor, n_features);
  STD_TORCH_CHECK(weight.size(1) == d_in && out.n_tokens == n_tokens, "x [", n_tokens, ", ", d_in, "], weight [",
                  n_features, ", ", weight.size(1), "] and buffers for ", out.n_tokens, " tokens do not fit");
  const DeviceGuard guard(values.get_device());
  cuda::DenseOut dense = {};
  if (h.has_value()) {
    check_matrix(*h, "h");
    check_alike(*h, "h", values);
    STD_TORCH_CHECK(h->size(0) == n_tokens && h->size(1) == n_features && h->stride(1) == 1, "h must be [", n_tokens,
                    ", ", n_features, "] with whole rows");
    dense = {h->mutable_data_ptr(), h->stride(0)};
  }
  if (d_in > 1 && (x.stride(1) != 1 || weight.stride(1) != 1)) return false;
  const std::optional<Tensor> b = features_of(bias, "bias", values, n_features);
  const std::optional<Tensor> theta = features_of(threshold, "threshold", values, n_features);
  const cuda::Linear linear = {out.dtype,
                               n_tokens,
                               n_features,
                               d_in,
                               x.const_data_ptr(),
                               x.stride(0),
                               weight.const_data_ptr(),
                               weight.stride(0),
                               pointer(b),
                               activation_of(activation),
                               pointer(theta)};
  if (!cuda::fused_supports(linear, dense)) return false;
  check_cuda(cuda::linear_relu_encode_out(linear, dense, out, current_stream(values)), "linear_relu_encode");
  return true;
}

// ---- compressed sparse rows, and products with them -----------------------------------------------------------------

using CsrTensors = std::tuple<Tensor, Tensor, Tensor>;  // crow, col, values

cuda::Csr pointers(const CsrTensors& rows) {
  return {static_cast<int64_t*>(std::get<0>(rows).mutable_data_ptr()),
          static_cast<int64_t*>(std::get<1>(rows).mutable_data_ptr()), std::get<2>(rows).mutable_data_ptr()};
}

// What it writes is to be trusted once `fault` is checked.
CsrTensors list_rows(const cpu::Encoding& encoding, const Tensor& like, const FaultWord& fault, cudaStream_t stream) {
  CsrTensors rows = {new_empty(like, {encoding.n_tokens + 1}, ScalarType::Long),
                     new_empty(like, {encoding.n_values}, ScalarType::Long),
                     new_empty(like, {encoding.n_values}, like.scalar_type())};
  int64_t scratch_bytes = 0;
  check_cuda(cuda::csr_scratch_bytes(encoding.n_tokens, encoding.n_features, &scratch_bytes), "to_csr");
  const Tensor scratch = new_empty(like, {scratch_bytes}, ScalarType::Byte);
  check_cuda(cuda::to_csr(encoding, pointers(rows), scratch.mutable_data_ptr(), fault.word(), stream), "to_csr");
  return rows;
}

CsrTensors to_csr(const Tensor& counts, const Tensor& index, const Tensor& values, const Tensor& tile_ptr,
                  int64_t n_features) {
  const cpu::Encoding encoding = view(counts, index, values, tile_ptr, n_features);
  const DeviceGuard guard(values.get_device());
  const cudaStream_t stream = current_stream(values);
  const FaultWord fault(values);
  CsrTensors rows = list_rows(encoding, values, fault, stream);
  fault.check(encoding, stream, "to_csr");
  return rows;
}

Tensor sparse_linear(const Tensor& counts, const Tensor& index, const Tensor& values, const Tensor& tile_ptr,
                     const Tensor& weight, const std::optional<Tensor>& bias) {
  check_matrix(weight, "weight");
  check_alike(weight, "weight", values);
  const cpu::Encoding encoding = view(counts, index, values, tile_ptr, weight.size(0));
  const int64_t d_out = weight.size(1);
  const DeviceGuard guard(values.get_device());
  const Tensor w = whole_rows(weight);
  std::optional<Tensor> b;
  if (bias.has_value()) {
    check_alike(*bias, "bias", values);
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == d_out, "bias must be [", d_out, "]");
    b = torch::stable::contiguous(*bias);
  }
  Tensor out = new_empty(values, {encoding.n_tokens, d_out}, values.scalar_type());
  const cudaStream_t stream = current_stream(values);
  const FaultWord fault(values);
  const CsrTensors rows = list_rows(encoding, values, fault, stream);
  check_cuda(cuda::sparse_linear(encoding.dtype, encoding.n_tokens, pointers(rows), w.const_data_ptr(), w.stride(0),
                                 b.has_value() ? b->const_data_ptr() : nullptr, d_out, out.mutable_data_ptr(),
                                 fault.word(), stream),
             "sparse_linear");
  fault.check(encoding, stream, "sparse_linear");
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyfacts, CUDA, m) {
  m.impl("encode", TORCH_BOX(&encode));
  m.impl("encode_out", TORCH_BOX(&encode_out));
  m.impl("fused_linear_relu_encode_out", TORCH_BOX(&fused_linear_relu_encode_out));
  m.impl("canonicalise", TORCH_BOX(&canonicalise));
  m.impl("canonicalise_out", TORCH_BOX(&canonicalise_out));
  m.impl("decode", TORCH_BOX(&decode));
  m.impl("decode_out", TORCH_BOX(&decode_out));
  m.impl("to_csr", TORCH_BOX(&to_csr));
  m.impl("sparse_linear", TORCH_BOX(&sparse_linear));
}

}  // namespace pyfacts
