// What the CUDA kernels share: block reduction and the launch check.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace stepcredit {

inline void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(op) + ": CUDA launch failed: " + cudaGetErrorString(error));
  }
}

// Sum of `value` over the block in a fixed order, so that equal inputs give equal bits. Every thread gets the result.
template <int kThreads, typename T>
__device__ T block_sum(T value, T (&shared)[kThreads]) {
  shared[threadIdx.x] = value;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    __syncthreads();
  }
  const T total = shared[0];
  __syncthreads();
  return total;
}

}  // namespace stepcredit
