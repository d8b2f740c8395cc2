// The choice of an instruction set: made once, at the first use.
#pragma once

#include "kernels.h"

namespace pyfacts::cpu {

// The table in use.
const Kernels& kernels();

// Puts another table in use, which the CPU must be able to run. For tests.
void use_kernels(const Kernels& table);

}  // namespace pyfacts::cpu
