// enc @ W + b and enc.T @ G: sparse times dense, where the sparse side is unpacked into lists a panel at a time.
//
// The sum is cut three ways. A block is up to 8,192 rows of the result. A panel is a stretch of the summed dimension,
// chosen by density so that a row's list in it has about 8 entries. A slab is 128 floats of d_out, which a kernel keeps
// in registers along a list. For each panel the block's groups (a tile of tokens, or a column of features) are unpacked
// into lists, in parallel; then tasks (slab, group), slabs outermost, sum the panel's rows over the lists. A thread
// packs a slab of the panel as float32 when it comes to it: from then on its rows come from L2, and a weight of 16 bits
// is widened once, not once a use. Where rows are used less than four times on average, only those in use are packed;
// at the density of an SAE a panel is 8,192 features, and packing is the only read of the weight from memory.
// Sums run in order over the summed dimension, and a product rounds before it is added (16-bit products are exact):
// equal bits on every CPU, with and without FMA, but for the payloads of NaNs.
//
// Floor for 4096 x 16384 to 768 on two cores, by L2 at 64 bytes a cycle: each stored value reads 3 KiB, at 1 % 2 GB,
// 4 ms at 4 GHz; predicted with sums, lists and the weight from memory: 10 ms. Measured on Zen 5: 11.9 ms in float32,
// 11.4 in bfloat16; at 10 % 60 and 57 ms, at 30 % 190 and 196 ms. The dense product takes 480 (float32) and 113 ms
// (bfloat16, which the CPU multiplies itself: from about 20 % on it wins). 32 of 65,536 features: 17 and 16 ms.
// Lists of 4 and 16 entries were within 15 % of 8, some densities better and some worse.
#include "sparse_linear.h"

#include <cstring>
#include <memory>
#include <vector>

#include "dispatch.h"
#include "memory.h"
#include "parallel.h"
#include "run_reader.h"
#include "segments.h"

namespace pyfacts::cpu {
namespace {

// Rows of sums that are worked on together, and the longest panel: a slab of either is then at most kSlabBytes.
constexpr int64_t kBlockRows = 8192;
constexpr int64_t kMaxPanel = 8192;
static_assert(kMaxPanel * kSlabFloats * static_cast<int64_t>(sizeof(float)) <= kSlabBytes);

// Wanted entries of a list in a panel: fewer, and moving the sums costs more than adding to them; more, and the panel's
// slab leaves the L2 cache.
constexpr double kListLength = 8;
// Uses of a panel's row from which on the unused rows are not worth finding.
constexpr int64_t kManyUses = 4;

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// A stretch of some dimension.
struct Range {
  int64_t begin;
  int64_t end;
  int64_t size() const { return end - begin; }
};

Range part(int64_t i, int64_t size, int64_t n) { return {i * size, smaller((i + 1) * size, n)}; }

// The sparse rows of a group, as far as they lie in the panel at hand.
struct Lists {
  int64_t n_rows;
  int64_t starts[kColumnWidth + 1];
  uint32_t* inner;  // counted from the panel's start
  float* factor;
};

// ---- One column's part of one tile --------------------------------------------------------------------------------

int64_t values_of(const Encoding& encoding, int64_t column, int64_t tile) {
  const int64_t run = column * n_tiles(encoding.n_tokens) + tile;
  return run_start(encoding, run + 1).n_values - run_start(encoding, run).n_values;
}

// Unpacks a tile's part of some columns; false if a segment breaks the format.
bool list_tile(const Encoding& encoding, Range columns, int64_t tile, int64_t* starts, uint32_t* inner, float* factor) {
  constexpr int64_t kColumns = kMaxPanel / kColumnWidth;
  const int64_t item = item_bytes(encoding.dtype);
  const Range tokens = part(tile, kTileTokens, encoding.n_tokens);
  uint8_t counts[kTileTokens * kColumns];
  const uint8_t* index[kColumns];
  const uint8_t* values[kColumns];
  RunReader index_runs[kColumns];
  RunReader value_runs[kColumns];
  for (int64_t c = 0; c < columns.size(); ++c) {
    const uint8_t* column_counts = encoding.counts + (columns.begin + c) * encoding.n_tokens + tokens.begin;
    for (int64_t row = 0; row < tokens.size(); ++row) counts[row * columns.size() + c] = column_counts[row];
    const int64_t run = (columns.begin + c) * n_tiles(encoding.n_tokens) + tile;
    const PlaneSizes begin = run_start(encoding, run), end = run_start(encoding, run + 1);
    index[c] = index_runs[c].open(encoding.index, encoding.index_bytes, begin.index_bytes, end.index_bytes);
    values[c] = value_runs[c].open(static_cast<const uint8_t*>(encoding.values), encoding.n_values * item,
                                   begin.n_values * item, end.n_values * item);
  }
  const int64_t last_width = columns.size() > 0 ? column_width(encoding.n_features, columns.end - 1) : 0;
  return kernels().conversions[static_cast<int>(encoding.dtype)].list(
      {counts, index, values, tokens.size(), columns.size(), last_width, nonzero_mask(encoding.dtype, true), starts,
       inner, factor});
}

// ---- The two ways to read an encoding: rows are tokens, or features ------------------------------------------------

// Groups are tiles of tokens, panels run over columns of features.
class ByToken {
 public:
  static constexpr int64_t kGroupRows = kTileTokens;
  static constexpr int64_t kPanelUnit = kColumnWidth;
  explicit ByToken(const Encoding& encoding) : e_(encoding) {}
  int64_t n_rows() const { return e_.n_tokens; }
  int64_t n_inner() const { return e_.n_features; }
  int64_t n_entries(Range panel, int64_t group) const {
    int64_t n = 0;
    for (int64_t column = panel.begin; column < panel.end; ++column) n += values_of(e_, column, group);
    return n;
  }
  bool list(Range panel, int64_t group, Lists* lists) const {
    return list_tile(e_, panel, group, lists->starts, lists->inner, lists->factor);
  }

 private:
  const Encoding& e_;
};

// Groups are columns of features, panels run over tiles of tokens. A column's lists by token are sorted by feature.
class ByFeature {
 public:
  static constexpr int64_t kGroupRows = kColumnWidth;
  static constexpr int64_t kPanelUnit = kTileTokens;
  explicit ByFeature(const Encoding& encoding) : e_(encoding) {}
  int64_t n_rows() const { return e_.n_features; }
  int64_t n_inner() const { return e_.n_tokens; }
  int64_t n_entries(Range panel, int64_t group) const {
    int64_t n = 0;
    for (int64_t tile = panel.begin; tile < panel.end; ++tile) n += values_of(e_, group, tile);
    return n;
  }
  bool list(Range panel, int64_t group, Lists* lists) const {
    const int64_t capacity = n_entries(panel, group) + kListSlack;
    auto feature = std::make_unique_for_overwrite<uint32_t[]>(capacity);
    auto factor = std::make_unique_for_overwrite<float[]>(capacity);
    auto starts = std::make_unique_for_overwrite<int64_t[]>(panel.size() * kTileTokens + 1);
    int64_t n = 0;
    for (int64_t tile = panel.begin; tile < panel.end; ++tile) {
      int64_t* tile_starts = starts.get() + (tile - panel.begin) * kTileTokens;
      if (!list_tile(e_, {group, group + 1}, tile, tile_starts, feature.get() + n, factor.get() + n)) return false;
      const int64_t n_tokens = part(tile, kTileTokens, e_.n_tokens).size();
      for (int64_t row = 0; row <= n_tokens; ++row) tile_starts[row] += n;
      n = tile_starts[n_tokens];
    }
    const int64_t n_tokens = smaller(panel.end * kTileTokens, e_.n_tokens) - panel.begin * kTileTokens;
    transpose(feature.get(), factor.get(), starts.get(), n_tokens, lists);
    return true;
  }

 private:
  // A counting sort: tokens stay in order within a feature.
  static void transpose(const uint32_t* feature, const float* factor, const int64_t* starts, int64_t n_tokens,
                        Lists* lists) {
    int64_t next[kColumnWidth + 1] = {};
    const int64_t n = n_tokens > 0 ? starts[n_tokens] : 0;
    for (int64_t i = 0; i < n; ++i) ++next[feature[i] + 1];
    for (int64_t j = 0; j < kColumnWidth; ++j) next[j + 1] += next[j];
    std::memcpy(lists->starts, next, sizeof(next));
    for (int64_t token = 0; token < n_tokens; ++token) {
      for (int64_t i = starts[token]; i < starts[token + 1]; ++i) {
        const int64_t at = next[feature[i]]++;
        lists->inner[at] = static_cast<uint32_t>(token);
        lists->factor[at] = factor[i];
      }
    }
  }

  const Encoding& e_;
};

// ---- The product ----------------------------------------------------------------------------------------------------

// The lists of a block of groups in one panel.
template <typename Side>
class PanelLists {
 public:
  Status read(const Side& side, Range groups, Range panel, int64_t n_inner, ParallelFor parallel_for) {
    lists_.resize(groups.size());
    int64_t n = 0;
    std::vector<int64_t> begins;
    for (int64_t group = groups.begin; group < groups.end; ++group) {
      begins.push_back(n);
      n += side.n_entries(panel, group) + kListSlack;
    }
    if (n > capacity_) {
      inner_ = std::make_unique_for_overwrite<uint32_t[]>(n);
      factor_ = std::make_unique_for_overwrite<float[]>(n);
      capacity_ = n;
    }
    const Status status = parallel_check(groups.size(), parallel_for, [&](int64_t i) -> Status {
      lists_[i].n_rows = part(groups.begin + i, Side::kGroupRows, side.n_rows()).size();
      lists_[i].inner = inner_.get() + begins[i];
      lists_[i].factor = factor_.get() + begins[i];
      return {side.list(panel, groups.begin + i, &lists_[i]) ? Fault::none : Fault::bitmap_count, -1, -1};
    });
    if (status.ok()) mark_used(n - groups.size() * kListSlack, n_inner);
    return status;
  }
  const Lists& of(int64_t group) const { return lists_[group]; }
  bool uses(int64_t inner) const { return used_.empty() || used_[inner] != 0; }

 private:
  void mark_used(int64_t n_entries, int64_t n_inner) {
    used_.clear();
    if (n_entries >= kManyUses * n_inner) return;
    used_.resize(n_inner);
    for (const Lists& lists : lists_) {
      for (int64_t i = 0; i < lists.starts[lists.n_rows]; ++i) used_[lists.inner[i]] = 1;
    }
  }

  std::vector<Lists> lists_;
  std::unique_ptr<uint32_t[]> inner_;
  std::unique_ptr<float[]> factor_;
  int64_t capacity_ = 0;
  std::vector<uint8_t> used_;  // [n_inner], or empty: all
};

// What a product needs beside the sparse side: [n_inner, d_out] x -> [n_rows, d_out], each sum beginning with `begin`.
struct Product {
  DType dtype;
  Rows dense;
  const float* begin;  // [n_slabs, kSlabFloats]
  int64_t d_out;
  uint8_t* out;  // [n_rows, d_out]

  int64_t n_slabs() const { return ceil_div(d_out, kSlabFloats); }
  Range slab(int64_t i) const { return part(i, kSlabFloats, d_out); }
  int64_t slab_width(int64_t i) const { return ceil_div(slab(i).size(), kSlabMultiple) * kSlabMultiple; }
  const Conversions& conversions() const { return kernels().conversions[static_cast<int>(dtype)]; }

  const uint8_t* dense_at(int64_t row, int64_t slab) const {
    return static_cast<const uint8_t*>(dense.data) + (row * dense.row_stride + slab * kSlabFloats) * item_bytes(dtype);
  }
  uint8_t* out_at(int64_t row, int64_t slab) const {
    return out + (row * d_out + slab * kSlabFloats) * item_bytes(dtype);
  }
};

// A panel's rows of one slab as floats, close together: in a weight of 4,096 columns they would share a few cache sets.
class PackedSlab {
 public:
  template <typename Uses>
  void pack(const Product& product, int64_t slab, Range rows, Uses uses) {
    if (slab == slab_) return;
    slab_ = slab;
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      if (!uses(row - rows.begin)) continue;
      product.conversions().widen(product.dense_at(row, slab), product.slab(slab).size(),
                                  floats() + (row - rows.begin) * product.slab_width(slab));
    }
  }
  float* floats() const { return reinterpret_cast<float*>(memory_.get()); }

 private:
  std::unique_ptr<uint8_t, void (*)(uint8_t*)> memory_{take_slab(), return_slab};
  int64_t slab_ = -1;
};

// Tiles or columns of a panel, so that its lists have the wanted length if the sparse side is as dense everywhere.
template <typename Side>
int64_t panel_units(const Encoding& encoding) {
  constexpr int64_t kMaxUnits = kMaxPanel / Side::kPanelUnit;
  const double n_elements = static_cast<double>(encoding.n_tokens) * static_cast<double>(encoding.n_features);
  const double per_unit = Side::kPanelUnit * static_cast<double>(encoding.n_values) / n_elements;
  if (!(per_unit * kMaxUnits > kListLength)) return kMaxUnits;
  const auto units = static_cast<int64_t>(kListLength / per_unit) + 1;
  return smaller(units, kMaxUnits);
}

// All panels for a block of groups, whose sums stay in memory of their own until the last.
template <typename Side>
Status multiply_block(const Side& side, Range groups, int64_t units, const Product& product, float* sums,
                      PanelLists<Side>& lists, ParallelFor parallel_for) {
  const int64_t n_units = ceil_div(side.n_inner(), Side::kPanelUnit);
  const int64_t n_panels = n_units > 0 ? ceil_div(n_units, units) : 1;
  const Range rows = {groups.begin * Side::kGroupRows, smaller(groups.end * Side::kGroupRows, side.n_rows())};
  for (int64_t i = 0; i < n_panels; ++i) {
    const Range panel = part(i, units, n_units);
    const Range inner = {panel.begin * Side::kPanelUnit, smaller(panel.end * Side::kPanelUnit, side.n_inner())};
    const Status status = lists.read(side, groups, panel, inner.size(), parallel_for);
    if (!status.ok()) return status;
    parallel(product.n_slabs() * groups.size(), parallel_for, [&](int64_t begin, int64_t end) {
      PackedSlab packed;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t slab = task / groups.size(), group = task % groups.size();
        const int64_t width = product.slab_width(slab);
        const Lists& list = lists.of(group);
        float* group_sums = sums + slab * rows.size() * kSlabFloats + group * Side::kGroupRows * width;
        packed.pack(product, slab, inner, [&](int64_t row) { return lists.uses(row); });
        kernels().sum_lists({list.starts, list.inner, list.factor, list.n_rows, packed.floats(), width,
                             i == 0 ? product.begin + slab * kSlabFloats : nullptr, group_sums});
        if (i + 1 < n_panels) continue;
        for (int64_t row = 0; row < list.n_rows; ++row) {
          product.conversions().narrow(group_sums + row * width, product.slab(slab).size(),
                                       product.out_at(rows.begin + group * Side::kGroupRows + row, slab));
        }
      }
    });
  }
  return {};
}

template <typename Side>
Status multiply(const Encoding& encoding, const Product& product, ParallelFor parallel_for) {
  const Status layout = check_layout(encoding, parallel_for);
  if (!layout.ok()) return layout;
  const Side side(encoding);
  const int64_t n_groups = ceil_div(side.n_rows(), Side::kGroupRows);
  const int64_t block_groups = smaller(n_groups, kBlockRows / Side::kGroupRows);
  const int64_t block_rows = smaller(side.n_rows(), kBlockRows);
  const int64_t n_sums = block_rows * product.n_slabs() * kSlabFloats;
  auto sums = std::make_unique_for_overwrite<float[]>(n_sums);
  advise_huge_pages(sums.get(), n_sums * static_cast<int64_t>(sizeof(float)));
  advise_huge_pages(product.out, side.n_rows() * product.d_out * item_bytes(product.dtype));
  PanelLists<Side> lists;
  for (int64_t first = 0; first < n_groups; first += block_groups) {
    const Range groups = {first, smaller(first + block_groups, n_groups)};
    const Status status =
        multiply_block(side, groups, panel_units<Side>(encoding), product, sums.get(), lists, parallel_for);
    if (status.ok()) continue;
    const Status exact = check(encoding, true, parallel_for);  // the kernels only notice that something is wrong
    return exact.ok() ? status : exact;
  }
  return {};
}

}  // namespace

Status sparse_linear(const Encoding& encoding, Rows weight, const void* bias, int64_t d_out, void* out,
                     ParallelFor parallel_for) {
  std::vector<float> begin(ceil_div(d_out, kSlabFloats) * kSlabFloats);
  const Product product = {encoding.dtype, weight, begin.data(), d_out, static_cast<uint8_t*>(out)};
  if (bias != nullptr) product.conversions().widen(static_cast<const uint8_t*>(bias), d_out, begin.data());
  return multiply<ByToken>(encoding, product, parallel_for);
}

Status sparse_linear_grad_weight(const Encoding& encoding, Rows grad, int64_t d_out, void* out,
                                 ParallelFor parallel_for) {
  const std::vector<float> zeros(ceil_div(d_out, kSlabFloats) * kSlabFloats);
  return multiply<ByFeature>(encoding, {encoding.dtype, grad, zeros.data(), d_out, static_cast<uint8_t*>(out)},
                             parallel_for);
}

}  // namespace pyfacts::cpu
