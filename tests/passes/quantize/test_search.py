"""Searched grids: never worse than plain rounding in any group, better on the whole, and still where nothing is to gain."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from octavo.custom_ops.packing import QuantizedWeight
from octavo.errors import OptionError
from octavo.passes.quantize.groups import Scheme
from octavo.passes.quantize.hqq import NORM, hqq
from octavo.passes.quantize.rtn import rtn
from octavo.passes.quantize.search import search

SCHEMES = [Scheme(bits, size, zero) for bits in (4, 8) for size in (32, 64) for zero in ("none", "uint8", "float")]  # type: ignore[arg-type]


def weighed(weight: np.ndarray, found: QuantizedWeight) -> np.ndarray:
    """Each group's squared error, each weight's counted by its own square and the group's mean square."""
    groups = weight.astype(np.float64).reshape(len(weight), -1, found.group_size)
    errors = groups - found.dequantize().reshape(groups.shape)
    return ((groups**2 + (groups**2).mean(axis=-1, keepdims=True)) * errors**2).sum(axis=-1)


def by_group(weight: np.ndarray, found: QuantizedWeight, power: float = 2) -> np.ndarray:
    error = np.abs(weight - found.dequantize()).astype(np.float64) ** power
    return error.reshape(len(weight), -1, found.group_size).sum(axis=-1)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(SCHEMES), arrays.arrays(np.float32, (2, 64), elements=st.floats(-1e3, 1e3, width=32)))
def test_no_group_gets_worse(scheme: Scheme, weight: np.ndarray) -> None:
    """Up to the rounding of the errors themselves."""
    plain, searched = weighed(weight, rtn(weight, scheme)), weighed(weight, search(weight, scheme))
    largest = float(np.abs(weight).max())
    assert (searched <= plain * (1 + 1e-5) + (largest * 2.0**-22) ** 2 * 64 * 2 * largest**2).all()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_whole_gets_better(scheme: Scheme) -> None:
    weight = np.random.default_rng(0).standard_t(5, (64, 256)).astype(np.float32)
    plain, searched = weighed(weight, rtn(weight, scheme)).sum(), weighed(weight, search(weight, scheme)).sum()
    assert searched < plain * 0.97


@pytest.mark.parametrize("factor", [1e-30, 1e-9, 1.0, 1e9, 1e30])
def test_the_size_of_weights_does_not_matter(factor: float) -> None:
    """Squares of the smallest and largest are no float32 numbers."""
    weight = np.random.default_rng(1).standard_t(5, (16, 128)).astype(np.float32)
    scaled = (weight * factor).astype(np.float32)
    plain, searched = (weighed(scaled / np.float32(factor), _unscaled(quantize(scaled, Scheme(4, 64)), factor)).sum() for quantize in (rtn, search))
    assert searched < plain * 0.97


def _unscaled(found: QuantizedWeight, factor: float) -> QuantizedWeight:
    return QuantizedWeight(found.q, found.scales.astype(np.float32) / np.float32(factor), found.bits, found.group_size)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(4, 8))
def test_a_weight_on_any_symmetric_grid_is_found_exactly(seed: int, reach: int) -> None:
    """Plain rounding finds it only if it uses level −8."""
    rng = np.random.default_rng(seed)
    levels = rng.integers(-reach, min(reach, 7) + 1, (4, 64))
    levels[:, ::32] = -reach
    scale = np.repeat(rng.uniform(0.001, 0.1, (4, 2)).astype(np.float16).astype(np.float32), 32, axis=1)
    weight = (levels * scale * rng.choice([-1, 1], (4, 1))).astype(np.float32)
    assert np.array_equal(search(weight, Scheme(4, 32)).dequantize(), weight)


@pytest.mark.parametrize("bits", [4, 8])
def test_half_quadratic_lowers_its_own_error_in_every_group(bits: int) -> None:
    scheme = Scheme(bits, 64, "float")  # type: ignore[arg-type]
    weight = np.random.default_rng(2).standard_t(4, (64, 256)).astype(np.float32)
    plain, found = rtn(weight, scheme), hqq(weight, scheme)
    before, after = by_group(weight, plain, NORM), by_group(weight, found, NORM)
    assert (after <= before * (1 + 1e-5)).all() and after.sum() < before.sum() * 0.999
    assert np.array_equal(found.scales, plain.scales)


def test_half_quadratic_zero_points_are_floats() -> None:
    with pytest.raises(OptionError, match='zero_point="float"'):
        hqq(np.ones((2, 32)), Scheme(4, 32, "uint8"))
