// The codec `split`: a column's index and values as bytes that an entropy coder makes small, and back.
//
// Positions become gaps, whose small values are frequent; bitmaps, which have other statistics, stand apart. Values
// become one plane for each of their bytes, turned left by one bit first: the exponent is then the last plane, alone
// but for a half float's mantissa, and the sign, which activations of one sign never use, is a bit of the first.
#pragma once

#include <cstdint>

namespace pyfacts::storage {

// Index bytes of the segments that list positions, and of those with a bitmap.
struct IndexSizes {
  int64_t positions = 0;
  int64_t bitmaps = 0;
};

// `occupied` [n_occupied] are the counts that are not 0 of one column, `width` features wide.
IndexSizes index_sizes(const uint8_t* occupied, int64_t n_occupied, int64_t width);

// index -> gaps and bitmaps, each of the size that index_sizes() gives, and back. A segment's first gap is its first
// position, the others count the positions in between. Gaps that lead beyond 255 wrap: the positions then do not
// ascend, which join_block() refuses.
void split_index(const uint8_t* occupied, int64_t n_occupied, int64_t width, const uint8_t* index, uint8_t* gaps,
                 uint8_t* bitmaps);
void join_index(const uint8_t* occupied, int64_t n_occupied, int64_t width, const uint8_t* gaps, const uint8_t* bitmaps,
                uint8_t* index);

// Items [n] of 2, 4 or 8 bytes, at any address -> planes u8 [item_bytes, n], least significant first, and back.
void split_items(const uint8_t* items, int64_t n, int64_t item_bytes, uint8_t* planes);
void join_items(const uint8_t* planes, int64_t n, int64_t item_bytes, uint8_t* items);

}  // namespace pyfacts::storage
