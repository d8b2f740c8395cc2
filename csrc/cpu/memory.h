// Memory that does not page-fault over and over: a first touch of 128 MiB costs 65 ms on 4 KiB pages and 30 ms on huge
// ones, where copying it takes 27 ms.
#pragma once

#include <cstdint>

namespace pyfacts::cpu {

constexpr int64_t kSlabBytes = int64_t{4} << 20;

// From this size on, an output goes past the caches: it would only push out what is in them.
constexpr int64_t kStreamBytes = int64_t{8} << 20;

// A slab of kSlabBytes from a process-wide pool, on huge pages where the system grants them. Contents are arbitrary.
// Throws std::bad_alloc.
uint8_t* take_slab();

// Back to the pool, which keeps this much and frees the rest.
constexpr int64_t kPooledBytes = int64_t{160} << 20;
void return_slab(uint8_t* slab);

// Asks for huge pages for the page-aligned interior of a large buffer that is about to be written. Only a hint.
void advise_huge_pages(void* data, int64_t size_bytes);

}  // namespace pyfacts::cpu
