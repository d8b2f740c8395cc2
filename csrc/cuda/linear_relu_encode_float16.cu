// The fused kernels for float16. CUTLASS compiles slowly, 25 s a file, so that there is a file per dtype.
#include "linear_relu_encode.cuh"

namespace pyfacts::cuda {

cudaError_t launch_fused_float16(const Linear& linear, const DenseOut& dense, const Arena& out, int n_multiprocessors,
                                 cudaStream_t stream) {
  return launch_fused<cutlass::half_t>(linear, dense, out, n_multiprocessors, stream);
}

}  // namespace pyfacts::cuda
