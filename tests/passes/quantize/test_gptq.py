"""GPTQ: never worse than the others on the inputs that it has seen, much better where they depend on each other."""

from __future__ import annotations

import numpy as np
import pytest
from octavo.errors import ModelError, OptionError
from octavo.passes.quantize.gptq import calibration_error, gptq, inverse_factor
from octavo.passes.quantize.groups import Scheme
from octavo.passes.quantize.methods import Seen, quantizer
from octavo.passes.quantize.rtn import rtn
from octavo.passes.quantize.search import search

SCHEMES = [Scheme(4, size, zero) for size in (32, 64) for zero in ("none", "uint8", "float")]  # type: ignore[arg-type]


def weight_and_inputs(rank: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """Inputs that mostly lie in a space of few dimensions, as hidden states do."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(500, rank)) @ rng.normal(size=(rank, 128)) + 0.1 * rng.normal(size=(500, 128))
    return rng.standard_t(5, (40, 128)).astype(np.float32), inputs.astype(np.float32)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_no_row_gets_worse_and_the_whole_much_better(scheme: Scheme) -> None:
    weight, inputs = weight_and_inputs()
    hessian = inputs.T @ inputs
    errors = {quantize.__name__: calibration_error(weight, quantize(weight, scheme), hessian) for quantize in (rtn, search)}
    found = calibration_error(weight, gptq(weight, scheme, hessian), hessian)
    assert all((found <= other).all() for other in errors.values())
    assert found.sum() < 0.5 * min(error.sum() for error in errors.values())


def test_the_calibration_error_is_that_of_the_outputs() -> None:
    weight, inputs = weight_and_inputs()
    found = rtn(weight, Scheme(4, 32))
    outputs = inputs.astype(np.float64) @ (weight - found.dequantize()).astype(np.float64).T
    np.testing.assert_allclose(calibration_error(weight, found, inputs.T.astype(np.float64) @ inputs), (outputs**2).sum(axis=0), rtol=1e-6)


def test_independent_inputs_gain_nothing_but_lose_nothing() -> None:
    weight, _ = weight_and_inputs()
    eye = np.eye(128, dtype=np.float32)
    assert (calibration_error(weight, gptq(weight, Scheme(4, 32), eye), eye) <= calibration_error(weight, search(weight, Scheme(4, 32)), eye)).all()


def test_inputs_that_are_never_seen() -> None:
    """A dead input, and fewer rows than inputs: XᵀX is singular."""
    weight, inputs = weight_and_inputs()
    inputs[:, 5] = 0
    for rows in (inputs, inputs[:20], np.zeros_like(inputs)):
        hessian = rows.T @ rows
        assert np.isfinite(inverse_factor(hessian)).all()
        found = gptq(weight, Scheme(4, 32), hessian)
        assert np.abs(found.dequantize() - weight).max() < np.abs(weight).max()


def test_a_calibration_that_is_not_finite_is_refused_by_name() -> None:
    weight, inputs = weight_and_inputs()
    hessian = inputs.T @ inputs
    hessian[3, 3] = np.nan
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.down"):
        gptq(weight, Scheme(4, 32), hessian, "layers.1.mlp.down")


def test_the_factor_is_that_of_the_inverse() -> None:
    _, inputs = weight_and_inputs()
    hessian = (inputs.T @ inputs).astype(np.float64)
    damped = hessian + 0.01 * np.diag(hessian).mean() * np.eye(len(hessian))
    factor = inverse_factor(hessian).astype(np.float64)
    assert (np.tril(factor, -1) == 0).all() and (np.diag(factor) > 0).all()
    np.testing.assert_allclose(factor.T @ factor @ damped, np.eye(len(damped)), atol=1e-4)


class Fixed:
    """Inputs that don't depend on what was rounded."""

    def __init__(self, seen: dict[str, list[Seen]]) -> None:
        self.known, self.told = seen, dict[str, np.ndarray]()

    def seen(self, name: str) -> list[Seen] | None:
        return self.known.get(name)

    def rounded(self, name: str, values: np.ndarray) -> None:
        self.told[name] = values


def test_quantizers_by_name() -> None:
    weight, inputs = weight_and_inputs()
    scheme, hessian = Scheme(4, 32, "float"), inputs.T @ inputs
    fixed = Fixed({"w": [Seen(np.arange(40), hessian)]})
    calibrated = quantizer("gptq", fixed)
    found = calibrated(weight, scheme, "w")
    assert np.array_equal(found.q, gptq(weight, scheme, hessian).q)
    assert np.array_equal(calibrated(weight, scheme, "a table").q, search(weight, scheme).q)
    assert list(fixed.told) == ["w"] and np.array_equal(fixed.told["w"], found.dequantize())
    assert np.array_equal(quantizer("rtn")(weight, scheme, "w").q, rtn(weight, scheme).q)
    for method, given in (("gptq", None), ("rtn", fixed), ("awq", None)):
        with pytest.raises(OptionError, match=f"method='{method}'"):
            quantizer(method, given)  # type: ignore[arg-type]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_rows_that_read_something_else_are_rounded_for_it(scheme: Scheme) -> None:
    weight, inputs = weight_and_inputs()
    hessians = (inputs.T @ inputs, inputs[:50].T @ inputs[:50])
    rows = (np.arange(40)[::-3], np.setdiff1d(np.arange(40), np.arange(40)[::-3]))
    found = quantizer("gptq", Fixed({"w": [Seen(*part) for part in zip(rows, hessians)]}))(weight, scheme, "w").dequantize()
    for part, hessian in zip(rows, hessians):
        assert np.array_equal(found[part], gptq(weight[part], scheme, hessian).dequantize())
