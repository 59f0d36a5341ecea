// The part of gather_logprobs that is not a matrix product, as cpu/gather_logprobs.cpp has it: one block per row of a
// tile of logits, which the product that made it may have left in the L2 cache.
#include <cmath>

#include "cuda/common.cuh"
#include "cuda/ops.h"

namespace stepcredit {
namespace {

constexpr int kThreads = 256;

// A logit from a product: (x + bias) * scale, soft cap, temperature; and its derivative by x.
template <typename Float>
struct Head {
  Float inner, outer, chain;
  bool capped;

  explicit Head(const LogitTile<Float>& t)
      : inner(static_cast<Float>(t.softcap > 0 ? t.scale / t.softcap : 1.0)),
        outer(static_cast<Float>((t.softcap > 0 ? t.softcap : t.scale) / t.temperature)),
        chain(static_cast<Float>(t.scale / t.temperature)),
        capped(t.softcap > 0) {}

  __device__ Float bent(const LogitTile<Float>& t, const Float* products, int column) const {
    const Float x = products[column] + (t.bias != nullptr ? t.bias[column] : Float(0));
    return capped ? tanh(x * inner) : x;
  }
};

// Of logits z: their maximum m, sums of exp(z - m) and of exp(z - m) (z - m). Before any: -inf, 0, 0.
template <typename Float>
struct Softmax {
  Float maximum, sum, weighted;
};

// The sums about a higher maximum. Those of logits that were all -inf vanish; a NaN stays.
template <typename Float>
__device__ void raise_to(Softmax<Float>& s, Float maximum) {
  const Float shift = s.maximum - maximum, factor = exp(shift);
  s.weighted = factor > 0 ? factor * (s.weighted + s.sum * shift) : Float(0);
  s.sum *= factor;
  s.maximum = maximum;
}

template <typename Float>
__device__ void add(Softmax<Float>& s, Float z) {
  if (z > s.maximum) raise_to(s, z);
  // Only -inf so far: such logits add nothing, and -inf - -inf would be NaN; but a NaN among them must be seen.
  const Float d = s.maximum == Float(-INFINITY) && z == z ? z : z - s.maximum;
  const Float e = exp(d);
  s.sum += e;
  if (e > 0) s.weighted += e * d;
}

template <typename Float>
__device__ Softmax<Float> merged(Softmax<Float> a, Softmax<Float> b) {
  if (a.maximum < b.maximum) raise_to(a, b.maximum);
  if (b.maximum < a.maximum) raise_to(b, a.maximum);
  return {a.maximum, a.sum + b.sum, a.weighted + b.weighted};
}

template <typename Float>
__global__ void __launch_bounds__(kThreads) fold_kernel(GatherLogprobsFoldParams<Float> p, Head<Float> head) {
  __shared__ Softmax<Float> shared[kThreads];
  const LogitTile<Float>& t = p.tile;
  const int64_t row = blockIdx.x;
  if (t.active != nullptr && !t.active[row]) return;
  const Float* products = t.logits + row * t.cols;
  for (int64_t i = row * p.num_targets + threadIdx.x; i < (row + 1) * p.num_targets; i += kThreads) {
    const int64_t column = p.targets[i] - t.first_col;
    if (column < 0 || column >= t.cols) continue;
    p.picked[i] = head.outer * head.bent(t, products, static_cast<int>(column));
  }
  Softmax<Float> own{Float(-INFINITY), 0, 0};
  const int cols = static_cast<int>(t.cols);
// Unrolled in float64, where exp is a call, it would spill.
#pragma unroll(sizeof(Float) == 4 ? 4 : 1)
  for (int c = threadIdx.x; c < cols; c += kThreads) add(own, head.outer * head.bent(t, products, c));
  own = block_reduce(own, shared, [](Softmax<Float> a, Softmax<Float> b) { return merged(a, b); });
  if (threadIdx.x != 0) return;
  const Softmax<double> before{p.maximum[row], p.sum[row], p.weighted[row]};
  const Softmax<double> after = merged(before, Softmax<double>{own.maximum, own.sum, own.weighted});
  p.maximum[row] = after.maximum;
  p.sum[row] = after.sum;
  p.weighted[row] = after.weighted;
}

// d loss / d product, in place. With g_k the gradient of log-prob k and h that of the entropy H:
// dz_v = sum_k g_k [v = target_k] - p_v (sum_k g_k + h (log p_v + H)).
template <typename Float>
__global__ void __launch_bounds__(kThreads) grad_kernel(GatherLogprobsGradParams<Float> p, Head<Float> head) {
  extern __shared__ unsigned targeted[];  // a bit a column
  const LogitTile<Float>& t = p.tile;
  const int64_t row = blockIdx.x;
  Float* products = t.logits + row * t.cols;
  const int cols = static_cast<int>(t.cols);
  if (t.active != nullptr && !t.active[row]) {
    for (int c = threadIdx.x; c < cols; c += kThreads) products[c] = 0;
    return;
  }
  const int64_t* targets = p.targets + row * p.num_targets;
  const Float* grads = p.grad_logprobs + row * p.num_targets;
  for (int word = threadIdx.x; word < (cols + 31) / 32; word += kThreads) targeted[word] = 0;
  __syncthreads();
  for (int64_t k = threadIdx.x; k < p.num_targets; k += kThreads) {
    const int64_t column = targets[k] - t.first_col;
    if (column >= 0 && column < t.cols) atomicOr(&targeted[column / 32], 1u << (column % 32));
  }
  __syncthreads();
  Float total = 0;
  for (int64_t k = 0; k < p.num_targets; ++k) total += grads[k];
  const Float maximum = p.maximum[row], log_sum = p.log_sum[row], h = p.grad_entropy[row], entropy = p.entropy[row];
  for (int c = threadIdx.x; c < cols; c += kThreads) {
    const Float bent = head.bent(t, products, c);
    const Float logp = (head.outer * bent - maximum) - log_sum;
    // Where p is 0, log p may be -inf; their product is 0. Any bound works at which exp is 0.
    Float dz = -exp(logp) * (total + h * ((logp < Float(-1000) ? Float(-1000) : logp) + entropy));
    if ((targeted[c / 32] >> (c % 32)) & 1u) {
      for (int64_t k = 0; k < p.num_targets; ++k) dz += targets[k] - t.first_col == c ? grads[k] : Float(0);
    }
    // Without a cap the logit may be -inf, which must not meet the 0.
    products[c] = dz * head.chain * (head.capped ? 1 - bent * bent : Float(1));
  }
}

template <typename Float>
void fold(const GatherLogprobsFoldParams<Float>& p, void* stream) {
  if (p.tile.rows == 0) return;
  fold_kernel<<<static_cast<unsigned>(p.tile.rows), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      p, Head<Float>(p.tile));
  check_launch("gather_logprobs");
}

template <typename Float>
void grad(const GatherLogprobsGradParams<Float>& p, void* stream) {
  if (p.tile.rows == 0) return;
  const size_t bits = static_cast<size_t>((p.tile.cols + 31) / 32) * sizeof(unsigned);
  grad_kernel<<<static_cast<unsigned>(p.tile.rows), kThreads, bits, static_cast<cudaStream_t>(stream)>>>(
      p, Head<Float>(p.tile));
  check_launch("gather_logprobs_backward");
}

}  // namespace

void gather_logprobs_fold_cuda(const GatherLogprobsFoldParams<float>& p, void* stream) { fold(p, stream); }
void gather_logprobs_fold_cuda(const GatherLogprobsFoldParams<double>& p, void* stream) { fold(p, stream); }
void gather_logprobs_grad_cuda(const GatherLogprobsGradParams<float>& p, void* stream) { grad(p, stream); }
void gather_logprobs_grad_cuda(const GatherLogprobsGradParams<double>& p, void* stream) { grad(p, stream); }

}  // namespace stepcredit
