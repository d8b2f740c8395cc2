// The CUDA kernels on the host, for tests/test_cuda_emulation.py: what encode.cu, canonical.cu and decode.cu launch,
// block by block. Buffers that kernels read or write end at an unmapped page, so that no access beyond them goes
// unnoticed.
#include "lanes.h"
// The device code wants the above.
#include <sys/mman.h>
#include <unistd.h>

#include "../../csrc/cuda/canonical.cuh"
#include "../../csrc/cuda/csr.cuh"
#include "../../csrc/cuda/decode.cuh"
#include "../../csrc/cuda/encode.cuh"
#include "../../csrc/cuda/sparse_linear.cuh"
#include "../../csrc/predicate.h"
#include "copies.h"

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
template <typename Memory, typename Body>
void launch(int64_t n_blocks, int n_threads, uint32_t seed, Body body) {
  std::vector<int64_t> blocks(n_blocks);
  std::iota(blocks.begin(), blocks.end(), 0);
  std::shuffle(blocks.begin(), blocks.end(), std::mt19937(seed));
  emulation::Block block(n_threads, seed);
  const auto shared = std::make_unique<Memory>();
  for (int64_t number : blocks) {
    std::memset(static_cast<void*>(shared.get()), kPoison, sizeof(Memory));
    block.run([&](int thread) { body(number, thread, *shared); });
  }
}

using GuardedArena = ArenaCopy<Guarded>;
using GuardedEncoding = EncodingCopy<Guarded>;

template <typename T, typename Rule>
void encode(const T* x, int64_t row_stride, int64_t n_tokens, int64_t n_features, const Rule& rule, const Arena& out,
            int64_t first_token, uint32_t seed) {
  Guarded<const T> rows(x, extent(n_tokens, row_stride, n_features));
  GuardedArena arena(out);
  const bool aligned = reinterpret_cast<uintptr_t>(rows.data()) % kUnitBytes == 0 &&
                       row_stride * static_cast<int64_t>(sizeof(T)) % kUnitBytes == 0;
  const Part<T> part = {rows.data(), row_stride, n_tokens, n_features, first_token, aligned};
  launch<BlockShared<T>>(part.n_blocks(), kBlockGroups<T> * kWarpLanes, seed,
                         [&](int64_t block, int thread, BlockShared<T>& shared) {
                           encode_groups<T>(part, rule, arena.get(), block, thread, shared);
                         });
  arena.copy_back();
}

// tile_ptr has one entry more than there are runs; returns the planes' sizes.
Sizes canonical_starts(const Arena& original, Sizes* tile_ptr, uint32_t seed) {
  GuardedArena arena(original);
  const int64_t n = n_runs(original.n_tokens, original.n_features);
  std::vector<Sizes> sizes(n);
  launch<Shared>(n, kRunThreads, seed, [&](int64_t block, int thread, Shared& shared) {
    measure_run(arena.get(), block, thread, shared, sizes.data());
  });
  Sizes sum = {0, 0};  // what CUB's scan does on the device
  for (int64_t run = 0; run < n; ++run) {
    tile_ptr[run] = sum;
    sum = {sum.index + sizes[run].index, sum.values + sizes[run].values};
  }
  return n == 0 ? sum : plane_sizes(arena.get(), sizes.data(), tile_ptr, n);
}

struct CopyShared {
  Shared run;
  uint32_t groups_before[kRunGroups + 1];
};

template <typename T>
void canonical_copy(const Arena& original, const Sizes* tile_ptr, Sizes total, uint8_t* index, T* values,
                    uint32_t seed) {
  GuardedArena arena(original);
  Guarded<uint8_t> guarded_index(index, total.index);
  Guarded<T> guarded_values(values, total.values);
  launch<CopyShared>(n_runs(original.n_tokens, original.n_features), kRunThreads, seed,
                     [&](int64_t block, int thread, CopyShared& shared) {
                       copy_run(arena.get(), tile_ptr, block, thread, shared.run, shared.groups_before,
                                guarded_index.data(), guarded_values.data());
                     });
  guarded_index.copy_back();
  guarded_values.copy_back();
}

template <typename T>
struct DecodeShared {
  Shared run;
  StagedRows<T> staged[kRunWarps];
};

template <typename T>
FaultKey decode(const cpu::Encoding& e, bool signed_zero, T* out, uint32_t seed) {
  const GuardedEncoding encoding(e);
  Guarded<T> dense(out, e.n_tokens * e.n_features);
  const bool aligned = reinterpret_cast<uintptr_t>(dense.data()) % kUnitBytes == 0 &&
                       e.n_features * static_cast<int64_t>(sizeof(T)) % kUnitBytes == 0;
  FaultKey first_fault = kNoFault;
  launch<DecodeShared<T>>(
      n_runs(e.n_tokens, e.n_features), kRunThreads, seed, [&](int64_t block, int thread, DecodeShared<T>& shared) {
        decode_run<T>(encoding.get(), signed_zero, block, thread, shared.run, shared.staged[thread / kWarpLanes],
                      {dense.data(), e.n_features, aligned}, &first_fault);
      });
  dense.copy_back();
  return first_fault;
}

template <typename T>
FaultKey to_csr(const cpu::Encoding& e, int64_t* crow, int64_t* col, T* values, uint32_t seed) {
  const GuardedEncoding encoding(e);
  Guarded<int64_t> guarded_col(col, e.n_values);
  Guarded<T> guarded_values(values, e.n_values);
  std::vector<uint32_t> counts(n_columns(e.n_features) * e.n_tokens);
  const int64_t n = n_runs(e.n_tokens, e.n_features);
  FaultKey first_fault = kNoFault;
  launch<Shared>(n, kRunThreads, seed, [&](int64_t block, int thread, Shared& shared) {
    count_segments(encoding.get(), block, thread, shared, counts.data(), &first_fault);
  });
  std::vector<int64_t> n_row(e.n_tokens);
  for (int64_t token = 0; token < e.n_tokens; ++token) {
    sum_columns(n_columns(e.n_features), e.n_tokens, token, counts.data(), n_row.data());
  }
  crow[0] = 0;  // what CUB's sum does on the device
  std::partial_sum(n_row.begin(), n_row.end(), crow + 1);
  launch<Shared>(n, kRunThreads, seed + 1, [&](int64_t block, int thread, Shared& shared) {
    list_run(encoding.get(), counts.data(), crow, block, thread, shared, guarded_col.data(), guarded_values.data(),
             &first_fault);
  });
  guarded_col.copy_back();
  guarded_values.copy_back();
  return first_fault;
}

template <DType dtype>
void sparse_linear(int64_t n_tokens, int64_t n_features, const int64_t* crow, const int64_t* col, const void* values,
                   const void* weight, const void* bias, int64_t d_out, void* out, uint32_t seed) {
  using T = typename Convert<dtype>::Bits;
  Guarded<const T> guarded_weight(static_cast<const T*>(weight), n_features * d_out);
  Guarded<const T> guarded_bias(static_cast<const T*>(bias), bias == nullptr ? 0 : d_out);
  Guarded<T> guarded_out(static_cast<T*>(out), n_tokens * d_out);
  const bool aligned = reinterpret_cast<uintptr_t>(guarded_weight.data()) % kUnitBytes == 0 &&
                       d_out * static_cast<int64_t>(sizeof(T)) % kUnitBytes == 0;
  const int64_t slabs = ceil_div(d_out, kSlabOutputs);
  launch<Entries>(n_tokens * slabs, kSlabThreads, seed, [&](int64_t block, int thread, Entries& entries) {
    const int64_t token = block / slabs;
    multiply_row<dtype>(crow[token], crow[token + 1], col, static_cast<const T*>(values),
                        {guarded_weight.data(), d_out, d_out, aligned}, bias == nullptr ? nullptr : guarded_bias.data(),
                        block % slabs, thread, entries, guarded_out.data() + token * d_out);
  });
  guarded_out.copy_back();
}

}  // namespace

extern "C" {

void emulated_encode(int dtype, const void* x, int64_t row_stride, int64_t n_tokens, int64_t n_features, double min_abs,
                     bool signed_zero, const void* thresholds, const Arena* out, int64_t first_token, uint32_t seed) {
  const uint32_t floor = make_predicate(static_cast<DType>(dtype), min_abs, false).floor;
  const auto run = [&]<typename T>(const T* rows) {
    if (thresholds == nullptr) {
      const ByMagnitude<T> rule = {floor, signed_zero};
      return encode(rows, row_stride, n_tokens, n_features, rule, *out, first_token, seed);
    }
    Guarded<const T> copy(static_cast<const T*>(thresholds), n_columns(n_features) * kColumnWidth);
    const ByThreshold<T> rule = {copy.data(), floor};
    encode(rows, row_stride, n_tokens, n_features, rule, *out, first_token, seed);
  };
  dtype == 0 ? run(static_cast<const uint32_t*>(x)) : run(static_cast<const uint16_t*>(x));
}

void emulated_canonical_starts(const Arena* arena, Sizes* tile_ptr, Sizes* total, uint32_t seed) {
  *total = canonical_starts(*arena, tile_ptr, seed);
}

void emulated_canonical_copy(const Arena* arena, const Sizes* tile_ptr, const Sizes* total, uint8_t* index,
                             void* values, uint32_t seed) {
  const auto run = [&](auto* out) { canonical_copy(*arena, tile_ptr, *total, index, out, seed); };
  arena->dtype == DType::float32 ? run(static_cast<uint32_t*>(values)) : run(static_cast<uint16_t*>(values));
}

void emulated_decode(int dtype, int64_t n_tokens, int64_t n_features, const uint8_t* counts, const uint8_t* index,
                     int64_t index_bytes, const void* values, int64_t n_values, const int64_t* tile_ptr,
                     bool signed_zero, void* out, char* message, int64_t message_bytes, uint32_t seed) {
  const cpu::Encoding e = {
      static_cast<DType>(dtype), n_tokens, n_features, counts, index, index_bytes, values, n_values, tile_ptr};
  const FaultKey fault = dtype == 0 ? decode(e, signed_zero, static_cast<uint32_t*>(out), seed)
                                    : decode(e, signed_zero, static_cast<uint16_t*>(out), seed);
  write_status(status_of(fault, n_tokens), message, message_bytes);
}

void emulated_to_csr(int dtype, int64_t n_tokens, int64_t n_features, const uint8_t* counts, const uint8_t* index,
                     int64_t index_bytes, const void* values, int64_t n_values, const int64_t* tile_ptr, int64_t* crow,
                     int64_t* col, void* row_values, char* message, int64_t message_bytes, uint32_t seed) {
  const cpu::Encoding e = {
      static_cast<DType>(dtype), n_tokens, n_features, counts, index, index_bytes, values, n_values, tile_ptr};
  const FaultKey fault = dtype == 0 ? to_csr(e, crow, col, static_cast<uint32_t*>(row_values), seed)
                                    : to_csr(e, crow, col, static_cast<uint16_t*>(row_values), seed);
  write_status(status_of(fault, n_tokens), message, message_bytes);
}

void emulated_sparse_linear(int dtype, int64_t n_tokens, int64_t n_features, const int64_t* crow, const int64_t* col,
                            const void* values, const void* weight, const void* bias, int64_t d_out, void* out,
                            uint32_t seed) {
  const auto run = dtype == 0   ? sparse_linear<DType::float32>
                   : dtype == 1 ? sparse_linear<DType::bfloat16>
                                : sparse_linear<DType::float16>;
  run(n_tokens, n_features, crow, col, values, weight, bias, d_out, out, seed);
}

}  // extern "C"
