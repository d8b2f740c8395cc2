#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "interpreter.h"
#include "numbers.h"

namespace ptx {

void* Memory::allocate(size_t bytes) {
  constexpr size_t kAlignment = 256;  // as cudaMalloc's
  const size_t rounded = (std::max<size_t>(bytes, 1) + kAlignment - 1) / kAlignment * kAlignment;
  void* const pointer = std::aligned_alloc(kAlignment, rounded);
  std::memset(pointer, 0xCD, rounded);
  blocks_[reinterpret_cast<uint64_t>(pointer)] = bytes;
  return pointer;
}

bool Memory::free(void* pointer) {
  if (blocks_.erase(reinterpret_cast<uint64_t>(pointer)) == 0) return false;
  std::free(pointer);
  return true;
}

bool Memory::holds(uint64_t address, size_t bytes) const {
  auto next = blocks_.upper_bound(address);
  if (next == blocks_.begin()) return false;
  --next;
  return address + bytes <= next->first + next->second;
}

Interpreter::Space Interpreter::space() const {
  for (const std::string& word : instruction_->modifiers) {
    if (word == "global") return Space::global;
    if (word.starts_with("shared")) return Space::shared;
    if (word == "param") return Space::param;
    if (word == "local" || word == "const") fail("memory that is not known");
  }
  return Space::generic;
}

Cta& Interpreter::cta_of(uint64_t shared_address) const {
  const uint32_t rank = static_cast<uint32_t>(shared_address) >> kRankShift;
  if (rank == 0) return *warp_->cta;
  if (rank > ctas_.size()) fail("an address of no block of the cluster");
  Cta& cta = *ctas_[rank - 1];
  if (cta.alive_warps == 0) fail("memory of a block that has ended");
  return cta;
}

void Interpreter::check_shared(const Cta& cta, uint32_t offset, size_t bytes, size_t alignment) const {
  if (offset < kSharedBase || offset + bytes > cta.memory_end) {
    fail("shared address " + std::to_string(offset) + " is out of bounds");
  }
  if (offset % alignment != 0) fail("shared address " + std::to_string(offset) + " is misaligned");
}

// The bytes at an address, once it was checked that they may be touched.
uint8_t* Interpreter::locate(Space where, uint64_t address, size_t bytes, bool write) {
  const bool parameter = address >= params_at_ && address + bytes <= params_at_ + launch_.params.size();
  if (where == Space::generic) {
    for (const auto& cta : ctas_) {
      const uint64_t start = reinterpret_cast<uint64_t>(cta->memory);
      if (address >= start && address < start + cta->memory_end) {
        const uint64_t rank = static_cast<uint64_t>(cta->rank) + 1;
        return locate(Space::shared, (rank << kRankShift) + (address - start), bytes, write);
      }
    }
    where = parameter ? Space::param : Space::global;
  }
  if (where == Space::shared) {
    Cta& cta = cta_of(address);
    const uint32_t offset = offset_of(address);
    check_shared(cta, offset, bytes, bytes);
    if (cta.mbarriers.contains(offset)) fail("a barrier is used as memory");
    for (size_t i = offset; i < offset + bytes; ++i) {
      if (cta.origin[i] == Origin::tma_in_flight) fail("memory is touched that TMA is writing");
      if (write && cta.origin[i] == Origin::tma) check_products(cta, offset, bytes);
      if (write) cta.origin[i] = Origin::threads;
    }
    return cta.memory + offset;
  }
  if (address % bytes != 0) fail("an address is misaligned");
  const bool allowed = where == Space::param ? parameter && !write : memory_.holds(address, bytes);
  if (!allowed) fail(write ? "a write out of bounds" : "a read out of bounds");
  return reinterpret_cast<uint8_t*>(address);
}

void Interpreter::load() {
  const Type t = instruction_->types.back();
  const size_t item = bytes_of(t);
  const Operand& to = operand(0);
  const bool many = to.kind == Operand::vector;
  const size_t n = many ? to.parts.size() : 1;
  const Space where = space();
  each([&](int lane) {
    const uint8_t* const from = locate(where, address(operand(1), lane), item * n, false);
    for (size_t i = 0; i < n; ++i) {
      uint64_t value = 0;
      std::memcpy(&value, from + i * item, item);
      set(many ? to.parts[i] : to, lane, static_cast<uint64_t>(extend(value, t)),
          Type::b64);  // into any wider register
    }
  });
}

void Interpreter::store() {
  const size_t item = bytes_of(instruction_->types.back());
  const Operand& from = operand(1);
  const bool many = from.kind == Operand::vector;
  const size_t n = many ? from.parts.size() : 1;
  const Space where = space();
  each([&](int lane) {
    uint8_t* const to = locate(where, address(operand(0), lane), item * n, true);
    for (size_t i = 0; i < n; ++i) {
      const uint64_t value = get(many ? from.parts[i] : from, lane);
      std::memcpy(to + i * item, &value, item);
    }
  });
  ++events_;
}

void Interpreter::atomic(bool returns) {
  const Instruction& in = *instruction_;
  const Type t = in.types.back();
  const size_t item = bytes_of(t), first = returns ? 1 : 0;
  if (t == Type::f32 || is_half(t)) fail("only atomic operations on integers are known");
  const Space where = space();
  each([&](int lane) {
    uint8_t* const at = locate(where, address(operand(first), lane), item, true);
    uint64_t old = 0;
    std::memcpy(&old, at, item);
    const uint64_t b = get(first + 1, lane);
    uint64_t made = 0;
    if (in.has("add")) {
      made = old + b;
    } else if (in.has("min") || in.has("max")) {
      const bool less = is_signed(t) ? extend(b, t) < extend(old, t) : low_bits(b, t) < low_bits(old, t);
      made = less == in.has("min") ? b : old;
    } else {
      fail("an atomic operation that is not known");
    }
    std::memcpy(at, &made, item);
    if (returns) set(0, lane, old, t);
  });
  ++events_;
}

}  // namespace ptx
