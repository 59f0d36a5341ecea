#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/common.h"
#include "cpu/ops.h"

namespace stepcredit {
namespace {

// Weighted mean of a branch's answer log-probs: the first `head_tokens` weigh `head_weight`, the rest 1, and the
// weights are divided by their mean. An empty branch has no score.
template <typename Float>
double branch_score(const InformationGainParams<Float>& p, int64_t r) {
  const int64_t start = p.cu_branches[r], stop = p.cu_branches[r + 1];
  if (start == stop) return std::numeric_limits<double>::quiet_NaN();
  const int64_t head_stop = std::min(stop, start + p.head_tokens);
  double head = 0.0, tail = 0.0;
  for (int64_t i = start; i < head_stop; ++i) head += p.logprobs[i];
  for (int64_t i = head_stop; i < stop; ++i) tail += p.logprobs[i];
  const double weights = p.head_weight * static_cast<double>(head_stop - start) + static_cast<double>(stop - head_stop);
  // A zero head weight on an answer that is all head must not divide by zero: it has no weighted token at all.
  if (weights == 0.0) return std::numeric_limits<double>::quiet_NaN();
  return (p.head_weight * head + tail) / weights;
}

template <typename Float>
void run(const InformationGainParams<Float>& p) {
  constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
#pragma omp parallel for schedule(dynamic, 64) num_threads(p.threads) if (p.num_branches > 1024)
  for (int64_t s = 0; s < p.num_steps; ++s) {
    int64_t best = -1;
    double real = kNaN, baseline = kNaN;
    for (int64_t v = p.cu_steps[s]; v < p.cu_steps[s + 1]; ++v) {
      const int64_t first = p.cu_variants[v], last = p.cu_variants[v + 1];
      double sum = 0.0;
      for (int64_t r = first; r < last; ++r) {
        const double score = branch_score(p, r);
        p.scores[r] = static_cast<Float>(score);
        if (r > first) sum += score;
      }
      if (first == last) continue;
      const double score = branch_score(p, first);
      // Ties go to the earlier variant; a NaN never wins over a number.
      if (best < 0 || score > real || (std::isnan(real) && !std::isnan(score))) {
        best = v;
        real = score;
        baseline = last - first > 1 ? sum / static_cast<double>(last - first - 1) : kNaN;
      }
    }
    const double gain = real - baseline;
    p.best_variant[s] = best;
    p.real[s] = static_cast<Float>(real);
    p.baseline[s] = static_cast<Float>(baseline);
    p.gain[s] = static_cast<Float>(gain);
    p.scored[s] = std::isnan(gain) ? 0 : 1;
  }
}

}  // namespace

void information_gain_cpu(const InformationGainParams<float>& p) { run(p); }
void information_gain_cpu(const InformationGainParams<double>& p) { run(p); }

}  // namespace stepcredit
