// Picks the best instruction set that the CPU and the operating system support, or the one PYFACTS_ISA names.
#include "dispatch.h"

#include <cstdlib>
#include <cstring>
#include <string>

#include "bounds.h"
#include "encoding.h"

namespace pyfacts::cpu {
namespace {

struct Choice {
  const Kernels* available[4] = {};  // best last
  const char* names[5] = {};         // nullptr-terminated
  int n_available = 0;
  const Kernels* chosen = nullptr;
  std::string error;

  void offer(const Kernels& table) {
    available[n_available] = &table;
    names[n_available++] = table.name;
    chosen = &table;
  }

  Choice() {
    offer(kKernelsScalar);
    offer_simd();
    if (const char* name = std::getenv("PYFACTS_ISA"); name != nullptr && *name != '\0') force(name);
  }

  void offer_simd() {
#if defined(__x86_64__)
    // __builtin_cpu_supports also asks XGETBV whether the operating system saves the registers.
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") &&
                      __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt") &&
                      __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool vbmi2 = avx512 && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
                       __builtin_cpu_supports("avx512bitalg") && __builtin_cpu_supports("avx512vpopcntdq");
    if (avx2) offer(kKernelsAvx2);
    if (avx512) offer(kKernelsAvx512);
    if (vbmi2) offer(kKernelsAvx512Vbmi2);
#endif
  }

  const BoundKernels* bound_kernels() const {
#if defined(__x86_64__)
    const bool avx512 = chosen == &kKernelsAvx512 || chosen == &kKernelsAvx512Vbmi2;
    if (avx512 && __builtin_cpu_supports("avx512bf16")) return &kBoundKernelsAvx512Bf16;
#endif
    return nullptr;
  }

  void force(const char* name) {
    std::string known;
    for (int i = 0; i < n_available; ++i) {
      if (std::strcmp(names[i], name) == 0) {
        chosen = available[i];
        return;
      }
      known += (i != 0 ? ", " : "") + std::string(names[i]);
    }
    error = "PYFACTS_ISA is '" + std::string(name) + "', but this CPU runs: " + known +
            ". Set PYFACTS_ISA to one of these, or unset it to use the best.";
  }
};

Choice& choice() {
  static Choice choice;
  return choice;
}

}  // namespace

const BoundKernels* bound_kernels() { return choice().bound_kernels(); }
const Kernels& kernels() { return *choice().chosen; }
void use_kernels(const Kernels& table) { choice().chosen = &table; }
const char* isa() { return choice().chosen->name; }
const char* isa_error() { return choice().error.empty() ? nullptr : choice().error.c_str(); }
const char* const* available_isas() { return choice().names; }

}  // namespace pyfacts::cpu
