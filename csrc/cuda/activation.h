// What follows a linear layer in one kernel.
#pragma once

#include <cstdint>

namespace pyfacts::cuda {

// With z = x Wᵀ + b rounded to the dtype, once: relu max(z, 0); relu2 its square, rounded again; jumprelu z where it
// exceeds the feature's threshold, or 0 where that is negative, else 0. All of them keep a NaN, and none yields -0.0.
enum class Activation : uint8_t { relu, relu2, jumprelu };

}  // namespace pyfacts::cuda
