"""Plain rounding: how far a weight can move, and that one which lies on a grid already doesn't."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from octavo.custom_ops.packing import QuantizedWeight
from octavo.passes.quantize.groups import Scheme
from octavo.passes.quantize.rtn import rtn

SCHEMES = [Scheme(bits, size, zero) for bits in (4, 8) for size in (32, 128) for zero in ("none", "uint8", "float")]  # type: ignore[arg-type]
numbers = st.floats(-1e4, 1e4, width=32)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(SCHEMES), st.data())
def test_no_weight_moves_further_than_its_step_allows(scheme: Scheme, data: st.DataObject) -> None:
    """Half a step; the level without a counterpart, and a float16 scale or minimum that is a little short, cost some more.

    Scales below float16's normal numbers lose up to 2^-25, times the levels.
    """
    weight = data.draw(arrays.arrays(np.float32, (2, 128), elements=numbers))
    found = rtn(weight, scheme)
    error = np.abs(weight - found.dequantize()).reshape(2, -1, scheme.group_size)
    step = np.abs(found.scales.astype(np.float32))[:, :, None]
    groups = weight.reshape(error.shape)
    stored = 2.0**-11 if found.scales.dtype == np.float16 else 2.0**-22
    span = np.abs(groups).max(axis=-1, keepdims=True) + np.ptp(groups, axis=-1, keepdims=True)
    half = 1.0 if scheme.zero_point == "none" else 0.5
    assert (error <= half * step + 2 * stored * span + scheme.top * 2.0**-24).all()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_more_than_half_of_the_range_is_used(scheme: Scheme) -> None:
    """A scale ten times too large would pass a bound in steps."""
    weight = np.random.default_rng(0).normal(size=(64, 256)).astype(np.float32)
    found = rtn(weight, scheme)
    reached = found.q.reshape(64, -1, scheme.group_size)
    assert (np.ptp(reached, axis=-1) > scheme.top / 2).all()
    error = float(np.sqrt(np.mean((weight - found.dequantize()) ** 2)))
    assert error < 7.0 / scheme.top / np.sqrt(12) * 1.2  # a uniform error over a range of less than seven deviations


def representable(scheme: Scheme, rng: np.random.Generator, rows: int = 16, K: int = 256) -> QuantizedWeight:
    """A weight on grids of its own, each group of which uses its lowest and its highest level."""
    few = (rows, K // scheme.group_size)
    q = rng.integers(0, scheme.top + 1, (rows, K)).astype(np.uint8)
    q[:, :: scheme.group_size], q[:, 1 :: scheme.group_size] = 0, scheme.top
    scales = rng.uniform(0.001, 0.1, few).astype(np.float16)
    zero_points = rng.integers(0, scheme.top + 1, few).astype(np.uint8) if scheme.zero_point == "uint8" else None
    minimums = rng.normal(0, 0.5, few).astype(np.float16) if scheme.zero_point == "float" else None
    return QuantizedWeight(q, scales, scheme.bits, scheme.group_size, zero_points, minimums)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_representable_weight_comes_back_bit_for_bit(scheme: Scheme) -> None:
    weight = representable(scheme, np.random.default_rng(1)).dequantize()
    assert np.array_equal(rtn(weight, scheme).dequantize(), weight)


def test_a_symmetric_weight_is_a_fixed_point() -> None:
    weight = np.random.default_rng(2).normal(size=(32, 256)).astype(np.float32)
    once = rtn(weight, Scheme(4, 32)).dequantize()
    assert not np.array_equal(once, weight) and np.array_equal(rtn(once, Scheme(4, 32)).dequantize(), once)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_zeros_and_constants(scheme: Scheme) -> None:
    assert not rtn(np.zeros((2, 128)), scheme).dequantize().any()
    same = rtn(np.full((2, 128), 0.5), scheme).dequantize()
    assert np.abs(same - 0.5).max() < 0.001


def test_scales_are_half_unless_that_would_lose_them() -> None:
    weight = np.random.default_rng(3).normal(size=(4, 64))
    for factor, dtype in ((1, np.float16), (1e-6, np.float32), (1e6, np.float32)):
        found = rtn(weight * factor, Scheme(4, 32))
        assert found.scales.dtype == dtype
        np.testing.assert_allclose(found.dequantize() / factor, rtn(weight, Scheme(4, 32)).dequantize(), atol=0.01)
