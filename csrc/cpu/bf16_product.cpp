// Float32 products of bfloat16 matrices. torch.mm rounds such products to bfloat16, which leaves 8 bits of a logit.
#include <algorithm>
#include <vector>

#include "cpu/ops.h"

#if defined(__x86_64__) && defined(__linux__)
#include <immintrin.h>
#define STEPCREDIT_AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512bf16")))
#endif

namespace stepcredit {

#ifdef STEPCREDIT_AVX512_BF16
namespace {

// A panel is kCols rows of the right matrix, stored so that one load yields a pair of values of 16 neighbouring rows.
// kRows * kCols / 16 = 24 sums stay in registers, with 4 registers for the panel.
constexpr int kRows = 6, kCols = 64, kPairBlock = 16;

void pack(const uint32_t* right, int64_t rows, int64_t pairs, uint32_t* panel) {
  for (int64_t first = 0; first < pairs; first += kPairBlock) {
    const int64_t last = std::min<int64_t>(first + kPairBlock, pairs);
    for (int64_t n = 0; n < kCols; ++n) {
      for (int64_t k = first; k < last; ++k) panel[k * kCols + n] = n < rows ? right[n * pairs + k] : 0;
    }
  }
}

STEPCREDIT_AVX512_BF16 void multiply(const uint32_t* const (&left)[kRows], const uint32_t* panel, int64_t pairs,
                                     float* const (&out)[kRows], int64_t cols) {
  constexpr int kVectors = kCols / 16;
  __m512 sums[kRows][kVectors];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[r][v] = _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < pairs; ++k) {
    __m512i b[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) b[v] = _mm512_loadu_si512(panel + k * kCols + 16 * v);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const __m512bh a = (__m512bh)_mm512_set1_epi32(static_cast<int>(left[r][k]));
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], a, (__m512bh)b[v]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const int64_t left_over = std::clamp<int64_t>(cols - 16 * v, 0, 16);
      _mm512_mask_storeu_ps(out[r] + 16 * v, static_cast<__mmask16>((1u << left_over) - 1), sums[r][v]);
    }
  }
}

}  // namespace

bool bf16_product_available() { return __builtin_cpu_supports("avx512bf16"); }

void bf16_product_cpu(const Bf16ProductParams& p) {
  const int64_t pairs = p.depth / 2, panels = (p.cols + kCols - 1) / kCols;
  const auto* left = reinterpret_cast<const uint32_t*>(p.left);
  const auto* right = reinterpret_cast<const uint32_t*>(p.right);
#pragma omp parallel num_threads(p.threads)
  {
    std::vector<uint32_t> panel(pairs * kCols);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < panels; ++i) {
      const int64_t first = i * kCols, cols = std::min<int64_t>(kCols, p.cols - first);
      pack(right + first * pairs, cols, pairs, panel.data());
      for (int64_t row = 0; row < p.rows; row += kRows) {
        // The last rows are computed more than once rather than by a second, shorter kernel.
        const uint32_t* a[kRows];
        float* c[kRows];
        for (int r = 0; r < kRows; ++r) {
          const int64_t at = std::min(row + r, p.rows - 1);
          a[r] = left + at * pairs;
          c[r] = p.out + at * p.cols + first;
        }
        multiply(a, panel.data(), pairs, c, cols);
      }
    }
  }
}
#else
bool bf16_product_available() { return false; }
void bf16_product_cpu(const Bf16ProductParams&) {}
#endif

}  // namespace stepcredit
