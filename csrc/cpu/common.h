// What the CPU kernels share.
#pragma once

// One build runs on every x86-64: the loader picks the widest clone the processor has.
#if defined(__x86_64__) && defined(__linux__)
#define STEPCREDIT_CLONES __attribute__((target_clones("arch=skylake-avx512", "arch=haswell", "default")))
#else
#define STEPCREDIT_CLONES
#endif

// A function that is no clone itself is not inlined into a clone unless it must be.
#define STEPCREDIT_INLINE inline __attribute__((always_inline))

namespace stepcredit {

// Below this many elements starting threads costs more than the loop.
constexpr long kParallelMinimum = 1 << 15;

}  // namespace stepcredit
