// One column's run of bytes in a plane, as vector kernels can read it.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>

#include "kernels.h"

namespace pyfacts::cpu {

// Kernels read up to kSlackBytes beyond a run; near the end of the plane, where that would leave it, the run moves to
// memory of its own.
class RunReader {
 public:
  const uint8_t* open(const uint8_t* plane, int64_t plane_bytes, int64_t begin, int64_t end) {
    if (end + kSlackBytes <= plane_bytes) return plane + begin;
    copy_ = std::make_unique<uint8_t[]>(end - begin + kSlackBytes);
    if (end > begin) std::memcpy(copy_.get(), plane + begin, end - begin);
    return copy_.get();
  }

 private:
  std::unique_ptr<uint8_t[]> copy_;
};

}  // namespace pyfacts::cpu
