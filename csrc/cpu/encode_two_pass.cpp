// Encodes a matrix that is all there in two passes: count() learns how large the planes are, pack() packs each tile in
// the cache and streams it to its place.
//
// For what is too large to be staged (encode.cpp) in memory that the pool keeps: fresh memory costs more than reading
// twice. Floor at 50 % of 4096 x 16384 fp32: 2 x 268 MB read, 142 MB written, 17 ms at the 40 GB/s of one Zen 5 core;
// measured 21.4, 0.63 x memcpy, where staging takes 18.5, 0.74 x. On Zen 4: 0.72 x.
#include <atomic>
#include <numeric>
#include <vector>

#include "parallel.h"
#include "tile_packer.h"

namespace pyfacts::cpu {
namespace {

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
  const auto packed_bytes = [&](double density) {
    const double index_bytes = density < 1.0 / 8 ? density : 1.0 / 8;
    return static_cast<double>(x.n_tokens * x.n_features) * (density * item_bytes(x.dtype) + index_bytes);
  };
  constexpr auto kStaged = static_cast<double>(kPooledBytes);
  return packed_bytes(1) > kStaged && packed_bytes(sample_density(DenseGroups(x, keep), x)) > kStaged;
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
      count_tile(tile, groups.item(), tile_counts.data(), n_values.data());
      for (int64_t c = 0; c < columns; ++c) {
        int64_t* const size = tile_ptr + 2 * (c * tiles + t);
        size[0] = 0;
        for (int64_t row = 0; row < tile.n_rows; ++row) {
          const uint8_t n = tile_counts[row * columns + c];
          counts[c * x.n_tokens + t * kTileTokens + row] = n;
          size[0] += index_bytes(n, column_width(x.n_features, c));
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
      packer.pack(tile, groups.rows(task + 1 < end ? task + 1 : task), item);
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
