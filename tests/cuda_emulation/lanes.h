// Runs CUDA device functions on the host, lane by lane, as far as encode and decode need it.
//
// Every thread of a block is a fiber with a stack of its own. A fiber runs alone until it reaches a collective, where
// it posts its value and waits; once all lanes of its warp (or threads of its block) wait at that very call site, they
// go on. A warp runs as far as it can before the next one starts, in an order of warps and lanes shuffled from a seed,
// and shared memory is poisoned before every block. So threads that diverge around a collective are found, and those
// that need a barrier which is not there. Of memory ordering within the hardware it says nothing.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <source_location>
#include <vector>

#define __device__
#define __forceinline__ inline

namespace emulation {

constexpr int kLanes = 32;
constexpr size_t kStackBytes = 64 * 1024;

[[noreturn]] inline void fail(const char* what, int line_a, int line_b) {
  std::fprintf(stderr, "emulation: %s (lines %d and %d)\n", what, line_a, line_b);
  std::abort();
}

// What a thread waits for: a place in the code, and what it brought.
struct Collective {
  enum Kind { none, ballot, shuffle, shuffle_up, shuffle_xor, reduce_or, reduce_add, sync_warp, barrier } kind = none;
  const char* file = "";
  int line = 0;
  uint64_t value = 0;
};

class Block {
 public:
  Block(int n_threads, uint32_t seed) : random_(seed), threads_(n_threads) {
    for (Thread& thread : threads_) thread.stack = std::make_unique<char[]>(kStackBytes);
  }

  // Runs body(thread) in every thread of a block to its end: warp after warp, each as far as it gets without the
  // others.
  void run(std::function<void(int thread)> body) {
    body_ = std::move(body);
    current_ = this;
    for (Thread& thread : threads_) thread.started = thread.done = false, thread.at.kind = Collective::none;
    const int n = static_cast<int>(threads_.size());
    std::vector<int> warps(n / kLanes);
    std::iota(warps.begin(), warps.end(), 0);
    for (;;) {
      std::shuffle(warps.begin(), warps.end(), random_);
      for (int warp : warps) run_warp(warp * kLanes);
      meet(0, n);
      if (threads_[0].done) break;
      take(0, n, &block_values_);
    }
    current_ = nullptr;
  }

  // Called by a fiber: waits for the others, returns what they all posted.
  static const std::vector<uint64_t>& wait(Collective at) {
    Block& block = *current_;
    const int self = block.running_;
    block.threads_[self].at = at;
    if (_setjmp(block.threads_[self].context) == 0) _longjmp(block.scheduler_, 1);
    return at.kind == Collective::barrier ? block.block_values_ : block.threads_[self - lane()].values;
  }
  static int lane() { return current_->running_ % kLanes; }

 private:
  struct Thread {
    std::unique_ptr<char[]> stack;
    jmp_buf context;
    bool started = false;
    bool done = false;
    Collective at;
    std::vector<uint64_t> values;  // of a warp's lanes at their last collective; kept by lane 0
  };

  static void enter() {
    Block& block = *current_;
    const int self = block.running_;
    block.body_(self);
    block.threads_[self].done = true;
    _longjmp(block.scheduler_, 1);
  }

  void resume(int thread) {
    running_ = thread;
    if (_setjmp(scheduler_) != 0) return;
    if (threads_[thread].started) _longjmp(threads_[thread].context, 1);
    threads_[thread].started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = threads_[thread].stack.get();
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, enter, 0);
    setcontext(&context);
  }

  // To the warp's next barrier, or its end.
  void run_warp(int begin) {
    std::vector<int> lanes(kLanes);
    std::iota(lanes.begin(), lanes.end(), begin);
    for (;;) {
      std::shuffle(lanes.begin(), lanes.end(), random_);
      for (int thread : lanes) {
        if (!threads_[thread].done) resume(thread);
      }
      meet(begin, begin + kLanes);
      if (threads_[begin].done || threads_[begin].at.kind == Collective::barrier) return;
      take(begin, begin + kLanes, &threads_[begin].values);
    }
  }

  // The threads [begin, end) must all have ended, or all wait at one call site.
  void meet(int begin, int end) const {
    const Thread& first = threads_[begin];
    for (int i = begin; i < end; ++i) {
      const Thread& other = threads_[i];
      if (other.done != first.done) fail("a thread ended before a collective", first.at.line, other.at.line);
      if (!other.done && (other.at.kind != first.at.kind || other.at.line != first.at.line ||
                          std::strcmp(other.at.file, first.at.file) != 0)) {
        fail("threads diverge around a collective", first.at.line, other.at.line);
      }
    }
  }

  void take(int begin, int end, std::vector<uint64_t>* values) {
    values->clear();
    for (int i = begin; i < end; ++i) {
      values->push_back(threads_[i].at.value);
      threads_[i].at.kind = Collective::none;
    }
  }

  static inline Block* current_ = nullptr;
  std::mt19937 random_;
  std::vector<Thread> threads_;
  std::vector<uint64_t> block_values_;
  std::function<void(int)> body_;
  jmp_buf scheduler_;
  int running_ = 0;
};

inline const std::vector<uint64_t>& collective(Collective::Kind kind, uint32_t mask, uint64_t value,
                                               std::source_location site) {
  if (mask != 0xffffffff) fail("only whole warps are emulated", static_cast<int>(site.line()), 0);
  return Block::wait({kind, site.file_name(), static_cast<int>(site.line()), value});
}

}  // namespace emulation

// ---- The intrinsics ------------------------------------------------------------------------------------------------

using emulation::Collective;
using Site = std::source_location;

inline int __popc(uint32_t x) { return std::popcount(x); }
inline int __popcll(uint64_t x) { return std::popcount(x); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(static_cast<uint32_t>(x)) + 1; }

inline int __ffsll(long long x) { return x == 0 ? 0 : std::countr_zero(static_cast<uint64_t>(x)) + 1; }

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline void __stcs(uint4* at, uint4 value) { *at = value; }

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }

inline uint32_t __ballot_sync(uint32_t mask, int flag, Site site = Site::current()) {
  uint32_t result = 0;
  const auto& values = emulation::collective(Collective::ballot, mask, flag != 0, site);
  for (int lane = 0; lane < emulation::kLanes; ++lane) result |= static_cast<uint32_t>(values[lane]) << lane;
  return result;
}

inline uint32_t __reduce_or_sync(uint32_t mask, uint32_t value, Site site = Site::current()) {
  const auto& values = emulation::collective(Collective::reduce_or, mask, value, site);
  return static_cast<uint32_t>(std::accumulate(values.begin(), values.end(), uint64_t{0}, std::bit_or<>()));
}

inline uint32_t __reduce_add_sync(uint32_t mask, uint32_t value, Site site = Site::current()) {
  const auto& values = emulation::collective(Collective::reduce_add, mask, value, site);
  return static_cast<uint32_t>(std::accumulate(values.begin(), values.end(), uint64_t{0}));
}

template <typename T>
T __shfl_sync(uint32_t mask, T value, int source, Site site = Site::current()) {
  const auto& values = emulation::collective(Collective::shuffle, mask, static_cast<uint64_t>(value), site);
  return static_cast<T>(values[source % emulation::kLanes]);
}

template <typename T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, Site site = Site::current()) {
  const auto& values = emulation::collective(Collective::shuffle_up, mask, static_cast<uint64_t>(value), site);
  const int lane = emulation::Block::lane();
  return static_cast<T>(values[lane >= static_cast<int>(delta) ? lane - delta : lane]);
}

template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int other, Site site = Site::current()) {
  const auto& values = emulation::collective(Collective::shuffle_xor, mask, static_cast<uint64_t>(value), site);
  return static_cast<T>(values[emulation::Block::lane() ^ other]);
}

inline void __syncwarp(Site site = Site::current()) {
  emulation::collective(Collective::sync_warp, 0xffffffff, 0, site);
}

inline void __syncthreads(Site site = Site::current()) {
  emulation::collective(Collective::barrier, 0xffffffff, 0, site);
}

inline int __syncthreads_or(int flag, Site site = Site::current()) {
  const auto& values = emulation::collective(Collective::barrier, 0xffffffff, flag != 0, site);
  return std::any_of(values.begin(), values.end(), [](uint32_t value) { return value != 0; });
}

template <typename T>
T atomicMin(T* address, T value) {
  const T old = *address;
  *address = std::min(old, value);
  return old;
}

template <typename T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address += value;
  return old;
}
