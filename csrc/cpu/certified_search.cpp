#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/candidates.h"
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

// Pairs of products are added in 16 bits, which queries of 7 bits cannot overflow: 2 * 255 * 63 < 2^15. Few groups at a
// time, so that their rows stay in the L1 cache for all queries, of which two at a time meet half of the passages, so
// that their sums stay in registers. Where there is no second query, the first is multiplied twice.
template <int Count>
__attribute__((target("avx2"))) void multiply_avx2(const uint8_t* block, const int8_t* const (&queries)[kQueries],
                                                   int64_t groups, int32_t (&sums)[kQueries][kRows]) {
  constexpr int kVectors = kRows / 16, kChunk = 64;
  const __m256i ones = _mm256_set1_epi16(1);
  for (int64_t first = 0; first < groups; first += kChunk) {
    const int64_t last = std::min<int64_t>(first + kChunk, groups);
    for (int c = 0; c < Count; c += 2) {
      const int pair[2] = {c, std::min(c + 1, Count - 1)};
      for (int half = 0; half < kRows; half += kRows / 2) {
        __m256i sum[2][kVectors];
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) {
            const auto* kept = reinterpret_cast<const __m256i*>(sums[pair[i]] + half + 8 * v);
            sum[i][v] = first == 0 ? _mm256_setzero_si256() : _mm256_loadu_si256(kept);
          }
        }
        for (int64_t g = first; g < last; ++g) {
          const __m256i query[2] = {_mm256_set1_epi32(four(queries[pair[0]], g)),
                                    _mm256_set1_epi32(four(queries[pair[1]], g))};
          const uint8_t* passages = block + (g * kRows + half) * kGroup;
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) {
            const __m256i rows = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(passages + v * 32));
#pragma GCC unroll 2
            for (int i = 0; i < 2; ++i) {
              sum[i][v] = _mm256_add_epi32(sum[i][v], _mm256_madd_epi16(_mm256_maddubs_epi16(rows, query[i]), ones));
            }
          }
        }
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) {
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums[pair[i]] + half + 8 * v), sum[i][v]);
          }
        }
      }
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

// Bounds of the scores of one block for one query, and into `seen` what reaches its bar. Most blocks hold nothing that
// does, as the widest bound tells at less cost. Comparisons are negated, so that a bound that overflowed to NaN
// excludes nothing.
STEPCREDIT_CLONES void screen(const CertifiedSearchParams& p, int64_t q, int64_t first, const int32_t* sums,
                              const Widest& widest, const ExactScores& exact, Seen& seen) {
  const int64_t count = std::min<int64_t>(kRows, p.num_passages - first);
  const int32_t offset = p.query_offset[q];
  const float scale = p.query_scale[q], left_out = p.query_error[q], length = p.query_norm[q], mean = p.query_mean[q];
  // Eight units of rounding of each of the two terms. Four to six are used: by the product of the integers, their
  // conversion and the two scales, by the query's product with the centre, by adding the two and the reach, and by the
  // score, which is rounded to float32 too.
  constexpr float kUlps = 4.8e-7f;
  // For scales so small that their product is rounded as, or flushed like, a number below 2^-126.
  const float tiny = 16384.0f * static_cast<float>(p.width) * 0x1p-125f;
  // Twice the units, for sums in another order than below: what this excludes must not be a candidate there.
  const float ulps = p.exact ? 2 * kUlps : 0.0f;
  const float widest_left = 1.000001f * (length * widest.error + left_out * widest.norm);
  const float above = mean + (p.exact ? widest_left + ulps * std::fabs(mean) + tiny : 0.0f);
  float est[kRows], reach[kRows];
  int any = 0;
  for (int64_t r = 0; r < count; ++r) {
    est[r] = static_cast<float>(sums[r] - offset) * (scale * p.scale[first + r]);
    any |= !(est[r] + ulps * std::fabs(est[r]) + above < seen.bar);
  }
  if (!any) return;
  any = 0;
  for (int64_t r = 0; r < count; ++r) {
    const float left = 1.000001f * (length * p.error[first + r] + left_out * p.norm[first + r]);
    reach[r] = p.exact ? left + kUlps * std::fabs(est[r]) + kUlps * std::fabs(mean) + tiny : 0.0f;
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
  const ExactScores exact{p.vectors, false, p.width};
  std::vector<std::vector<Seen>> seen(std::max(1, p.threads), std::vector<Seen>(p.num_queries));
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t part = 0; part < static_cast<int64_t>(seen.size()); ++part) {
    const int64_t begin = part * blocks / static_cast<int64_t>(seen.size());
    const int64_t end = (part + 1) * blocks / static_cast<int64_t>(seen.size());
    int32_t sums[kQueries][kRows];
    for (int64_t block = begin; block < end; ++block) {
      const uint8_t* rows = p.rows + block * stride * kRows;
      const Widest widest = widest_of(p, block * kRows, std::min<int64_t>(kRows, p.num_passages - block * kRows));
      for (int64_t q = 0; q < p.num_queries; q += kQueries) {
        const int count = static_cast<int>(std::min<int64_t>(kQueries, p.num_queries - q));
        const int8_t* queries[kQueries] = {};
        for (int c = 0; c < count; ++c) queries[c] = p.queries + (q + c) * stride;
        multiply.by_count[count - 1](rows, queries, groups, sums);
        for (int c = 0; c < count; ++c) screen(p, q + c, block * kRows, sums[c], widest, exact, seen[part][q + c]);
      }
    }
  }

  rank_candidates(seen, p.exact_queries, p.num_queries, p.k, p.exact ? &exact : nullptr, p.threads,
                  {p.scores, p.ids, p.rescored});
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
  const ExactScores exact{p.vectors, false, p.width};
#pragma omp parallel for num_threads(p.threads) \
    schedule(static) if (p.num_queries * p.count * p.width > kParallelMinimum)
  for (int64_t i = 0; i < p.num_queries * p.count; ++i)
    p.scores[i] = exact(p.queries + i / p.count * p.width, p.ids[i]);
}

}  // namespace stepcredit
