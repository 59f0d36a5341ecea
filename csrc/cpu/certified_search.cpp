#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/common.h"
#include "cpu/ops.h"

#if defined(__x86_64__) && defined(__linux__)
#include <immintrin.h>
#endif

namespace stepcredit {
namespace {

constexpr int kRows = kInt8Block;  // passages of a block: one load yields four components of 16 of them
constexpr int kGroup = 4;          // components that one instruction multiplies and adds up
constexpr int kQueries = 6;        // queries at a time: kRows / 16 * 6 = 24 sums stay in registers

// sums[c][r] = dot(row r + 128, queries[c]). Rows are unsigned, since that is what the instructions take.
using Multiply = void (*)(const uint8_t* block, const int8_t* const (&queries)[kQueries], int64_t groups,
                          int32_t (&sums)[kQueries][kRows]);

template <int Count>
void multiply_plain(const uint8_t* block, const int8_t* const (&queries)[kQueries], int64_t groups,
                    int32_t (&sums)[kQueries][kRows]) {
  for (int c = 0; c < Count; ++c) {
    std::fill_n(sums[c], kRows, 0);
    for (int64_t g = 0; g < groups; ++g) {
      const uint8_t* rows = block + g * kRows * kGroup;
      for (int r = 0; r < kRows; ++r) {
        for (int i = 0; i < kGroup; ++i) sums[c][r] += rows[r * kGroup + i] * queries[c][g * kGroup + i];
      }
    }
  }
}

#if defined(__x86_64__) && defined(__linux__)
int32_t four(const int8_t* query, int64_t group) {
  int32_t packed;
  __builtin_memcpy(&packed, query + group * kGroup, sizeof packed);
  return packed;
}

template <int Count>
__attribute__((target("avx512f,avx512bw,avx512vnni"))) void multiply_vnni(const uint8_t* block,
                                                                          const int8_t* const (&queries)[kQueries],
                                                                          int64_t groups,
                                                                          int32_t (&sums)[kQueries][kRows]) {
  constexpr int kVectors = kRows / 16;
  __m512i sum[Count][kVectors];
#pragma GCC unroll 6
  for (int c = 0; c < Count; ++c) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[c][v] = _mm512_setzero_si512();
  }
  for (int64_t g = 0; g < groups; ++g) {
    __m512i rows[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) rows[v] = _mm512_loadu_si512(block + (g * kVectors + v) * 64);
#pragma GCC unroll 6
    for (int c = 0; c < Count; ++c) {
      const __m512i query = _mm512_set1_epi32(four(queries[c], g));
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[c][v] = _mm512_dpbusd_epi32(sum[c][v], rows[v], query);
    }
  }
#pragma GCC unroll 6
  for (int c = 0; c < Count; ++c) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) _mm512_storeu_si512(sums[c] + 16 * v, sum[c][v]);
  }
}

// Pairs of products are added in 16 bits, which queries of 7 bits cannot overflow: 2 * 255 * 63 < 2^15.
template <int Count>
__attribute__((target("avx2"))) void multiply_avx2(const uint8_t* block, const int8_t* const (&queries)[kQueries],
                                                   int64_t groups, int32_t (&sums)[kQueries][kRows]) {
  constexpr int kVectors = kRows / 8;
  const __m256i ones = _mm256_set1_epi16(1);
  for (int c = 0; c < Count; ++c) {
    __m256i sum[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sum[v] = _mm256_setzero_si256();
    for (int64_t g = 0; g < groups; ++g) {
      const __m256i query = _mm256_set1_epi32(four(queries[c], g));
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const __m256i rows = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block + (g * kVectors + v) * 32));
        sum[v] = _mm256_add_epi32(sum[v], _mm256_madd_epi16(_mm256_maddubs_epi16(rows, query), ones));
      }
    }
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums[c] + 8 * v), sum[v]);
    }
  }
}
#endif

struct Kernels {
  Multiply by_count[kQueries];  // for 1 to kQueries queries
};

#define STEPCREDIT_KERNELS(name)                           \
  Kernels {                                                \
    {                                                      \
      name<1>, name<2>, name<3>, name<4>, name<5>, name<6> \
    }                                                      \
  }

Kernels kernels(Int8Path path) {
#if defined(__x86_64__) && defined(__linux__)
  if (path == Int8Path::kVnni) return STEPCREDIT_KERNELS(multiply_vnni);
  if (path == Int8Path::kAvx2) return STEPCREDIT_KERNELS(multiply_avx2);
#endif
  return STEPCREDIT_KERNELS(multiply_plain);
}

struct Candidate {
  float upper;
  int64_t id;
};

// What one thread knows of one query: the k highest lower bounds that it has seen, as a heap with the lowest in front,
// and every passage whose upper bound reaches them.
struct Seen {
  float bar = -std::numeric_limits<float>::infinity();  // the k-th highest lower bound
  std::vector<float> lowers;
  std::vector<Candidate> candidates;
  size_t prune_at = 1024;

  void add(float lower, float upper, int64_t id, int64_t k) {
    candidates.push_back({upper, id});
    const auto size = static_cast<int64_t>(lowers.size());
    if (std::isnan(lower) || (size == k && !(lower > lowers.front()))) return;
    if (size == k) {
      std::pop_heap(lowers.begin(), lowers.end(), std::greater<>());
      lowers.back() = lower;
    } else {
      lowers.push_back(lower);
    }
    std::push_heap(lowers.begin(), lowers.end(), std::greater<>());
    if (static_cast<int64_t>(lowers.size()) == k) bar = lowers.front();
    if (candidates.size() >= prune_at) prune();
  }

  void prune() {
    const auto hopeless = [this](const Candidate& c) { return c.upper < bar; };
    candidates.erase(std::remove_if(candidates.begin(), candidates.end(), hopeless), candidates.end());
    prune_at = std::max<size_t>(1024, 2 * candidates.size());
  }
};

// Bounds of the scores of one block for one query, and into `seen` what reaches its bar: comparisons are negated, so
// that a bound that overflowed to NaN excludes nothing.
STEPCREDIT_CLONES void screen(const CertifiedSearchParams& p, int64_t q, int64_t first, const int32_t* sums,
                              Seen& seen) {
  const int64_t count = std::min<int64_t>(kRows, p.num_passages - first);
  const int32_t offset = p.query_offset[q];
  const float scale = p.query_scale[q], left_out = p.query_error[q], length = p.query_norm[q];
  // Scores are compared after rounding to float32, and est itself is rounded: four units in the last place of each.
  constexpr float kUlps = 4.8e-7f;
  const float mean = kUlps * std::fabs(p.query_mean[q]);
  float est[kRows], reach[kRows];
  int any = 0;
  for (int64_t r = 0; r < count; ++r) {
    est[r] = static_cast<float>(sums[r] - offset) * (scale * p.scale[first + r]);
    const float left = 1.000001f * (length * p.error[first + r] + left_out * p.norm[first + r]);
    reach[r] = p.exact ? left + kUlps * std::fabs(est[r]) + mean : 0.0f;
    any |= !(est[r] + reach[r] < seen.bar);
  }
  if (!any) return;
  for (int64_t r = 0; r < count; ++r) {
    const float upper = est[r] + reach[r];
    if (!(upper < seen.bar)) seen.add(est[r] - reach[r], upper, first + r, p.k);
  }
}

// Products of float32 are exact in double, so contraction changes nothing, and the lanes fix the order of the sum.
STEPCREDIT_CLONES double dot(const float* a, const float* b, int64_t n) {
  constexpr int kLanes = 16;
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) lanes[j] += static_cast<double>(a[i + j]) * static_cast<double>(b[i + j]);
  }
  for (int j = 0; i < n; ++i, ++j) lanes[j] += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int j = 0; j < width; ++j) lanes[j] += lanes[j + width];
  }
  return lanes[0];
}

// The candidates of all threads that reach the k-th lower bound of all passages.
std::vector<Candidate> merged(const CertifiedSearchParams& p, std::vector<std::vector<Seen>>& seen, int64_t q) {
  std::vector<float> lowers;
  size_t count = 0;
  for (auto& one : seen) {
    lowers.insert(lowers.end(), one[q].lowers.begin(), one[q].lowers.end());
    count += one[q].candidates.size();
  }
  float bar = -std::numeric_limits<float>::infinity();
  if (static_cast<int64_t>(lowers.size()) >= p.k) {
    std::nth_element(lowers.begin(), lowers.begin() + (p.k - 1), lowers.end(), std::greater<>());
    bar = lowers[p.k - 1];
  }
  std::vector<Candidate> out;
  out.reserve(count);
  for (auto& one : seen) {
    for (const Candidate& c : one[q].candidates) {
      if (!(c.upper < bar)) out.push_back(c);
    }
  }
  return out;
}

}  // namespace

Int8Path int8_path() {
#if defined(__x86_64__) && defined(__linux__)
  if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw")) return Int8Path::kVnni;
  if (__builtin_cpu_supports("avx2")) return Int8Path::kAvx2;
#endif
  return Int8Path::kPlain;
}

void certified_search_cpu(const CertifiedSearchParams& p) {
  const Kernels multiply = kernels(p.path);
  const int64_t blocks = (p.num_passages + kRows - 1) / kRows, groups = p.groups;
  const int64_t stride = groups * kGroup;
  std::vector<std::vector<Seen>> seen(std::max(1, p.threads), std::vector<Seen>(p.num_queries));
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t part = 0; part < static_cast<int64_t>(seen.size()); ++part) {
    const int64_t begin = part * blocks / static_cast<int64_t>(seen.size());
    const int64_t end = (part + 1) * blocks / static_cast<int64_t>(seen.size());
    int32_t sums[kQueries][kRows];
    for (int64_t block = begin; block < end; ++block) {
      const uint8_t* rows = p.rows + block * stride * kRows;
      for (int64_t q = 0; q < p.num_queries; q += kQueries) {
        const int count = static_cast<int>(std::min<int64_t>(kQueries, p.num_queries - q));
        const int8_t* queries[kQueries] = {};
        for (int c = 0; c < count; ++c) queries[c] = p.queries + (q + c) * stride;
        multiply.by_count[count - 1](rows, queries, groups, sums);
        for (int c = 0; c < count; ++c) screen(p, q + c, block * kRows, sums[c], seen[part][q + c]);
      }
    }
  }

  std::vector<std::vector<Candidate>> candidates(p.num_queries);
  std::vector<int64_t> starts(p.num_queries + 1, 0);
  for (int64_t q = 0; q < p.num_queries; ++q) {
    candidates[q] = merged(p, seen, q);
    starts[q + 1] = starts[q] + static_cast<int64_t>(candidates[q].size());
  }
  // One list of all, so that threads share the work of a single query; passages may still have to come from a disk.
  if (p.exact) {
#pragma omp parallel for num_threads(p.threads) schedule(dynamic, 16)
    for (int64_t i = 0; i < starts.back(); ++i) {
      const int64_t q = std::upper_bound(starts.begin(), starts.end(), i) - starts.begin() - 1;
      Candidate& c = candidates[q][i - starts[q]];
      c.upper = static_cast<float>(dot(p.exact_queries + q * p.width, p.vectors + c.id * p.width, p.width));
    }
  }
  for (int64_t q = 0; q < p.num_queries; ++q) {
    auto& mine = candidates[q];
    const auto better = [](const Candidate& a, const Candidate& b) {
      return a.upper > b.upper || (a.upper == b.upper && a.id < b.id);
    };
    std::partial_sort(mine.begin(), mine.begin() + p.k, mine.end(), better);
    for (int64_t i = 0; i < p.k; ++i) {
      p.scores[q * p.k + i] = p.exact ? mine[i].upper : mine[i].upper + p.query_mean[q];
      p.ids[q * p.k + i] = mine[i].id;
    }
    p.rescored[q] = p.exact ? static_cast<int64_t>(mine.size()) : 0;
  }
}

void quantize_cpu(const QuantizeParams& p) {
  const int64_t blocks = (p.num_passages + kRows - 1) / kRows, stride = p.groups * kGroup;
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t block = 0; block < blocks; ++block) {
    uint8_t* out = p.rows + block * stride * kRows;
    std::fill_n(out, stride * kRows, uint8_t{128});
    for (int64_t r = 0; r < kRows; ++r) {
      const int64_t row = block * kRows + r;
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
        out[(d / kGroup * kRows + r) * kGroup + d % kGroup] = static_cast<uint8_t>(static_cast<int>(level) + 128);
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
#pragma omp parallel for num_threads(p.threads) \
    schedule(static) if (p.num_queries * p.count * p.width > kParallelMinimum)
  for (int64_t i = 0; i < p.num_queries * p.count; ++i) {
    const float* query = p.queries + i / p.count * p.width;
    p.scores[i] = static_cast<float>(dot(query, p.vectors + p.ids[i] * p.width, p.width));
  }
}

}  // namespace stepcredit
