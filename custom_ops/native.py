"""The library's native functions, for calls between two steps: rows of logits to tokens, blocks of a cache over others.

They are no nodes of a graph: what they do depends on each request, and no graph should know of requests. Each answers a status and neither
throws nor allocates; the calls let go of Python's lock.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from ..errors import LibraryError
from . import active_isa, open_library

MAX_LOGPROBS = 20
FINE, IS_NAN, NOTHING_IS_FINITE = 0, 1, 2

_int, _double, _long, _address = ctypes.c_int32, ctypes.c_double, ctypes.c_uint64, ctypes.c_void_p


class SampleRow(ctypes.Structure):
    """What is asked of one row of logits, and the answer: `SampleRow` of src/native/sample.h, which says what the fields mean."""

    _fields_ = (
        ("logits", _address), ("temperature", _double), ("top_p", _double), ("min_p", _double),
        ("repetition", _double), ("frequency", _double), ("presence", _double),
        ("seed", _long), ("completion", _long), ("index", _long),
        ("bias_ids", _address), ("bias", _address), ("banned", _address), ("seen", _address), ("counts", _address),
        ("num_bias", _int), ("num_banned", _int), ("num_seen", _int), ("top_k", _int), ("given", _int), ("logprobs", _int),
        ("status", _int), ("token", _int), ("rank", _int), ("num_top", _int), ("top_ids", _int * MAX_LOGPROBS),
        ("logprob", _double), ("top_logprobs", _double * MAX_LOGPROBS),
    )

    def measured(self) -> tuple[int, float, int, tuple[tuple[int, float], ...]]:
        """The answer: the token, its log probability and rank, and (token, log probability) of the best. Read at once, a fifth of the time."""
        k = self.num_top
        token, rank, *top = _answer(k).unpack_from(self, SampleRow.token.offset)
        return token, top[k], rank, tuple(zip(top[:k], top[k + 1 :]))


@cache
def _answer(k: int) -> struct.Struct:
    """token, rank, k of top_ids, logprob, k of top_logprobs."""
    return struct.Struct(f"=2i4x{k}i{4 * (MAX_LOGPROBS - k)}xd{k}d")


def address_of(row: NDArray[np.float32]) -> int:
    """Of a writable array: a fourth of the time that `row.ctypes` takes."""
    return ctypes.addressof(ctypes.c_char.from_buffer(row))     # type: ignore[arg-type]


class SampleRows:
    """`octavo_sample` over rows of `vocab_size` logits, with scratch of its own: used by one thread at a time.

    Raises LibraryError where the library can't be loaded.
    """

    def __init__(self, vocab_size: int) -> None:
        active_isa()    # or it raises
        library = open_library()
        library.octavo_sample_scratch.restype = ctypes.c_size_t
        size = library.octavo_sample_scratch(vocab_size)
        self._call, self._vocab_size, self._size = library.octavo_sample, vocab_size, ctypes.c_size_t(size)
        self._scratch = np.empty(size, np.uint8)
        self._address = ctypes.c_void_p(self._scratch.ctypes.data)

    def __call__(self, rows: Sequence[SampleRow]) -> None:
        """Answers every row. Logits and lists of tokens must be alive and in range: ValueError where they can't be."""
        pointers = (ctypes.c_void_p * len(rows))(*[ctypes.addressof(row) for row in rows])
        if self._call(pointers, len(rows), self._vocab_size, self._address, self._size):
            raise ValueError("a row's parameters are out of range")


class CopyBlocks:
    """`octavo_kv_copy` within `caches`, contiguous arrays whose first dimension is the block."""

    def __init__(self, caches: Sequence[NDArray[np.generic]]) -> None:
        assert all(cache.flags.c_contiguous and len(cache) == len(caches[0]) for cache in caches), "caches of one KV group have the same blocks"
        self._call = open_library().octavo_kv_copy
        self._caches = caches
        self._addresses = (ctypes.c_void_p * len(caches))(*(cache.ctypes.data for cache in caches))
        self._sizes = (ctypes.c_int64 * len(caches))(*(cache.nbytes // len(cache) for cache in caches))

    def __call__(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copies block sources[i] over block targets[i] in every cache, i ascending. ValueError where a cache has no such block."""
        count = len(sources)
        blocks = ctypes.c_int64 * count
        status = self._call(
            self._addresses, self._sizes, len(self._caches), ctypes.c_int64(len(self._caches[0])), blocks(*sources), blocks(*targets), count,
        )
        if status:
            raise ValueError(f"a block of {list(sources)} or {list(targets)} is not in the cache")


def library_error() -> LibraryError | None:
    """Why the native functions can't be called here; None where they can."""
    try:
        active_isa()
    except LibraryError as error:
        return error
    return None
