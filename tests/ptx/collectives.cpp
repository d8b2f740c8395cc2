#include <cstring>

#include "interpreter.h"
#include "numbers.h"

namespace ptx {

// Whether all the lanes of `wanted` that there are have come; if not, those that are here wait.
bool Interpreter::gathered(uint32_t wanted) {
  if ((wanted & here_ & ~mask_) != 0) fail("lanes that should take part are elsewhere by their guard");
  if ((wanted & warp_->alive & ~here_) == 0) return true;
  warp_->waiting |= mask_;
  held_ = mask_;
  return false;
}

uint32_t Interpreter::members(const Operand& from) {
  const uint32_t mask = static_cast<uint32_t>(get(from, std::countr_zero(mask_)));
  each([&](int lane) {
    if (static_cast<uint32_t>(get(from, lane)) != mask) fail("lanes that disagree on who takes part");
    if ((mask >> lane & 1) == 0) fail("a lane that does not take part");
  });
  return mask;
}

void Interpreter::shuffle() {
  const Instruction& in = *instruction_;
  if (!gathered(members(operand(4)))) return;
  std::array<uint64_t, kLanes> values{};
  each([&](int lane) { values[lane] = get(1, lane); });
  each([&](int lane) {
    const int by = static_cast<int>(get(2, lane)) & 31, c = static_cast<int>(get(3, lane));
    const int clamp = c & 31, segment = c >> 8 & 31, bound = (lane & segment) | (clamp & ~segment);
    const int from = in.has("up")     ? lane - by
                     : in.has("down") ? lane + by
                     : in.has("bfly") ? lane ^ by
                                      : (lane & segment) | (by & ~segment);
    const bool valid = in.has("up") ? from >= bound : from <= bound;
    const int source = valid ? from : lane;
    if ((mask_ >> source & 1) == 0) fail("a shuffle from a lane that is not there");
    set(0, lane, values[source], Type::b32);
    set(in.predicate_result, lane, valid ? 1 : 0, Type::pred);
  });
}

void Interpreter::vote() {
  const Instruction& in = *instruction_;
  if (!gathered(members(operand(2)))) return;
  uint32_t ballot = 0;
  each([&](int lane) { ballot |= static_cast<uint32_t>(get(1, lane) & 1) << lane; });
  const Type out = in.has("ballot") ? Type::b32 : Type::pred;
  if (out == Type::pred && !in.has("any") && !in.has("all")) fail("a vote that is not known");
  const uint32_t made = out == Type::b32 ? ballot : (in.has("any") ? ballot != 0 : ballot == mask_) ? 1 : 0;
  each([&](int lane) { set(0, lane, made, out); });
}

void Interpreter::reduce() {
  if (!instruction_->has("add")) fail("a reduction that is not known");
  if (!gathered(members(operand(2)))) return;
  uint32_t sum = 0;
  each([&](int lane) { sum += static_cast<uint32_t>(get(1, lane)); });
  each([&](int lane) { set(0, lane, sum, Type::b32); });
}

void Interpreter::elect() {
  if (!gathered(members(operand(1)))) return;
  const int leader = std::countr_zero(mask_);
  each([&](int lane) {
    set(0, lane, leader, Type::b32);
    set(instruction_->predicate_result, lane, lane == leader ? 1 : 0, Type::pred);
  });
}

void Interpreter::store_matrices() {
  if (!instruction_->has("x4") || instruction_->has("trans")) fail("only stmatrix.x4 is known");
  if (!gathered(kAllLanes)) return;
  for (int matrix = 0; matrix < 4; ++matrix) {
    for (int row = 0; row < 8; ++row) {
      uint8_t* const to = locate(Space::shared, address(operand(0), 8 * matrix + row), 16, true);
      for (int i = 0; i < 4; ++i) {
        const uint32_t pair = static_cast<uint32_t>(get(operand(1).parts[matrix], 4 * row + i));
        std::memcpy(to + 4 * i, &pair, sizeof(pair));
      }
    }
  }
  ++events_;
}

// ---- barriers: of a warp, of a block, of a cluster. Warps come as a whole.

Interpreter::Step Interpreter::block_barrier() {
  const Instruction& in = *instruction_;
  if (in.has("warp")) {
    gathered(members(operand(0)));
    return Step::done;
  }
  if (!gathered(kAllLanes)) return Step::done;
  const bool asks = in.has("red");
  if (asks ? !in.has("or") || in.operands.size() != 3 : in.operands.size() != 1) {
    fail("a barrier that is not known");
  }
  Warp& w = *warp_;
  const uint64_t id = get(asks ? 1 : 0, std::countr_zero(mask_));
  if (id >= w.cta->any_at_barrier.size()) fail("a barrier that is not there");
  if (w.at_barrier < 0) {
    w.at_barrier = static_cast<int>(id);
    if (asks) each([&](int lane) { w.cta->any_at_barrier[id] |= (get(2, lane) & 1) != 0; });
    release_block(*w.cta, w.at_barrier);
    if (!w.released) return Step::blocked;
  }
  w.at_barrier = -1;
  w.released = false;
  if (asks) each([&](int lane) { set(0, lane, w.any_at_barrier ? 1 : 0, Type::pred); });
  return Step::done;
}

// Once all warps that are left have come.
void Interpreter::release_block(Cta& cta, int id) {
  int n = 0;
  for (const auto& warp : cta.warps) n += warp->at_barrier == id && !warp->released ? 1 : 0;
  if (n == 0 || n < cta.alive_warps) return;
  for (const auto& warp : cta.warps) {
    if (warp->at_barrier != id) continue;
    warp->released = true;
    warp->any_at_barrier = cta.any_at_barrier[id];
  }
  cta.any_at_barrier[id] = false;
  ++events_;
}

Interpreter::Step Interpreter::cluster_barrier() {
  if (!gathered(kAllLanes)) return Step::done;
  Warp& w = *warp_;
  if (instruction_->has("arrive")) {
    if (w.cluster_arrivals > w.cluster_waits) fail("a second arrival at the cluster's barrier");
    ++w.cluster_arrivals;
    release_cluster();
    return Step::done;
  }
  if (cluster_phase_ < w.cluster_arrivals) return Step::blocked;
  w.cluster_waits = w.cluster_arrivals;
  return Step::done;
}

void Interpreter::release_cluster() {
  bool any = false;
  for (const auto& cta : ctas_) {
    for (const auto& warp : cta->warps) {
      if (warp->alive == 0) continue;
      if (warp->cluster_arrivals <= cluster_phase_) return;
      any = true;
    }
  }
  if (any) ++cluster_phase_, ++events_;
}

// The address of the same place in another block of the cluster.
void Interpreter::map_address() {
  each([&](int lane) {
    const uint64_t a = get(1, lane), rank = low_bits(get(2, lane), Type::b32);
    if (a >> kRankShift != 0) fail("mapa of an address in another block");
    if (rank >= ctas_.size()) fail("a block that is not in the cluster");
    set(0, lane, (rank + 1) << kRankShift | a, Type::b32);
  });
}

}  // namespace ptx
