// The word on the device that keeps the first fault of an encoding: set up, and read by the host.
#include "encoding.h"
#include "unpack.cuh"

namespace pyfacts::cuda {

cudaError_t begin_checks(const cpu::Encoding& e, FaultKey* first_fault, cudaStream_t stream) {
  static_assert(kNoFault == 0xffffffffffffffff);
  cudaError_t error = cudaMemsetAsync(first_fault, 0xff, sizeof(FaultKey), stream);
  const bool empty = e.n_features == 0 || e.n_tokens == 0;  // then no run checks that the planes are, too
  if (error != cudaSuccess || !empty || (e.index_bytes == 0 && e.n_values == 0)) return error;
  const Fault fault = e.index_bytes != 0 ? Fault::index_size : Fault::values_size;
  const FaultKey key = static_cast<FaultKey>(fault);
  return cudaMemcpyAsync(first_fault, &key, sizeof(key), cudaMemcpyHostToDevice, stream);
}

cudaError_t verdict(const FaultKey* first_fault, int64_t n_tokens, cpu::Status* status, cudaStream_t stream) {
  FaultKey found = kNoFault;
  cudaError_t error = cudaMemcpyAsync(&found, first_fault, sizeof(FaultKey), cudaMemcpyDeviceToHost, stream);
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
  *status = status_of(found, n_tokens);
  return error;
}

}  // namespace pyfacts::cuda
