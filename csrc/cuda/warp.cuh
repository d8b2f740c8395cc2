// What the lanes of a warp do together.
#pragma once

#include <cstdint>

namespace pyfacts::cuda {

constexpr int kWarpLanes = 32;
constexpr uint32_t kAllLanes = 0xffffffff;

// 16 bytes that are moved at once.
struct alignas(16) Unit {
  uint32_t word[4];
};

// The sum of `value` over the lanes before this one; *total gets the sum over all. All lanes take part.
__device__ __forceinline__ uint32_t exclusive_warp_sum(uint32_t value, int lane, uint32_t* total) {
  uint32_t sum = value;
#pragma unroll
  for (int step = 1; step < kWarpLanes; step *= 2) {
    const uint32_t below = __shfl_up_sync(kAllLanes, sum, step);
    if (lane >= step) sum += below;
  }
  *total = __reduce_add_sync(kAllLanes, value);  // not lane 31's sum: from this the compiler knows that all agree
  return sum - value;
}

}  // namespace pyfacts::cuda
