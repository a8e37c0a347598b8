"""Smoothing changes no bit of what a graph computes, only how its inputs and weights share their range; and static scales are those of the inputs seen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from graphs import one_sequence, ops, run, token_flat, written
from octavo.custom_ops.quant_reference import quant_linear
from octavo.errors import ModelError
from octavo.passes.linears import smooth
from octavo.passes.linears.lower_quant import QuantizeLinears
from octavo.passes.linears.match import find_linears
from octavo.passes.linears.smooth import SmoothLinears, factors
from octavo.passes.linears.split_norms import split_skip_norms
from octavo.passes.linears.weights import WeightPlan
from octavo.passes.outcome import Outcome
from octavo.passes.quantize.groups import Scheme
from octavo.passes.quantize.methods import quantizer
from octavo.passes.quantize.rtn import rtn

PLAN = WeightPlan({"*": "int8"}, 32, quantizer("rtn"))
ROWS = np.random.default_rng(5).normal(size=(6, 64)).astype(np.float32)
TOKENS = np.arange(5, 29) * 7 % 320


def uneven(model: ir.Model) -> dict[str, np.ndarray]:
    """Maxima that ask for factors of every size, alike for linears of one input."""
    rng = np.random.default_rng(0)
    by_input = {sites[0].input: np.exp2(rng.normal(0, 4, sites[0].K)).astype(np.float32) for sites in find_linears(model).by_input()}
    return {str(site.weight.name): by_input[site.input] for site in find_linears(model).sites}


def smoothed(model: ir.Model, plan: WeightPlan = PLAN, stored: Mapping[str, object] | None = None) -> tuple[Outcome, SmoothLinears]:
    stage = SmoothLinears(plan, stored or {}, uneven(model))  # type: ignore[arg-type]
    return stage(model).outcome, stage


@pytest.mark.parametrize("name", ["llama", "qwen2", "llama3"])
def test_a_smoothed_decoder_computes_the_same_bits(name: str) -> None:
    model = token_flat(name)
    feeds = one_sequence(model, TOKENS)
    before, plain = run(model, feeds)[0], token_flat(name)
    outcome, stage = smoothed(model)
    np.testing.assert_array_equal(run(model, feeds)[0], before)
    layers, untied = (3, 1) if name == "llama3" else (2, 0)
    assert outcome.rewritten == 6 * layers + untied and not outcome.refusals
    assert outcome.notes[1] == f"not behind a norm or a gate: {layers} (layers.*.attn.o)" and ("head" in outcome.notes[-1]) == (not untied)
    for weight, s in stage.factors.items():
        changed, old = (graph.graph.initializers[weight].const_value.numpy() for graph in (model, plain))
        assert len(np.unique(s)) > 4 and np.abs(changed - old).max() > 1


WRONG = {
    "the gain is left as it is": ("_divide_gain", lambda *_: None),
    "the gain is multiplied": ("_divide_gain", lambda norm, s, build: smooth_gain(norm, 1 / s, build)),
    "rows where columns are": ("_scale", lambda value, by, axis: smooth_scale(value, by, 1 - axis if set(value.shape) == {by.size} else axis)),
}
smooth_gain, smooth_scale = smooth._divide_gain, smooth._scale


@pytest.mark.parametrize("how", WRONG)
def test_factors_in_the_wrong_place_are_seen(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = token_flat("mha")                       # its projections are square: a wrong axis has the right length
    feeds = one_sequence(model, TOKENS)
    before = run(model, feeds)[0]
    monkeypatch.setattr(smooth, *WRONG[how])
    smoothed(model)
    assert np.abs(run(model, feeds)[0] - before).max() > 0.1


GATED = {
    "apart, with biases": (
        "p = MatMul(x, a) u0 = MatMul(x, b) u = Add(u0, ubias) s = Sigmoid(p) g = Mul(p, s) t = Mul(g, u) y = MatMul(t, d)",
        {"a": (64, 96), "b": (64, 96), "ubias": (96,), "d": (96, 40)},
    ),
    "in one": (
        "p = MatMul(x, a) g0, u = Split<axis = -1, num_outputs = 2>(p) g = Gelu(g0) t = Mul(u, g) y = MatMul(t, d)", {"a": (64, 192), "d": (96, 40)},
    ),
    "transposed": (
        "p = Gemm<transB = 1>(x, a, abias) u = Gemm<transB = 1>(x, b, bbias) s = Sigmoid(p) g = Mul(p, s) t = Mul(g, u) y = Gemm<transB = 1>(t, d)",
        {"a": (96, 64), "abias": (96,), "b": (96, 64), "bbias": (96,), "d": (40, 96)},
    ),
}


@pytest.mark.parametrize("name", GATED)
def test_the_values_of_a_gate_take_the_factors_of_what_reads_it(name: str) -> None:
    body, weights = GATED[name]
    model = written(body, weights, "float[n,40] y")
    before = run(model, {"x": ROWS})[0]
    outcome, stage = smoothed(model)
    assert list(stage.factors) == ["d"] and outcome.rewritten == 1
    np.testing.assert_array_equal(run(model, {"x": ROWS})[0], before)


GAINS = {
    "of its own": "h = RMSNormalization<axis = -1>(x, n) y = MatMul(h, w)",
    "shared with another norm": "h = RMSNormalization<axis = -1>(x, n) g = RMSNormalization<axis = -1>(h, n) y = MatMul(g, w)",
    "computed": "m = Exp(n) h = RMSNormalization<axis = -1>(x, m) y = MatMul(h, w)",
    "skip": "h = com.microsoft.SkipSimplifiedLayerNormalization<epsilon = 0.01>(x, x, n) y = MatMul(h, w)",
}


@pytest.mark.parametrize("body", GAINS.values(), ids=GAINS.keys())
def test_gains(body: str) -> None:
    model = written(body, {"n": (64,), "w": (64, 32)}, "float[n,32] y")
    split_skip_norms(model)                         # which has its own rounding
    before = run(model, {"x": ROWS})[0]
    _, stage = smoothed(model)
    assert list(stage.factors) == ["w"]
    np.testing.assert_array_equal(run(model, {"x": ROWS})[0], before)


def test_a_norm_that_others_read_is_refused() -> None:
    model = written("h = RMSNormalization<axis = -1>(x, n) y = MatMul(h, w) z = Exp(h)", {"n": (64,), "w": (64, 32)}, "float[n,32] y, float[n,64] z")
    before = ir.serde.serialize_model(model)
    outcome, stage = smoothed(model)
    assert not stage.factors and "what else reads its input" in outcome.refusals[0].reason and "Exp" in outcome.refusals[0].nearest
    assert ir.serde.serialize_model(model) == before


KEPT = {
    "stored quantized": (PLAN, {"w": None}, ""),
    "not rounded here": (replace(PLAN, patterns={"input": "fp32", "*": "int8"}), {}, ""),
    "a weight that others read": (PLAN, {}, " q = MatMul(x, w) z = Exp(q)"),
}


@pytest.mark.parametrize("why", KEPT)
def test_what_is_not_rounded_here_keeps_its_bits(why: str) -> None:
    """One of two readers is enough: they share the input."""
    plan, stored, more = KEPT[why]
    model = written(f"h = RMSNormalization<axis = -1>(x, n) a = MatMul(h, w) b = MatMul(h, v) y = Sub(a, b){more}",
                    {"n": (64,), "w": (64, 32), "v": (64, 32)}, "float[n,32] y, float[n,32] z" if more else "float[n,32] y")  # fmt: skip
    before = ir.serde.serialize_model(model)
    outcome, stage = smoothed(model, plan, stored)
    assert not stage.factors and not outcome.refusals and any(note.startswith(f"{why}: 2") for note in outcome.notes), outcome.notes
    assert ir.serde.serialize_model(model) == before


def test_floats_on_a_grid_are_stored_quantized_too() -> None:
    model = written("h = RMSNormalization<axis = -1>(x, n) y = MatMul(h, w)", {"n": (64,), "w": (64, 32)}, "float[n,32] y")
    value = model.graph.initializers["w"]
    value.const_value = ir.Tensor(np.ascontiguousarray(rtn(value.const_value.numpy().T, Scheme(8, 32)).dequantize().T), name="w")
    outcome, _ = smoothed(model)
    assert outcome.rewritten == 0 and outcome.notes[1].startswith("stored quantized: 1")


def test_factors_are_the_papers_to_the_next_power_of_two() -> None:
    x, w = np.float32([4, 64, 1, 1024, 0, 1e30]), np.float32([1, 1, 1, 1, 1, 1])
    assert factors(x, w).tolist() == expected(x, w)
    assert (factors(x, np.zeros(6, np.float32)) == 1).all()


def expected(x: np.ndarray, w: np.ndarray) -> list[float]:
    exponents = [smooth.ALPHA * np.log2(a) - (1 - smooth.ALPHA) * np.log2(b) if a else None for a, b in zip(x, w)]
    middle = np.median([e for e in exponents if e is not None])
    return [1.0 if e is None else float(2.0 ** np.clip(np.rint(e - middle), -6, 6)) for e in exponents]


def test_static_scales_are_the_largest_input_of_each_group_over_127() -> None:
    model = written("h = RMSNormalization<axis = -1>(x, n) a = MatMul(h, w) b = MatMul(h, v)", {"n": (64,), "w": (64, 32), "v": (64, 8)},
                    "float[n,32] a, float[n,8] b")  # fmt: skip
    seen = np.linspace(0.1, 3, 64).astype(np.float32)
    weights, gain = {name: rtn(model.graph.initializers[name].const_value.numpy().T, Scheme(8, 32)) for name in "wv"}, model.graph.initializers["n"]
    scale = np.float32([seen[31], seen[63]]) / np.float32(127)
    given = {"input": ROWS, "norm_weight": gain.const_value.numpy(), "activation_scale": scale}
    QuantizeLinears(replace(PLAN, maxima={"w": seen, "v": seen}), {})(model)
    assert ops(model) == ["QuantLinear", "Split"]
    for found, name in zip(run(model, {"x": ROWS}), "wv"):
        np.testing.assert_array_equal(found, quant_linear(weights[name], **given).output)


@pytest.mark.parametrize("seen, scales", [([0, 2], [2, 2]), ([0, 0], [1, 1]), ([1e-35, 1e-20], [1e-20, 1e-20])])
def test_inputs_that_were_never_seen_have_the_coarsest_scale(seen: list[float], scales: list[float]) -> None:
    model = written("y = MatMul(x, w)", {"w": (64, 32)}, "float[n,32] y")
    QuantizeLinears(replace(PLAN, maxima={"w": np.repeat(np.float32(seen), 32)}), {})(model)
    found = next(node for node in model.graph if node.op_type == "QuantLinear").inputs[6]
    np.testing.assert_allclose(found.const_value.numpy() * 127, scales, rtol=1e-6)
    assert np.isfinite(run(model, {"x": ROWS})[0]).all()


def test_inputs_that_are_no_numbers_are_an_error() -> None:
    model = written("y = MatMul(x, w)", {"w": (64, 32)}, "float[n,32] y")
    with pytest.raises(ModelError, match="the inputs of head are not finite on the calibration text"):
        QuantizeLinears(replace(PLAN, maxima={"w": np.full(64, np.nan, np.float32)}), {})(model)


@pytest.mark.parametrize("turned", [True, False])
def test_a_head_and_its_table_stay_one_weight(turned: bool) -> None:
    """Of an initializer, or of a turned copy as some exporters write it: both are stored once, and only as long as they have the same numbers."""
    weights = {"n": (64,), "t": (96, 64)} | ({"w": (64, 96)} if turned else {})
    body = "e = Gather(t, input_ids) h = RMSNormalization<axis = -1>(e, n) y = MatMul(h, w)"
    model = written(body if turned else f"w = Transpose<perm = [1, 0]>(t) {body}", weights, "float[q,96] y", inputs="int64[q] input_ids")
    if turned:
        table = model.graph.initializers["t"].const_value
        model.graph.initializers["w"].const_value = ir.Tensor(np.ascontiguousarray(table.numpy().T), name="w")
    outcome, stage = smoothed(model)
    assert not stage.factors and outcome.notes == ("none smoothed", "a weight that others read: 1 (head)")
    assert find_linears(model).names == ("head",)
