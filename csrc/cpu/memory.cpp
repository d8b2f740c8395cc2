// The pool of slabs behind the encoder.
#include "memory.h"

#include <pthread.h>

#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace pyfacts::cpu {
namespace {

constexpr int64_t kHugePageBytes = int64_t{2} << 20;
constexpr size_t kMaxPooledSlabs = kPooledBytes / kSlabBytes;

struct Pool {
  std::mutex mutex;
  std::vector<uint8_t*> slabs;
};

// Never destroyed: threads may still return slabs while the process exits. Locked over a fork: the child would find it
// locked for ever by a thread that it does not have.
Pool& pool() {
  static Pool* const made = [] {
    pthread_atfork([] { pool().mutex.lock(); }, [] { pool().mutex.unlock(); }, [] { pool().mutex.unlock(); });
    return new Pool;
  }();
  return *made;
}

}  // namespace

uint8_t* take_slab() {
  {
    std::lock_guard<std::mutex> lock(pool().mutex);
    if (!pool().slabs.empty()) {
      uint8_t* slab = pool().slabs.back();
      pool().slabs.pop_back();
      return slab;
    }
  }
  void* slab = std::aligned_alloc(kHugePageBytes, kSlabBytes);
  if (slab == nullptr) throw std::bad_alloc();
  advise_huge_pages(slab, kSlabBytes);
  return static_cast<uint8_t*>(slab);
}

void return_slab(uint8_t* slab) {
  {
    std::lock_guard<std::mutex> lock(pool().mutex);
    if (pool().slabs.size() < kMaxPooledSlabs) {
      pool().slabs.push_back(slab);
      return;
    }
  }
  std::free(slab);
}

void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t size_bytes) {
#if defined(__linux__)
  if (size_bytes < 2 * kHugePageBytes) return;
  constexpr uintptr_t kPage = 4096;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) & ~(kPage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + size_bytes) & ~(kPage - 1);
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // refused on some systems: no matter
#endif
}

}  // namespace pyfacts::cpu
