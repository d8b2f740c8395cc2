// Encodes a matrix that is all there in two passes: count() learns how large the planes are, pack() packs each tile in
// the cache and streams it to its place.
//
// Reading twice and moving the packed bytes once beats reading once and moving them three times (encode.cpp) where much
// is stored. Floor at 50 % of 4096 x 16384 bf16: 2 x 134 MB read, 75 MB written. Predicted 14 ms at the 25 GB/s at
// which one core of a Zen 4 copies (memcpy 11.7 ms); measured 16.1 into touched memory, where one pass took 46 to 60:
// 0.74 x memcpy, fp32 0.72 x. At 20 % the two are equal.
#include <atomic>
#include <numeric>
#include <vector>

#include "parallel.h"
#include "tile_packer.h"

namespace pyfacts::cpu {
namespace {

// Below this size the staging of one pass stays in the caches.
constexpr int64_t kTwoPassBytes = int64_t{16} << 20;
constexpr double kTwoPassDensity = 0.2;
constexpr int64_t kSampleRows = 32;

void count_tile(const DenseTile& x, int64_t item, uint8_t* counts, int64_t* n_values) {
  (item == 4 ? kernels().count32 : kernels().count16)({x, counts, n_values});
}

double sample_density(const DenseGroups& groups, const Dense& x) {
  std::vector<uint8_t> counts(groups.columns());
  std::vector<int64_t> n_values(groups.columns());
  int64_t total = 0;
  for (int64_t i = 0; i < kSampleRows; ++i) {
    count_tile(groups.row(i * x.n_tokens / kSampleRows), groups.item(), counts.data(), n_values.data());
    total += std::accumulate(n_values.begin(), n_values.end(), int64_t{0});
  }
  return static_cast<double>(total) / static_cast<double>(kSampleRows * x.n_features);
}

}  // namespace

PlaneSizes starts_from_sizes(int64_t* tile_ptr, int64_t n_runs) {
  PlaneSizes total = {0, 0};
  for (int64_t run = 0; run < n_runs; ++run) {
    const PlaneSizes size = {tile_ptr[2 * run], tile_ptr[2 * run + 1]};
    tile_ptr[2 * run] = total.index_bytes;
    tile_ptr[2 * run + 1] = total.n_values;
    total = {total.index_bytes + size.index_bytes, total.n_values + size.n_values};
  }
  return total;
}

bool suits_two_passes(const Dense& x, Keep keep) {
  const DenseGroups groups(x, keep);
  return x.n_tokens * x.n_features * groups.item() >= kTwoPassBytes && sample_density(groups, x) > kTwoPassDensity;
}

PlaneSizes count(const Dense& x, Keep keep, uint8_t* counts, int64_t* tile_ptr, ParallelFor parallel_for) {
  const DenseGroups groups(x, keep);
  const int64_t columns = groups.columns();
  const int64_t tiles = n_tiles(x.n_tokens);
  parallel(tiles, parallel_for, [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> tile_counts(kTileTokens * columns);
    std::vector<int64_t> n_values(columns);
    for (int64_t t = begin; t < end; ++t) {
      const DenseTile tile = groups.whole_rows(t);
      uint8_t* const first = counts + t * kTileTokens;
      count_tile(tile, groups.item(), tile_counts.data(), n_values.data());
      scatter_counts(tile_counts.data(), columns, tile.n_rows, columns, first, x.n_tokens);
      for (int64_t c = 0; c < columns; ++c) {
        int64_t* const size = tile_ptr + 2 * (c * tiles + t);
        size[0] = 0;
        for (int64_t row = 0; row < tile.n_rows; ++row) {
          size[0] += index_bytes(first[c * x.n_tokens + row], column_width(x.n_features, c));
        }
        size[1] = n_values[c];
      }
    }
  });
  return starts_from_sizes(tile_ptr, columns * tiles);
}

bool pack(const Dense& x, Keep keep, const int64_t* tile_ptr, PlaneSizes sizes, uint8_t* index, void* values,
          ParallelFor parallel_for) {
  const DenseGroups groups(x, keep);
  const int64_t item = groups.item();
  const int64_t tiles = n_tiles(x.n_tokens);
  const int64_t last_run = groups.columns() * tiles - 1;
  const bool stream = sizes.index_bytes + sizes.n_values * item >= kStreamBytes;
  advise_huge_pages(index, sizes.index_bytes);
  advise_huge_pages(values, sizes.n_values * item);
  std::atomic<bool> unchanged = true;
  parallel(groups.tasks(), parallel_for, [&](int64_t begin, int64_t end) {
    TilePacker packer;
    for (int64_t task = begin; task < end && unchanged; ++task) {
      const DenseTile tile = groups.group(task);
      packer.pack(tile, item);
      for (int64_t c = 0; c < tile.n_columns; ++c) {
        const int64_t i = (groups.first_column_of(task) + c) * tiles + groups.tile_of(task);
        const PlaneSizes start = {tile_ptr[2 * i], tile_ptr[2 * i + 1]};
        const PlaneSizes stop = i == last_run ? sizes : PlaneSizes{tile_ptr[2 * i + 2], tile_ptr[2 * i + 3]};
        const PackedRun& run = packer.run(c);
        if (run.index_bytes != stop.index_bytes - start.index_bytes ||
            run.value_bytes != (stop.n_values - start.n_values) * item) {
          unchanged = false;
          break;
        }
        move_out(run.values, static_cast<uint8_t*>(values) + start.n_values * item, run.value_bytes, stream);
        move_out(run.index, index + start.index_bytes, run.index_bytes, stream);
      }
    }
    if (stream) kernels().fence();
  });
  return unchanged;
}

}  // namespace pyfacts::cpu
