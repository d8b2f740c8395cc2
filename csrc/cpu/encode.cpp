// Encodes blocks as they come, each read once: a tile is packed in the cache (tile_packer.h), its runs move, end to
// end, to staging slabs, and finish() copies them to their places once the sizes of all columns are known.
//
// Floor at 3 % of 4096 x 16384 bf16: 134 MB read once, 4.1 ms at the 33 GB/s of one Zen 5 core, and 9 MB moved twice
// more; memcpy takes 6.8 ms. Measured, in reused memory: 1.4 x memcpy (1 %: 1.5, 10 %: 1.1, 30 %: 0.87, 50 %: 0.65),
// fp32 1.5 to 0.9 x. That took 8 columns at a time and not 16, prefetches into L1 behind those into L2 and across
// tiles, and what a tile's loop needs in registers: 1.2, 1.2, 0.95, 0.6, 0.55 x before. On Zen 4, with 16 columns: 1.8
// to 1.3 x.
//
// At 50 % bf16 memory is the limit: 134 MB are read and the 76 MB of planes are written, read and written again, 360 MB
// where memcpy moves 268: 0.74 x at its rate. Packing takes 2.6 ms from the cache, 4.4 from memory, and staging adds
// 1.8. Staging in L3, a group of columns over all tokens at a time, was slower (0.69 x) where the matrix lies on pages
// of 4 KiB, as a tensor's does, and faster on huge pages: 0.78 beside 0.73 x.
#include <mutex>
#include <vector>

#include "parallel.h"
#include "tile_packer.h"

namespace pyfacts::cpu {
namespace {

// One column of one tile in staging memory: its values, then its index.
struct StagedRun {
  const uint8_t* data;
  uint32_t value_bytes;
  uint32_t index_bytes;
};

// A staging slab and how much of it is taken.
struct Staging {
  uint8_t* slab;
  int64_t used;
};

}  // namespace

struct Encoder::State {
  DType dtype;
  int64_t n_tokens;
  int64_t n_features;
  Keep keep;
  uint8_t* counts;
  bool stream;  // whether staging goes past the caches, as most of it will have left them when finish() comes
  int64_t total_index_bytes = 0;
  int64_t total_value_bytes = 0;
  std::vector<StagedRun> runs;  // [n_columns, n_tiles]

  std::mutex mutex;             // guards what follows
  std::vector<uint8_t*> slabs;  // all staging slabs
  std::vector<Staging> open;    // those that no thread writes to and that have room

  ~State() {
    for (uint8_t* slab : slabs) return_slab(slab);
  }

  Staging take_staging() {
    std::lock_guard<std::mutex> lock(mutex);
    if (!open.empty()) {
      const Staging staging = open.back();
      open.pop_back();
      return staging;
    }
    slabs.reserve(slabs.size() + 1);  // so that a failure loses no slab
    slabs.push_back(take_slab());
    return {slabs.back(), 0};
  }

  void return_staging(Staging staging) {
    std::lock_guard<std::mutex> lock(mutex);
    open.push_back(staging);
  }

  StagedRun stage(const PackedRun& run, Staging* staging) {
    const int64_t n_bytes = run.value_bytes + run.index_bytes;
    while (staging->used + n_bytes > kSlabBytes) *staging = take_staging();  // a full slab stays in `slabs`
    uint8_t* data = staging->slab + staging->used;
    move_out(run.values, data, run.value_bytes, stream);
    move_out(run.index, data + run.value_bytes, run.index_bytes, stream);
    staging->used += n_bytes;
    return {data, static_cast<uint32_t>(run.value_bytes), static_cast<uint32_t>(run.index_bytes)};
  }
};

Encoder::Encoder(DType dtype, int64_t n_tokens, int64_t n_features, Keep keep, uint8_t* counts)
    : state_(std::make_unique<State>()) {
  state_->dtype = dtype;
  state_->n_tokens = n_tokens;
  state_->n_features = n_features;
  state_->keep = keep;
  state_->counts = counts;
  state_->stream = n_tokens * n_features * item_bytes(dtype) >= kStreamBytes;
  state_->runs.resize(n_columns(n_features) * n_tiles(n_tokens));
}

Encoder::~Encoder() = default;

void Encoder::add(const Dense& block, int64_t first_token, int64_t first_feature, ParallelFor parallel_for) {
  State& s = *state_;
  Keep keep = s.keep;
  if (keep.thresholds != nullptr) keep.thresholds += first_feature * item_bytes(s.dtype);
  const DenseGroups groups(block, keep);
  const int64_t tiles = n_tiles(s.n_tokens);
  const int64_t first_tile = first_token / kTileTokens;
  const int64_t first_column_of_block = first_feature / kColumnWidth;
  parallel(groups.tasks(), parallel_for, [&](int64_t begin, int64_t end) {
    TilePacker packer;
    Staging staging = s.take_staging();
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first_column = first_column_of_block + groups.first_column_of(task);
      const int64_t tile = first_tile + groups.tile_of(task);
      const DenseTile x = groups.group(task);
      packer.pack(x, groups.rows(task + 1 < end ? task + 1 : task), groups.item());
      copy_counts(packer.counts(), x.n_rows, x.n_columns, s.counts + first_column * s.n_tokens + tile * kTileTokens,
                  s.n_tokens);
      for (int64_t c = 0; c < x.n_columns; ++c) {
        s.runs[(first_column + c) * tiles + tile] = s.stage(packer.run(c), &staging);
      }
    }
    if (s.stream) kernels().fence();
    s.return_staging(staging);
  });
  for (int64_t column = first_column_of_block; column < first_column_of_block + groups.columns(); ++column) {
    for (int64_t tile = first_tile; tile < first_tile + n_tiles(block.n_tokens); ++tile) {
      s.total_index_bytes += s.runs[column * tiles + tile].index_bytes;
      s.total_value_bytes += s.runs[column * tiles + tile].value_bytes;
    }
  }
}

PlaneSizes Encoder::sizes() const {
  return {state_->total_index_bytes, state_->total_value_bytes / item_bytes(state_->dtype)};
}

void Encoder::finish(uint8_t* index, void* values, int64_t* tile_ptr, ParallelFor parallel_for) {
  const State& s = *state_;
  const int64_t item = item_bytes(s.dtype);
  const bool stream = s.total_index_bytes + s.total_value_bytes >= kStreamBytes;
  int64_t index_start = 0;
  int64_t value_start = 0;
  for (size_t run = 0; run < s.runs.size(); ++run) {
    tile_ptr[2 * run] = index_start;
    tile_ptr[2 * run + 1] = value_start / item;
    index_start += s.runs[run].index_bytes;
    value_start += s.runs[run].value_bytes;
  }
  advise_huge_pages(index, s.total_index_bytes);
  advise_huge_pages(values, s.total_value_bytes);
  parallel(static_cast<int64_t>(s.runs.size()), parallel_for, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const StagedRun& run = s.runs[i];
      move_out(run.data, static_cast<uint8_t*>(values) + tile_ptr[2 * i + 1] * item, run.value_bytes, stream);
      move_out(run.data + run.value_bytes, index + tile_ptr[2 * i], run.index_bytes, stream);
    }
    if (stream) kernels().fence();
  });
}

}  // namespace pyfacts::cpu
