// Products of blocks of 8-bit rows with a few queries at a time.
#pragma once

#include <cstdint>

#include "params.h"

namespace stepcredit {

constexpr int kInt8Group = 4;    // components that one instruction multiplies and adds up
constexpr int kInt8Queries = 6;  // queries at a time: with kInt8Block / 16 * 6 = 24 sums in registers

// sums[c][r] = dot(row r + 128, queries[c]). Rows are unsigned, since that is what the instructions take.
using Int8Multiply = void (*)(const uint8_t* block, const int8_t* const (&queries)[kInt8Queries], int64_t groups,
                              int32_t (&sums)[kInt8Queries][kInt8Block]);

// By the number of queries less one; what of `queries` and `sums` lies above that number is not read or means nothing.
struct Int8Products {
  Int8Multiply fine[kInt8Queries];
  Int8Multiply coarse[kInt8Queries];  // for queries of 6 bits, where that is faster; else null
};

Int8Products int8_products(Int8Path path);

}  // namespace stepcredit
