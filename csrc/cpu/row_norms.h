// The squared norm of every row of a matrix.
#pragma once

#include "encoding.h"

namespace pyfacts::cpu {

// sq_norms[n_tokens] in float64. Squares of the dtypes are exact there, and the order of summation is fixed: the same
// bits with any number of threads.
void row_sq_norms(const Dense& x, double* sq_norms, ParallelFor parallel_for);

}  // namespace pyfacts::cpu
