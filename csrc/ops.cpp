// Schemas of every pyfacts op and their CPU kernels: check -> allocate -> call a torch-free kernel.
//
// An encoding travels as its four planes (counts, index, values, tile_ptr) and n_features; see format.h and planes.h.
#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/sparse_linear.h"
#include "linear.h"
#include "planes.h"
#include "select.h"

namespace pyfacts {
namespace {

using torch::stable::contiguous;
using torch::stable::new_empty;

// x: a matrix with whole rows.
Planes encode_rows(const Tensor& x, cpu::Keep keep) {
  const int64_t n_tokens = x.size(0), n_features = x.size(1);
  const cpu::Dense dense = dense_of(x);
  const cpu::ParallelFor parallel_for = threads_for(dense);
  Tensor counts = empty_counts(x, n_tokens, n_features);
  auto* const count_bytes = static_cast<uint8_t*>(counts.mutable_data_ptr());
  if (!cpu::suits_two_passes(dense, keep)) {
    cpu::Encoder encoder(dense.dtype, n_tokens, n_features, keep, count_bytes);
    encoder.add(dense, 0, 0, parallel_for);
    return finish(encoder, std::move(counts), x, n_tokens, n_features);
  }
  Tensor tile_ptr = empty_tile_ptr(x, n_tokens, n_features);
  const cpu::PlaneSizes sizes =
      cpu::count(dense, keep, count_bytes, static_cast<int64_t*>(tile_ptr.mutable_data_ptr()), parallel_for);
  Planes planes = empty_planes(std::move(counts), std::move(tile_ptr), x, sizes);
  const cpu::Planes out = pointers(planes);
  STD_TORCH_CHECK(cpu::pack(dense, keep, out.tile_ptr, sizes, out.index, out.values, parallel_for),
                  "the matrix changed while it was being encoded");
  return planes;
}

Planes encode(const Tensor& x, double min_abs, bool signed_zero) {
  check_matrix(x, "x");
  STD_TORCH_CHECK(min_abs >= 0, "min_abs must be at least 0, got ", min_abs);
  return encode_rows(whole_rows(x), {min_abs, signed_zero});
}

void decode_out(const Tensor& counts, const Tensor& index, const Tensor& values, const Tensor& tile_ptr,
                int64_t n_features, bool signed_zero, Tensor out) {
  const cpu::Encoding encoding = view(counts, index, values, tile_ptr, n_features);
  check_matrix(out, "out");
  STD_TORCH_CHECK(out.size(0) == encoding.n_tokens && out.size(1) == n_features && has_rows_apart(out) &&
                      out.scalar_type() == values.scalar_type(),
                  "out must be [", encoding.n_tokens, ", ", n_features,
                  "] of the values' dtype, with whole rows apart");
  check_status(cpu::decode(encoding, signed_zero, out.mutable_data_ptr(), out.stride(0), threads_for(dense_of(out))));
}

Tensor decode(const Tensor& counts, const Tensor& index, const Tensor& values, const Tensor& tile_ptr,
              int64_t n_features, bool signed_zero) {
  check_matrix(counts, "counts");
  Tensor out = new_empty(values, {counts.size(1), n_features}, values.scalar_type());
  decode_out(counts, index, values, tile_ptr, n_features, signed_zero, out);
  return out;
}

// h [n_tokens, n_features] ([0, n_features] unless return_dense) is unpacked from the planes: it agrees with them bit
// for bit.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_relu_encode_and_dense(const Tensor& x, const Tensor& weight,
                                                                                const std::optional<Tensor>& bias,
                                                                                const std::string& activation,
                                                                                const std::optional<Tensor>& threshold,
                                                                                bool return_dense) {
  Planes planes = linear_relu_encode(x, weight, bias, activation, threshold);
  Tensor h = new_empty(x, {return_dense ? x.size(0) : 0, weight.size(0)}, x.scalar_type());
  if (return_dense) {
    const auto& [counts, index, values, tile_ptr] = planes;
    decode_out(counts, index, values, tile_ptr, weight.size(0), false, h);
  }
  return std::tuple_cat(std::make_tuple(std::move(h)), std::move(planes));
}

// A dense operand of a product with an encoding, its rows whole.
Tensor dense_operand(const Tensor& x, const char* name, int64_t n_rows, const Tensor& values) {
  check_matrix(x, name);
  STD_TORCH_CHECK(x.size(0) == n_rows && x.scalar_type() == values.scalar_type() && x.is_cpu(), name, " must be [",
                  n_rows, ", d_out] of the values' dtype, on the CPU");
  return whole_rows(x);
}

Tensor sparse_linear(const Tensor& counts, const Tensor& index, const Tensor& values, const Tensor& tile_ptr,
                     const Tensor& weight, const std::optional<Tensor>& bias) {
  check_matrix(weight, "weight");
  const cpu::Encoding encoding = view(counts, index, values, tile_ptr, weight.size(0));
  const Tensor w = dense_operand(weight, "weight", encoding.n_features, values);
  const int64_t d_out = w.size(1);
  std::optional<Tensor> b;
  if (bias.has_value()) {
    STD_TORCH_CHECK(
        bias->dim() == 1 && bias->size(0) == d_out && bias->scalar_type() == values.scalar_type() && bias->is_cpu(),
        "bias must be [", d_out, "] of the values' dtype, on the CPU");
    b = contiguous(*bias);
  }
  Tensor out = new_empty(values, {encoding.n_tokens, d_out}, values.scalar_type());
  check_status(
      cpu::sparse_linear(encoding, {w.const_data_ptr(), w.stride(0)}, b.has_value() ? b->const_data_ptr() : nullptr,
                         d_out, out.mutable_data_ptr(),
                         threads_for((encoding.n_values + encoding.n_tokens) * d_out * item_bytes(encoding.dtype))));
  return out;
}

Tensor sparse_linear_grad_weight(const Tensor& counts, const Tensor& index, const Tensor& values,
                                 const Tensor& tile_ptr, int64_t n_features, const Tensor& grad) {
  const cpu::Encoding encoding = view(counts, index, values, tile_ptr, n_features);
  const Tensor g = dense_operand(grad, "grad", encoding.n_tokens, values);
  Tensor out = new_empty(values, {n_features, g.size(1)}, values.scalar_type());
  check_status(cpu::sparse_linear_grad_weight(
      encoding, {g.const_data_ptr(), g.stride(0)}, g.size(1), out.mutable_data_ptr(),
      threads_for((encoding.n_values + n_features) * g.size(1) * item_bytes(encoding.dtype))));
  return out;
}

Planes slice(const Tensor& counts, const Tensor& index, const Tensor& values, const Tensor& tile_ptr,
             int64_t n_features, int64_t start, int64_t stop) {
  const cpu::Encoding encoding = view(counts, index, values, tile_ptr, n_features);
  STD_TORCH_CHECK(0 <= start && start <= stop && stop <= encoding.n_tokens, "tokens [", start, ", ", stop,
                  ") out of range for ", encoding.n_tokens, " tokens");
  cpu::PlaneSizes sizes;
  check_status(cpu::slice_sizes(encoding, start, stop, &sizes, threads_for(encoding)));
  Planes out = empty_planes(values, stop - start, n_features, sizes);
  check_status(cpu::slice(encoding, start, stop, pointers(out), threads_for(encoding)));
  return out;
}

Planes take(const Tensor& counts, const Tensor& index, const Tensor& values, const Tensor& tile_ptr, int64_t n_features,
            const Tensor& tokens) {
  const cpu::Encoding encoding = view(counts, index, values, tile_ptr, n_features);
  check_plane(tokens, "tokens", 1, ScalarType::Long, values);
  const int64_t n = tokens.size(0);
  const auto* const chosen = static_cast<const int64_t*>(tokens.const_data_ptr());
  for (int64_t i = 0; i < n; ++i) {
    STD_TORCH_CHECK(0 <= chosen[i] && chosen[i] < encoding.n_tokens, "token ", chosen[i], " out of range for ",
                    encoding.n_tokens, " tokens");
  }
  std::vector<cpu::PlaneSizes> bases(n_columns(n_features) + 1);
  const cpu::ParallelFor parallel_for =
      threads_for(n_columns(n_features) * std::max(n, encoding.n_tokens) + encoding.index_bytes);
  check_status(cpu::take_sizes(encoding, chosen, n, bases.data(), parallel_for));
  Planes out = empty_planes(values, n, n_features, bases.back());
  check_status(cpu::take(encoding, chosen, n, bases.data(), pointers(out), parallel_for));
  return out;
}

Planes cat(std::vector<Tensor> counts, std::vector<Tensor> index, std::vector<Tensor> values,
           std::vector<Tensor> tile_ptr, int64_t n_features) {
  STD_TORCH_CHECK(!counts.empty() && counts.size() == index.size() && counts.size() == values.size() &&
                      counts.size() == tile_ptr.size(),
                  "cat needs the four planes of at least one encoding");
  std::vector<cpu::Encoding> encodings;
  int64_t n_tokens = 0;
  cpu::PlaneSizes sizes = {0, 0};
  for (size_t i = 0; i < counts.size(); ++i) {
    encodings.push_back(view(counts[i], index[i], values[i], tile_ptr[i], n_features));
    STD_TORCH_CHECK(encodings[i].dtype == encodings[0].dtype, "cat needs encodings of one dtype");
    n_tokens += encodings[i].n_tokens;
    sizes.index_bytes += encodings[i].index_bytes;
    sizes.n_values += encodings[i].n_values;
  }
  Planes out = empty_planes(values[0], n_tokens, n_features, sizes);
  const cpu::ParallelFor parallel_for = threads_for(n_columns(n_features) * n_tokens + sizes.index_bytes +
                                                    sizes.n_values * item_bytes(encodings[0].dtype));
  check_status(cpu::cat(encodings.data(), static_cast<int64_t>(encodings.size()), pointers(out), parallel_for));
  return out;
}

std::tuple<Tensor, Tensor> neuron(const Tensor& counts, const Tensor& index, const Tensor& values,
                                  const Tensor& tile_ptr, int64_t n_features, int64_t feature) {
  const cpu::Encoding encoding = view(counts, index, values, tile_ptr, n_features);
  STD_TORCH_CHECK(0 <= feature && feature < n_features, "feature ", feature, " out of range for ", n_features,
                  " features");
  const int64_t item = item_bytes(encoding.dtype);
  // Room for all tokens; what is not found is never touched.
  const std::unique_ptr<int64_t[]> room(new int64_t[encoding.n_tokens]);
  const std::unique_ptr<uint8_t[]> values_room(new uint8_t[encoding.n_tokens * item]);
  int64_t n_found = 0;
  check_status(cpu::neuron(encoding, feature, room.get(), values_room.get(), &n_found));
  Tensor tokens = new_empty(values, {n_found}, ScalarType::Long);
  Tensor found = new_empty(values, {n_found}, values.scalar_type());
  if (n_found > 0) {
    std::memcpy(tokens.mutable_data_ptr(), room.get(), n_found * sizeof(int64_t));
    std::memcpy(found.mutable_data_ptr(), values_room.get(), n_found * item);
  }
  return {std::move(tokens), std::move(found)};
}

std::tuple<Tensor, Tensor, Tensor> to_csr(const Tensor& counts, const Tensor& index, const Tensor& values,
                                          const Tensor& tile_ptr, int64_t n_features) {
  const cpu::Encoding encoding = view(counts, index, values, tile_ptr, n_features);
  Tensor crow = new_empty(values, {encoding.n_tokens + 1}, ScalarType::Long);
  Tensor col = new_empty(values, {encoding.n_values}, ScalarType::Long);
  Tensor row_values = new_empty(values, {encoding.n_values}, values.scalar_type());
  check_status(cpu::to_csr(encoding, static_cast<int64_t*>(crow.mutable_data_ptr()),
                           static_cast<int64_t*>(col.mutable_data_ptr()), row_values.mutable_data_ptr(),
                           threads_for(encoding)));
  return {std::move(crow), std::move(col), std::move(row_values)};
}

std::string isa() { return cpu::isa(); }

}  // namespace

STABLE_TORCH_LIBRARY(pyfacts, m) {
  m.def(
      "encode(Tensor x, float min_abs, bool signed_zero)"
      " -> (Tensor counts, Tensor index, Tensor values, Tensor tile_ptr)");
  m.def(
      "decode(Tensor counts, Tensor index, Tensor values, Tensor tile_ptr, SymInt n_features, bool signed_zero)"
      " -> Tensor");
  m.def(
      "decode_out(Tensor counts, Tensor index, Tensor values, Tensor tile_ptr, SymInt n_features, bool signed_zero,"
      " Tensor(a!) out) -> ()");
  // On CUDA only: into the device form of a matrix that comes in parts, and from there to the canonical form.
  m.def(
      "encode_out(Tensor x, float min_abs, bool signed_zero, Tensor? threshold, SymInt first_token,"
      " SymInt n_features, Tensor(a!) counts, Tensor(b!) index, Tensor(c!) values, Tensor(d!) group_ptr,"
      " Tensor(e!) cursor) -> ()");
  m.def(
      "fused_linear_relu_encode_out(Tensor x, Tensor weight, Tensor? bias, str activation, Tensor? threshold,"
      " Tensor(a!)? h, Tensor(b!) counts, Tensor(c!) index, Tensor(d!) values, Tensor(e!) group_ptr,"
      " Tensor(f!) cursor) -> bool");
  m.def(
      "canonicalise(Tensor counts, Tensor index, Tensor values, Tensor group_ptr, Tensor cursor, SymInt n_features)"
      " -> (Tensor index, Tensor values, Tensor tile_ptr)");
  m.def(
      "canonicalise_out(Tensor counts, Tensor index, Tensor values, Tensor group_ptr, Tensor cursor,"
      " SymInt n_features, Tensor(a!) out_index, Tensor(b!) out_values, Tensor(c!) tile_ptr, Tensor(d!) sizes) -> ()");
  m.def(
      "linear_relu_encode(Tensor x, Tensor weight, Tensor? bias, str activation, Tensor? threshold, bool return_dense)"
      " -> (Tensor h, Tensor counts, Tensor index, Tensor values, Tensor tile_ptr)");
  m.def(
      "gated_relu_encode(Tensor x, Tensor w_gate, Tensor w_up, Tensor? b_gate, Tensor? b_up)"
      " -> (Tensor counts, Tensor index, Tensor values, Tensor tile_ptr)");
  m.def(
      "linear_topk_encode(Tensor x, Tensor weight, Tensor? bias, SymInt k, bool over_batch)"
      " -> (Tensor counts, Tensor index, Tensor values, Tensor tile_ptr)");
  m.def("topk_encode(Tensor x, SymInt k) -> (Tensor counts, Tensor index, Tensor values, Tensor tile_ptr)");
  m.def("row_sq_norm(Tensor x) -> Tensor");
  m.def(
      "slice(Tensor counts, Tensor index, Tensor values, Tensor tile_ptr, SymInt n_features, SymInt start, SymInt stop)"
      " -> (Tensor counts, Tensor index, Tensor values, Tensor tile_ptr)");
  m.def(
      "take(Tensor counts, Tensor index, Tensor values, Tensor tile_ptr, SymInt n_features, Tensor tokens)"
      " -> (Tensor counts, Tensor index, Tensor values, Tensor tile_ptr)");
  m.def(
      "cat(Tensor[] counts, Tensor[] index, Tensor[] values, Tensor[] tile_ptr, SymInt n_features)"
      " -> (Tensor counts, Tensor index, Tensor values, Tensor tile_ptr)");
  m.def(
      "neuron(Tensor counts, Tensor index, Tensor values, Tensor tile_ptr, SymInt n_features, SymInt feature)"
      " -> (Tensor tokens, Tensor values)");
  m.def(
      "to_csr(Tensor counts, Tensor index, Tensor values, Tensor tile_ptr, SymInt n_features)"
      " -> (Tensor crow_indices, Tensor col_indices, Tensor values)");
  m.def(
      "sparse_linear(Tensor counts, Tensor index, Tensor values, Tensor tile_ptr, Tensor weight, Tensor? bias)"
      " -> Tensor");
  m.def(
      "sparse_linear_grad_weight(Tensor counts, Tensor index, Tensor values, Tensor tile_ptr, SymInt n_features,"
      " Tensor grad) -> Tensor");
  m.def("isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(pyfacts, CPU, m) {
  m.impl("encode", TORCH_BOX(&encode));
  m.impl("decode", TORCH_BOX(&decode));
  m.impl("decode_out", TORCH_BOX(&decode_out));
  m.impl("linear_relu_encode", TORCH_BOX(&linear_relu_encode_and_dense));
  m.impl("gated_relu_encode", TORCH_BOX(&gated_relu_encode));
  m.impl("linear_topk_encode", TORCH_BOX(&linear_topk_encode));
  m.impl("topk_encode", TORCH_BOX(&topk_encode));
  m.impl("row_sq_norm", TORCH_BOX(&row_sq_norm));
  m.impl("slice", TORCH_BOX(&slice));
  m.impl("take", TORCH_BOX(&take));
  m.impl("cat", TORCH_BOX(&cat));
  m.impl("neuron", TORCH_BOX(&neuron));
  m.impl("to_csr", TORCH_BOX(&to_csr));
  m.impl("sparse_linear", TORCH_BOX(&sparse_linear));
  m.impl("sparse_linear_grad_weight", TORCH_BOX(&sparse_linear_grad_weight));
}

STABLE_TORCH_LIBRARY_IMPL(pyfacts, CompositeExplicitAutograd, m) { m.impl("isa", TORCH_BOX(&isa)); }

}  // namespace pyfacts
