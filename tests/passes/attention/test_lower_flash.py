"""FlashAttention against the exporter's graph: whole sequences, several at once, padding, no cache."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from drivers import Original, flash_error, seen
from octavo.models.interface import GraphInterface
from octavo.passes.attention.lower_flash import FlashPlan, plan_flash
from octavo.passes.attention.match import sites_of
from octavo.passes.outcome import Refusal
from sketches import VOCAB, Sketch, build

SKETCHES = {
    "output_heads_first": Sketch(past=False, gate="heads_first"),
    "output_tokens_first": Sketch(past=False, gate="tokens_first", op=True),
    "no_past": Sketch(past=False),
    "past": Sketch(),
    "past_no_padding_tile": Sketch(padding=False, heads="tile"),
    "bidirectional": Sketch(past=False, mask="none"),
    "bidirectional_no_padding": Sketch(past=False, mask="none", padding=False, rotary="none"),
    "window": Sketch(window=3, past=False),
    "softcap_broadcast": Sketch(softcap=3.0, factor=1.5, heads="broadcast"),
    "op_cache": Sketch(op=True, op_cache=True, op_heads_first=False, rotary="op"),
    "op_no_past": Sketch(op=True, past=False),
}


def planned(sketch: Sketch) -> tuple[ir.Model, GraphInterface, FlashPlan | Refusal]:
    model, interface = build(sketch)
    observation, found = seen(model, interface)
    return model, interface, plan_flash(observation, sites_of(found))


@pytest.mark.parametrize("sketch", SKETCHES.values(), ids=SKETCHES)
def test_the_logits_are_the_exporters(sketch: Sketch) -> None:
    model, interface, plan = planned(sketch)
    assert isinstance(plan, FlashPlan), str(plan)
    assert not any(port.role in ("past_key", "past_value") for port in plan.interface.inputs)
    assert flash_error(Original(build(sketch)[0], interface), model, plan, VOCAB, batch=2) < 1e-4
    kinds = [node.op_type for node in model.graph]
    assert kinds.count("FlashAttention") == 1
    assert "Softmax" not in kinds and "Attention" not in kinds


def test_other_inputs_and_outputs_stay() -> None:
    _, interface, plan = planned(Sketch(past=False))
    assert isinstance(plan, FlashPlan)
    assert plan.interface == interface


def test_a_cache_can_not_go_while_an_unknown_attention_reads_it() -> None:
    model, interface = build(Sketch())
    observation, found = seen(model, interface)
    assert isinstance(plan_flash(observation, sites_of(found), refused=1), Refusal)
    assert isinstance(plan_flash(observation, ()), Refusal)
