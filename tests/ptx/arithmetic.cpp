#include <algorithm>
#include <cstdlib>

#include "interpreter.h"
#include "numbers.h"

namespace ptx {

void Interpreter::arithmetic(Op op) {
  if (instruction_->types.empty()) fail("an instruction without a type");
  const Type t = instruction_->types.back();
  if (t == Type::f64) fail("float64 is not known");
  if (is_half(t)) {
    half_arithmetic(op, t);
  } else if (t == Type::f32) {
    float_arithmetic(op);
  } else {
    integer_arithmetic(op, t);
  }
}

void Interpreter::half_arithmetic(Op op, Type t) {
  const bool bf16 = is_bf16(t), keep_nan = instruction_->has("NaN");
  const auto apply = [&](float a, float b) -> double {
    switch (op) {
      case Op::add:
        return static_cast<double>(a) + b;
      case Op::sub:
        return static_cast<double>(a) - b;
      case Op::mul:
        return static_cast<double>(a) * b;
      case Op::max:
        return extreme(a, b, true, keep_nan);
      case Op::min:
        return extreme(a, b, false, keep_nan);
      default:
        fail("an operation on numbers of 16 bits that is not known");
    }
  };
  each([&](int lane) {
    const uint64_t a = get(1, lane), b = get(2, lane);
    uint64_t made = 0;
    for (int shift = 0; shift < (is_pair(t) ? 32 : 16); shift += 16) {
      const double value =
          apply(widen(static_cast<uint16_t>(a >> shift), bf16), widen(static_cast<uint16_t>(b >> shift), bf16));
      made |= uint64_t{narrow(value, bf16)} << shift;
    }
    set(0, lane, made, t);
  });
}

void Interpreter::float_arithmetic(Op op) {
  const Instruction& in = *instruction_;
  if (in.has("ftz") || in.has("approx") || in.has("sat")) fail("only IEEE arithmetic is known");
  each([&](int lane) {
    const auto operand_or_zero = [&](size_t i) { return i < in.operands.size() ? float_of(get(i, lane)) : 0.0f; };
    const float a = operand_or_zero(1), b = operand_or_zero(2), c = operand_or_zero(3);
    float made = 0;
    switch (op) {
      case Op::add:
        made = a + b;
        break;
      case Op::sub:
        made = a - b;
        break;
      case Op::mul:
        made = a * b;
        break;
      case Op::div:
        made = a / b;
        break;
      case Op::fma:
        made = std::fma(a, b, c);
        break;
      case Op::min:
        made = extreme(a, b, false, in.has("NaN"));
        break;
      case Op::max:
        made = extreme(a, b, true, in.has("NaN"));
        break;
      case Op::neg:
        made = -a;
        break;
      case Op::abs:
        made = std::fabs(a);
        break;
      case Op::sqrt:
        made = std::sqrt(a);
        break;
      default:
        fail("an operation on float32 that is not known");
    }
    const bool moves_bits = op == Op::neg || op == Op::abs;
    set(0, lane, std::isnan(made) && !moves_bits ? kCanonicalNan : bits_of(made), Type::f32);
  });
}

void Interpreter::integer_arithmetic(Op op, Type t) {
  const Instruction& in = *instruction_;
  const bool negative = is_signed(t), high = in.has("hi");
  const unsigned width = 8u * bytes_of(t);
  const Type out = !in.has("wide") ? t : width == 16 ? Type::b32 : Type::b64;
  const auto product = [&](int64_t a, int64_t b) {
    if (!high) return static_cast<uint64_t>(a) * static_cast<uint64_t>(b);
    const auto wide = negative ? static_cast<unsigned __int128>(static_cast<__int128>(a) * b)
                               : static_cast<unsigned __int128>(static_cast<uint64_t>(a)) * static_cast<uint64_t>(b);
    return static_cast<uint64_t>(wide >> width);
  };
  each([&](int lane) {
    const int64_t a = extend(get(1, lane), t), b = in.operands.size() > 2 ? extend(get(2, lane), t) : 0;
    const uint64_t x = static_cast<uint64_t>(a), y = static_cast<uint64_t>(b);
    const uint64_t by = std::min<uint64_t>(low_bits(y, Type::b32), 64);
    const bool less = negative ? a < b : x < y;
    if ((op == Op::div || op == Op::rem) && b == 0) fail("a division by zero");
    uint64_t made = 0;
    switch (op) {
      case Op::add:
        made = x + y;
        break;
      case Op::sub:
        made = x - y;
        break;
      case Op::mul:
        made = product(a, b);
        break;
      case Op::mad:
        made = product(a, b) + get(3, lane);
        break;
      case Op::div:
        made = negative ? static_cast<uint64_t>(a / b) : x / y;
        break;
      case Op::rem:
        made = negative ? static_cast<uint64_t>(a % b) : x % y;
        break;
      case Op::min:
        made = less ? x : y;
        break;
      case Op::max:
        made = less ? y : x;
        break;
      case Op::neg:
        made = 0 - x;
        break;
      case Op::abs:
        made = a < 0 ? 0 - x : x;
        break;
      case Op::bit_and:
        made = x & y;
        break;
      case Op::bit_or:
        made = x | y;
        break;
      case Op::bit_xor:
        made = x ^ y;
        break;
      case Op::bit_not:
        made = ~x;
        break;
      case Op::shl:
        made = by >= width ? 0 : x << by;
        break;
      case Op::shr:
        made = negative ? static_cast<uint64_t>(a >> std::min<uint64_t>(by, 63)) : by >= width ? 0 : x >> by;
        break;
      default:
        fail("an operation on integers that is not known");
    }
    set(0, lane, made, out);
  });
}

bool Interpreter::compare(const std::string& how, uint64_t a, uint64_t b, Type t) const {
  const auto ordered = [&](auto x, auto y) {
    const std::string two = how.substr(0, 2);
    if (two == "eq") return x == y;
    if (two == "ne") return x != y;
    if (two == "lt" || two == "lo") return x < y;
    if (two == "le" || two == "ls") return x <= y;
    if (two == "gt" || two == "hi") return x > y;
    if (two == "ge" || two == "hs") return x >= y;
    fail("a comparison that is not known");
  };
  if (t == Type::f32 || is_half(t)) {
    const float x = float_of(a, t), y = float_of(b, t);
    const bool unordered = std::isnan(x) || std::isnan(y);
    if (how == "nan" || how == "num") return unordered == (how == "nan");
    return unordered ? how.size() == 3 : ordered(x, y);  // "gtu" holds also if unordered
  }
  return is_signed(t) ? ordered(extend(a, t), extend(b, t)) : ordered(low_bits(a, t), low_bits(b, t));
}

// set.gtu.u32.bf16x2 and the like: all ones in each half for which it holds.
void Interpreter::set_by_halves() {
  if (type(0) != Type::u32 || !is_pair(type(1))) fail("a comparison that is not known");
  each([&](int lane) {
    uint64_t made = 0;
    for (int shift = 0; shift < 32; shift += 16) {
      const uint64_t a = get(1, lane) >> shift & 0xffff, b = get(2, lane) >> shift & 0xffff;
      if (compare(instruction_->modifiers[0], a, b, type(1))) made |= uint64_t{0xffff} << shift;
    }
    set(0, lane, made, Type::b32);
  });
}

void Interpreter::bits(Op op) {
  const Instruction& in = *instruction_;
  const Type t = in.types.back();
  const int width = 8 * bytes_of(t);
  switch (op) {
    case Op::setp:
      if (in.modifiers.size() > 2 || in.predicate_result.kind != Operand::sink) fail("a comparison that is not known");
      each(
          [&](int lane) { set(0, lane, compare(in.modifiers[0], get(1, lane), get(2, lane), t) ? 1 : 0, Type::pred); });
      break;
    case Op::set:
      set_by_halves();
      break;
    case Op::selp:
      each([&](int lane) { set(0, lane, (get(3, lane) & 1) != 0 ? get(1, lane) : get(2, lane), t); });
      break;
    case Op::popc:
      each([&](int lane) { set(0, lane, std::popcount(low_bits(get(1, lane), t)), Type::b32); });
      break;
    case Op::clz:
      each([&](int lane) { set(0, lane, std::countl_zero(low_bits(get(1, lane), t)) - (64 - width), Type::b32); });
      break;
    case Op::bfind:  // as shiftamt, by how much the highest bit has to be shifted to be the first
      if (t != Type::u32 || !in.has("shiftamt")) fail("only bfind.shiftamt.u32 is known");
      each([&](int lane) {
        const uint64_t a = low_bits(get(1, lane), t);
        set(0, lane, a == 0 ? kAllLanes : static_cast<uint64_t>(std::countl_zero(a) - 32), Type::b32);
      });
      break;
    case Op::brev:
      each([&](int lane) {
        const uint64_t a = get(1, lane);
        uint64_t made = 0;
        for (int i = 0; i < width; ++i) made = made << 1 | (a >> i & 1);
        set(0, lane, made, t);
      });
      break;
    case Op::bfi:
      each([&](int lane) {
        const uint64_t a = get(1, lane), at = get(3, lane) & 0xff, n = get(4, lane) & 0xff;
        uint64_t made = get(2, lane);
        for (uint64_t i = 0; i < n && at + i < static_cast<uint64_t>(width); ++i) {
          made = (made & ~(uint64_t{1} << (at + i))) | (a >> i & 1) << (at + i);
        }
        set(0, lane, made, t);
      });
      break;
    default:
      fail("an operation on bits that is not known");
  }
}

void Interpreter::convert() {
  const Type to = type(0), from = type(1);
  if (is_pair(to)) {
    each([&](int lane) {
      const uint64_t high = narrow(float_of(get(1, lane)), is_bf16(to)),
                     low = narrow(float_of(get(2, lane)), is_bf16(to));
      set(0, lane, high << 16 | low, to);
    });
    return;
  }
  const bool to_float = to == Type::f32 || is_half(to), from_float = from == Type::f32 || is_half(from);
  each([&](int lane) {
    const uint64_t a = get(1, lane);
    uint64_t made = 0;
    if (from_float && is_half(to)) {
      made = narrow(float_of(a, from), is_bf16(to));
    } else if (from_float && to_float) {
      const float x = float_of(a, from);
      if (from == Type::f32 && !instruction_->has("rni")) fail("only rounding to the nearest integer is known");
      made = bits_of(from == Type::f32 ? std::nearbyint(x) : x);
    } else if (from_float) {
      if (!instruction_->has("rzi")) fail("only rounding to zero is known");
      made = static_cast<uint64_t>(static_cast<int64_t>(float_of(a, from)));
    } else if (to == Type::f32) {
      made = bits_of(static_cast<float>(extend(a, from)));  // an unsigned one of 64 bits is below 2^63 here
    } else if (!to_float) {
      made = static_cast<uint64_t>(extend(a, from));
    } else {
      fail("a conversion that is not known");
    }
    set(0, lane, made, to);
  });
}

// Also between a vector and what its parts make up.
void Interpreter::move() {
  const Type t = type();
  const Operand &to = operand(0), &from = operand(1);
  const auto part_bits = [&](const Operand& vector) {
    return 8u * bytes_of(t) / static_cast<unsigned>(vector.parts.size());
  };
  each([&](int lane) {
    uint64_t value = 0;
    if (from.kind == Operand::vector) {
      const unsigned n = part_bits(from);
      for (size_t i = 0; i < from.parts.size(); ++i) {
        value |= (get(from.parts[i], lane) & ((uint64_t{1} << n) - 1)) << n * i;
      }
    } else {
      value = get(from, lane);
    }
    if (to.kind == Operand::vector) {
      const unsigned n = part_bits(to);
      for (size_t i = 0; i < to.parts.size(); ++i)
        set(to.parts[i], lane, value >> n * i & ((uint64_t{1} << n) - 1), Type::b64);
    } else {
      set(to, lane, value, t);
    }
  });
}

void Interpreter::convert_address() {
  const uint64_t shared = space() == Space::shared ? reinterpret_cast<uint64_t>(warp_->cta->memory) : 0;
  each([&](int lane) {
    const uint64_t a = get(1, lane);
    set(0, lane, instruction_->has("to") ? a - shared : a + shared, Type::b64);
  });
}

}  // namespace ptx
