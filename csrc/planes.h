// An encoding as tensors: its four planes checked, viewed and allocated. Shared by the CPU ops and the CUDA ops.
//
// Arguments were checked in Python with better words; the checks here keep a direct caller of torch.ops from reading
// out of bounds.
#pragma once

#include <tuple>
#include <utility>

#include "cpu/sparse_rows.h"
#include "stable.h"

namespace pyfacts {

using Planes = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // counts, index, values, tile_ptr

inline DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    case ScalarType::Half:
      return DType::float16;
    default:
      STD_TORCH_CHECK(false, "pyfacts encodes float32, bfloat16 and float16, got scalar type ",
                      static_cast<int>(tensor.scalar_type()));
  }
}

inline void check_matrix(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2, name, " must have 2 dimensions, got ", tensor.dim());
}

// The matrix with the elements of a row side by side.
inline Tensor whole_rows(const Tensor& matrix) {
  return matrix.size(1) > 1 && matrix.stride(1) != 1 ? torch::stable::contiguous(matrix) : matrix;
}

// Whether it can be written row by row: rows are whole and do not overlap.
inline bool has_rows_apart(const Tensor& matrix) {
  return (matrix.size(1) <= 1 || matrix.stride(1) == 1) && (matrix.size(0) <= 1 || matrix.stride(0) >= matrix.size(1));
}

// A matrix with whole rows.
inline cpu::Dense dense_of(const Tensor& matrix) {
  return {dtype_of(matrix), matrix.const_data_ptr(), matrix.stride(0), matrix.size(0), matrix.size(1)};
}

inline void check_plane(const Tensor& plane, const char* name, int64_t dim, ScalarType type, const Tensor& values) {
  STD_TORCH_CHECK(plane.dim() == dim && plane.is_contiguous(), name, " must be contiguous with ", dim,
                  " dimensions, got ", plane.dim());
  STD_TORCH_CHECK(plane.scalar_type() == type, name, " has scalar type ", static_cast<int>(plane.scalar_type()),
                  ", expected ", static_cast<int>(type));
  STD_TORCH_CHECK(plane.is_cpu() == values.is_cpu() && plane.get_device() == values.get_device(), name,
                  " and values must be on one device, got ", plane.get_device(), " and ", values.get_device());
}

inline cpu::Encoding view(const Tensor& counts, const Tensor& index, const Tensor& values, const Tensor& tile_ptr,
                          int64_t n_features) {
  check_plane(counts, "counts", 2, ScalarType::Byte, values);
  check_plane(index, "index", 1, ScalarType::Byte, values);
  check_plane(values, "values", 1, values.scalar_type(), values);
  check_plane(tile_ptr, "tile_ptr", 3, ScalarType::Long, values);
  const int64_t n_tokens = counts.size(1);
  STD_TORCH_CHECK(0 <= n_features && n_features <= kMaxFeatures, "n_features is ", n_features);
  STD_TORCH_CHECK(counts.size(0) == n_columns(n_features), "counts has ", counts.size(0), " columns, expected ",
                  n_columns(n_features), " for ", n_features, " features");
  STD_TORCH_CHECK(tile_ptr.size(0) == counts.size(0) && tile_ptr.size(1) == n_tiles(n_tokens) && tile_ptr.size(2) == 2,
                  "tile_ptr must be [", counts.size(0), ", ", n_tiles(n_tokens), ", 2], got [", tile_ptr.size(0), ", ",
                  tile_ptr.size(1), ", ", tile_ptr.size(2), "]");
  return {dtype_of(values),
          n_tokens,
          n_features,
          static_cast<const uint8_t*>(counts.const_data_ptr()),
          static_cast<const uint8_t*>(index.const_data_ptr()),
          index.size(0),
          values.const_data_ptr(),
          values.size(0),
          static_cast<const int64_t*>(tile_ptr.const_data_ptr())};
}

inline void check_status(const cpu::Status& status) {
  STD_TORCH_CHECK(status.ok(), "not a valid encoding: ", cpu::describe(status.fault), " (column ", status.column,
                  ", token ", status.token, ")");
}

inline Tensor empty_counts(const Tensor& like, int64_t n_tokens, int64_t n_features) {
  return torch::stable::new_empty(like, {n_columns(n_features), n_tokens}, ScalarType::Byte);
}

inline Tensor empty_tile_ptr(const Tensor& like, int64_t n_tokens, int64_t n_features) {
  return torch::stable::new_empty(like, {n_columns(n_features), n_tiles(n_tokens), 2}, ScalarType::Long);
}

// The planes around `counts` and `tile_ptr`, once the sizes are known.
inline Planes empty_planes(Tensor counts, Tensor tile_ptr, const Tensor& like, cpu::PlaneSizes sizes) {
  using torch::stable::new_empty;
  return {std::move(counts), new_empty(like, {sizes.index_bytes}, ScalarType::Byte),
          new_empty(like, {sizes.n_values}, like.scalar_type()), std::move(tile_ptr)};
}

inline Planes empty_planes(const Tensor& like, int64_t n_tokens, int64_t n_features, cpu::PlaneSizes sizes) {
  return empty_planes(empty_counts(like, n_tokens, n_features), empty_tile_ptr(like, n_tokens, n_features), like,
                      sizes);
}

inline cpu::Planes pointers(const Planes& planes) {
  return {static_cast<uint8_t*>(std::get<0>(planes).mutable_data_ptr()),
          static_cast<uint8_t*>(std::get<1>(planes).mutable_data_ptr()), std::get<2>(planes).mutable_data_ptr(),
          static_cast<int64_t*>(std::get<3>(planes).mutable_data_ptr())};
}

// The planes of rows that are sparse already.
inline Planes pack_rows(const cpu::SparseRows& rows, const Tensor& like) {
  const cpu::ParallelFor parallel_for =
      threads_for(static_cast<int64_t>(rows.entries.size() * sizeof(rows.entries[0])));
  Tensor counts = empty_counts(like, rows.n_tokens(), rows.n_features);
  Tensor tile_ptr = empty_tile_ptr(like, rows.n_tokens(), rows.n_features);
  const cpu::PlaneSizes sizes = cpu::count(rows, static_cast<uint8_t*>(counts.mutable_data_ptr()),
                                           static_cast<int64_t*>(tile_ptr.mutable_data_ptr()), parallel_for);
  Planes planes = empty_planes(std::move(counts), std::move(tile_ptr), like, sizes);
  const cpu::Planes out = pointers(planes);
  cpu::pack(rows, out.tile_ptr, out.index, out.values, parallel_for);
  return planes;
}

// The planes once `encoder` has seen every block.
inline Planes finish(cpu::Encoder& encoder, Tensor counts, const Tensor& like, int64_t n_tokens, int64_t n_features) {
  const cpu::PlaneSizes sizes = encoder.sizes();
  Planes planes = empty_planes(std::move(counts), empty_tile_ptr(like, n_tokens, n_features), like, sizes);
  const cpu::Planes out = pointers(planes);
  encoder.finish(out.index, out.values, out.tile_ptr,
                 threads_for(sizes.index_bytes + sizes.n_values * item_bytes(dtype_of(like))));
  return planes;
}

}  // namespace pyfacts
