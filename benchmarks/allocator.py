"""The memory allocator under which a benchmark runs."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

#: Parameters of `mallopt`, from glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
#: Memory that is freed stays with the process: no mapping of its own for a large block, no end of the heap given back.
KEPT = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1))
#: The default number of mappings, and the thresholds at the most to which glibc raises them by itself, in bytes. What
#: they were cannot be asked, and once one is set glibc no longer raises them.
GROWN = ((M_MMAP_MAX, 65536), (M_MMAP_THRESHOLD, 32 << 20), (M_TRIM_THRESHOLD, 64 << 20))


@contextmanager
def memory_kept() -> Iterator[None]:
    """Inside, what is freed is used again instead of going back to the system, which would hand out fresh pages at the
    next call, one fault each. On a CPU the logits and activations of a forward pass are such blocks, and what their
    faults cost differs between machines. Changes nothing where the C library is not glibc."""
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    _set(libc, KEPT)
    try:
        yield
    finally:
        _set(libc, GROWN)
        libc.malloc_trim(0)


def _set(libc: ctypes.CDLL, options: tuple[tuple[int, int], ...]) -> None:
    for name, value in options:
        if not libc.mallopt(name, value):
            raise RuntimeError(f"mallopt({name}, {value}) was refused")
