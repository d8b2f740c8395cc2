#include <algorithm>
#include <cstring>
#include <utility>

#include "interpreter.h"
#include "numbers.h"

namespace ptx {

// ---- mbarriers

Mbarrier& Interpreter::mbarrier_at(Cta& cta, uint32_t offset) const {
  const auto found = cta.mbarriers.find(offset);
  if (found == cta.mbarriers.end()) fail("no barrier was initialised at " + std::to_string(offset));
  return found->second;
}

// A phase is over once all have arrived, and all bytes.
void Interpreter::settle(Mbarrier& mbarrier) {
  if (mbarrier.pending == 0 && mbarrier.bytes == 0) {
    ++mbarrier.phase;
    mbarrier.pending = mbarrier.expected;
  }
  ++events_;
}

Interpreter::Step Interpreter::mbarrier() {
  const Instruction& in = *instruction_;
  if (in.has("init")) {
    each([&](int lane) {
      const uint64_t at = address(operand(0), lane);
      const int count = static_cast<int>(get(1, lane));
      Cta& cta = cta_of(at);
      check_shared(cta, offset_of(at), 8, 8);
      if (count < 1) fail("a barrier at which nobody arrives");
      if (!cta.mbarriers.insert({offset_of(at), {count, count, 0, 0}}).second) fail("a barrier is initialised twice");
    });
    ++events_;
  } else if (in.has("arrive")) {
    const bool announces = in.has("expect_tx");
    if (operand(0).kind != Operand::sink || in.operands.size() != (announces ? 3 : 2))
      fail("an arrival that is not known");
    each([&](int lane) {
      const uint64_t at = address(operand(1), lane);
      Mbarrier& mbarrier = mbarrier_at(cta_of(at), offset_of(at));
      if (announces) mbarrier.bytes += static_cast<int64_t>(low_bits(get(2, lane), Type::b32));
      if (mbarrier.pending == 0) fail("an arrival too many");
      --mbarrier.pending;
      settle(mbarrier);
    });
  } else if (in.has("try_wait") && in.has("parity")) {
    bool all = true;
    std::array<bool, kLanes> over{};
    each([&](int lane) {
      const uint64_t at = address(operand(1), lane);
      over[lane] = (mbarrier_at(cta_of(at), offset_of(at)).phase & 1) != (get(2, lane) & 1);
      all = all && over[lane];
    });
    if (!all && chance(0.7)) return Step::blocked;  // it may wait a while, or not
    each([&](int lane) { set(0, lane, over[lane] ? 1 : 0, Type::pred); });
  } else {
    fail("an operation on a barrier that is not known");
  }
  return Step::done;
}

// ---- TMA

void Interpreter::ask_for_copy() {
  const Instruction& in = *instruction_;
  if (!in.has("bulk") || !in.has("tensor") || !in.has("shared::cluster") || !in.has("mbarrier::complete_tx::bytes")) {
    fail("a copy that is not known");
  }
  if (std::popcount(mask_) != 1) fail("a copy that more than one lane asks for");
  const int lane = std::countr_zero(mask_);
  const Operand& source = operand(1);
  Copy copy{};
  const uint64_t map_at = get(source.parts[0], lane);
  if (map_at % 64 != 0) fail("a tensor map is misaligned");
  if (map_at < params_at_ || map_at + sizeof(TensorMap) > params_at_ + launch_.params.size()) {
    fail("a tensor map that is not among the parameters");
  }
  std::memcpy(&copy.map, reinterpret_cast<const void*>(map_at), sizeof(TensorMap));
  if (copy.map.magic != TensorMap::kMagic) fail("not a tensor map");
  if (source.parts.size() != 2 || source.parts[1].parts.size() != copy.map.rank) fail("coordinates of another rank");
  size_t bytes = copy.map.item_bytes;
  for (int i = 0; i < copy.map.rank; ++i) {
    copy.at[i] = static_cast<int32_t>(get(source.parts[1].parts[i], lane));
    bytes *= copy.map.box[i];
  }
  const uint64_t to = address(operand(0), lane), mbarrier = address(operand(2), lane);
  copy.to = offset_of(to);
  copy.mbarrier = offset_of(mbarrier);
  if (&cta_of(to) != &cta_of(mbarrier)) fail("a copy and its barrier are in different blocks");
  if (in.has("multicast::cluster")) {
    const uint64_t ranks = get(3, lane) & 0xffff;
    if (ranks == 0 || ranks >> ctas_.size() != 0) fail("a copy to blocks that are not there");
    for (const auto& cta : ctas_) {
      if ((ranks >> cta->rank & 1) != 0) copy.targets.push_back(cta.get());
    }
  } else {
    copy.targets.push_back(&cta_of(to));
  }
  for (Cta* cta : copy.targets) {
    if (cta->alive_warps == 0) fail("a copy to a block that has ended");
    check_shared(*cta, copy.to, bytes, copy.map.swizzle_bytes == 128 ? 1024 : 128);
    check_products(*cta, copy.to, bytes);
    mbarrier_at(*cta, copy.mbarrier);
    for (size_t i = copy.to; i < copy.to + bytes; ++i) {
      if (cta->origin[i] == Origin::tma_in_flight) fail("two copies to one place");
      if (cta->origin[i] == Origin::threads) fail("a copy over what threads wrote");
      cta->origin[i] = Origin::tma_in_flight;
    }
  }
  copies_.push_back(std::move(copy));
  ++statistics_.copies;
  ++events_;
}

// Any one of the copies arrives.
void Interpreter::land() {
  const auto chosen = copies_.begin() + static_cast<std::ptrdiff_t>(random_() % copies_.size());
  const Copy copy = std::move(*chosen);
  copies_.erase(chosen);
  const TensorMap& map = copy.map;
  std::array<uint32_t, TensorMap::kMaxRank> i{};
  uint32_t done = 0;
  for (int d = 0; d < map.rank; done += map.item_bytes) {
    bool inside = true;
    uint64_t from = map.address;
    for (int e = 0; e < map.rank; ++e) {
      const int64_t x = int64_t{copy.at[e]} + i[e];
      inside = inside && x >= 0 && x < map.size[e];
      from += static_cast<uint64_t>(x) * (e == 0 ? map.item_bytes : map.stride[e - 1]);
    }
    if (inside && !memory_.holds(from, map.item_bytes)) fail("TMA reads out of bounds");
    for (const Cta* cta : copy.targets) {
      uint8_t* const to = cta->memory + swizzled(copy.to + done, map.swizzle_bytes);
      if (inside) {
        std::memcpy(to, reinterpret_cast<const void*>(from), map.item_bytes);
      } else {
        std::memset(to, 0, map.item_bytes);
      }
    }
    for (d = 0; d < map.rank && ++i[d] == map.box[d]; ++d) i[d] = 0;
  }
  for (Cta* cta : copy.targets) {
    std::fill_n(cta->origin.begin() + copy.to, done, Origin::tma);
    Mbarrier& mbarrier = mbarrier_at(*cta, copy.mbarrier);
    mbarrier.bytes -= done;
    settle(mbarrier);
  }
}

// ---- WGMMA: 64 x 256 products of 16 by which every warp of a warpgroup gets 16 rows. They happen for the warpgroup as
// a whole, once all its warps have asked, and in order.

namespace {
constexpr int kRows = 64, kColumns = 256, kDepth = 16;
constexpr int kAccumulators = kRows * kColumns / (kLanes * kWarpgroupWarps);
}  // namespace

// K-major rows in shared memory, swizzled: eight of them, of 128 bytes, in every `stride` bytes.
struct Interpreter::Tile {
  uint32_t start, stride;
  uint32_t at(int row, int k) const {
    return swizzled(start + static_cast<uint32_t>(row) / 8 * stride + static_cast<uint32_t>(row) % 8 * 128 +
                        static_cast<uint32_t>(k) * 2,
                    128);
  }
};

Interpreter::Tile Interpreter::tile(uint64_t descriptor) const {
  if (descriptor >> 62 != 1) fail("only matrices swizzled by 128 bytes are known");
  if ((descriptor >> 49 & 7) != 0) fail("a matrix with a base offset is not known");
  return {static_cast<uint32_t>(descriptor & 0x3fff) << 4, static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4};
}

// Whether these bytes are still to be read by products that were asked for.
void Interpreter::check_products(const Cta& cta, uint32_t offset, size_t bytes) const {
  for (const auto& warp : cta.warps) {
    for (const Product& product : warp->products) {
      for (const auto& [descriptor, rows] : {std::pair{product.a, kRows}, std::pair{product.b, kColumns}}) {
        const Tile operand = tile(descriptor);
        const uint32_t start = operand.start / 1024 * 1024,
                       end = start + static_cast<uint32_t>(rows) / 8 * operand.stride;
        if (offset < end && start < offset + bytes) fail("memory is overwritten that a product still reads");
      }
    }
  }
}

Interpreter::Step Interpreter::product() {
  Warp& w = *warp_;
  const Instruction& in = *instruction_;
  if (!gathered(kAllLanes)) return Step::done;
  if (in.has("fence")) {
    ++w.epoch;
  } else if (in.has("commit_group")) {
    w.groups.push_back(std::exchange(w.uncommitted, 0));
  } else if (in.has("wait_group")) {
    while (w.groups.size() > static_cast<size_t>(operand(0).value)) {
      while (w.groups.front() > 0) {
        if (!multiply()) return Step::blocked;
      }
      w.groups.pop_front();
    }
    if (w.groups.empty() && w.uncommitted == 0) {
      for (const int slot : w.accumulators) w.locked[slot] = 0;
      w.accumulators.clear();
    }
    ++events_;
  } else {
    ask_for_product();
  }
  return Step::done;
}

void Interpreter::ask_for_product() {
  Warp& w = *warp_;
  const Instruction& in = *instruction_;
  const auto& d = operand(0).parts;
  if (!in.has("mma_async") || !in.has("m64n256k16") || !in.has("f32") || d.size() != kAccumulators) {
    fail("a product that is not known");
  }
  constexpr int64_t kPlain[] = {1, 1, 0, 0};  // no operand negated or transposed
  for (size_t i = 0; i < 4; ++i) {
    if (operand(4 + i).value != kPlain[i]) fail("a product that is not known");
  }
  const Product product{&in, get(1, 0), get(2, 0), (get(3, 0) & 1) != 0};
  each([&](int lane) {
    if (get(1, lane) != product.a || get(2, lane) != product.b || ((get(3, lane) & 1) != 0) != product.accumulate) {
      fail("lanes that ask for different products");
    }
  });
  for (const Operand& accumulator : d) {
    if (w.locked[accumulator.slot] != 0) continue;
    if (product.accumulate && w.written_in[accumulator.slot] == w.epoch) {
      fail("an accumulator was written since the last wgmma.fence");
    }
    w.locked[accumulator.slot] = 1;
    w.accumulators.push_back(accumulator.slot);
  }
  w.products.push_back(product);
  ++w.uncommitted;
  ++statistics_.products;
  ++events_;
}

// The oldest product of the current warp's warpgroup, if all its warps have asked for it.
bool Interpreter::multiply() {
  Cta& cta = *warp_->cta;
  const size_t first = static_cast<size_t>(warp_->index / kWarpgroupWarps) * kWarpgroupWarps;
  if (first + kWarpgroupWarps > cta.warps.size()) fail("a warpgroup that is not whole");
  for (size_t i = first; i < first + kWarpgroupWarps; ++i) {
    if (cta.warps[i]->products.empty()) return false;
  }
  const Product product = warp_->products.front();
  const bool bf16 = product.instruction->has("bf16");
  const auto element = [&](uint32_t at) {
    check_shared(cta, at, 2, 2);
    if (cta.origin[at] == Origin::tma_in_flight) fail("a product reads what TMA has not brought yet");
    if (cta.origin[at] != Origin::tma) fail("a product reads what TMA did not bring");
    uint16_t bits = 0;
    std::memcpy(&bits, cta.memory + at, sizeof(bits));
    return widen(bits, bf16);
  };
  const Tile a = tile(product.a), b = tile(product.b);
  static thread_local float weight[kDepth][kColumns], sums[kRows][kColumns];
  for (int column = 0; column < kColumns; ++column) {
    for (int k = 0; k < kDepth; ++k) weight[k][column] = element(b.at(column, k));
  }
  for (int row = 0; row < kRows; ++row) {
    std::fill_n(sums[row], kColumns, 0.0f);
    for (int k = 0; k < kDepth; ++k) {
      const float x = element(a.at(row, k));
      for (int column = 0; column < kColumns; ++column) sums[row][column] += x * weight[k][column];
    }
  }
  for (int i = 0; i < kWarpgroupWarps; ++i) {
    Warp& w = *cta.warps[first + i];
    const Product asked = w.products.front();
    w.products.pop_front();
    if (asked.a != product.a || asked.b != product.b || asked.accumulate != product.accumulate) {
      fail("the warps of a warpgroup ask for different products");
    }
    for (int j = 0; j < kAccumulators; ++j) {
      auto& slot = w.registers[asked.instruction->operands[0].parts[j].slot];
      for (int lane = 0; lane < kLanes; ++lane) {
        const int row = 16 * i + 8 * (j / 2 % 2) + lane / 4, column = 8 * (j / 4) + 2 * (lane % 4) + j % 2;
        slot[lane] = bits_of((product.accumulate ? float_of(slot[lane]) : 0.0f) + sums[row][column]);
      }
    }
    // It is of the oldest group that is not done, or of none yet.
    const auto group = std::find_if(w.groups.begin(), w.groups.end(), [](int left) { return left > 0; });
    --(group != w.groups.end() ? *group : w.uncommitted);
  }
  ++events_;
  return true;
}

}  // namespace ptx
