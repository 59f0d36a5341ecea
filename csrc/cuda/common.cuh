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

// `value` of all threads of the block, combined in a fixed order, so that equal inputs give equal bits. Every thread
// gets the result.
template <int kThreads, typename T, typename Combine>
__device__ T block_reduce(T value, T (&shared)[kThreads], Combine combine) {
  shared[threadIdx.x] = value;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) shared[threadIdx.x] = combine(shared[threadIdx.x], shared[threadIdx.x + half]);
    __syncthreads();
  }
  const T total = shared[0];
  __syncthreads();
  return total;
}

template <int kThreads, typename T>
__device__ T block_sum(T value, T (&shared)[kThreads]) {
  return block_reduce(value, shared, [](T a, T b) { return a + b; });
}

}  // namespace stepcredit
