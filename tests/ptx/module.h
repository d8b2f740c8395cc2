// A PTX module: the text that nvcc makes of a CUDA file, taken apart into instructions.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace ptx {

enum class Type : uint8_t {
  none,
  pred,
  b8,
  u8,
  s8,
  b16,
  u16,
  s16,
  f16,
  bf16,
  b32,
  u32,
  s32,
  f32,
  f16x2,
  bf16x2,
  b64,
  u64,
  s64,
  f64
};

constexpr int bytes_of(Type type) {
  if (type >= Type::b64) return 8;
  if (type >= Type::b32) return 4;
  if (type >= Type::b16) return 2;
  return 1;
}
constexpr bool is_signed(Type type) {
  return type == Type::s8 || type == Type::s16 || type == Type::s32 || type == Type::s64;
}

enum class Special : uint8_t {
  tid_x,
  tid_y,
  tid_z,
  ntid_x,
  ntid_y,
  ntid_z,
  ctaid_x,
  ctaid_y,
  ctaid_z,
  nctaid_x,
  nctaid_y,
  nctaid_z,
  laneid,
  cluster_ctarank,
  cluster_ctaid_x,
  cluster_ctaid_y,
  cluster_ctaid_z,
  cluster_nctaid_x,
  lanemask_lt,
  lanemask_le,
  lanemask_gt,
  lanemask_ge,
  lanemask_eq,
};

struct Operand {
  enum Kind : uint8_t {
    sink,
    reg,
    immediate,
    special,
    shared_symbol,
    dynamic_shared_symbol,
    param_symbol,
    global_symbol,
    label,
    vector,
    address
  } kind = sink;
  bool negated = false;        // of a predicate
  Special what{};              // of a special register
  int slot = -1;               // of a register
  int64_t value = 0;           // an immediate, a symbol's offset, a label's instruction, or what is added to an address
  std::vector<Operand> parts;  // of a vector, or of an address: its base, and the coordinates that may follow it
};

struct Instruction {
  std::string name;                    // the first word: "ld"
  std::vector<std::string> modifiers;  // the words after it: "global", "v4", "u32"
  std::vector<Type> types;             // those of the words that are types
  int guard = -1;                      // the slot of the predicate that it depends on
  bool guard_negated = false;
  Operand predicate_result;  // the second destination of `a|p`
  std::vector<Operand> operands;
  int line = 0;
  int operation = -1;  // left to who runs it

  bool has(const char* modifier) const {
    for (const std::string& word : modifiers) {
      if (word == modifier) return true;
    }
    return false;
  }
};

struct Param {
  int offset;
  int size;
};

struct Kernel {
  std::string name;
  std::vector<Param> params;
  int param_bytes = 0;
  int n_slots = 0;
  int static_shared_bytes = 0;
  int max_threads = 1024;  // of a block
  std::vector<Instruction> code;
};

struct Module {
  std::map<std::string, Kernel> kernels;
  std::vector<uint8_t> globals;  // the module's variables, one after the other
};

// Throws std::runtime_error, with the line, at what it does not know.
Module parse(const std::string& text);

}  // namespace ptx
