"""Floats that were quantized once are found to be so, exactly; others are not."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from octavo.passes.quantize.grid import on_grid
from octavo.passes.quantize.groups import scheme_of

M, K = 24, 256


def quantized(bits: int, size: int, *, asymmetric: bool, dtype: type, seed: int = 0, low: int = 0) -> np.ndarray:
    """scale·(q − zero point) [M, K] as a graph computes it, levels from `low` up."""
    rng, top = np.random.default_rng(seed), (1 << bits) - 1
    q, scale = rng.integers(low, top + 1, (M, K)), rng.uniform(-0.02, 0.02, (M, K // size)).astype(dtype).astype(np.float32)
    zero = rng.integers(0, top + 1, (M, K // size)) if asymmetric else np.full((M, K // size), 1 << (bits - 1))
    return (q - np.repeat(zero, size, axis=1)).astype(np.float32) * np.repeat(scale, size, axis=1)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_scheme_is_found_again_to_the_bit(bits: int, size: int, asymmetric: bool, dtype: type) -> None:
    weight = quantized(bits, size, asymmetric=asymmetric, dtype=dtype)
    found = on_grid(weight)
    assert found is not None
    assert str(scheme_of(found)) == f"int{bits} in groups of {size}, {'with zero points' if asymmetric else 'symmetric'}"
    np.testing.assert_array_equal(found.dequantize(), weight)
    assert found.scale_type == np.dtype(dtype).name


def test_rows_with_one_scale_and_two_bits() -> None:
    """A scale per output, as int8 exporters have it; and levels of 2 bits, which 4 hold."""
    rows, two = quantized(8, K, asymmetric=True, dtype=np.float32), quantized(2, 32, asymmetric=True, dtype=np.float16)
    found = on_grid(rows)
    assert found is not None and (found.bits, found.group_size) == (8, 128) and np.array_equal(found.dequantize(), rows)
    found = on_grid(two)
    assert found is not None and (found.bits, found.group_size) == (4, 32) and np.array_equal(found.dequantize(), two)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([4, 8]), st.booleans(), st.integers(0, 10**6), st.sampled_from([0.0, 0.5, 0.99]), st.integers(-30, 30))
def test_sparse_groups_of_any_magnitude_are_exact(bits: int, asymmetric: bool, seed: int, zeros: float, power: int) -> None:
    weight = quantized(bits, 32, asymmetric=asymmetric, dtype=np.float32, seed=seed) * np.float32(2.0**power)
    weight[np.random.default_rng(seed).random(weight.shape) < zeros] = 0
    found = on_grid(weight)
    assert found is not None and found.bits <= bits
    np.testing.assert_array_equal(found.dequantize(), weight)


def test_what_was_never_quantized_or_has_no_groups_is_not() -> None:
    weight = quantized(4, 32, asymmetric=False, dtype=np.float16)
    assert on_grid(np.random.default_rng(0).normal(size=(M, K)).astype(np.float32)) is None
    broken = weight.copy()
    broken[7, 100] = np.nextafter(broken[7, 100], np.float32(1))
    assert on_grid(broken) is None                                      # a single float, by its last bit
    assert on_grid(np.ascontiguousarray(weight[:, np.random.default_rng(0).permutation(K)])) is None      # inputs in another order
    assert on_grid(np.ascontiguousarray(weight[:, :48])) is None        # no whole number of groups
    assert on_grid(quantized(4, 16, asymmetric=False, dtype=np.float16)) is None
    for bad in (np.nan, np.inf):
        broken = weight.copy()
        broken[3, 5] = bad
        assert on_grid(broken) is None
