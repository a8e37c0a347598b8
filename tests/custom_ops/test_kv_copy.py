"""The native block copy against NumPy: any caches, any copies in order, nothing where a block is out of range."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from octavo.custom_ops.native import CopyBlocks

BLOCKS = 5


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, BLOCKS - 1), st.integers(0, BLOCKS - 1)), max_size=8), st.integers(0, 2**32))
def test_copies_are_numpys(copies, seed):
    """Chains too: a block that was written is the source of a later copy."""
    rng = np.random.default_rng(seed)
    caches = [rng.integers(0, 255, (BLOCKS, *shape)).astype(dtype) for shape, dtype in (((2, 4, 8), np.float16), ((2, 8, 3), np.uint8), ((1,), np.float32))]
    want = [cache.copy() for cache in caches]
    for source, target in copies:
        for cache in want:
            cache[target] = cache[source]
    CopyBlocks(caches)([source for source, _ in copies], [target for _, target in copies])
    for got, expected in zip(caches, want):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("bad", [-1, BLOCKS])
def test_a_block_out_of_range_copies_nothing(bad):
    cache = np.arange(BLOCKS * 3).reshape(BLOCKS, 3)
    before = cache.copy()
    for sources, targets in (([0, bad], [1, 2]), ([0, 1], [1, bad])):
        with pytest.raises(ValueError, match="not in the cache"):
            CopyBlocks([cache])(sources, targets)
    np.testing.assert_array_equal(cache, before)
