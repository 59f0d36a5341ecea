// exp and tanh that the compiler can vectorise: straight-line code, no table, no call, and no two selects on the same
// condition (those it turns into a branch). In double: the standard library.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/common.h"

namespace stepcredit {

// exp(x) for x <= 88, within 2 ulp; results below the normal range, that of -inf too, are 0; NaN stays NaN.
STEPCREDIT_INLINE float exp_float(float x) {
  constexpr float kLow = -88.f;         // rounds to 2^-127, whose bits below are those of 0
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const float y = x < kLow ? kLow : x;
  const float shifted = y * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (y - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + 0x3f800000u;  // 2^n
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

// tanh(x) within 3 ulp: odd polynomial near 0, where the quotient of exponentials cancels.
STEPCREDIT_INLINE float tanh_float(float x) {
  const float a = std::fabs(x);
  const float e = exp_float(-2.f * a);
  const float far = (1.f - e) / (1.f + e);
  const float s = x * x;
  float q = -5.70498872745e-3f;
  q = q * s + 2.06390887954e-2f;
  q = q * s - 5.37397155531e-2f;
  q = q * s + 1.33314422036e-1f;
  q = q * s - 3.33332819422e-1f;
  const float near = q * s * a + a;
  return std::copysign(a < 0.625f ? near : far, x);
}

STEPCREDIT_INLINE float fast_exp(float x) { return exp_float(x); }
STEPCREDIT_INLINE double fast_exp(double x) { return std::exp(x); }
STEPCREDIT_INLINE float fast_tanh(float x) { return tanh_float(x); }
STEPCREDIT_INLINE double fast_tanh(double x) { return std::tanh(x); }

}  // namespace stepcredit
