"""What this machine can give: bytes a second out of memory, int8 operations a second. Measured by the op library, with its instructions."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from . import open_library

_BEST_OF = 5
_ROUNDS = 1 << 22       # about 10 ms of multiplying


def read_bandwidth(nbytes: int, threads: int) -> float:
    """Bytes a second of `threads` threads that read `nbytes` again and again, each a part of its own: the best of a few tries."""
    read = open_library().octavo_read
    read.restype, read.argtypes = ctypes.c_uint64, [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint64]
    part = max(nbytes // threads // 256 * 256, 256)
    data = np.ones(part * threads, np.uint8)
    starts = [data.ctypes.data + i * part for i in range(threads)]
    passes = max(1, (1 << 28) // len(data))     # so much a try that starting the threads costs little beside it
    return part * threads * passes / _best_time(threads, lambda i: read(starts[i], part, passes))


def int8_operations(threads: int) -> float | None:
    """Int8 operations a second of `threads` threads with the instruction that the kernels in use multiply with, a multiply-add counted as two;
    None where they have none.
    """
    multiply = open_library().octavo_multiply
    multiply.restype, multiply.argtypes = ctypes.c_uint64, [ctypes.c_uint64]
    done = multiply(_ROUNDS)
    return threads * done / _best_time(threads, lambda _: multiply(_ROUNDS)) if done else None


def _best_time(threads: int, work: Callable[[int], object]) -> float:
    """Seconds that `work(0)` … `work(threads − 1)` take side by side. ctypes lets go of the interpreter's lock."""
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_BEST_OF):
            start = time.perf_counter()
            list(pool.map(work, range(threads)))
            best = min(best, time.perf_counter() - start)
    return best
