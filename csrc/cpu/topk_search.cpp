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

// Order of a list: higher first, NaN before everything, as torch.sort has it. The caller looks for NaN in
// front.
bool before(float a, float b) { return a > b || (std::isnan(a) && !std::isnan(b)); }

// Puts (score, id) into the list of query `q`, which holds `count` entries; the last one leaves a full list.
// An equal score already there has a lower id and stays in front. Returns what a later score has to exceed:
// the last entry of a full list, NaN (which `score <= bar` never satisfies) while there is room.
float insert(const TopkSearchParams& p, int64_t q, float score, int64_t id, int64_t count) {
  float* scores = p.scores + q * p.k;
  int64_t* ids = p.ids + q * p.k;
  const int64_t at = std::upper_bound(scores, scores + count, score, before) - scores;
  if (at < p.k) {
    const int64_t last = std::min(count, p.k - 1);
    std::copy_backward(scores + at, scores + last, scores + last + 1);
    std::copy_backward(ids + at, ids + last, ids + last + 1);
    scores[at] = score;
    ids[at] = id;
    count = last + 1;
  }
  return count == p.k ? scores[p.k - 1] : std::numeric_limits<float>::quiet_NaN();
}

// Queries [begin, end) of the tile. After the first few passages almost no score beats its query's bar, so
// the loop only compares; several rows of a narrow tile are compared at once, as if it were one row with the
// bars repeated.
STEPCREDIT_CLONES void fold(const TopkSearchParams& p, int64_t begin, int64_t end) {
  const int64_t width = end - begin;
  const int64_t repeat = width == p.num_queries ? std::max<int64_t>(1, kBlock / width) : 1;
  const int64_t full = std::min(p.k, p.first_id);
  std::vector<float> bars(repeat * width);
  for (int64_t i = 0; i < repeat * width; ++i) {
    const int64_t q = begin + i % width;
    bars[i] = full == p.k ? p.scores[q * p.k + p.k - 1] : std::numeric_limits<float>::quiet_NaN();
  }
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
        const int64_t q = i % width, id = p.first_id + row + i / width;
        const float bar = insert(p, begin + q, scores[i], id, std::min(p.k, id));
        for (int64_t j = q; j < repeat * width; j += width) bars[j] = bar;
      }
    }
  }
}

}  // namespace

void topk_search_cpu(const TopkSearchParams& p) {
  const int64_t blocks = (p.num_queries + kBlock - 1) / kBlock;
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(p.threads, blocks));
  const int64_t width = (blocks + parts - 1) / parts * kBlock;
#pragma omp parallel for num_threads(p.threads) if (parts > 1)
  for (int64_t begin = 0; begin < p.num_queries; begin += width) {
    fold(p, begin, std::min(begin + width, p.num_queries));
  }
}

}  // namespace stepcredit
