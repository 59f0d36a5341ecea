#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/common.h"
#include "cpu/ops.h"

namespace stepcredit {
namespace {

// Scores compared between two branches: four AVX-512 or eight AVX2 registers.
constexpr int64_t kBlock = 64;
// Scores that wait before they are merged into a query's list, so that a long list is not moved for each.
constexpr int64_t kPending = 64;

struct Hit {
  float score;
  int64_t id;
};

// Higher scores first, NaN before everything, as torch.sort has it: the caller looks for NaN in front.
bool higher(float a, float b) { return a > b || (std::isnan(a) && !std::isnan(b)); }

bool before(const Hit& a, const Hit& b) {
  return higher(a.score, b.score) || (!higher(b.score, a.score) && a.id < b.id);
}

struct Pending {
  Hit hits[kPending];
  int64_t count = 0;
};

// Merges what waits into the list of query `q`, which holds `count` entries and keeps the best p.k. Ids that
// wait are higher than all in the list, so an equal score goes behind.
void merge(const TopkSearchParams& p, int64_t q, int64_t count, Pending& pending) {
  float* scores = p.scores + q * p.k;
  int64_t* ids = p.ids + q * p.k;
  std::sort(pending.hits, pending.hits + pending.count, before);
  int64_t at = std::upper_bound(scores, scores + count, pending.hits[0].score, higher) - scores;
  const std::vector<float> old_scores(scores + at, scores + count);
  const std::vector<int64_t> old_ids(ids + at, ids + count);
  const int64_t old_count = count - at;
  const int64_t stop = std::min(p.k, count + pending.count);
  for (int64_t old = 0, next = 0; at < stop; ++at) {
    const bool keep = next == pending.count || (old < old_count && !higher(pending.hits[next].score, old_scores[old]));
    scores[at] = keep ? old_scores[old] : pending.hits[next].score;
    ids[at] = keep ? old_ids[old++] : pending.hits[next++].id;
  }
  pending.count = 0;
}

// Queries [begin, end) of the tile. A score counts when it exceeds its query's bar: the last entry of a full
// list, NaN (which `score <= bar` never satisfies) while there is room. After the first passages almost none
// does, so the loop only compares; several rows of a narrow tile are compared at once, as one row with the
// bars repeated.
STEPCREDIT_CLONES void fold(const TopkSearchParams& p, int64_t begin, int64_t end) {
  const int64_t width = end - begin;
  const int64_t repeat = width == p.num_queries ? std::max<int64_t>(1, kBlock / width) : 1;
  std::vector<int64_t> counts(width, std::min(p.k, p.first_id));
  std::vector<Pending> pending(width);
  std::vector<float> bars(repeat * width);
  const auto raise = [&](int64_t q) {
    const bool full = counts[q] == p.k;
    const float bar = full ? p.scores[(begin + q) * p.k + p.k - 1] : std::numeric_limits<float>::quiet_NaN();
    for (int64_t i = q; i < repeat * width; i += width) bars[i] = bar;
  };
  const auto flush = [&](int64_t q) {
    const int64_t waiting = pending[q].count;
    merge(p, begin + q, counts[q], pending[q]);
    counts[q] = std::min(p.k, counts[q] + waiting);
    raise(q);
  };
  for (int64_t q = 0; q < width; ++q) raise(q);
  for (int64_t row = 0; row < p.rows; row += repeat) {
    const float* scores = p.tile + row * p.num_queries + begin;
    const int64_t n = std::min(repeat, p.rows - row) * width;
    for (int64_t first = 0; first < n; first += kBlock) {
      const int64_t stop = std::min(first + kBlock, n);
      int hit = 0;
      for (int64_t i = first; i < stop; ++i) hit |= !(scores[i] <= bars[i]);
      if (!hit) continue;
      for (int64_t i = first; i < stop; ++i) {
        if (scores[i] <= bars[i]) continue;
        Pending& mine = pending[i % width];
        mine.hits[mine.count++] = {scores[i], p.first_id + row + i / width};
        if (mine.count == kPending) flush(i % width);
      }
    }
  }
  for (int64_t q = 0; q < width; ++q) {
    if (pending[q].count > 0) flush(q);
  }
}

}  // namespace

void topk_search_cpu(const TopkSearchParams& p) {
  const int64_t blocks = (p.num_queries + kBlock - 1) / kBlock;
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(p.threads, blocks));
  const int64_t width = (blocks + parts - 1) / parts * kBlock;
#pragma omp parallel for num_threads(p.threads) if (parts > 1 && p.rows * p.num_queries > kParallelMinimum)
  for (int64_t begin = 0; begin < p.num_queries; begin += width) {
    fold(p, begin, std::min(begin + width, p.num_queries));
  }
}

}  // namespace stepcredit
