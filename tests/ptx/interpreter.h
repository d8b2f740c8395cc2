// The state of a cluster that runs, and what its instructions do to it.
#pragma once

#include <array>
#include <bit>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "machine.h"
#include "tensor_map.h"

namespace ptx {

constexpr int kLanes = 32;
constexpr uint32_t kAllLanes = 0xffffffff;
constexpr int kWarpgroupWarps = 4;

// Shared addresses are offsets into a block's memory, which begins with what a launch keeps for itself. Those of the
// whole cluster have the block's rank, plus one, above the offset.
constexpr uint32_t kSharedBase = 1024;
constexpr int kRankShift = 24;

using Registers = std::vector<std::array<uint64_t, kLanes>>;

// A warpgroup's product, as each of its warps asks for it.
struct Product {
  const Instruction* instruction;
  uint64_t a, b;  // descriptors
  bool accumulate;
};

struct Cta;

struct Warp {
  Cta* cta = nullptr;
  int index = 0;
  Registers registers;
  std::array<int, kLanes> pc{};
  uint32_t alive = 0;
  uint32_t waiting = 0;  // lanes at a collective that others have not reached
  uint32_t lagging = 0;  // lanes that fall behind the others for a while
  uint64_t lag = 0;      // how many instructions more

  int at_barrier = -1;  // which of the block's
  bool released = false;
  bool any_at_barrier = false;
  int cluster_arrivals = 0, cluster_waits = 0;

  std::deque<Product> products;  // asked for, not yet done
  std::deque<int> groups;        // of each committed group, how many products are not done
  int uncommitted = 0;
  std::vector<int> accumulators;     // slots that belong to products which were not waited for
  std::vector<uint8_t> locked;       // whether a slot is one of those
  std::vector<uint32_t> written_in;  // in which epoch a slot was last written
  uint32_t epoch = 1;                // one more at each wgmma.fence
};

struct Mbarrier {
  int expected, pending;
  int64_t bytes;  // that were announced and have not come
  uint32_t phase;
};

// Who wrote a byte of shared memory.
enum class Origin : uint8_t { nobody, threads, tma, tma_in_flight };

struct Cta {
  int rank = 0;
  Dim id{};
  std::vector<uint8_t> allocation;
  uint8_t* memory = nullptr;  // aligned like the device's
  uint32_t memory_end = 0;
  std::vector<Origin> origin;
  std::map<uint32_t, Mbarrier> mbarriers;  // by offset
  std::array<bool, 16> any_at_barrier{};   // of bar.red.or
  std::vector<std::unique_ptr<Warp>> warps;
  int alive_warps = 0;
};

// A TMA copy that is on its way.
struct Copy {
  TensorMap map;
  std::array<int32_t, TensorMap::kMaxRank> at;
  uint32_t to, mbarrier;  // offsets, the same in all targets
  std::vector<Cta*> targets;
};

class Interpreter {
 public:
  Interpreter(const Launch& launch, const Memory& memory);
  Statistics run();

 private:
  enum class Step { done, blocked };
  enum class Space { generic, global, shared, param };
  enum class Op : uint8_t;
  struct Tile;

  [[noreturn]] void fail(const std::string& what) const;
  bool chance(double probability);

  // Turns: interpreter.cpp
  static Op op_of(const Instruction& instruction);
  void run_cluster(const Dim& first);
  std::unique_ptr<Cta> make_cta(int rank, const Dim& id);
  void end_warp();
  [[noreturn]] void deadlock(const std::vector<Warp*>& warps);
  Step advance();
  Step execute();

  // Operands: interpreter.cpp
  template <typename Body>
  void each(Body body) const {  // lane that takes part
    for (uint32_t rest = mask_; rest != 0; rest &= rest - 1) body(std::countr_zero(rest));
  }
  Type type(size_t i = 0) const;
  const Operand& operand(size_t i) const;
  uint64_t get(const Operand& from, int lane) const;
  uint64_t get(size_t i, int lane) const { return get(operand(i), lane); }
  void set(const Operand& to, int lane, uint64_t value, Type type);
  void set(size_t i, int lane, uint64_t value, Type type) { set(operand(i), lane, value, type); }
  uint64_t address(const Operand& from, int lane) const;
  uint64_t special(Special what, int lane) const;

  // Memory: memory.cpp
  Space space() const;
  Cta& cta_of(uint64_t shared_address) const;
  static uint32_t offset_of(uint64_t shared_address) {
    return static_cast<uint32_t>(shared_address) & ((1u << kRankShift) - 1);
  }
  void check_shared(const Cta& cta, uint32_t offset, size_t bytes, size_t alignment) const;
  uint8_t* locate(Space where, uint64_t address, size_t bytes, bool write);
  void load();
  void store();
  void atomic(bool returns);

  // What lanes do by themselves: arithmetic.cpp
  void arithmetic(Op op);
  void half_arithmetic(Op op, Type type);
  void float_arithmetic(Op op);
  void integer_arithmetic(Op op, Type type);
  void bits(Op op);
  bool compare(const std::string& how, uint64_t a, uint64_t b, Type type) const;
  void set_by_halves();
  void convert();
  void move();
  void convert_address();

  // What lanes and warps do together: collectives.cpp
  bool gathered(uint32_t wanted);
  uint32_t members(const Operand& from);
  void shuffle();
  void vote();
  void reduce();
  void elect();
  void store_matrices();
  Step block_barrier();
  void release_block(Cta& cta, int id);
  Step cluster_barrier();
  void release_cluster();
  void map_address();

  // What happens beside the threads: asynchronous.cpp
  Mbarrier& mbarrier_at(Cta& cta, uint32_t offset) const;
  void settle(Mbarrier& mbarrier);
  Step mbarrier();
  void ask_for_copy();
  void land();
  Tile tile(uint64_t descriptor) const;
  void check_products(const Cta& cta, uint32_t offset, size_t bytes) const;
  Step product();
  void ask_for_product();
  bool multiply();

  const Launch& launch_;
  const Kernel& kernel_;
  const Memory& memory_;
  std::mt19937_64 random_;
  std::vector<Op> ops_;  // of the kernel's instructions
  std::vector<uint8_t> params_;
  uint64_t params_at_ = 0;
  double copy_chance_ = 0, product_chance_ = 0;  // to happen at a turn
  double lag_chance_ = 0;                        // to begin at an instruction
  Statistics statistics_;

  std::vector<std::unique_ptr<Cta>> ctas_;
  std::vector<Copy> copies_;
  int cluster_phase_ = 0;
  uint32_t dynamic_start_ = 0;
  uint64_t events_ = 0;  // that others may have waited for

  // The instruction at hand.
  Warp* warp_ = nullptr;
  const Instruction* instruction_ = nullptr;
  int pc_ = 0;
  uint32_t here_ = 0;    // lanes at pc_ that do not lag
  uint32_t mask_ = 0;    // those whose guard holds
  uint32_t jumped_ = 0;  // those that have gone elsewhere
  uint32_t held_ = 0;    // those that stay, for others have not come
};

enum class Interpreter::Op : uint8_t {
  mov,
  add,
  sub,
  mul,
  mad,
  fma,
  div,
  rem,
  min,
  max,
  neg,
  abs,
  bit_and,
  bit_or,
  bit_xor,
  bit_not,
  shl,
  shr,
  sqrt,
  setp,
  set,
  selp,
  cvt,
  cvta,
  popc,
  clz,
  brev,
  bfind,
  bfi,
  ld,
  st,
  atom,
  red,
  bra,
  ret,
  bar,
  barrier,
  shfl,
  vote,
  redux,
  elect,
  stmatrix,
  mbarrier,
  mapa,
  nothing,
  setmaxnreg,
  cp,
  wgmma,
};

}  // namespace ptx
