// What a CUtensorMap holds here, where no driver makes one.
#pragma once

#include <cstdint>

namespace ptx {

struct TensorMap {
  static constexpr int kMaxRank = 5;
  static constexpr uint64_t kMagic = 0x70616d726f736e74;
  uint64_t magic;
  uint64_t address;
  uint64_t stride[kMaxRank - 1];  // bytes, of dimensions 1 and up
  uint32_t size[kMaxRank];
  uint16_t box[kMaxRank];
  uint8_t rank;
  uint8_t item_bytes;
  uint8_t swizzle_bytes;  // 0, 32, 64, 128
};
static_assert(sizeof(TensorMap) <= 128);

// Where the byte at a shared address comes to lie: 16-byte pieces change places within 1,024 bytes.
inline uint32_t swizzled(uint32_t address, int swizzle_bytes) {
  const uint32_t mask = swizzle_bytes == 128 ? 7 : swizzle_bytes == 64 ? 3 : swizzle_bytes == 32 ? 1 : 0;
  return address ^ ((address >> 7 & mask) << 4);
}

}  // namespace ptx
