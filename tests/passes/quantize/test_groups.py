"""What may be quantized at all, and that rows keep their values when they are put together."""

from __future__ import annotations

import numpy as np
import pytest
from octavo.errors import ModelError, OptionError
from octavo.passes.quantize.groups import Scheme, check_weight, stacked
from octavo.passes.quantize.hqq import hqq
from octavo.passes.quantize.rtn import rtn
from octavo.passes.quantize.search import search


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("quantize", [rtn, search, hqq])
def test_a_weight_that_is_not_finite_is_refused_by_name(bad: float, quantize: object) -> None:
    weight = np.ones((3, 64), np.float32)
    weight[2, 17] = bad
    with pytest.raises(ModelError, match=r"layers\.0\.attn\.q.*output 2, input 17"):
        quantize(weight, Scheme(4, 32, "float"), "layers.0.attn.q")  # type: ignore[operator]


def test_large_weights_are_finite() -> None:
    """Their sum isn't in float32."""
    weight = np.full((2, 32), np.finfo(np.float32).max, np.float32)
    assert check_weight(weight, Scheme(4, 32), "w") is not None
    assert np.isfinite(rtn(weight, Scheme(8, 32, "uint8")).dequantize()).all()


@pytest.mark.parametrize(("K", "size", "hint"), [(96, 64, "group_size=32"), (40, 32, "fp32"), (160, 128, "group_size=32")])
def test_groups_that_do_not_divide_are_refused_by_name(K: int, size: int, hint: str) -> None:
    with pytest.raises(OptionError, match=f"groups of {size} don't divide the {K} inputs of mlp.down.*{hint}"):
        rtn(np.ones((2, K), np.float32), Scheme(4, size), "mlp.down")  # type: ignore[arg-type]


@pytest.mark.parametrize("fields", [{"bits": 3}, {"group_size": 16}, {"zero_point": "half"}])
def test_a_scheme_is_checked(fields: dict) -> None:
    with pytest.raises(OptionError, match=f"{next(iter(fields))}=.* is not one of"):
        Scheme(**{"bits": 4, "group_size": 32, **fields})


@pytest.mark.parametrize("zero_point", ["none", "uint8", "float"])
def test_stacked_rows_keep_values(zero_point: str) -> None:
    rng = np.random.default_rng(0)
    first, second = (rtn(rng.normal(size=(M, 256)), Scheme(4, 128, zero_point)) for M in (3, 5))  # type: ignore[arg-type]
    both = stacked([first, second])
    assert np.array_equal(both.dequantize(), np.concatenate([first.dequantize(), second.dequantize()]))


def test_stacking_half_and_float_scales_keeps_values() -> None:
    rng = np.random.default_rng(0)
    large, small = rng.normal(size=(2, 32)), rng.normal(size=(2, 32)) * 1e-6
    parts = [rtn(weight, Scheme(4, 32)) for weight in (large, small)]
    assert {part.scales.dtype for part in parts} == {np.dtype(np.float16), np.dtype(np.float32)}
    assert np.array_equal(stacked(parts).dequantize(), np.concatenate([part.dequantize() for part in parts]))
