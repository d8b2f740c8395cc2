#include "interpreter.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "numbers.h"

namespace ptx {
namespace {

constexpr uint32_t kSharedLimit = 228 * 1024;
constexpr uint64_t kPatience = 2000;  // turns without an event before a copy has to come
constexpr uint64_t kForEver = 100 * kPatience;

// Registers of warps that have ended: fresh memory costs more than what runs in it.
thread_local std::vector<Registers> spare_registers;

}  // namespace

Interpreter::Interpreter(const Launch& launch, const Memory& memory)
    : launch_(launch), kernel_(*launch.kernel), memory_(memory), random_(launch.seed) {
  for (const Instruction& instruction : kernel_.code) ops_.push_back(op_of(instruction));
  // Tensor maps among the parameters are aligned as they are on the device.
  constexpr uint64_t kAlignment = 128;
  params_.resize(launch.params.size() + kAlignment);
  params_at_ = (reinterpret_cast<uint64_t>(params_.data()) + kAlignment - 1) / kAlignment * kAlignment;
  std::copy(launch.params.begin(), launch.params.end(), reinterpret_cast<uint8_t*>(params_at_));
  // Eager or late, by the seed.
  static constexpr double kChances[] = {0.002, 0.05, 0.5};
  copy_chance_ = kChances[random_() % 3];
  product_chance_ = kChances[random_() % 3];
  lag_chance_ = random_() % 2 == 0 ? 0.0 : 0.005;
}

Statistics Interpreter::run() {
  const Dim &grid = launch_.grid, &cluster = launch_.cluster;
  for (int i = 0; i < 3; ++i) {
    if (cluster[i] < 1 || grid[i] < 1 || grid[i] % cluster[i] != 0) fail("the grid does not consist of whole clusters");
  }
  for (int z = 0; z < grid[2]; z += cluster[2]) {
    for (int y = 0; y < grid[1]; y += cluster[1]) {
      for (int x = 0; x < grid[0]; x += cluster[0]) run_cluster({x, y, z});
    }
  }
  return statistics_;
}

void Interpreter::fail(const std::string& what) const {
  std::string where;
  if (warp_ != nullptr && instruction_ != nullptr) {
    where = ", block " + std::to_string(warp_->cta->id[0]) + ", warp " + std::to_string(warp_->index) + ", PTX line " +
            std::to_string(instruction_->line) + ": " + instruction_->name;
    for (const std::string& word : instruction_->modifiers) where += "." + word;
  }
  throw std::runtime_error(what + where);
}

bool Interpreter::chance(double probability) { return static_cast<double>(random_() >> 11) * 0x1p-53 < probability; }

// ---- turns

std::unique_ptr<Cta> Interpreter::make_cta(int rank, const Dim& id) {
  auto cta = std::make_unique<Cta>();
  cta->rank = rank;
  cta->id = id;
  cta->memory_end = dynamic_start_ + launch_.dynamic_shared_bytes;
  if (cta->memory_end > kSharedLimit) fail("more shared memory than there is");
  cta->allocation.assign(cta->memory_end + 1024, 0xA5);
  const uint64_t at = reinterpret_cast<uint64_t>(cta->allocation.data());
  cta->memory = reinterpret_cast<uint8_t*>((at + 1023) / 1024 * 1024);
  cta->origin.assign(cta->memory_end, Origin::nobody);
  const int n_threads = launch_.block[0] * launch_.block[1] * launch_.block[2];
  for (int first = 0; first < n_threads; first += kLanes) {
    auto warp = std::make_unique<Warp>();
    warp->cta = cta.get();
    warp->index = first / kLanes;
    if (!spare_registers.empty()) {
      warp->registers = std::move(spare_registers.back());
      spare_registers.pop_back();
    }
    warp->registers.resize(kernel_.n_slots);
    warp->locked.assign(kernel_.n_slots, 0);
    warp->written_in.assign(kernel_.n_slots, 0);
    warp->alive = n_threads - first >= kLanes ? kAllLanes : (1u << (n_threads - first)) - 1;
    cta->warps.push_back(std::move(warp));
  }
  cta->alive_warps = static_cast<int>(cta->warps.size());
  return cta;
}

void Interpreter::run_cluster(const Dim& first) {
  const Dim& size = launch_.cluster;
  ctas_.clear();
  copies_.clear();
  cluster_phase_ = 0;
  dynamic_start_ = kSharedBase + (kernel_.static_shared_bytes + 127) / 128 * 128;
  std::vector<Warp*> warps;
  for (int rank = 0; rank < size[0] * size[1] * size[2]; ++rank) {
    const Dim at = {rank % size[0], rank / size[0] % size[1], rank / (size[0] * size[1])};
    ctas_.push_back(make_cta(rank, {first[0] + at[0], first[1] + at[1], first[2] + at[2]}));
    for (auto& warp : ctas_.back()->warps) warps.push_back(warp.get());
  }

  uint64_t idle = 0, seen = events_;
  while (!warps.empty()) {
    const size_t chosen = random_() % warps.size();
    warp_ = warps[chosen];
    instruction_ = nullptr;
    if (!copies_.empty() && chance(copy_chance_)) land();
    if (!warp_->products.empty() && chance(product_chance_)) multiply();
    const uint64_t turn = 1 + random_() % (chance(0.5) ? 8 : 400);
    for (uint64_t i = 0; i < turn && warp_->alive != 0; ++i) {
      if (advance() == Step::blocked) break;
    }
    if (warp_->alive == 0) {
      end_warp();
      warps.erase(warps.begin() + static_cast<std::ptrdiff_t>(chosen));
    }
    if (events_ != seen) {
      seen = events_;
      idle = 0;
    } else if (++idle > kPatience && !copies_.empty()) {
      land();
    } else if (idle > kForEver) {
      deadlock(warps);
    }
  }
  warp_ = nullptr;
  if (!copies_.empty()) fail("the blocks ended before what TMA brings them");
  for (auto& cta : ctas_) {
    for (auto& warp : cta->warps) spare_registers.push_back(std::move(warp->registers));
  }
}

void Interpreter::end_warp() {
  if (!warp_->products.empty() || warp_->uncommitted != 0) fail("a warp ended before its products");
  Cta& cta = *warp_->cta;
  if (--cta.alive_warps == 0) {
    for (const Copy& copy : copies_) {
      for (const Cta* target : copy.targets) {
        if (target == &cta) fail("a block ended before what TMA brings it");
      }
    }
  }
  for (int id = 0; id < static_cast<int>(cta.any_at_barrier.size()); ++id) release_block(cta, id);
  release_cluster();
  ++events_;
}

void Interpreter::deadlock(const std::vector<Warp*>& warps) {
  std::string where;
  for (const Warp* warp : warps) {
    const int lane = std::countr_zero(warp->alive);
    where += " " + std::to_string(warp->cta->id[0]) + "/" + std::to_string(warp->index) + ":" +
             std::to_string(kernel_.code[warp->pc[lane]].line);
  }
  warp_ = nullptr;
  fail("nothing goes on; block/warp:line are" + where);
}

// One instruction of those lanes of the current warp that are furthest behind, or now and then of others.
Interpreter::Step Interpreter::advance() {
  Warp& w = *warp_;
  if (w.at_barrier >= 0 && !w.released) return Step::blocked;
  if (w.lag == 0 && chance(lag_chance_)) {
    w.lagging = static_cast<uint32_t>(random_()) & ~w.waiting;
    w.lag = 1 + random_() % 64;
  }
  if ((w.alive & ~w.waiting & ~w.lagging) == 0) w.lag = 0;  // the others wait for these
  if (w.lag == 0) {
    w.lagging = 0;
  } else {
    --w.lag;
  }
  const uint32_t ready = w.alive & ~w.waiting & ~w.lagging;
  if (ready == 0) fail("lanes wait for each other at different places");
  pc_ = std::numeric_limits<int>::max();
  for (uint32_t rest = ready; rest != 0; rest &= rest - 1) pc_ = std::min(pc_, w.pc[std::countr_zero(rest)]);
  if (chance(1.0 / 16)) {
    uint32_t rest = ready;
    for (uint64_t skip = random_() % std::popcount(ready); skip > 0; --skip) rest &= rest - 1;
    pc_ = w.pc[std::countr_zero(rest)];
  }
  instruction_ = &kernel_.code[pc_];
  here_ = mask_ = 0;
  for (uint32_t rest = w.alive & ~w.lagging; rest != 0; rest &= rest - 1) {
    const int lane = std::countr_zero(rest);
    if (w.pc[lane] != pc_) continue;
    here_ |= 1u << lane;
    const int guard = instruction_->guard;
    if (guard < 0 || ((w.registers[guard][lane] & 1) != 0) != instruction_->guard_negated) mask_ |= 1u << lane;
  }
  jumped_ = held_ = 0;
  ++statistics_.instructions;
  if (mask_ != 0 && execute() == Step::blocked) return Step::blocked;
  for (uint32_t rest = here_ & w.alive & ~jumped_ & ~held_; rest != 0; rest &= rest - 1) {
    w.pc[std::countr_zero(rest)] = pc_ + 1;
  }
  w.waiting &= ~(here_ & ~held_);
  return Step::done;
}

// ---- operands

Type Interpreter::type(size_t i) const { return i < instruction_->types.size() ? instruction_->types[i] : Type::none; }

const Operand& Interpreter::operand(size_t i) const {
  if (i >= instruction_->operands.size()) fail("too few operands");
  return instruction_->operands[i];
}

uint64_t Interpreter::get(const Operand& from, int lane) const {
  switch (from.kind) {
    case Operand::reg: {
      if (warp_->locked[from.slot] != 0) fail("an accumulator is read before its product was waited for");
      const uint64_t value = warp_->registers[from.slot][lane];
      return from.negated ? ~value & 1 : value;
    }
    case Operand::immediate:
      return static_cast<uint64_t>(from.value);
    case Operand::special:
      return special(from.what, lane);
    case Operand::shared_symbol:
      return kSharedBase + static_cast<uint64_t>(from.value);
    case Operand::dynamic_shared_symbol:
      return dynamic_start_;
    case Operand::param_symbol:
      return params_at_ + static_cast<uint64_t>(from.value);
    case Operand::global_symbol:
      return reinterpret_cast<uint64_t>(launch_.globals) + static_cast<uint64_t>(from.value);
    default:
      fail("an operand that has no value");
  }
}

void Interpreter::set(const Operand& to, int lane, uint64_t value, Type type) {
  if (to.kind == Operand::sink) return;
  if (to.kind != Operand::reg) fail("a destination that is no register");
  if (warp_->locked[to.slot] != 0) fail("an accumulator is written before its product was waited for");
  warp_->registers[to.slot][lane] = low_bits(value, type);
  warp_->written_in[to.slot] = warp_->epoch;
}

uint64_t Interpreter::address(const Operand& from, int lane) const {
  if (from.kind != Operand::address) fail("expected an address");
  return get(from.parts[0], lane) + static_cast<uint64_t>(from.value);
}

uint64_t Interpreter::special(Special what, int lane) const {
  const int thread = warp_->index * kLanes + lane;
  const Dim &block = launch_.block, &grid = launch_.grid, &cluster = launch_.cluster;
  const Cta& cta = *warp_->cta;
  switch (what) {
    case Special::tid_x:
      return thread % block[0];
    case Special::tid_y:
      return thread / block[0] % block[1];
    case Special::tid_z:
      return thread / (block[0] * block[1]);
    case Special::ntid_x:
      return block[0];
    case Special::ntid_y:
      return block[1];
    case Special::ntid_z:
      return block[2];
    case Special::ctaid_x:
      return cta.id[0];
    case Special::ctaid_y:
      return cta.id[1];
    case Special::ctaid_z:
      return cta.id[2];
    case Special::nctaid_x:
      return grid[0];
    case Special::nctaid_y:
      return grid[1];
    case Special::nctaid_z:
      return grid[2];
    case Special::cluster_ctarank:
      return cta.rank;
    case Special::cluster_ctaid_x:
      return cta.rank % cluster[0];
    case Special::cluster_ctaid_y:
      return cta.rank / cluster[0] % cluster[1];
    case Special::cluster_ctaid_z:
      return cta.rank / (cluster[0] * cluster[1]);
    case Special::cluster_nctaid_x:
      return cluster[0];
    case Special::laneid:
      return lane;
    case Special::lanemask_eq:
      return 1u << lane;
    case Special::lanemask_lt:
      return (1u << lane) - 1;
    case Special::lanemask_le:
      return (2u << lane) - 1;
    case Special::lanemask_gt:
      return ~((2u << lane) - 1);
    case Special::lanemask_ge:
      return ~((1u << lane) - 1);
  }
  fail("a special register that is not known");
}

// ---- instructions

Interpreter::Op Interpreter::op_of(const Instruction& instruction) {
  static const std::map<std::string, Op> ops = {{"mov", Op::mov},
                                                {"add", Op::add},
                                                {"sub", Op::sub},
                                                {"mul", Op::mul},
                                                {"mad", Op::mad},
                                                {"fma", Op::fma},
                                                {"div", Op::div},
                                                {"rem", Op::rem},
                                                {"min", Op::min},
                                                {"max", Op::max},
                                                {"neg", Op::neg},
                                                {"abs", Op::abs},
                                                {"and", Op::bit_and},
                                                {"or", Op::bit_or},
                                                {"xor", Op::bit_xor},
                                                {"not", Op::bit_not},
                                                {"shl", Op::shl},
                                                {"shr", Op::shr},
                                                {"sqrt", Op::sqrt},
                                                {"setp", Op::setp},
                                                {"set", Op::set},
                                                {"selp", Op::selp},
                                                {"cvt", Op::cvt},
                                                {"cvta", Op::cvta},
                                                {"popc", Op::popc},
                                                {"clz", Op::clz},
                                                {"brev", Op::brev},
                                                {"bfind", Op::bfind},
                                                {"bfi", Op::bfi},
                                                {"ld", Op::ld},
                                                {"st", Op::st},
                                                {"atom", Op::atom},
                                                {"red", Op::red},
                                                {"bra", Op::bra},
                                                {"ret", Op::ret},
                                                {"exit", Op::ret},
                                                {"bar", Op::bar},
                                                {"barrier", Op::barrier},
                                                {"shfl", Op::shfl},
                                                {"vote", Op::vote},
                                                {"redux", Op::redux},
                                                {"elect", Op::elect},
                                                {"mapa", Op::mapa},
                                                {"mbarrier", Op::mbarrier},
                                                {"stmatrix", Op::stmatrix},
                                                {"cp", Op::cp},
                                                {"wgmma", Op::wgmma},
                                                {"setmaxnreg", Op::setmaxnreg},
                                                {"fence", Op::nothing},
                                                {"membar", Op::nothing},
                                                {"prefetch", Op::nothing},
                                                {"nanosleep", Op::nothing}};
  const auto found = ops.find(instruction.name);
  if (found == ops.end()) {
    throw std::runtime_error("unknown instruction '" + instruction.name + "', PTX line " +
                             std::to_string(instruction.line));
  }
  return found->second;
}

Interpreter::Step Interpreter::execute() {
  const Op op = ops_[pc_];
  switch (op) {
    case Op::mov:
      move();
      break;
    case Op::cvt:
      convert();
      break;
    case Op::cvta:
      convert_address();
      break;
    case Op::setp:
    case Op::set:
    case Op::selp:
    case Op::popc:
    case Op::clz:
    case Op::brev:
    case Op::bfind:
    case Op::bfi:
      bits(op);
      break;
    case Op::ld:
      load();
      break;
    case Op::st:
      store();
      break;
    case Op::atom:
      atomic(true);
      break;
    case Op::red:
      atomic(false);
      break;
    case Op::bra:
      each([&](int lane) { warp_->pc[lane] = static_cast<int>(operand(0).value); });
      jumped_ = mask_;
      break;
    case Op::ret:
      warp_->alive &= ~mask_;
      warp_->waiting = 0;  // who waited for these lanes looks again
      break;
    case Op::bar:
      return block_barrier();
    case Op::barrier:
      return instruction_->has("cluster") ? cluster_barrier() : block_barrier();
    case Op::shfl:
      shuffle();
      break;
    case Op::vote:
      vote();
      break;
    case Op::redux:
      reduce();
      break;
    case Op::elect:
      elect();
      break;
    case Op::stmatrix:
      store_matrices();
      break;
    case Op::mapa:
      map_address();
      break;
    case Op::mbarrier:
      return mbarrier();
    case Op::cp:
      ask_for_copy();
      break;
    case Op::wgmma:
      return product();
    case Op::setmaxnreg:
      gathered(kAllLanes);
      break;
    case Op::nothing:
      break;
    default:
      arithmetic(op);
  }
  return Step::done;
}

Statistics run(const Launch& launch, const Memory& memory) { return Interpreter(launch, memory).run(); }

}  // namespace ptx
