// Callables over a ParallelFor.
#pragma once

#include <mutex>

#include "encoding.h"

namespace pyfacts::cpu {

// body(begin, end) on disjoint ranges that cover [0, n).
template <typename Body>
void parallel(int64_t n, ParallelFor parallel_for, Body body) {
  if (n <= 0) return;
  parallel_for(n, [](int64_t begin, int64_t end, void* context) { (*static_cast<Body*>(context))(begin, end); }, &body);
}

// body(task) -> Status for every task in [0, n); the failure of the lowest task that failed, so that the answer does
// not depend on the number of threads. A range stops at its first failure.
template <typename Body>
Status parallel_check(int64_t n, ParallelFor parallel_for, Body body) {
  std::mutex mutex;
  int64_t failed_task = n;
  Status failure;
  parallel(n, parallel_for, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const Status status = body(task);
      if (status.ok()) continue;
      std::lock_guard<std::mutex> lock(mutex);
      if (task < failed_task) {
        failed_task = task;
        failure = status;
      }
      return;
    }
  });
  return failure;
}

}  // namespace pyfacts::cpu
