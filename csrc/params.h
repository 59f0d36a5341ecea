// One plain struct per op: pointers, sizes, strides in elements. Shared by the CPU and CUDA kernels;
// no torch and no Python header is included anywhere below this folder except in bindings.cpp.
#pragma once

#include <cstdint>

namespace stepcredit {

enum class Scale : int { kNone = 0, kStd = 1 };
enum class Singleton : int { kZero = 0, kReward = 1 };

// B rollouts, M rewards of each, T packed tokens, S steps. Everything is contiguous.
template <typename Float>
struct MaskedAdvantagesParams {
  const Float* rewards;        // [B, M]
  const int64_t* groups;       // [B], in [0, B)
  const int64_t* cu_seqlens;   // [B + 1]
  const uint8_t* policy_mask;  // [T]
  const int64_t* step_ids;     // [T], in [-1, S)
  const Float* step_gains;     // [S], NaN = unscored
  const Float* weights;        // [M], or null: 1
  Float* advantages;           // [T], written everywhere
  int64_t num_rollouts, num_rewards, num_tokens, num_steps;
  double alpha, eps;
  int64_t ddof;
  Scale scale;
  Singleton singleton;
  double dead_zone, negative_scale, soft_clip;
  bool nan_is_missing;  // a reward that is NaN counts for nobody; else it is a mistake, and its group becomes NaN
  bool batch_norm;
  int threads;
};

// R branches, V gold variants, S steps; offsets nest: steps own variants, variants own branches, branches own
// log-probs.
template <typename Float>
struct InformationGainParams {
  const Float* logprobs;       // [M]
  const int64_t* cu_branches;  // [R + 1] into logprobs
  const int64_t* cu_variants;  // [V + 1] into branches; a variant's first branch is the real one
  const int64_t* cu_steps;     // [S + 1] into variants
  Float* gain;                 // [S], NaN where not scored
  Float* real;                 // [S]
  Float* baseline;             // [S], NaN where not scored
  uint8_t* scored;             // [S]
  Float* scores;               // [R]
  int64_t* best_variant;       // [S], index into all variants, -1 for a step without any
  int64_t num_branches, num_variants, num_steps;
  int64_t head_tokens;
  double head_weight;
  int threads;
};

// Folds the scores of one stripe of passages into each query's list of the best so far. Tiles come in order of their
// passages; before one with first_id = n every list holds min(k, n) entries. Everything is contiguous.
struct TopkSearchParams {
  const float* tile;  // [rows, num_queries], inner products
  int64_t rows, num_queries;
  int64_t first_id;  // passage of the tile's first row
  int64_t k;         // at most the number of passages
  float* scores;     // [num_queries, k], best first
  int64_t* ids;      // [num_queries, k]
  int threads;
};

// Passages of a block of 8-bit rows.
constexpr int kInt8Block = 64;

// How 8-bit products are computed: by AVX-512 VNNI, by AVX2 (which takes queries of 7 bits), or by plain loops.
enum class Int8Path : int { kPlain = 0, kAvx2 = 1, kVnni = 2 };

// Passages as 8-bit rows: passage - centre = scale * row + what is left out. Everything is contiguous; groups are of
// four components, the last one filled up with zeros, and blocks of kInt8Block passages likewise.
struct QuantizeParams {
  const float* vectors;  // [num_passages, width]
  const float* centre;   // [width]
  uint8_t* rows;         // [blocks, groups, kInt8Block, 4], row + 128
  float* scale;          // [blocks * kInt8Block]
  float* error;          // [blocks * kInt8Block], at least the length of what is left out
  float* norm;           // [blocks * kInt8Block], at least the length of scale * row
  int64_t num_passages, width, groups;
  int threads;
};

// Queries as 8-bit integers: query = scale * row + what is left out.
struct Int8Queries {
  const int8_t* rows;     // [num_queries, groups * 4]
  const float* scale;     // [num_queries]
  const float* error;     // [num_queries], at least the length of what is left out
  const int32_t* offset;  // [num_queries], 128 * the sum of the row
};

// The k passages of largest inner product: 8-bit products bound every score, and those whose upper bound reaches the
// k-th lower bound are computed from the vectors themselves.
struct CertifiedSearchParams {
  const uint8_t* rows;  // as in QuantizeParams
  const float* scale;   // [blocks * kInt8Block]
  const float* error;   // [blocks * kInt8Block]
  const float* norm;    // [blocks * kInt8Block]
  Int8Queries queries;
  Int8Queries coarse;          // to leave out most blocks at less cost; rows null: do without. With kAvx2 alone
  const float* query_norm;     // [num_queries], at least the length of the query
  const float* query_mean;     // [num_queries], inner product with the centre
  const float* exact_queries;  // [num_queries, width]
  const float* vectors;        // [num_passages, width]; not read unless exact
  float* scores;               // [num_queries, k], best first
  int64_t* ids;                // [num_queries, k]
  int64_t* rescored;           // [num_queries], scores computed from vectors
  int64_t num_queries, num_passages, width, groups;
  int64_t k;   // at most num_passages
  bool exact;  // false: rank by the 8-bit products
  Int8Path path;
  int threads;
};

// How float32 products are computed: by AVX-512, by AVX2 with FMA, or by plain loops.
enum class FloatPath : int { kPlain = 0, kAvx2 = 1, kAvx512 = 2 };

// The k passages of largest inner product: estimates in float32 bound every score, and those that may be a hit are
// computed again in double. Everything is contiguous.
struct ExactSearchParams {
  const float* queries;  // [num_queries, width]
  const void* vectors;   // [num_passages, width], float32 or bfloat16
  bool bfloat16;
  double longest;     // length of the longest vector
  float* scores;      // [num_queries, k], best first
  int64_t* ids;       // [num_queries, k]
  int64_t* rescored;  // [num_queries], scores computed in double
  int64_t num_queries, num_passages, width;
  int64_t k;  // at most num_passages
  FloatPath path;
  int threads;
};

// Inner products summed in double, rounded to float32.
struct ExactScoresParams {
  const float* queries;  // [num_queries, width]
  const float* vectors;  // [passages, width]
  const int64_t* ids;    // [num_queries, count]
  float* scores;         // [num_queries, count]
  int64_t num_queries, count, width;
  int threads;
};

// out = left @ right^T in float32, everything contiguous; depth is even.
struct Bf16ProductParams {
  const uint16_t* left;   // [rows, depth] bfloat16
  const uint16_t* right;  // [cols, depth] bfloat16
  float* out;             // [rows, cols]
  int64_t rows, cols, depth;
  int threads;
};

// A tile of matrix products hidden @ weight.T, contiguous, overwritten by what is computed from it.
template <typename Float>
struct LogitTile {
  Float* logits;          // [rows, cols]
  const Float* bias;      // [cols] or null
  const uint8_t* active;  // [rows], or null for all: the others are not folded, and their gradient is 0
  int64_t rows, cols, first_col;
  double scale, softcap, temperature;  // softcap 0: none
};

// Folds a tile into running values of its rows. They start at maximum = -inf, sum = weighted = 0.
template <typename Float>
struct GatherLogprobsFoldParams {
  LogitTile<Float> tile;
  const int64_t* targets;  // [rows, num_targets], columns of the whole vocabulary
  double* maximum;         // [rows] m
  double* sum;             // [rows] of exp(z - m)
  double* weighted;        // [rows] sum of exp(z - m) (z - m)
  double* picked;          // [rows, num_targets] logits of the targets
  int64_t num_targets;
  int threads;
};

// Overwrites a tile with the gradient of the matrix products.
template <typename Float>
struct GatherLogprobsGradParams {
  LogitTile<Float> tile;
  const int64_t* targets;      // [rows, num_targets]
  const Float* grad_logprobs;  // [rows, num_targets]
  const Float* grad_entropy;   // [rows]
  const Float* maximum;        // [rows]
  const Float* log_sum;        // [rows]
  const Float* entropy;        // [rows]
  int64_t num_targets;
  int threads;
};

}  // namespace stepcredit
