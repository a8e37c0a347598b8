"""Rows are gathered as early as nothing mixes tokens any more, and no earlier."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from drivers import MAX_CONTEXT, Paged, seen
from octavo.passes.attention.match import sites_of
from octavo.passes.cache_interface import TokenFlatPlan, plan_token_flat
from octavo.passes.logits import RowsAt, find_rows
from octavo.passes.outcome import Refusal
from sketches import VOCAB, Sketch, build


def planned(model: ir.Model, interface: object) -> TokenFlatPlan:
    observation, found = seen(model, interface)  # type: ignore[arg-type]
    plan = plan_token_flat(observation, sites_of(found), max_context=MAX_CONTEXT)
    assert isinstance(plan, TokenFlatPlan), str(plan)
    return plan


def test_the_mlp_behind_the_last_attention_runs_for_the_rows_alone() -> None:
    model, interface = build(Sketch())
    plan = planned(model, interface)
    producer = plan.rows.value.producer()
    assert producer is not None
    assert producer.op_type == "Add"  # the residual sum of embedding and attention
    assert plan.rows.axis == 1
    assert len([node for node in model.graph if node.op_type == "Tanh" and producer.outputs[0] in node.inputs]) == 0
    Paged(model, plan)
    gather, = (node for node in model.graph if node.op_type == "Gather" and plan.inputs.logit_rows in node.inputs)
    assert gather.inputs[0] is producer.outputs[0]
    assert [use.node.op_type for use in producer.outputs[0].uses()] == ["Gather"]


def test_rows_in_any_order_and_twice() -> None:
    model, interface = build(Sketch())
    paged = Paged(model, planned(model, interface))
    tokens = list(range(10))
    whole = paged.step([(0, tokens)])
    again = paged.step([(1, tokens)], rows=[9, 0, 9])
    assert again.shape == (3, VOCAB)
    np.testing.assert_allclose(again, whole[[9, 0, 9]], rtol=0, atol=1e-5)


def test_no_rows_at_all() -> None:
    model, interface = build(Sketch())
    assert Paged(model, planned(model, interface)).step([(0, [1, 2, 3])], rows=[]).shape == (0, VOCAB)


def test_a_softmax_over_tokens_ends_the_walk() -> None:
    model, interface = build(Sketch())
    logits = next(value for value in model.graph.outputs if value.name == "logits")
    softmax = ir.node("Softmax", [logits], attributes={"axis": 1}, name="over_tokens")
    model.graph.append(softmax)
    logits.name, softmax.outputs[0].name = "inner", "logits"
    softmax.outputs[0].type, softmax.outputs[0].shape = logits.type, logits.shape
    model.graph.outputs[0] = softmax.outputs[0]
    observation, found = seen(model, interface)
    rows = find_rows(observation, model.graph.outputs[0], {site.output for site in sites_of(found)})
    assert rows == RowsAt(model.graph.outputs[0], 1)


def test_logits_without_rows_are_refused() -> None:
    model, interface = build(Sketch())
    logits = next(value for value in model.graph.outputs if value.name == "logits")
    summed = ir.node("ReduceMean", [logits], attributes={"keepdims": 0}, name="all")
    model.graph.append(summed)
    summed.outputs[0].name = "mean"
    summed.outputs[0].type = logits.type
    observation, _ = seen(model, interface)
    assert isinstance(find_rows(observation, next(iter(model.graph.initializers.values())), set()), Refusal)
