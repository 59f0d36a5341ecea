#include "cuda/common.cuh"
#include "cuda/ops.h"

namespace stepcredit {
namespace {

constexpr int kThreads = 128;
constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Every lane gets the sum, added in the same order each time.
__device__ double warp_sum(double value) {
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(kAllLanes, value, lanes);
  return value;
}

// As on the CPU (cpu/information_gain.cpp), with the lanes of a warp side by side over the tokens.
template <typename Float>
__device__ double branch_score(const InformationGainParams<Float>& p, int64_t branch, int lane) {
  const int64_t start = p.cu_branches[branch], stop = p.cu_branches[branch + 1];
  const int64_t head_stop = min(stop, start + p.head_tokens);
  double sum = 0.0;
  for (int64_t i = start + lane; i < stop; i += kWarp) {
    sum += (i < head_stop ? p.head_weight : 1.0) * static_cast<double>(p.logprobs[i]);
  }
  sum = warp_sum(sum);
  const double weights = p.head_weight * static_cast<double>(head_stop - start) + static_cast<double>(stop - head_stop);
  // No weighted token, no score.
  return weights == 0.0 ? nan("") : sum / weights;
}

// One warp per step: answers are short and steps have a handful of branches.
template <typename Float>
__global__ void __launch_bounds__(kThreads) information_gain_kernel(InformationGainParams<Float> p) {
  const int64_t step = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (step >= p.num_steps) return;
  int64_t best = -1;
  double real = nan(""), baseline = nan("");
  for (int64_t v = p.cu_steps[step]; v < p.cu_steps[step + 1]; ++v) {
    const int64_t first = p.cu_variants[v], last = p.cu_variants[v + 1];
    double candidate = 0.0, others = 0.0;
    for (int64_t branch = first; branch < last; ++branch) {
      const double score = branch_score(p, branch, lane);
      if (lane == 0) p.scores[branch] = static_cast<Float>(score);
      if (branch == first) {
        candidate = score;
      } else {
        others += score;
      }
    }
    if (first == last) continue;
    // Ties go to the earlier variant; a NaN never wins over a number.
    if (best < 0 || candidate > real || (isnan(real) && !isnan(candidate))) {
      best = v;
      real = candidate;
      baseline = last - first > 1 ? others / static_cast<double>(last - first - 1) : nan("");
    }
  }
  if (lane != 0) return;
  const double gain = real - baseline;
  p.best_variant[step] = best;
  p.real[step] = static_cast<Float>(real);
  p.baseline[step] = static_cast<Float>(baseline);
  p.gain[step] = static_cast<Float>(gain);
  p.scored[step] = isnan(gain) ? 0 : 1;
}

template <typename Float>
void launch(const InformationGainParams<Float>& p, void* stream) {
  if (p.num_steps == 0) return;
  constexpr int64_t kSteps = kThreads / kWarp;
  const auto blocks = static_cast<unsigned>((p.num_steps + kSteps - 1) / kSteps);
  information_gain_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p);
  check_launch("information_gain");
}

}  // namespace

void information_gain_cuda(const InformationGainParams<float>& p, void* stream) { launch(p, stream); }
void information_gain_cuda(const InformationGainParams<double>& p, void* stream) { launch(p, stream); }

}  // namespace stepcredit
