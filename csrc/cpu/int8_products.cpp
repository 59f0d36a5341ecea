#include "cpu/int8_products.h"

#include <algorithm>

#include "cpu/ops.h"

#if defined(__x86_64__) && defined(__linux__)
#include <immintrin.h>
#endif

namespace stepcredit {
namespace {

template <int Count>
void multiply_plain(const uint8_t* block, const int8_t* const (&queries)[kInt8Queries], int64_t groups,
                    int32_t (&sums)[kInt8Queries][kInt8Block]) {
  for (int c = 0; c < Count; ++c) {
    std::fill_n(sums[c], kInt8Block, 0);
    for (int64_t g = 0; g < groups; ++g) {
      const uint8_t* rows = block + g * kInt8Block * kInt8Group;
      for (int r = 0; r < kInt8Block; ++r) {
        for (int i = 0; i < kInt8Group; ++i) sums[c][r] += rows[r * kInt8Group + i] * queries[c][g * kInt8Group + i];
      }
    }
  }
}

#if defined(__x86_64__) && defined(__linux__)
int32_t four(const int8_t* query, int64_t group) {
  int32_t packed;
  __builtin_memcpy(&packed, query + group * kInt8Group, sizeof packed);
  return packed;
}

template <int Count>
__attribute__((target("avx512f,avx512bw,avx512vnni"))) void multiply_vnni(const uint8_t* block,
                                                                          const int8_t* const (&queries)[kInt8Queries],
                                                                          int64_t groups,
                                                                          int32_t (&sums)[kInt8Queries][kInt8Block]) {
  constexpr int kVectors = kInt8Block / 16;
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

// Adds products of groups [first, last) to the sums of some queries: `Vectors` times eight passages at a time, and the
// products of `Added` groups in 16 bits before they are widened.
template <int Queries, int Vectors, int Added>
__attribute__((target("avx2"), always_inline)) inline void add_avx2(const uint8_t* block, const int8_t* const* queries,
                                                                    int64_t first, int64_t last,
                                                                    int32_t (*sums)[kInt8Block]) {
  const __m256i ones = _mm256_set1_epi16(1);
  for (int row = 0; row < kInt8Block; row += 8 * Vectors) {
    __m256i sum[Queries][Vectors];
#pragma GCC unroll 4
    for (int i = 0; i < Queries; ++i) {
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) {
        const auto* kept = reinterpret_cast<const __m256i*>(sums[i] + row + 8 * v);
        sum[i][v] = first == 0 ? _mm256_setzero_si256() : _mm256_loadu_si256(kept);
      }
    }
    for (int64_t g = first; g < last; g += Added) {
      __m256i added[Queries][Vectors];
#pragma GCC unroll 4
      for (int j = 0; j < Added; ++j) {
        const uint8_t* passages = block + ((g + j) * kInt8Block + row) * kInt8Group;
        __m256i query[Queries];
#pragma GCC unroll 4
        for (int i = 0; i < Queries; ++i) query[i] = _mm256_set1_epi32(four(queries[i], g + j));
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) {
          const __m256i rows = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(passages + v * 32));
#pragma GCC unroll 4
          for (int i = 0; i < Queries; ++i) {
            const __m256i products = _mm256_maddubs_epi16(rows, query[i]);
            added[i][v] = j == 0 ? products : _mm256_add_epi16(added[i][v], products);
          }
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < Queries; ++i) {
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) {
          sum[i][v] = _mm256_add_epi32(sum[i][v], _mm256_madd_epi16(added[i][v], ones));
        }
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < Queries; ++i) {
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums[i] + row + 8 * v), sum[i][v]);
      }
    }
  }
}

// Pairs of products are added in 16 bits, which queries of 7 bits cannot overflow: 2 * 255 * 63 < 2^15; nor can those
// of -32 to 32 when two groups are added: 4 * 255 * 32 < 2^15. Few groups at a time, so that their rows stay in the L1
// cache for all queries; two queries at a time, so that sums stay in registers.
template <int Count, int Vectors, int Added>
__attribute__((target("avx2"))) void multiply_avx2(const uint8_t* block, const int8_t* const (&queries)[kInt8Queries],
                                                   int64_t groups, int32_t (&sums)[kInt8Queries][kInt8Block]) {
  constexpr int64_t kChunk = 64;
  for (int64_t first = 0; first < groups; first += kChunk) {
    const int64_t last = std::min<int64_t>(first + kChunk, groups), even = last - (last - first) % Added;
    int c = 0;
    for (; c + 2 <= Count; c += 2) {
      add_avx2<2, Vectors, Added>(block, queries + c, first, even, sums + c);
      if (even < last) add_avx2<2, Vectors, 1>(block, queries + c, even, last, sums + c);
    }
    if (c < Count) {
      add_avx2<1, Vectors, Added>(block, queries + c, first, even, sums + c);
      if (even < last) add_avx2<1, Vectors, 1>(block, queries + c, even, last, sums + c);
    }
  }
}

template <int Count>
constexpr Int8Multiply fine_avx2 = multiply_avx2<Count, 4, 1>;
template <int Count>
constexpr Int8Multiply coarse_avx2 = multiply_avx2<Count, 2, 2>;
#endif

}  // namespace

Int8Path int8_path() {
#if defined(__x86_64__) && defined(__linux__)
  if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw")) return Int8Path::kVnni;
  if (__builtin_cpu_supports("avx2")) return Int8Path::kAvx2;
#endif
  return Int8Path::kPlain;
}

#define STEPCREDIT_COUNTS(name) {name<1>, name<2>, name<3>, name<4>, name<5>, name<6>}

Int8Products int8_products(Int8Path path) {
#if defined(__x86_64__) && defined(__linux__)
  if (path == Int8Path::kVnni) return {STEPCREDIT_COUNTS(multiply_vnni), {}};
  if (path == Int8Path::kAvx2) return {STEPCREDIT_COUNTS(fine_avx2), STEPCREDIT_COUNTS(coarse_avx2)};
#endif
  return {STEPCREDIT_COUNTS(multiply_plain), {}};
}

}  // namespace stepcredit
