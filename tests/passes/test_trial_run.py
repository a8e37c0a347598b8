"""A lowered graph that onnxruntime can't load, can't run, or that gives outputs of other lengths fails its trial; a sound one passes."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from drivers import MAX_CONTEXT, seen
from octavo.models.interface import GraphInterface
from octavo.models.onnx_reader import graph_interface
from octavo.passes.attention.lower_contiguous import ContiguousPlan, LowerContiguous, plan_contiguous
from octavo.passes.attention.lower_flash import FlashPlan, LowerFlash, plan_flash
from octavo.passes.attention.match import sites_of
from octavo.passes.trial_run import Trial
from sketches import Sketch, build

SKETCHES = {"past": Sketch(), "no_past": Sketch(past=False), "op_cache": Sketch(op=True, op_cache=True, op_heads_first=False, rotary="op")}


def _contiguous(sketch: Sketch) -> tuple[Trial, ir.Model, GraphInterface]:
    model, interface = build(sketch)
    observation, found = seen(model, interface)
    plan = plan_contiguous(observation, sites_of(found), max_context=MAX_CONTEXT)
    assert isinstance(plan, ContiguousPlan)
    trial = Trial(observation)
    LowerContiguous(plan)(model)
    return trial, model, plan.interface


@pytest.mark.parametrize("sketch", SKETCHES.values(), ids=SKETCHES)
def test_a_sound_graph_with_one_cache_a_sequence_passes(sketch: Sketch) -> None:
    trial, model, interface = _contiguous(sketch)
    outcome = trial.run(model, interface, batched=False)
    assert outcome.refusals == () and outcome.rewritten == outcome.matched == 3


@pytest.mark.parametrize("sketch", SKETCHES.values(), ids=SKETCHES)
def test_a_sound_graph_without_a_cache_passes(sketch: Sketch) -> None:
    model, interface = build(sketch)
    observation, found = seen(model, interface)
    plan = plan_flash(observation, sites_of(found))
    assert isinstance(plan, FlashPlan)
    trial = Trial(observation)
    LowerFlash(plan)(model)
    assert trial.run(model, plan.interface, batched=True).refusals == ()


def test_sizes_that_are_not_the_values_are_found() -> None:
    """The graph says of values inside it that they are vectors: onnxruntime believes what a graph says."""
    trial, model, interface = _contiguous(Sketch())
    for node in model.graph:
        if node.op_type == "MatMul" and node.outputs[0] not in model.graph.outputs:
            node.outputs[0].shape, node.outputs[0].type = ir.Shape([4]), ir.TensorType(ir.DataType.FLOAT)
    [refusal] = trial.run(model, interface, batched=False).refusals
    assert refusal.reason == "the lowered graph does not load" and "Incompatible dimensions" in refusal.nearest


def test_an_operator_that_the_opset_does_not_have_is_found() -> None:
    trial, model, interface = _contiguous(Sketch())
    next(iter(model.graph)).op_type = "NoSuchOperator"
    [refusal] = trial.run(model, interface, batched=False).refusals
    assert refusal.reason == "the lowered graph does not load" and "NoSuchOperator" in refusal.nearest


def test_an_output_of_another_length_is_found() -> None:
    """Logits of all rows but one: everything runs."""
    trial, model, interface = _contiguous(Sketch())
    graph = model.graph
    logits = graph.outputs[0]
    sliced = ir.Value(name="logits", type=logits.type)
    logits.name, logits.shape = "whole", None
    bounds = []
    for name, number in (("start", 1), ("end", 1 << 30), ("axis", 1)):
        value = ir.Value(name=name, const_value=ir.tensor([number], name=name))
        graph.register_initializer(value)
        bounds.append(value)
    graph.append(ir.Node("", "Slice", [logits, *bounds], outputs=[sliced]))
    graph.outputs[0] = sliced
    [refusal] = trial.run(model, interface, batched=False).refusals
    assert refusal.reason == "output logits is not as long as the source's" and "expected (1, 3," in refusal.nearest


def test_keys_that_a_source_without_a_past_gives_are_those_of_its_step_alone() -> None:
    """A prefill graph's present holds what the step brought; the lowered graph's goes on from a past, and is not compared with it."""
    observation, found = seen(*build(Sketch(past=False)))
    [site] = sites_of(found)
    model, _ = build(Sketch(past=False))
    for side, value in (("key", site.key), ("value", site.value)):
        inner = next(v for node in model.graph for v in node.outputs if v.name == value.name)
        present = ir.Value(name=f"present.0.{side}", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["B", 2, "S", 8]))
        model.graph.append(ir.Node("", "Identity", [inner], outputs=[present]))
        model.graph.outputs.append(present)
    interface = graph_interface(model)
    assert interface.output("present_key", 0) is not None
    observation, found = seen(model, interface)
    plan = plan_contiguous(observation, sites_of(found), max_context=MAX_CONTEXT)
    assert isinstance(plan, ContiguousPlan)
    trial = Trial(observation)
    LowerContiguous(plan)(model)
    assert trial.run(model, plan.interface, batched=False).refusals == ()
