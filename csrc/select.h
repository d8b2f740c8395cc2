// What `select` keeps of dense activations, and the norms that say how much it drops.
#pragma once

#include "planes.h"

namespace pyfacts {

// The k largest |x| of every row of x [n_tokens, n_features].
Planes topk_encode(const Tensor& x, int64_t k);

// float64 [n_tokens].
Tensor row_sq_norm(const Tensor& x);

}  // namespace pyfacts
