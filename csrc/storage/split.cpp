#include "split.h"

#include <bit>
#include <cstring>

#include "../format.h"

namespace pyfacts::storage {

IndexSizes index_sizes(const uint8_t* occupied, int64_t n_occupied, int64_t width) {
  IndexSizes sizes;
  for (int64_t i = 0; i < n_occupied; ++i)
    (has_positions(occupied[i], width) ? sizes.positions : sizes.bitmaps) += index_bytes(occupied[i], width);
  return sizes;
}

void split_index(const uint8_t* occupied, int64_t n_occupied, int64_t width, const uint8_t* index, uint8_t* gaps,
                 uint8_t* bitmaps) {
  for (int64_t i = 0; i < n_occupied; ++i) {
    const int64_t size = index_bytes(occupied[i], width);
    if (has_positions(occupied[i], width)) {
      uint8_t position = 255;  // the one before 0
      for (int64_t k = 0; k < size; ++k, position = index[k - 1]) {
        gaps[k] = static_cast<uint8_t>(index[k] - position - 1);
      }
      gaps += size;
    } else {
      std::memcpy(bitmaps, index, size);
      bitmaps += size;
    }
    index += size;
  }
}

void join_index(const uint8_t* occupied, int64_t n_occupied, int64_t width, const uint8_t* gaps, const uint8_t* bitmaps,
                uint8_t* index) {
  for (int64_t i = 0; i < n_occupied; ++i) {
    const int64_t size = index_bytes(occupied[i], width);
    if (has_positions(occupied[i], width)) {
      uint8_t position = 255;  // the one before 0
      for (int64_t k = 0; k < size; ++k) index[k] = position = static_cast<uint8_t>(position + gaps[k] + 1);
      gaps += size;
    } else {
      std::memcpy(index, bitmaps, size);
      bitmaps += size;
    }
    index += size;
  }
}

namespace {

template <typename Bits>
void split_bits(const uint8_t* items, int64_t n, uint8_t* planes) {
  for (int64_t i = 0; i < n; ++i) {
    Bits bits;
    std::memcpy(&bits, items + i * sizeof(Bits), sizeof(Bits));
    bits = std::rotl(bits, 1);
    for (size_t byte = 0; byte < sizeof(Bits); ++byte) planes[byte * n + i] = static_cast<uint8_t>(bits >> 8 * byte);
  }
}

template <typename Bits>
void join_bits(const uint8_t* planes, int64_t n, uint8_t* items) {
  for (int64_t i = 0; i < n; ++i) {
    Bits bits = 0;
    for (size_t byte = 0; byte < sizeof(Bits); ++byte)
      bits = static_cast<Bits>(bits | static_cast<Bits>(planes[byte * n + i]) << 8 * byte);
    bits = std::rotr(bits, 1);
    std::memcpy(items + i * sizeof(Bits), &bits, sizeof(Bits));
  }
}

}  // namespace

void split_items(const uint8_t* items, int64_t n, int64_t item_bytes, uint8_t* planes) {
  item_bytes == 2   ? split_bits<uint16_t>(items, n, planes)
  : item_bytes == 4 ? split_bits<uint32_t>(items, n, planes)
                    : split_bits<uint64_t>(items, n, planes);
}

void join_items(const uint8_t* planes, int64_t n, int64_t item_bytes, uint8_t* items) {
  item_bytes == 2   ? join_bits<uint16_t>(planes, n, items)
  : item_bytes == 4 ? join_bits<uint32_t>(planes, n, items)
                    : join_bits<uint64_t>(planes, n, items);
}

}  // namespace pyfacts::storage
