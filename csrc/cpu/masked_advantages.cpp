#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/common.h"
#include "cpu/ops.h"

namespace stepcredit {
namespace {

struct Group {
  double sum = 0.0, squares = 0.0;
  double low = std::numeric_limits<double>::infinity(), high = -std::numeric_limits<double>::infinity();
  int64_t count = 0;
};

// Group-relative advantage of every rollout, in double: two passes over B rewards, mean first, so that the
// sum of squares does not cancel.
template <typename Float>
std::vector<double> rollout_advantages(const MaskedAdvantagesParams<Float>& p) {
  std::vector<Group> groups(p.num_rollouts);
  for (int64_t b = 0; b < p.num_rollouts; ++b) {
    Group& g = groups[p.groups[b]];
    const double r = p.rewards[b];
    g.sum += r;
    g.low = std::min(g.low, r);
    g.high = std::max(g.high, r);
    ++g.count;
  }
  const auto mean = [](const Group& g) { return g.sum / static_cast<double>(g.count); };
  for (int64_t b = 0; b < p.num_rollouts; ++b) {
    Group& g = groups[p.groups[b]];
    const double d = p.rewards[b] - mean(g);
    g.squares += d * d;
  }
  std::vector<double> advantages(p.num_rollouts);
  for (int64_t b = 0; b < p.num_rollouts; ++b) {
    const Group& g = groups[p.groups[b]];
    double centred, deviation;
    if (g.count <= 1) {
      centred = p.singleton == Singleton::kReward ? static_cast<double>(p.rewards[b]) : 0.0;
      deviation = 1.0;
    } else {
      // Equal rewards give exactly zero: a rounded mean would leave 1e-17 / eps behind.
      centred = g.low == g.high ? 0.0 : p.rewards[b] - mean(g);
      deviation = std::sqrt(g.squares / static_cast<double>(g.count - p.ddof));
    }
    advantages[b] = p.scale == Scale::kStd ? centred / (deviation + p.eps) : centred;
  }
  return advantages;
}

template <typename Float>
std::vector<int64_t> query_lengths(const MaskedAdvantagesParams<Float>& p) {
  std::vector<int64_t> total(p.num_steps, 0);
#pragma omp parallel num_threads(p.threads) if (p.num_tokens > kParallelMinimum)
  {
    std::vector<int64_t> mine(p.num_steps, 0);
#pragma omp for nowait
    for (int64_t i = 0; i < p.num_tokens; ++i) {
      if (p.step_ids[i] >= 0 && p.policy_mask[i]) ++mine[p.step_ids[i]];
    }
#pragma omp critical
    for (int64_t s = 0; s < p.num_steps; ++s) total[s] += mine[s];
  }
  return total;
}

template <typename Float>
void run(const MaskedAdvantagesParams<Float>& p) {
  const std::vector<double> advantages = rollout_advantages(p);
  const std::vector<int64_t> lengths = query_lengths(p);
  std::vector<double> bonus(p.num_steps, 0.0);
  for (int64_t s = 0; s < p.num_steps; ++s) {
    double x = p.step_gains[s];
    if (std::isnan(x) || lengths[s] == 0) continue;
    if (std::abs(x) < p.dead_zone) x = 0.0;
    if (x < 0.0) x *= p.negative_scale;
    if (std::isfinite(p.soft_clip)) x = p.soft_clip * std::tanh(x / p.soft_clip);
    bonus[s] = p.alpha * x / static_cast<double>(lengths[s]);
  }
#pragma omp parallel for schedule(dynamic, 16) num_threads(p.threads) if (p.num_tokens > kParallelMinimum)
  for (int64_t b = 0; b < p.num_rollouts; ++b) {
    for (int64_t i = p.cu_seqlens[b]; i < p.cu_seqlens[b + 1]; ++i) {
      double a = 0.0;
      if (p.policy_mask[i]) a = advantages[b] + (p.step_ids[i] >= 0 ? bonus[p.step_ids[i]] : 0.0);
      p.advantages[i] = static_cast<Float>(a);
    }
  }
}

}  // namespace

void masked_advantages_cpu(const MaskedAdvantagesParams<float>& p) { run(p); }
void masked_advantages_cpu(const MaskedAdvantagesParams<double>& p) { run(p); }

}  // namespace stepcredit
