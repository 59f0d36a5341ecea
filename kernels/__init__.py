"""Triton kernels, one file per op: `@triton.jit` functions, then the launcher that `stepcredit.ops` calls with checked
arguments. Each file imports Triton, so ops import it when a kernel is launched and not before."""
