"""Stock GroupQueryAttention against the exporter's graph: prefill, chunks and single tokens over a growing past."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from drivers import MAX_CONTEXT, Original, contiguous_error, seen
from octavo.models.interface import GraphInterface
from octavo.passes.attention.lower_contiguous import ContiguousPlan, LowerContiguous, plan_contiguous
from octavo.passes.attention.match import refusals_of, sites_of
from octavo.passes.outcome import Refusal
from sketches import VOCAB, Sketch, build

SKETCHES = {
    "output_heads_first": Sketch(gate="heads_first"),
    "output_tokens_first": Sketch(gate="tokens_first", op=True),
    "past": Sketch(),
    "no_past": Sketch(past=False),
    "interleaved_fused": Sketch(rotary="interleaved", fused=True),
    "broadcast": Sketch(heads="broadcast"),
    "window": Sketch(window=5),
    "softcap": Sketch(softcap=3.0, factor=1.5),
    "op_cache": Sketch(op=True, op_cache=True, op_heads_first=False, rotary="op"),
    "op_no_past": Sketch(op=True, past=False, padding=False, is_causal=True, rotary="microsoft"),
    "no_rotary_mqa": Sketch(rotary="none", G=1),
}


def planned(sketch: Sketch) -> tuple[ir.Model, GraphInterface, ContiguousPlan | Refusal]:
    model, interface = build(sketch)
    observation, found = seen(model, interface)
    return model, interface, plan_contiguous(observation, sites_of(found), max_context=MAX_CONTEXT, refused=len(refusals_of(found)))


@pytest.mark.parametrize("sketch", SKETCHES.values(), ids=SKETCHES)
def test_the_logits_are_the_exporters(sketch: Sketch) -> None:
    model, interface, plan = planned(sketch)
    assert isinstance(plan, ContiguousPlan), str(plan)
    assert [port.role for port in plan.interface.inputs] == ["input_ids", "position_ids", "past_key", "past_value"]
    assert contiguous_error(Original(build(sketch)[0], interface), model, plan, VOCAB) < 1e-4
    assert not any(node.domain == "ai.octavo" for node in model.graph)


def test_names_are_the_exporters_where_it_has_some() -> None:
    for sketch in (Sketch(), Sketch(past=False)):
        _, _, plan = planned(sketch)
        assert isinstance(plan, ContiguousPlan)
        assert [port.name for port in plan.interface.inputs[2:]] == ["past_key_values.0.key", "past_key_values.0.value"]
        assert [port.name for port in plan.interface.outputs] == ["logits", "present.0.key", "present.0.value"]


def test_what_it_can_not_express_is_refused() -> None:
    for sketch, word in ((Sketch(D=4), "head size 4"), (Sketch(past=False, mask="none"), "bidirectional"), (Sketch(D=4, past=False), "head size 4")):
        _, _, plan = planned(sketch)
        assert isinstance(plan, Refusal)
        assert word in plan.reason


def test_beside_a_site_that_is_not_known_the_exporters_inputs_stay() -> None:
    sketch = Sketch()
    model, interface = build(sketch)
    observation, found = seen(model, interface)
    plan = plan_contiguous(observation, sites_of(found), max_context=MAX_CONTEXT, refused=1)
    assert isinstance(plan, ContiguousPlan)
    assert plan.interface == interface
    assert contiguous_error(Original(build(sketch)[0], interface), model, plan, VOCAB) < 1e-4


def test_a_graph_without_a_cache_needs_all_its_sites() -> None:
    model, interface = build(Sketch(past=False))
    observation, found = seen(model, interface)
    assert isinstance(plan_contiguous(observation, sites_of(found), max_context=MAX_CONTEXT, refused=1), Refusal)


def test_the_outcome_counts() -> None:
    model, _, plan = planned(Sketch())
    assert isinstance(plan, ContiguousPlan)
    outcome = LowerContiguous(plan)(model).outcome  # type: ignore[attr-defined]
    assert (outcome.stage, outcome.matched, outcome.rewritten) == ("lower_contiguous", 1, 1)
    assert outcome.nodes_after < outcome.nodes_before
