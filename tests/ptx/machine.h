// Runs kernels of a PTX module on the host: every thread of a cluster of blocks, instruction by instruction.
//
// Addresses are the host's. Warps take turns at random; lanes that diverge run apart and meet at collectives, and some
// lag behind the rest of their warp for a while. What the
// hardware does beside the threads happens at a random later time, and sometimes as late as it may: copies by TMA, and
// the matrix products of WGMMA, which read shared memory when they happen. It is an error to touch memory that such an
// operation still writes or reads, to use accumulators that were not waited for, or barriers that nobody initialised;
// to arrive once too often, to end a block to whose memory others still write, to read or write out of bounds or
// misaligned, and to wait for ever.
//
// It sees every write at once, in whatever order threads made them: of how memory is ordered on the device, and of what
// ptxas makes of the PTX, it knows nothing; nor of time.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <vector>

#include "module.h"

namespace ptx {

using Dim = std::array<int, 3>;

struct Launch {
  const Kernel* kernel = nullptr;
  const uint8_t* globals = nullptr;
  Dim grid{1, 1, 1}, block{1, 1, 1}, cluster{1, 1, 1};
  int dynamic_shared_bytes = 0;
  std::vector<uint8_t> params;
  uint64_t seed = 0;  // of the turns
};

// Device memory: what may be read and written.
class Memory {
 public:
  void* allocate(size_t bytes);
  bool free(void* pointer);
  bool holds(uint64_t address, size_t bytes) const;

 private:
  std::map<uint64_t, size_t> blocks_;
};

struct Statistics {
  uint64_t instructions = 0;  // of warps
  uint64_t products = 0;
  uint64_t copies = 0;
};

// Throws std::runtime_error that says what is wrong, and where.
Statistics run(const Launch& launch, const Memory& memory);

}  // namespace ptx
