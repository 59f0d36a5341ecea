#include <limits>

#include "cuda/common.cuh"
#include "cuda/ops.h"

namespace stepcredit {
namespace {

constexpr int kThreads = 256;

// One block per rollout. A block reads all B rewards twice (B is a few thousand at most, and they stay in L2), which
// buys one launch, no atomics on floats and no second pass over the batch.
template <typename Float>
__global__ void __launch_bounds__(kThreads)
    masked_advantages_kernel(MaskedAdvantagesParams<Float> p, int* query_lengths) {
  __shared__ double sums[kThreads];
  __shared__ int differs;
  const int64_t rollout = blockIdx.x;
  const int64_t group = p.groups[rollout];
  const double own = p.rewards[rollout];
  if (threadIdx.x == 0) differs = 0;
  __syncthreads();

  double sum = 0.0, count = 0.0;
  for (int64_t b = threadIdx.x; b < p.num_rollouts; b += kThreads) {
    if (p.groups[b] != group) continue;
    const double r = p.rewards[b];
    sum += r;
    count += 1.0;
    if (r != own) differs = 1;  // every writer writes the same value
  }
  count = block_sum(count, sums);
  const double mean = block_sum(sum, sums) / count;
  double squares = 0.0;
  for (int64_t b = threadIdx.x; b < p.num_rollouts; b += kThreads) {
    if (p.groups[b] != group) continue;
    const double d = p.rewards[b] - mean;
    squares += d * d;
  }
  squares = block_sum(squares, sums);

  double centred, deviation = 1.0;
  if (count <= 1.0) {
    centred = p.singleton == Singleton::kReward ? own : 0.0;
  } else {
    // Equal rewards give exactly zero: a rounded mean would leave 1e-17 / eps behind.
    centred = differs ? own - mean : 0.0;
    deviation = sqrt(squares / (count - static_cast<double>(p.ddof)));
  }
  const double advantage = p.scale == Scale::kStd ? centred / (deviation + p.eps) : centred;

  // The tokens of a step lie in one rollout, so its length is counted inside this block (integer atomics: order-free).
  const int64_t start = p.cu_seqlens[rollout], stop = p.cu_seqlens[rollout + 1];
  const auto step_of = [&](int64_t i) { return p.policy_mask[i] ? p.step_ids[i] : int64_t{-1}; };
  for (int64_t i = start + threadIdx.x; i < stop; i += kThreads) {
    if (step_of(i) >= 0) query_lengths[step_of(i)] = 0;
  }
  __syncthreads();
  for (int64_t i = start + threadIdx.x; i < stop; i += kThreads) {
    if (step_of(i) >= 0) atomicAdd(&query_lengths[step_of(i)], 1);
  }
  __syncthreads();
  for (int64_t i = start + threadIdx.x; i < stop; i += kThreads) {
    double a = p.policy_mask[i] ? advantage : 0.0;
    const int64_t step = step_of(i);
    if (step >= 0) {
      double x = p.step_gains[step];
      if (!isnan(x)) {
        if (fabs(x) < p.dead_zone) x = 0.0;
        if (x < 0.0) x *= p.negative_scale;
        if (isfinite(p.soft_clip)) x = p.soft_clip * tanh(x / p.soft_clip);
        a += p.alpha * x / static_cast<double>(query_lengths[step]);
      }
    }
    p.advantages[i] = static_cast<Float>(a);
  }
}

template <typename Float>
void launch(const MaskedAdvantagesParams<Float>& p, int* query_lengths, void* stream) {
  if (p.num_rollouts == 0) return;
  masked_advantages_kernel<<<static_cast<unsigned>(p.num_rollouts), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      p, query_lengths);
  check_launch("masked_advantages");
}

}  // namespace

void masked_advantages_cuda(const MaskedAdvantagesParams<float>& p, int* query_lengths, void* stream) {
  launch(p, query_lengths, stream);
}
void masked_advantages_cuda(const MaskedAdvantagesParams<double>& p, int* query_lengths, void* stream) {
  launch(p, query_lengths, stream);
}

}  // namespace stepcredit
