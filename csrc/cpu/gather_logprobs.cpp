// The part of gather_logprobs that is not a matrix product: folding a tile of logits into per-row running sums, and
// turning a recomputed tile of logits into their gradient. A row of a tile stays in the L1 cache between the loops.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/common.h"
#include "cpu/ops.h"
#include "cpu/vector_math.h"

namespace stepcredit {
namespace {

// Where p is 0, log p may be -inf; their product is 0. Any bound works at which exp is 0.
template <typename Float>
STEPCREDIT_INLINE Float not_below(Float x) {
  constexpr Float kLow = -1000;
  return x < kLow ? kLow : x;
}

// Matrix products to logits, in place: (x + bias) * scale, soft cap, temperature.
template <typename Float>
STEPCREDIT_INLINE void finish_logits(const LogitTile<Float>& t, Float* z) {
  if (t.bias != nullptr) {
    for (int64_t c = 0; c < t.cols; ++c) z[c] += t.bias[c];
  }
  if (t.softcap > 0) {
    const Float inner = static_cast<Float>(t.scale / t.softcap);
    const Float outer = static_cast<Float>(t.softcap / t.temperature);
#pragma omp simd
    for (int64_t c = 0; c < t.cols; ++c) z[c] = outer * fast_tanh(z[c] * inner);
  } else if (t.scale != t.temperature) {
    const Float factor = static_cast<Float>(t.scale / t.temperature);
    for (int64_t c = 0; c < t.cols; ++c) z[c] *= factor;
  }
}

template <typename Float>
STEPCREDIT_INLINE void fold_row(const GatherLogprobsFoldParams<Float>& p, int64_t row) {
  const LogitTile<Float>& t = p.tile;
  Float* z = t.logits + row * t.cols;
  finish_logits(t, z);
  for (int64_t k = 0; k < p.num_targets; ++k) {
    const int64_t column = p.targets[row * p.num_targets + k] - t.first_col;
    if (column >= 0 && column < t.cols) p.picked[row * p.num_targets + k] = z[column];
  }
  Float top = -std::numeric_limits<Float>::infinity();
#pragma omp simd reduction(max : top)
  for (int64_t c = 0; c < t.cols; ++c) top = z[c] > top ? z[c] : top;
  const double before = p.maximum[row];
  const Float best = before > top ? static_cast<Float>(before) : top;
  // Only -inf so far: such logits add nothing, and -inf - -inf would be NaN. (NaN logits do not raise the maximum, so a
  // row that holds one must go on to the sums.)
  Float sum = 0, weighted = 0;
  if (best == -std::numeric_limits<Float>::infinity()) {
    for (int64_t c = 0; c < t.cols; ++c) sum += z[c] != z[c] ? z[c] : Float(0);
    p.sum[row] += sum;
    return;
  }
#pragma omp simd reduction(+ : sum, weighted)
  for (int64_t c = 0; c < t.cols; ++c) {
    const Float d = z[c] - best;
    const Float e = fast_exp(d);
    sum += e;
    weighted += e * not_below(d);
  }
  const double shift = before - static_cast<double>(best);
  if (p.sum[row] > 0 && shift < 0) {
    const double factor = std::exp(shift);
    p.weighted[row] = factor > 0 ? factor * (p.weighted[row] + p.sum[row] * shift) : 0.0;
    p.sum[row] *= factor;
  }
  p.maximum[row] = best;
  p.sum[row] += sum;
  p.weighted[row] += weighted;
}

// d loss / d (matrix product) of one row, in place. With g_k the gradient of log-prob k and h that of the entropy H:
// dz_v = sum_k g_k [v = target_k] - p_v (sum_k g_k + h (log p_v + H)).
template <bool kCapped, typename Float>
STEPCREDIT_INLINE void grad_row(const GatherLogprobsGradParams<Float>& p, int64_t row, Float* target_grads) {
  const LogitTile<Float>& t = p.tile;
  Float* z = t.logits + row * t.cols;
  finish_logits(t, z);
  const Float chain = static_cast<Float>(t.scale / t.temperature);
  const Float inverse_cap = kCapped ? static_cast<Float>(t.temperature / t.softcap) : Float(0);
  const Float* grad = p.grad_logprobs + row * p.num_targets;
  Float total = 0;
  for (int64_t k = 0; k < p.num_targets; ++k) {
    total += grad[k];
    const int64_t column = p.targets[row * p.num_targets + k] - t.first_col;
    if (column < 0 || column >= t.cols) continue;
    const Float capped = kCapped ? z[column] * inverse_cap : Float(0);
    target_grads[k] = grad[k] * chain * (1 - capped * capped);
  }
  const Float maximum = p.maximum[row], log_sum = p.log_sum[row], h = p.grad_entropy[row], entropy = p.entropy[row];
#pragma omp simd
  for (int64_t c = 0; c < t.cols; ++c) {
    const Float logp = (z[c] - maximum) - log_sum;
    const Float dz = -fast_exp(logp) * (total + h * (not_below(logp) + entropy));
    // Without a cap z may be -inf, which must not meet the 0.
    const Float capped = kCapped ? z[c] * inverse_cap : Float(0);
    z[c] = dz * chain * (1 - capped * capped);
  }
  for (int64_t k = 0; k < p.num_targets; ++k) {
    const int64_t column = p.targets[row * p.num_targets + k] - t.first_col;
    if (column >= 0 && column < t.cols) z[column] += target_grads[k];
  }
}

// The clones must not be templates.
STEPCREDIT_CLONES void fold_clone(const GatherLogprobsFoldParams<float>& p, int64_t row) { fold_row(p, row); }
STEPCREDIT_CLONES void grad_clone(const GatherLogprobsGradParams<float>& p, int64_t row, float* target_grads) {
  p.tile.softcap > 0 ? grad_row<true>(p, row, target_grads) : grad_row<false>(p, row, target_grads);
}
void fold_clone(const GatherLogprobsFoldParams<double>& p, int64_t row) { fold_row(p, row); }
void grad_clone(const GatherLogprobsGradParams<double>& p, int64_t row, double* target_grads) {
  p.tile.softcap > 0 ? grad_row<true>(p, row, target_grads) : grad_row<false>(p, row, target_grads);
}

template <typename Float>
bool is_active(const LogitTile<Float>& t, int64_t row) {
  return t.active == nullptr || t.active[row];
}

template <typename Float>
void fold(const GatherLogprobsFoldParams<Float>& p) {
#pragma omp parallel for schedule(static) num_threads(p.threads) if (p.tile.rows * p.tile.cols > kParallelMinimum)
  for (int64_t row = 0; row < p.tile.rows; ++row) {
    if (is_active(p.tile, row)) fold_clone(p, row);
  }
}

template <typename Float>
void grad(const GatherLogprobsGradParams<Float>& p) {
#pragma omp parallel num_threads(p.threads) if (p.tile.rows * p.tile.cols > kParallelMinimum)
  {
    std::vector<Float> target_grads(p.num_targets);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < p.tile.rows; ++row) {
      if (is_active(p.tile, row)) {
        grad_clone(p, row, target_grads.data());
      } else {
        std::fill_n(p.tile.logits + row * p.tile.cols, p.tile.cols, Float(0));
      }
    }
  }
}

}  // namespace

void gather_logprobs_fold_cpu(const GatherLogprobsFoldParams<float>& p) { fold(p); }
void gather_logprobs_fold_cpu(const GatherLogprobsFoldParams<double>& p) { fold(p); }
void gather_logprobs_grad_cpu(const GatherLogprobsGradParams<float>& p) { grad(p); }
void gather_logprobs_grad_cpu(const GatherLogprobsGradParams<double>& p) { grad(p); }

}  // namespace stepcredit
