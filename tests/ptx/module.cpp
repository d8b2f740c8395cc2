#include "module.h"

#include <algorithm>
#include <cctype>
#include <optional>
#include <stdexcept>
#include <tuple>

namespace ptx {
namespace {

const std::map<std::string, Type>& type_names() {
  static const std::map<std::string, Type> names = {
      {"pred", Type::pred}, {"b8", Type::b8},   {"u8", Type::u8},   {"s8", Type::s8},       {"b16", Type::b16},
      {"u16", Type::u16},   {"s16", Type::s16}, {"f16", Type::f16}, {"bf16", Type::bf16},   {"b32", Type::b32},
      {"u32", Type::u32},   {"s32", Type::s32}, {"f32", Type::f32}, {"f16x2", Type::f16x2}, {"bf16x2", Type::bf16x2},
      {"b64", Type::b64},   {"u64", Type::u64}, {"s64", Type::s64}, {"f64", Type::f64}};
  return names;
}

const std::map<std::string, Special>& special_names() {
  using enum Special;
  static const std::map<std::string, Special> names = {{"%tid.x", tid_x},
                                                       {"%tid.y", tid_y},
                                                       {"%tid.z", tid_z},
                                                       {"%ntid.x", ntid_x},
                                                       {"%ntid.y", ntid_y},
                                                       {"%ntid.z", ntid_z},
                                                       {"%ctaid.x", ctaid_x},
                                                       {"%ctaid.y", ctaid_y},
                                                       {"%ctaid.z", ctaid_z},
                                                       {"%nctaid.x", nctaid_x},
                                                       {"%nctaid.y", nctaid_y},
                                                       {"%nctaid.z", nctaid_z},
                                                       {"%laneid", laneid},
                                                       {"%cluster_ctarank", cluster_ctarank},
                                                       {"%cluster_ctaid.x", cluster_ctaid_x},
                                                       {"%cluster_ctaid.y", cluster_ctaid_y},
                                                       {"%cluster_ctaid.z", cluster_ctaid_z},
                                                       {"%cluster_nctaid.x", cluster_nctaid_x},
                                                       {"%lanemask_lt", lanemask_lt},
                                                       {"%lanemask_le", lanemask_le},
                                                       {"%lanemask_gt", lanemask_gt},
                                                       {"%lanemask_ge", lanemask_ge},
                                                       {"%lanemask_eq", lanemask_eq}};
  return names;
}

bool is_word(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%' || c == '.';
}

class Parser {
 public:
  explicit Parser(const std::string& text) : text_(text) {}

  Module run() {
    while (!at_end()) {
      const std::string word = next_word();
      if (word == ".version" || word == ".target" || word == ".address_size") {
        while (peek() != '\n') ++at_;
      } else if (word == ".visible" || word == ".weak" || word == ".extern") {
        continue;
      } else if (word == ".entry") {
        kernel();
      } else if (word == ".global" || word == ".const") {
        const auto [name, bytes, align] = variable();
        module_.globals.resize((module_.globals.size() + align - 1) / align * align);
        globals_[name] = static_cast<int64_t>(module_.globals.size());
        module_.globals.resize(module_.globals.size() + bytes);
        skip();
        if (peek() == '=') fail("initialised variables are not known");
        expect(';');
      } else if (word == ".shared") {  // extern: what a launch asks for, behind what is static
        const auto [name, bytes, align] = variable();
        if (bytes != 0) fail("shared memory of a fixed size that no kernel owns is not known");
        externs_.push_back(name);
        expect(';');
      } else {
        fail("unknown at file scope: '" + word + "'");
      }
    }
    return std::move(module_);
  }

 private:
  struct Scope {
    int parent;
    std::map<std::string, int> registers;
    std::map<std::string, int> labels;
  };

  [[noreturn]] void fail(const std::string& what) {
    throw std::runtime_error("PTX line " + std::to_string(line_) + ": " + what);
  }
  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }
  void skip() {
    while (at_ < text_.size()) {
      if (text_[at_] == '\n') ++line_;
      if (std::isspace(static_cast<unsigned char>(text_[at_]))) {
        ++at_;
      } else if (text_.compare(at_, 2, "//") == 0) {
        while (peek() != '\n' && peek() != '\0') ++at_;
      } else {
        return;
      }
    }
  }
  bool at_end() {
    skip();
    return at_ == text_.size();
  }
  void expect(char c) {
    skip();
    if (peek() != c) fail(std::string("expected '") + c + "', found '" + text_.substr(at_, 20) + "'");
    ++at_;
  }
  bool accept(char c) {
    skip();
    if (peek() != c) return false;
    ++at_;
    return true;
  }
  // Letters, digits and what else names are made of, "::" included.
  std::string next_word() {
    skip();
    const size_t start = at_;
    while (is_word(peek()) || (text_.compare(at_, 2, "::") == 0 && is_word(text_[at_ + 2])))
      at_ += peek() == ':' ? 2 : 1;
    if (at_ == start) fail("expected a word, found '" + text_.substr(at_, 20) + "'");
    return text_.substr(start, at_ - start);
  }
  int next_int() { return std::stoi(next_word()); }

  // .align 16 .b8 name[128], the space before it already read. The name, the bytes, the alignment.
  std::tuple<std::string, int, int> variable() {
    int align = 1;
    std::string word = next_word();
    if (word == ".align") {
      align = next_int();
      word = next_word();
    }
    const auto type = type_names().find(word.substr(1));
    if (type == type_names().end()) fail("unknown type '" + word + "'");
    const int item = bytes_of(type->second);
    const std::string name = next_word();
    int n = 1;
    if (accept('[')) {
      n = accept(']') ? 0 : next_int();
      if (n != 0) expect(']');
    }
    return {name, n * item, std::max(align, item)};
  }

  void kernel() {
    kernel_ = {};
    scopes_ = {{-1, {}, {}}};
    scope_ = 0;
    params_.clear();
    shared_.clear();
    fixups_.clear();
    kernel_.name = next_word();
    if (accept('(')) {
      while (!accept(')')) {
        if (next_word() != ".param") fail("expected .param");
        const auto [name, bytes, align] = variable();
        const int offset = (kernel_.param_bytes + align - 1) / align * align;
        params_[name] = offset;
        kernel_.params.push_back({offset, bytes});
        kernel_.param_bytes = offset + bytes;
        accept(',');
      }
    }
    while (!accept('{')) {
      if (next_word() == ".maxntid") {
        kernel_.max_threads = next_int();
        while (accept(',')) kernel_.max_threads *= next_int();
      } else {
        next_word();  // as .minnctapersm has one
      }
    }
    body();
    for (const auto& [index, operand, name, scope] : fixups_) {
      int at = -1;
      for (int s = scope; s >= 0 && at < 0; s = scopes_[s].parent) {
        const auto found = scopes_[s].labels.find(name);
        if (found != scopes_[s].labels.end()) at = found->second;
      }
      if (at < 0) fail("unknown label '" + name + "' in " + kernel_.name);
      kernel_.code[index].operands[operand].value = at;
    }
    module_.kernels[kernel_.name] = std::move(kernel_);
  }

  void body() {
    int depth = 1;
    while (depth > 0) {
      if (accept('{')) {
        scopes_.push_back({scope_, {}, {}});
        scope_ = static_cast<int>(scopes_.size()) - 1;
        ++depth;
      } else if (accept('}')) {
        scope_ = scopes_[scope_].parent;
        --depth;
      } else if (accept(';')) {
        continue;
      } else if (skip(), peek() == '@') {
        instruction("");
      } else {
        const std::string word = next_word();
        if (accept(':')) {
          scopes_[scope_].labels[word] = static_cast<int>(kernel_.code.size());
        } else if (word[0] == '.') {
          directive(word);
        } else {
          instruction(word);
        }
      }
    }
  }

  void directive(const std::string& word) {
    if (word == ".reg") {
      next_word();  // a slot holds any type
      do {
        const std::string name = next_word();
        if (accept('<')) {
          const int n = next_int();
          expect('>');
          for (int i = 0; i < n; ++i) scopes_[scope_].registers[name + std::to_string(i)] = kernel_.n_slots++;
        } else {
          scopes_[scope_].registers[name] = kernel_.n_slots++;
        }
      } while (accept(','));
    } else if (word == ".shared") {
      const auto [name, bytes, align] = variable();
      const int offset = (kernel_.static_shared_bytes + align - 1) / align * align;
      shared_[name] = offset;
      kernel_.static_shared_bytes = offset + bytes;
    } else if (word == ".pragma") {
      while (peek() != ';') ++at_;
    } else {
      fail("unknown directive '" + word + "'");
    }
    expect(';');
  }

  std::optional<int> find_register(const std::string& name) const {
    for (int s = scope_; s >= 0; s = scopes_[s].parent) {
      const auto found = scopes_[s].registers.find(name);
      if (found != scopes_[s].registers.end()) return found->second;
    }
    return std::nullopt;
  }

  void instruction(std::string word) {
    Instruction made;
    if (word.empty()) {
      expect('@');
      made.guard_negated = accept('!');
      const std::string name = next_word();
      const auto slot = find_register(name);
      if (!slot) fail("unknown predicate '" + name + "'");
      made.guard = *slot;
      word = next_word();
    }
    made.line = line_;
    size_t start = word.find('.');
    made.name = word.substr(0, start);
    while (start != std::string::npos) {
      const size_t end = word.find('.', start + 1);
      made.modifiers.push_back(word.substr(start + 1, end == std::string::npos ? end : end - start - 1));
      const auto type = type_names().find(made.modifiers.back());
      if (type != type_names().end()) made.types.push_back(type->second);
      start = end;
    }
    while (!accept(';')) {
      made.operands.push_back(operand(static_cast<int>(made.operands.size())));
      if (accept('|')) made.predicate_result = operand(-1);
      accept(',');
    }
    kernel_.code.push_back(std::move(made));
  }

  Operand operand(int place) {
    Operand made;
    if (accept('{')) {
      made.kind = Operand::vector;
      while (!accept('}')) {
        made.parts.push_back(operand(-1));
        accept(',');
      }
      return made;
    }
    if (accept('[')) {
      made.kind = Operand::address;
      made.parts.push_back(operand(-1));
      if (accept('+')) {
        const bool negative = accept('-');
        made.value = std::stoll(next_word(), nullptr, 0) * (negative ? -1 : 1);
      } else if (skip(), peek() == '-') {
        ++at_;
        made.value = -std::stoll(next_word(), nullptr, 0);
      }
      if (accept(',')) made.parts.push_back(operand(-1));
      expect(']');
      return made;
    }
    made.negated = accept('!');
    const bool negative = accept('-');
    const std::string word = next_word();
    if (std::isdigit(static_cast<unsigned char>(word[0]))) {
      made.kind = Operand::immediate;
      if (word[0] == '0' && (word[1] == 'f' || word[1] == 'F' || word[1] == 'd' || word[1] == 'D')) {
        made.value = static_cast<int64_t>(std::stoull(word.substr(2), nullptr, 16));
      } else {
        made.value = static_cast<int64_t>(std::stoull(word, nullptr, 0)) * (negative ? -1 : 1);
      }
      return made;
    }
    if (word == "_") return made;
    if (word == "WARP_SZ") {
      made.kind = Operand::immediate;
      made.value = 32;
      return made;
    }
    if (const auto slot = find_register(word)) {
      made.kind = Operand::reg;
      made.slot = *slot;
    } else if (special_names().contains(word)) {
      made.kind = Operand::special;
      made.what = special_names().at(word);
    } else if (params_.contains(word)) {
      made.kind = Operand::param_symbol;
      made.value = params_[word];
    } else if (shared_.contains(word)) {
      made.kind = Operand::shared_symbol;
      made.value = shared_[word];
    } else if (globals_.contains(word)) {
      made.kind = Operand::global_symbol;
      made.value = globals_[word];
    } else if (std::find(externs_.begin(), externs_.end(), word) != externs_.end()) {
      made.kind = Operand::dynamic_shared_symbol;
    } else if (place >= 0) {
      made.kind = Operand::label;
      fixups_.push_back({kernel_.code.size(), place, word, scope_});
    } else {
      fail("unknown name '" + word + "'");
    }
    return made;
  }

  struct Fixup {
    size_t instruction;
    int operand;
    std::string label;
    int scope;
  };

  const std::string& text_;
  size_t at_ = 0;
  int line_ = 1;
  Module module_;
  Kernel kernel_;
  std::vector<Scope> scopes_;
  int scope_ = 0;
  std::map<std::string, int> params_, shared_;
  std::map<std::string, int64_t> globals_;
  std::vector<std::string> externs_;
  std::vector<Fixup> fixups_;
};

}  // namespace

Module parse(const std::string& text) { return Parser(text).run(); }

}  // namespace ptx
