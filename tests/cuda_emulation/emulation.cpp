// The CUDA encode and decode on the host, for tests/test_cuda_emulation.py: what encode.cu and decode.cu launch, block
// by block. Buffers that kernels read or write end at an unmapped page, so that no access beyond them goes unnoticed.
#include "lanes.h"
// The device code wants the above.
#include <sys/mman.h>
#include <unistd.h>

#include "../../csrc/cuda/decode.cuh"
#include "../../csrc/cuda/encode.cuh"

using namespace pyfacts;
using namespace pyfacts::cuda;

namespace {

constexpr int kPoison = 0xa5;

// A copy of n items, of a numpy array say, whose end is the end of the mapping.
template <typename T>
class Guarded {
 public:
  Guarded(T* original, int64_t n) : original_(original), n_bytes_(n * static_cast<int64_t>(sizeof(T))) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    room_ = (static_cast<size_t>(n_bytes_) + page - 1) / page * page;
    mapping_ =
        static_cast<uint8_t*>(mmap(nullptr, room_ + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (mapping_ == MAP_FAILED) std::abort();
    mprotect(mapping_ + room_, page, PROT_NONE);
    mapped_ = room_ + page;
    std::memset(mapping_, kPoison, room_);
    if (n_bytes_ > 0) std::memcpy(mapping_ + room_ - n_bytes_, original, n_bytes_);
  }
  Guarded(const Guarded&) = delete;
  ~Guarded() { munmap(mapping_, mapped_); }

  T* data() { return reinterpret_cast<T*>(mapping_ + room_ - n_bytes_); }

  // Back to the array, once nothing before the buffer was overwritten.
  void copy_back() {
    const uint8_t* end = mapping_ + room_ - n_bytes_;
    if (!std::all_of(mapping_, mapping_ + (end - mapping_), [](uint8_t byte) { return byte == kPoison; })) {
      emulation::fail("wrote before the beginning of a buffer", 0, 0);
    }
    if (n_bytes_ > 0) std::memcpy(const_cast<std::remove_const_t<T>*>(original_), data(), n_bytes_);
  }

 private:
  T* original_;
  int64_t n_bytes_;
  size_t room_;
  size_t mapped_;
  uint8_t* mapping_;
};

// body(block, thread, shared) for every thread of every block, blocks in a shuffled order.
template <typename Body>
void launch(int64_t n_blocks, uint32_t seed, Body body) {
  std::vector<int64_t> blocks(n_blocks);
  std::iota(blocks.begin(), blocks.end(), 0);
  std::shuffle(blocks.begin(), blocks.end(), std::mt19937(seed));
  emulation::Block block(kRunThreads, seed);
  for (int64_t number : blocks) {
    Shared shared;
    std::memset(&shared, kPoison, sizeof(shared));
    block.run([&](int thread) { body(number, thread, shared); });
  }
}

int64_t n_runs(int64_t n_tokens, int64_t n_features) { return n_columns(n_features) * n_tiles(n_tokens); }

int64_t extent(int64_t n_tokens, int64_t row_stride, int64_t n_features) {
  return n_tokens > 0 && n_features > 0 ? (n_tokens - 1) * row_stride + n_features : 0;
}

template <typename T>
void count(const T* x, int64_t row_stride, int64_t n_tokens, int64_t n_features, Predicate predicate, uint8_t* counts,
           SegmentMask* masks, Sizes* starts, uint32_t seed) {
  const int64_t n_segments = n_columns(n_features) * n_tokens;
  const int64_t n = n_runs(n_tokens, n_features);
  Guarded<const T> rows(x, extent(n_tokens, row_stride, n_features));
  Guarded<uint8_t> guarded_counts(counts, n_segments);
  Guarded<SegmentMask> guarded_masks(masks, n_segments);
  Guarded<Sizes> sizes(starts, n);
  launch(n, seed, [&](int64_t block, int thread, Shared& shared) {
    count_run<T>({rows.data(), row_stride, n_tokens, n_features}, predicate, block, thread, shared,
                 guarded_counts.data(), guarded_masks.data(), sizes.data());
  });
  guarded_counts.copy_back();
  guarded_masks.copy_back();
  Sizes sum = {0, 0};  // what CUB's scan does on the device
  for (int64_t run = 0; run <= n; ++run) {
    starts[run] = sum;
    if (run < n) sum = {sum.index + sizes.data()[run].index, sum.values + sizes.data()[run].values};
  }
}

template <typename T>
void pack(const T* x, int64_t row_stride, int64_t n_tokens, int64_t n_features, SegmentMask* masks, Sizes* starts,
          uint8_t* index, T* values, Sizes* tile_ptr, uint32_t seed) {
  const int64_t n = n_runs(n_tokens, n_features);
  Guarded<const T> rows(x, extent(n_tokens, row_stride, n_features));
  Guarded<SegmentMask> guarded_masks(masks, n_columns(n_features) * n_tokens);
  Guarded<Sizes> guarded_starts(starts, n);
  Guarded<uint8_t> guarded_index(index, starts[n].index);
  Guarded<T> guarded_values(values, starts[n].values);
  Guarded<Sizes> guarded_tile_ptr(tile_ptr, n);
  launch(n, seed, [&](int64_t block, int thread, Shared& shared) {
    pack_run<T>({rows.data(), row_stride, n_tokens, n_features}, guarded_masks.data(), guarded_starts.data(), block,
                thread, shared, guarded_index.data(), guarded_values.data(), guarded_tile_ptr.data());
  });
  guarded_index.copy_back();
  guarded_values.copy_back();
  guarded_tile_ptr.copy_back();
}

template <typename T>
FaultKey decode(const cpu::Encoding& original, uint32_t zero_mask, T* out, uint32_t seed) {
  cpu::Encoding e = original;
  const int64_t n = n_runs(e.n_tokens, e.n_features);
  Guarded<const uint8_t> counts(e.counts, n_columns(e.n_features) * e.n_tokens);
  Guarded<const uint8_t> index(e.index, e.index_bytes);
  Guarded<const T> values(static_cast<const T*>(e.values), e.n_values);
  Guarded<const int64_t> tile_ptr(e.tile_ptr, 2 * n);
  Guarded<T> dense(out, e.n_tokens * e.n_features);
  e.counts = counts.data();
  e.index = index.data();
  e.values = values.data();
  e.tile_ptr = tile_ptr.data();
  FaultKey first_fault = kNoFault;
  launch(n, seed, [&](int64_t block, int thread, Shared& shared) {
    decode_run<T>(e, zero_mask, block, thread, shared, {dense.data(), e.n_features, e.n_tokens, e.n_features},
                  &first_fault);
  });
  dense.copy_back();
  return first_fault;
}

}  // namespace

extern "C" {

// starts [n_runs + 1] receives the totals last.
void emulated_count(int dtype, const void* x, int64_t row_stride, int64_t n_tokens, int64_t n_features, double min_abs,
                    bool signed_zero, uint8_t* counts, SegmentMask* masks, Sizes* starts, uint32_t seed) {
  const Predicate predicate = make_predicate(static_cast<DType>(dtype), min_abs, signed_zero);
  const auto run = [&](auto* rows) {
    count(rows, row_stride, n_tokens, n_features, predicate, counts, masks, starts, seed);
  };
  dtype == 0 ? run(static_cast<const uint32_t*>(x)) : run(static_cast<const uint16_t*>(x));
}

void emulated_pack(int dtype, const void* x, int64_t row_stride, int64_t n_tokens, int64_t n_features,
                   SegmentMask* masks, Sizes* starts, uint8_t* index, void* values, Sizes* tile_ptr, uint32_t seed) {
  const auto run = [&](auto* rows, auto* out) {
    pack(rows, row_stride, n_tokens, n_features, masks, starts, index, out, tile_ptr, seed);
  };
  dtype == 0 ? run(static_cast<const uint32_t*>(x), static_cast<uint32_t*>(values))
             : run(static_cast<const uint16_t*>(x), static_cast<uint16_t*>(values));
}

// message: empty, or what check_status says of the fault.
void emulated_decode(int dtype, int64_t n_tokens, int64_t n_features, const uint8_t* counts, const uint8_t* index,
                     int64_t index_bytes, const void* values, int64_t n_values, const int64_t* tile_ptr,
                     bool signed_zero, void* out, char* message, int64_t message_bytes, uint32_t seed) {
  const cpu::Encoding e = {
      static_cast<DType>(dtype), n_tokens, n_features, counts, index, index_bytes, values, n_values, tile_ptr};
  const uint32_t all = dtype == 0 ? 0xffffffffu : 0xffffu;
  const uint32_t zero_mask = signed_zero ? all : all >> 1;
  const cpu::Status status = status_of(dtype == 0 ? decode(e, zero_mask, static_cast<uint32_t*>(out), seed)
                                                  : decode(e, zero_mask, static_cast<uint16_t*>(out), seed),
                                       n_tokens);
  if (status.ok()) {
    message[0] = '\0';
  } else {
    std::snprintf(message, message_bytes, "%s (column %lld, token %lld)", cpu::describe(status.fault),
                  static_cast<long long>(status.column), static_cast<long long>(status.token));
  }
}

}  // extern "C"
