// The storage side for Python, without torch: `pyfacts._storage`.
//
// One class, `Encoding`, holds the planes of a canonical encoding as buffers (NumPy arrays, mapped files, bytes) and
// calls the kernels on them with the GIL released; a few functions make encodings from what a dump stores and back.
// Faults in data are raised as `_storage.Fault(what, plane, column, token)`, which the caller turns into a message that
// names the file.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cpu/encoding.h"
#include "storage/block.h"
#include "storage/feature_lists.h"
#include "storage/split.h"
#include "storage/token_rows.h"

namespace py = pybind11;
using namespace pyfacts;

namespace {

PyObject* fault_type = nullptr;

void raise_if(const storage::Fault& fault) {
  if (fault.ok()) return;
  static constexpr const char* names[] = {"", "occupancy", "counts", "index", "values"};
  const py::tuple args = py::make_tuple(fault.what, names[static_cast<int>(fault.plane)], fault.column, fault.token);
  PyErr_SetObject(fault_type, args.ptr());
  throw py::error_already_set();
}
void raise_if(const cpu::Status& status) { raise_if(storage::from_status(status)); }

template <typename Call>
auto without_gil(Call call) {
  const py::gil_scoped_release release;
  return call();
}

// A contiguous buffer of any Python object, held as long as this lives.
class Bytes {
 public:
  explicit Bytes(const py::handle& object, bool writable = false) {
    if (PyObject_GetBuffer(object.ptr(), &view_, writable ? PyBUF_WRITABLE : PyBUF_SIMPLE) != 0)
      throw py::error_already_set();
  }
  ~Bytes() { PyBuffer_Release(&view_); }
  Bytes(const Bytes&) = delete;
  Bytes& operator=(const Bytes&) = delete;

  int64_t size() const { return view_.len; }
  template <typename T = uint8_t>
  T* data() const {
    return static_cast<T*>(view_.buf);
  }

 private:
  Py_buffer view_{};
};

void expect_size(const char* name, const Bytes& bytes, int64_t expected) {
  if (bytes.size() != expected)
    throw py::value_error(std::string(name) + " has " + std::to_string(bytes.size()) + " bytes, expected " +
                          std::to_string(expected));
}

void expect_aligned(const char* name, const Bytes& bytes, int64_t alignment) {
  if (bytes.size() != 0 && reinterpret_cast<uintptr_t>(bytes.data()) % alignment != 0)
    throw py::value_error(std::string(name) + " must be aligned to " + std::to_string(alignment) + " bytes");
}

DType dtype_of(const std::string& name) {
  if (name == "float32") return DType::float32;
  if (name == "bfloat16") return DType::bfloat16;
  if (name == "float16") return DType::float16;
  throw py::value_error("dtype must be 'float32', 'bfloat16' or 'float16', got '" + name + "'");
}

void expect_features(int64_t n_features) {
  if (n_features < 1 || n_features > kMaxFeatures)
    throw py::value_error("n_features must be 1 to " + std::to_string(kMaxFeatures) + ", got " +
                          std::to_string(n_features));
}

void expect_feature(int64_t feature, int64_t n_features) {
  if (feature < 0 || feature >= n_features)
    throw py::index_error("feature " + std::to_string(feature) + " is out of range: there are " +
                          std::to_string(n_features));
}

using Array8 = py::array_t<uint8_t>;
using Array64 = py::array_t<int64_t>;

Array64 tile_ptr_array(int64_t n_features, int64_t n_tokens) {
  return Array64(std::vector<py::ssize_t>{n_columns(n_features), n_tiles(n_tokens), 2});
}

class Encoding {
 public:
  Encoding(py::object counts, py::object index, py::object values, py::object tile_ptr, int64_t n_features,
           const std::string& dtype)
      : planes{std::move(counts), std::move(index), std::move(values), std::move(tile_ptr)},
        dtype_name(dtype),
        counts_(planes[0]),
        index_(planes[1]),
        values_(planes[2]),
        tile_ptr_(planes[3]) {
    expect_features(n_features);
    view.dtype = dtype_of(dtype);
    view.n_features = n_features;
    const int64_t columns = n_columns(n_features);
    view.n_tokens = counts_.size() / columns;
    expect_size("counts", counts_, view.n_tokens * columns);
    expect_size("tile_ptr", tile_ptr_, columns * n_tiles(view.n_tokens) * 16);
    expect_aligned("tile_ptr", tile_ptr_, 8);
    expect_aligned("values", values_, item_bytes(view.dtype));
    view.n_values = values_.size() / item_bytes(view.dtype);
    expect_size("values", values_, view.n_values * item_bytes(view.dtype));
    view.counts = counts_.data();
    view.index = index_.data();
    view.index_bytes = index_.size();
    view.values = values_.data();
    view.tile_ptr = tile_ptr_.data<int64_t>();
  }

  void check(bool signed_zero) const {
    raise_if(without_gil([&] { return cpu::check(view, signed_zero, cpu::run_serially); }));
  }

  void decode(const py::object& out, bool signed_zero) const {
    const Bytes bytes(out, true);
    expect_size("out", bytes, view.n_tokens * view.n_features * item_bytes(view.dtype));
    expect_aligned("out", bytes, item_bytes(view.dtype));
    raise_if(
        without_gil([&] { return cpu::decode(view, signed_zero, bytes.data(), view.n_features, cpu::run_serially); }));
  }

  std::pair<Array64, Array8> neuron(int64_t feature) const {
    expect_feature(feature, view.n_features);
    const int64_t item = item_bytes(view.dtype);
    // Room for all tokens; what is not found is never touched.
    const std::unique_ptr<int64_t[]> tokens(new int64_t[view.n_tokens]);
    const std::unique_ptr<uint8_t[]> values(new uint8_t[view.n_tokens * item]);
    int64_t n_found = 0;
    raise_if(without_gil([&] { return cpu::neuron(view, feature, tokens.get(), values.get(), &n_found); }));
    return {Array64(n_found, tokens.get()), Array8(n_found * item, values.get())};
  }

  std::unique_ptr<Encoding> slice(int64_t start, int64_t stop) const {
    if (start < 0 || start > stop || stop > view.n_tokens)
      throw py::index_error("tokens " + std::to_string(start) + ":" + std::to_string(stop) +
                            " are out of range: there are " + std::to_string(view.n_tokens));
    cpu::PlaneSizes sizes;
    raise_if(without_gil([&] { return cpu::slice_sizes(view, start, stop, &sizes, cpu::run_serially); }));
    return make(stop - start, sizes.index_bytes, sizes.n_values,
                [&](const cpu::Planes& out) { return cpu::slice(view, start, stop, out, cpu::run_serially); });
  }

  std::unique_ptr<Encoding> take(const py::object& tokens) const {
    const Bytes bytes(tokens);
    const int64_t n = bytes.size() / 8;
    expect_size("tokens", bytes, n * 8);
    expect_aligned("tokens", bytes, 8);
    const int64_t* const chosen = bytes.data<int64_t>();
    for (int64_t i = 0; i < n; ++i) {
      if (chosen[i] < 0 || chosen[i] >= view.n_tokens)
        throw py::index_error("token " + std::to_string(chosen[i]) + " is out of range: there are " +
                              std::to_string(view.n_tokens));
    }
    std::vector<cpu::PlaneSizes> bases(n_columns(view.n_features) + 1);
    raise_if(without_gil([&] { return cpu::take_sizes(view, chosen, n, bases.data(), cpu::run_serially); }));
    return make(n, bases.back().index_bytes, bases.back().n_values, [&](const cpu::Planes& out) {
      return cpu::take(view, chosen, n, bases.data(), out, cpu::run_serially);
    });
  }

  void add_feature_stats(const py::object& nnz, const py::object& sum, const py::object& sum_sq,
                         const py::object& maximum) const {
    const Bytes nnz_bytes(nnz, true), sum_bytes(sum, true), sum_sq_bytes(sum_sq, true), maximum_bytes(maximum, true);
    expect_size("nnz", nnz_bytes, view.n_features * 8);
    expect_size("sum", sum_bytes, view.n_features * 8);
    expect_size("sum_sq", sum_sq_bytes, view.n_features * 8);
    expect_size("max", maximum_bytes, view.n_features * 4);
    expect_aligned("nnz", nnz_bytes, 8);
    expect_aligned("sum", sum_bytes, 8);
    expect_aligned("sum_sq", sum_sq_bytes, 8);
    expect_aligned("max", maximum_bytes, 4);
    raise_if(without_gil([&] {
      return storage::add_feature_stats(view, nnz_bytes.data<int64_t>(), sum_bytes.data<double>(),
                                        sum_sq_bytes.data<double>(), maximum_bytes.data<float>());
    }));
  }

  static std::unique_ptr<Encoding> cat(const std::vector<const Encoding*>& parts) {
    if (parts.empty()) throw py::value_error("cat needs at least one encoding");
    for (const Encoding* part : parts) {
      if (part == nullptr) throw py::type_error("cat needs encodings, and got None");
    }
    const Encoding& first = *parts[0];
    std::vector<cpu::Encoding> views;
    int64_t n_tokens = 0, index_bytes = 0, n_values = 0;
    for (const Encoding* part : parts) {
      if (part->view.n_features != first.view.n_features || part->view.dtype != first.view.dtype)
        throw py::value_error("cat needs encodings of one n_features and dtype");
      views.push_back(part->view);
      n_tokens += part->view.n_tokens;
      index_bytes += part->view.index_bytes;
      n_values += part->view.n_values;
    }
    return first.make(n_tokens, index_bytes, n_values, [&](const cpu::Planes& out) {
      return cpu::cat(views.data(), static_cast<int64_t>(views.size()), out, cpu::run_serially);
    });
  }

  py::object planes[4];
  std::string dtype_name;
  cpu::Encoding view{};

 private:
  // A new encoding of this one's width and dtype, its planes written by `fill`.
  template <typename Fill>
  std::unique_ptr<Encoding> make(int64_t n_tokens, int64_t index_bytes, int64_t n_values, Fill fill) const {
    Array8 counts(std::vector<py::ssize_t>{n_columns(view.n_features), n_tokens});
    Array8 index(index_bytes);
    Array8 values(n_values * item_bytes(view.dtype));
    Array64 tile_ptr = tile_ptr_array(view.n_features, n_tokens);
    const cpu::Planes out{counts.mutable_data(), index.mutable_data(), values.mutable_data(), tile_ptr.mutable_data()};
    raise_if(without_gil([&] { return fill(out); }));
    return std::make_unique<Encoding>(counts, index, values, tile_ptr, view.n_features, dtype_name);
  }

  Bytes counts_, index_, values_, tile_ptr_;
};

std::unique_ptr<storage::FeatureLists> feature_lists(const Encoding& encoding) {
  auto lists = std::make_unique<storage::FeatureLists>();
  raise_if(without_gil([&] { return lists->assign(encoding.view); }));
  return lists;
}

std::pair<py::array_t<uint32_t>, Array8> listed_neuron(const storage::FeatureLists& lists, int64_t feature) {
  expect_feature(feature, lists.n_features());
  const int64_t n = lists.count(feature);
  return {py::array_t<uint32_t>(n, lists.tokens(feature)), Array8(n * lists.item(), lists.values(feature))};
}

std::unique_ptr<storage::TokenRows> token_rows(const Encoding& encoding) {
  auto rows = std::make_unique<storage::TokenRows>();
  raise_if(without_gil([&] { return rows->assign(encoding.view); }));
  return rows;
}

// Token tokens[i] of block which[i] -> row i of `out`.
void gather_rows(const std::vector<const storage::TokenRows*>& blocks, const py::object& which,
                 const py::object& tokens, const py::object& out) {
  const Bytes which_bytes(which), token_bytes(tokens), bytes(out, true);
  const int64_t n = which_bytes.size() / 8;
  expect_size("which", which_bytes, n * 8);
  expect_size("tokens", token_bytes, n * 8);
  expect_aligned("which", which_bytes, 8);
  expect_aligned("tokens", token_bytes, 8);
  int64_t row_bytes = 0;
  for (const storage::TokenRows* block : blocks) {
    if (block == nullptr) throw py::type_error("gather_rows needs TokenRows, and got None");
    row_bytes = block->n_features() * item_bytes(block->dtype());
    expect_size("out", bytes, n * row_bytes);
    expect_aligned("out", bytes, item_bytes(block->dtype()));
  }
  const int64_t* const block_of = which_bytes.data<int64_t>();
  const int64_t* const token_of = token_bytes.data<int64_t>();
  for (int64_t i = 0; i < n; ++i) {
    if (block_of[i] < 0 || block_of[i] >= static_cast<int64_t>(blocks.size()))
      throw py::index_error("which holds " + std::to_string(block_of[i]) + ", there are " +
                            std::to_string(blocks.size()) + " blocks");
    if (token_of[i] < 0 || token_of[i] >= blocks[block_of[i]]->n_tokens())
      throw py::index_error("tokens hold " + std::to_string(token_of[i]) + ", the block has " +
                            std::to_string(blocks[block_of[i]]->n_tokens()));
  }
  raise_if(without_gil([&] {
    for (int64_t i = 0; i < n; ++i) {
      if (i + 1 < n) blocks[block_of[i + 1]]->prefetch(token_of[i + 1]);
      const storage::Fault fault = blocks[block_of[i]]->unpack(token_of[i], bytes.data() + i * row_bytes);
      if (!fault.ok()) return fault;
    }
    return storage::Fault{};
  }));
}

// counts [C, T] -> (occupancy u8 [C, ceil(T / 8)], occupied u8 [n], n_occupied i64 [C]).
py::tuple split_counts(const Encoding& encoding) {
  const int64_t columns = n_columns(encoding.view.n_features);
  const int64_t n_tokens = encoding.view.n_tokens;
  Array8 occupancy(std::vector<py::ssize_t>{columns, storage::occupancy_bytes(n_tokens)});
  Array64 n_occupied(columns);
  // The last, empty segments are written before they are known to be empty: one byte more than there are counts.
  const std::unique_ptr<uint8_t[]> room(new uint8_t[columns * n_tokens + 1]);
  uint8_t* const occupancy_data = occupancy.mutable_data();
  int64_t* const n_occupied_data = n_occupied.mutable_data();
  const int64_t total = without_gil([&] {
    return storage::split_counts(encoding.view.counts, columns, n_tokens, occupancy_data, room.get(), n_occupied_data);
  });
  return py::make_tuple(occupancy, Array8(total, room.get()), n_occupied);
}

// The planes of a block, or of some of its columns, as stored -> Encoding; checks all of it.
std::unique_ptr<Encoding> join_block(const py::object& occupancy, const py::object& occupied, const py::object& index,
                                     const py::object& values, const py::object& length, int64_t n_tokens,
                                     int64_t n_features, const std::string& dtype, bool signed_zero) {
  expect_features(n_features);
  if (n_tokens < 0) throw py::value_error("n_tokens must not be negative");
  const Bytes occupancy_bytes(occupancy), occupied_bytes(occupied), index_plane(index), values_bytes(values),
      length_bytes(length);
  const int64_t columns = n_columns(n_features);
  expect_size("length", length_bytes, columns * 32);
  expect_aligned("length", length_bytes, 8);
  const storage::StoredBlock block{dtype_of(dtype),
                                   n_tokens,
                                   n_features,
                                   occupancy_bytes.data(),
                                   occupancy_bytes.size(),
                                   occupied_bytes.data(),
                                   occupied_bytes.size(),
                                   index_plane.data(),
                                   index_plane.size(),
                                   values_bytes.data(),
                                   values_bytes.size(),
                                   length_bytes.data<int64_t>()};
  expect_aligned("values", values_bytes, item_bytes(block.dtype));
  Array8 counts(std::vector<py::ssize_t>{columns, n_tokens});
  Array64 tile_ptr = tile_ptr_array(n_features, n_tokens);
  uint8_t* const counts_data = counts.mutable_data();
  int64_t* const tile_ptr_data = tile_ptr.mutable_data();
  raise_if(without_gil([&] { return storage::join_block(block, signed_zero, counts_data, tile_ptr_data); }));
  return std::make_unique<Encoding>(counts, index, values, tile_ptr, n_features, dtype);
}

void expect_item_bytes(int64_t item_bytes) {
  if (item_bytes != 2 && item_bytes != 4 && item_bytes != 8)
    throw py::value_error("item_bytes must be 2, 4 or 8, got " + std::to_string(item_bytes));
}

void expect_column(int64_t width) {
  if (width < 1 || width > kColumnWidth)
    throw py::value_error("width must be in [1, 256], got " + std::to_string(width));
}

storage::IndexSizes sizes_of(const Bytes& counts, int64_t width) {
  expect_column(width);
  return storage::index_sizes(counts.data(), counts.size(), width);
}

py::tuple index_sizes(const py::object& counts, int64_t width) {
  const storage::IndexSizes sizes = sizes_of(Bytes(counts), width);
  return py::make_tuple(sizes.positions, sizes.bitmaps);
}

// A column's index -> (gaps u8 [n], bitmaps u8 [m]).
py::tuple split_index(const py::object& counts, const py::object& index, int64_t width) {
  const Bytes count_bytes(counts), index_bytes(index);
  const storage::IndexSizes sizes = sizes_of(count_bytes, width);
  expect_size("index", index_bytes, sizes.positions + sizes.bitmaps);
  Array8 gaps(sizes.positions), bitmaps(sizes.bitmaps);
  uint8_t* const gap_data = gaps.mutable_data();
  uint8_t* const bitmap_data = bitmaps.mutable_data();
  without_gil([&] {
    storage::split_index(count_bytes.data(), count_bytes.size(), width, index_bytes.data(), gap_data, bitmap_data);
  });
  return py::make_tuple(gaps, bitmaps);
}

Array8 join_index(const py::object& counts, const py::object& gaps, const py::object& bitmaps, int64_t width) {
  const Bytes count_bytes(counts), gap_bytes(gaps), bitmap_bytes(bitmaps);
  const storage::IndexSizes sizes = sizes_of(count_bytes, width);
  expect_size("gaps", gap_bytes, sizes.positions);
  expect_size("bitmaps", bitmap_bytes, sizes.bitmaps);
  Array8 index(sizes.positions + sizes.bitmaps);
  uint8_t* const out = index.mutable_data();
  without_gil([&] {
    storage::join_index(count_bytes.data(), count_bytes.size(), width, gap_bytes.data(), bitmap_bytes.data(), out);
  });
  return index;
}

using Reorder = void (*)(const uint8_t* in, int64_t n, int64_t item_bytes, uint8_t* out);

Array8 reordered(const py::object& object, int64_t item_bytes, Reorder reorder) {
  expect_item_bytes(item_bytes);
  const Bytes bytes(object);
  const int64_t n = bytes.size() / item_bytes;
  expect_size("the buffer", bytes, n * item_bytes);
  Array8 result(n * item_bytes);
  uint8_t* const out = result.mutable_data();
  without_gil([&] { reorder(bytes.data(), n, item_bytes, out); });
  return result;
}

// Items of item_bytes -> u8 [item_bytes, n].
py::array split_items(const py::object& items, int64_t item_bytes) {
  Array8 planes = reordered(items, item_bytes, storage::split_items);
  return planes.reshape({item_bytes, planes.size() / item_bytes});
}

Array8 join_items(const py::object& planes, int64_t item_bytes) {
  return reordered(planes, item_bytes, storage::join_items);
}

}  // namespace

PYBIND11_MODULE(_storage, m) {
  m.doc() = "The storage side of pyfacts: encodings on plain buffers, without torch.";
  fault_type = PyErr_NewExceptionWithDoc("pyfacts._storage.Fault",
                                         "Data that is no valid encoding; args: what, plane, column, token.",
                                         PyExc_ValueError, nullptr);
  if (fault_type == nullptr) throw py::error_already_set();
  m.add_object("Fault", py::reinterpret_borrow<py::object>(fault_type));

  py::class_<Encoding>(m, "Encoding", "The planes of a canonical encoding, on buffers that are not copied.")
      .def(py::init<py::object, py::object, py::object, py::object, int64_t, const std::string&>(), py::arg("counts"),
           py::arg("index"), py::arg("values"), py::arg("tile_ptr"), py::arg("n_features"), py::arg("dtype"))
      .def_property_readonly("counts", [](const Encoding& e) { return e.planes[0]; })
      .def_property_readonly("index", [](const Encoding& e) { return e.planes[1]; })
      .def_property_readonly("values", [](const Encoding& e) { return e.planes[2]; })
      .def_property_readonly("tile_ptr", [](const Encoding& e) { return e.planes[3]; })
      .def_property_readonly("n_tokens", [](const Encoding& e) { return e.view.n_tokens; })
      .def_property_readonly("n_features", [](const Encoding& e) { return e.view.n_features; })
      .def_property_readonly("nnz", [](const Encoding& e) { return e.view.n_values; })
      .def_property_readonly("dtype", [](const Encoding& e) { return e.dtype_name; })
      .def("check", &Encoding::check, py::arg("signed_zero"))
      .def("decode", &Encoding::decode, py::arg("out"), py::arg("signed_zero"))
      .def("neuron", &Encoding::neuron, py::arg("feature"))
      .def("slice", &Encoding::slice, py::arg("start"), py::arg("stop"))
      .def("take", &Encoding::take, py::arg("tokens"))
      .def("add_feature_stats", &Encoding::add_feature_stats, py::arg("nnz"), py::arg("sum"), py::arg("sum_sq"),
           py::arg("maximum"));
  py::class_<storage::FeatureLists>(m, "FeatureLists", "A copy of an encoding in the order of its features.")
      .def(py::init(&feature_lists), py::arg("encoding"))
      .def("neuron", &listed_neuron, py::arg("feature"))
      .def_property_readonly("nbytes", &storage::FeatureLists::n_bytes);
  py::class_<storage::TokenRows>(m, "TokenRows", "A copy of an encoding in the order of its tokens.")
      .def(py::init(&token_rows), py::arg("encoding"));
  m.def("gather_rows", &gather_rows, py::arg("blocks"), py::arg("which"), py::arg("tokens"), py::arg("out"));
  m.def("cat", &Encoding::cat, py::arg("encodings"));
  m.def("split_counts", &split_counts, py::arg("encoding"));
  m.def("join_block", &join_block, py::arg("occupancy"), py::arg("occupied"), py::arg("index"), py::arg("values"),
        py::arg("length"), py::arg("n_tokens"), py::arg("n_features"), py::arg("dtype"), py::arg("signed_zero"));
  m.def("index_sizes", &index_sizes, py::arg("counts"), py::arg("width"));
  m.def("split_index", &split_index, py::arg("counts"), py::arg("index"), py::arg("width"));
  m.def("join_index", &join_index, py::arg("counts"), py::arg("gaps"), py::arg("bitmaps"), py::arg("width"));
  m.def("split_items", &split_items, py::arg("items"), py::arg("item_bytes"));
  m.def("join_items", &join_items, py::arg("planes"), py::arg("item_bytes"));
  m.def("isa_error", &cpu::isa_error);
}
