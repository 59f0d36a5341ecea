// Products of blocks of 8-bit rows with a few queries at a time.
#pragma once

#include <cstdint>

#include "params.h"

namespace stepcredit {

constexpr int kInt8Group = 4;    // components that one instruction multiplies and adds up
constexpr int kInt8Queries = 6;  // queries at a time: by VNNI kInt8Block / 16 * 6 = 24 sums stay in registers

// sums[c][r] = dot(row r + 128, queries[c]). Rows are unsigned, since that is what the instructions take.
using Int8Multiply = void (*)(const uint8_t* block, const int8_t* const (&queries)[kInt8Queries], int64_t groups,
                              int32_t (&sums)[kInt8Queries][kInt8Block]);

// Sums of 16 bits bound the integers of queries: by AVX2 they are at most 63 in size, and 32 for coarse products, as
// LEVELS and COARSE_LEVELS of retrieval/int8.py have them. By the number of queries less one; what of `queries` and
// `sums` lies above that number is not read or means nothing.
struct Int8Products {
  Int8Multiply fine[kInt8Queries];
  Int8Multiply coarse[kInt8Queries];  // where smaller integers are faster, else null
};

Int8Products int8_products(Int8Path path);

}  // namespace stepcredit
