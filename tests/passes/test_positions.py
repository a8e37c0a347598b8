"""position_sources: which value is the position, in the spellings that exporters have for it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from octavo.models.onnx_reader import graph_interface
from octavo.passes.normalize import Normalize
from octavo.passes.observe import Observation, Probe, observe
from octavo.passes.outcome import Refusal
from octavo.passes.positions import PositionSource, laid, position_sources


def observed(body: str, inputs: str = "", constants: str = "") -> tuple[Observation, ir.Value]:
    """A cached decoder whose `body` computes `rotary`, which has one row per token and is added to the embedded tokens [B, S, 4]."""
    table = ", ".join("0.5" for _ in range(64))
    model = ir.from_onnx_text(f"""
<ir_version: 10, opset_import: ["" : 18]>
g (int64[B,S] input_ids, float[B,2,P,4] past_0_key, float[B,2,P,4] past_0_value{inputs})
 => (float[B,S,4] logits, float[B,2,P,4] present_0_key, float[B,2,P,4] present_0_value)
<float[16,4] table = {{{table}}}, float[1,4] rates = {{1.0, 0.5, 0.25, 0.125}}, int64 zero = {{0}}, int64 one = {{1}}, int64[1] last = {{-1}},
 int64[1] axis1 = {{1}}, int64 limit = {{40}}{constants}>
{{
    h = Gather(table, input_ids)
    present_0_key = Identity(past_0_key)
    present_0_value = Identity(past_0_value)
    s_1 = Shape<start = 1, end = 2>(input_ids)
    p_1 = Shape<start = 2, end = 3>(past_0_key)
    s = Squeeze(s_1)
    p = Squeeze(p_1)
    t = Add(s, p)
    {body}
    logits = Add(h, rotary)
}}
""")
    Normalize()(model)
    value = next(v for node in model.graph for v in node.outputs if v.name == "rotary")
    return observe(model, graph_interface(model)), value


ANGLES = "columns = Unsqueeze(at, last) f = Cast<to = 1>(columns) angle = Mul(f, rates) rotary = Cos(angle)"
IDS, MASK = ", int64[B,S] position_ids", ", int64[B,T] attention_mask"


@pytest.mark.parametrize(("at", "inputs"), [
    ("at = Identity(position_ids)", IDS),
    ("at = Range(p, t, one)", ""),
    ("r = Range(zero, s, one) at = Add(r, p)", ""),
    ("sums = CumSum(attention_mask, axis1) less = Sub(sums, one) at = Slice(less, p_1, far, axis1)", MASK),
    ("r = Range(p, t, one) two = Add(one, one) at = Add(r, two)", ""),  # OPT counts from 2
], ids=["input", "range", "past + range", "running sum of the mask", "with an offset"])
def test_found(at: str, inputs: str) -> None:
    """With the sources replaced, the value is what the whole cone gives at those positions."""
    observation, rotary = observed(f"{at} {ANGLES}", inputs, ", int64[1] far = {9223372036854775807}")
    sources = position_sources(observation, [rotary], max_context=64)
    assert not isinstance(sources, Refusal) and len(sources) == 1
    places = np.array([7, 8, 9])
    given = {value: laid(source, places) for value, source in sources.items()}
    np.testing.assert_allclose(
        observation.evaluate([rotary], Probe(1, 3, 2), replace=given)[0], observation.evaluate([rotary], Probe(1, 3, 7))[0], rtol=1e-6)


@pytest.mark.parametrize(("at", "inputs"), [
    ("m = ReduceMax(position_ids) at = Sub(position_ids, m)", IDS),
    ("over = Greater(t, limit) more = Cast<to = 7>(over) r = Range(p, t, one) at = Add(r, more)", ""),
    ("r = Range(zero, s, one) at = Identity(r)", ""),
    ("flags = Slice(attention_mask, p_1, far, axis1) at = Identity(flags)", MASK),
    ("r = Range(p, t, one) at = Min(r, p)", ""),
], ids=["relative to the longest", "past a threshold of the length", "place in the step", "the mask itself", "clipped by the past"])
def test_refused(at: str, inputs: str) -> None:
    observation, rotary = observed(f"{at} {ANGLES}", inputs, ", int64[1] far = {9223372036854775807}")
    found = position_sources(observation, [rotary], max_context=64)
    assert isinstance(found, Refusal) and found.where == "rotary" and found.nearest


def test_a_threshold_beyond_the_first_positions() -> None:
    """Angles that change at position 40 for all tokens once one of them is there: seen only because 40 is written in the cone."""
    body = "longest = ReduceMax(position_ids) over = Greater(longest, limit) k = Cast<to = 1>(over) {} rotary = Add(plain, k)"
    observation, rotary = observed(body.format(f"at = Identity(position_ids) {ANGLES}".replace("rotary", "plain")), IDS)
    assert isinstance(position_sources(observation, [rotary], max_context=64), Refusal)
    assert not isinstance(position_sources(observation, [rotary], max_context=32), Refusal)  # no position gets there


def test_values_without_rows_are_passed_over() -> None:
    observation, _ = observed("at = Range(p, t, one) " + ANGLES)
    scalar = next(v for node in observation.model.graph for v in node.outputs if v.name == "t")
    assert position_sources(observation, [scalar], max_context=64) == {}


def test_laid() -> None:
    source = PositionSource(ir.Value(name="v"), axis=1, rank=3, dtype=ir.DataType.INT32)
    array = laid(source, np.array([4, 9]))
    assert array.shape == (1, 2, 1) and array.dtype == np.int32 and array.reshape(-1).tolist() == [4, 9]
