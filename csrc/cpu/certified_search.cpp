#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/candidates.h"
#include "cpu/common.h"
#include "cpu/int8_products.h"
#include "cpu/ops.h"

namespace stepcredit {
namespace {

// Largest errors and lengths of one block's rows, with which all of them are bounded at once. None is negative, and so
// they are ordered like their bits, whose maximum vectorises.
struct Widest {
  float error, norm;
};

STEPCREDIT_CLONES Widest widest_of(const CertifiedSearchParams& p, int64_t first, int64_t count) {
  int32_t error = 0, norm = 0;
  for (int64_t r = first; r < first + count; ++r) {
    int32_t bits[2];
    std::memcpy(&bits[0], p.error + r, sizeof bits[0]);
    std::memcpy(&bits[1], p.norm + r, sizeof bits[1]);
    error = std::max(error, bits[0]);
    norm = std::max(norm, bits[1]);
  }
  Widest out;
  std::memcpy(&out.error, &error, sizeof error);
  std::memcpy(&out.norm, &norm, sizeof norm);
  return out;
}

// Eight units of rounding of each of the two terms of an estimate. Four to six are used: by the product of the
// integers, their conversion and the two scales, by the query's product with the centre, by adding the two and the
// reach, and by the score, which is rounded to float32 too.
constexpr float kUlps = 4.8e-7f;

// For scales so small that their product is rounded as, or flushed like, a number below 2^-126.
float tiny(const CertifiedSearchParams& p) { return 16384.0f * static_cast<float>(p.width) * 0x1p-125f; }

// May a row of this block reach the bar, by the widest bound of all of them? Most blocks hold none that does. The
// comparison is negated, here and below, so that a bound that overflowed to NaN excludes nothing.
STEPCREDIT_CLONES bool may_reach(const CertifiedSearchParams& p, const Int8Queries& queries, int64_t q, int64_t first,
                                 const int32_t* sums, const Widest& widest, float bar) {
  const int64_t count = std::min<int64_t>(kInt8Block, p.num_passages - first);
  const int32_t offset = queries.offset[q];
  const float scale = queries.scale[q], mean = p.query_mean[q];
  // Twice the units, for sums in another order than below: what this excludes must not be a candidate there.
  const float ulps = p.exact ? 2 * kUlps : 0.0f;
  const float left = 1.000001f * (p.query_norm[q] * widest.error + queries.error[q] * widest.norm);
  const float above = mean + (p.exact ? left + ulps * std::fabs(mean) + tiny(p) : 0.0f);
  int any = 0;
  for (int64_t r = 0; r < count; ++r) {
    const float est = static_cast<float>(sums[r] - offset) * (scale * p.scale[first + r]);
    any |= !(est + ulps * std::fabs(est) + above < bar);
  }
  return any != 0;
}

// Bounds of the scores of one block for one query, and into `seen` what reaches its bar.
STEPCREDIT_CLONES void screen(const CertifiedSearchParams& p, int64_t q, int64_t first, const int32_t* sums,
                              const ExactScores& exact, Seen& seen) {
  const int64_t count = std::min<int64_t>(kInt8Block, p.num_passages - first);
  const int32_t offset = p.queries.offset[q];
  const float scale = p.queries.scale[q], left_out = p.queries.error[q];
  const float length = p.query_norm[q], mean = p.query_mean[q], least = tiny(p);
  float est[kInt8Block], reach[kInt8Block];
  int any = 0;
  for (int64_t r = 0; r < count; ++r) {
    est[r] = static_cast<float>(sums[r] - offset) * (scale * p.scale[first + r]);
    const float left = 1.000001f * (length * p.error[first + r] + left_out * p.norm[first + r]);
    reach[r] = p.exact ? left + kUlps * std::fabs(est[r]) + kUlps * std::fabs(mean) + least : 0.0f;
    est[r] += mean;
    any |= !(est[r] + reach[r] < seen.bar);
  }
  if (!any) return;
  for (int64_t r = 0; r < count; ++r) {
    const float upper = est[r] + reach[r];
    if (upper < seen.bar) continue;
    const float* query = p.exact_queries + q * p.width;
    seen.add(est[r] - reach[r], upper, first + r, p.k, query, p.exact ? &exact : nullptr);
  }
}

// Whether coarse products pay for a few queries. Where they left many queries in the last few blocks, they are tried on
// one block in sixteen only.
class CoarseRecord {
 public:
  bool worth_it(int64_t block) const { return survived_ < kMost || block % 16 == 0; }

  // `share` of the queries needed the fine products of a block after all.
  void saw(float share) { survived_ += (share - survived_) / 4; }

 private:
  // Ours: on AVX2 coarse products take about three quarters of the time of fine ones, so that they pay below a quarter.
  static constexpr float kMost = 0.2f;
  float survived_ = 0.0f;
};

// One block for up to kInt8Queries queries from `from` on.
void search_block(const CertifiedSearchParams& p, const Int8Products& products, int64_t from, int64_t block,
                  const Widest& widest, const ExactScores& exact, CoarseRecord& record, Seen* seen) {
  const int64_t first = block * kInt8Block, stride = p.groups * kInt8Group;
  const uint8_t* rows = p.rows + first * stride;
  const int all = static_cast<int>(std::min<int64_t>(kInt8Queries, p.num_queries - from));
  int32_t sums[kInt8Queries][kInt8Block];
  const int8_t* queries[kInt8Queries] = {};
  int64_t left[kInt8Queries];  // queries that the coarse products did not settle
  int count = 0;
  const bool barred = seen[from].bar > -std::numeric_limits<float>::infinity();  // before that nothing is left out
  if (p.exact && p.coarse.rows != nullptr && barred && record.worth_it(block)) {
    for (int c = 0; c < all; ++c) queries[c] = p.coarse.rows + (from + c) * stride;
    products.coarse[all - 1](rows, queries, p.groups, sums);
    for (int c = 0; c < all; ++c) {
      const int64_t q = from + c;
      if (may_reach(p, p.coarse, q, first, sums[c], widest, seen[q].bar)) left[count++] = q;
    }
    record.saw(static_cast<float>(count) / static_cast<float>(all));
    if (count == 0) return;
  } else {
    for (; count < all; ++count) left[count] = from + count;
  }
  for (int c = 0; c < count; ++c) queries[c] = p.queries.rows + left[c] * stride;
  products.fine[count - 1](rows, queries, p.groups, sums);
  for (int c = 0; c < count; ++c) {
    const int64_t q = left[c];
    if (may_reach(p, p.queries, q, first, sums[c], widest, seen[q].bar)) screen(p, q, first, sums[c], exact, seen[q]);
  }
}

}  // namespace

void certified_search_cpu(const CertifiedSearchParams& p) {
  const Int8Products products = int8_products(p.path);
  const int64_t blocks = (p.num_passages + kInt8Block - 1) / kInt8Block;
  const ExactScores exact{p.vectors, false, p.width};
  std::vector<std::vector<Seen>> seen(std::max(1, p.threads), std::vector<Seen>(p.num_queries));
  const auto parts = static_cast<int64_t>(seen.size());
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t part = 0; part < parts; ++part) {
    std::vector<CoarseRecord> records((p.num_queries + kInt8Queries - 1) / kInt8Queries);
    for (int64_t block = part * blocks / parts; block < (part + 1) * blocks / parts; ++block) {
      const int64_t count = std::min<int64_t>(kInt8Block, p.num_passages - block * kInt8Block);
      const Widest widest = widest_of(p, block * kInt8Block, count);
      for (int64_t q = 0; q < p.num_queries; q += kInt8Queries) {
        search_block(p, products, q, block, widest, exact, records[q / kInt8Queries], seen[part].data());
      }
    }
  }

  rank_candidates(seen, p.exact_queries, p.num_queries, p.k, p.exact ? &exact : nullptr, p.threads,
                  {p.scores, p.ids, p.rescored});
}

void quantize_cpu(const QuantizeParams& p) {
  const int64_t blocks = (p.num_passages + kInt8Block - 1) / kInt8Block, stride = p.groups * kInt8Group;
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t block = 0; block < blocks; ++block) {
    uint8_t* out = p.rows + block * stride * kInt8Block;
    std::fill_n(out, stride * kInt8Block, uint8_t{128});
    for (int64_t r = 0; r < kInt8Block; ++r) {
      const int64_t row = block * kInt8Block + r;
      p.scale[row] = p.error[row] = p.norm[row] = 0.0f;
      if (row >= p.num_passages) continue;
      const float* vector = p.vectors + row * p.width;
      double highest = 0.0;
      for (int64_t d = 0; d < p.width; ++d) {
        highest = std::max(highest, std::fabs(static_cast<double>(vector[d]) - p.centre[d]));
      }
      const auto scale = static_cast<float>(highest / 127.0);
      double left_out = 0.0, kept = 0.0;
      for (int64_t d = 0; d < p.width; ++d) {
        const double value = static_cast<double>(vector[d]) - p.centre[d];
        const double level = scale > 0.0f ? std::clamp(std::nearbyint(value / scale), -127.0, 127.0) : 0.0;
        out[(d / kInt8Group * kInt8Block + r) * kInt8Group + d % kInt8Group] =
            static_cast<uint8_t>(static_cast<int>(level) + 128);
        left_out += (value - level * scale) * (value - level * scale);
        kept += level * scale * (level * scale);
      }
      const auto up = [](double x) {
        return std::nextafter(static_cast<float>(std::sqrt(x) * (1 + 1e-12)), std::numeric_limits<float>::infinity());
      };
      p.scale[row] = scale;
      p.error[row] = up(left_out);
      p.norm[row] = up(kept);
    }
  }
}

void exact_scores_cpu(const ExactScoresParams& p) {
  const ExactScores exact{p.vectors, false, p.width};
#pragma omp parallel for num_threads(p.threads) \
    schedule(static) if (p.num_queries * p.count * p.width > kParallelMinimum)
  for (int64_t i = 0; i < p.num_queries * p.count; ++i)
    p.scores[i] = exact(p.queries + i / p.count * p.width, p.ids[i]);
}

}  // namespace stepcredit
