"""The token-flat signature, its KV groups, and what keeps a graph from it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from drivers import MAX_CONTEXT, Paged, open_model, seen
from octavo.models.spec import CacheGroup, CacheLayer, ModelSpec
from octavo.passes.attention.match import sites_of
from octavo.passes.attention.site import Mask
from octavo.passes.build import Builder
from octavo.passes.cache_interface import CacheInterface, TokenFlatInputs, TokenFlatPlan, plan_token_flat
from octavo.passes.observe import Dim
from octavo.passes.outcome import Refusal
from sketches import VOCAB, Sketch, build


def planned(sketch: Sketch) -> tuple[ir.Model, TokenFlatPlan]:
    model, interface = build(sketch)
    observation, found = seen(model, interface)
    plan = plan_token_flat(observation, sites_of(found), max_context=MAX_CONTEXT)
    assert isinstance(plan, TokenFlatPlan), str(plan)
    return model, plan


def test_the_signature() -> None:
    model, plan = planned(Sketch())
    paged = Paged(model, plan)
    shapes = {port.name: (port.dtype, port.shape) for port in plan.interface.inputs}
    assert shapes == {
        "input_ids": ("int64", (1, "T")), "position_ids": ("int64", (1, "T")), "cumulative_sequence_length": ("int32", ("B+1",)),
        "past_seqlens": ("int32", ("B",)), "logit_rows": ("int64", ("R",)), "parent": ("int32", ("T",)), "block_table.0": ("int32", ("B", "M")),
        "slot_mapping.0": ("int32", ("T",)), "kv.0.key": ("float32", ("N", 2, 8, "P")), "kv.0.value": ("float32", ("N", 2, "P", 8)),
    }
    assert [value.name for value in paged.session.get_inputs()] == list(shapes)
    assert [(value.name, value.shape) for value in paged.session.get_outputs()] == [("logits", ["R", VOCAB])]
    assert plan.spec == ModelSpec(VOCAB, MAX_CONTEXT, (CacheLayer(0, 2, 8, 8, "fp32"),), (CacheGroup(None),))


def test_inputs_that_nothing_reads_stay_in_the_signature() -> None:
    model, plan = planned(Sketch(rotary="none"))
    paged = Paged(model, plan)
    assert "position_ids" in [value.name for value in paged.session.get_inputs()]
    assert not plan.inputs.position_ids.uses()


def test_layers_of_one_window_size_and_format_make_a_group() -> None:
    site, = sites_of(seen(*build(Sketch()))[1])
    windowed = replace(site, mask=Mask("window", 5))
    sites = [replace(kind, name=f"site.{i}") for i, kind in enumerate([site, windowed, site, windowed, replace(site, kv_heads=1)])]
    inputs = TokenFlatInputs.of(sites, ["fp32", "fp32", "fp32", "fp16", "fp32"])
    assert [layer.group for layer in inputs.layers] == [0, 1, 0, 2, 3]
    assert inputs.groups == (CacheGroup(None), CacheGroup(5), CacheGroup(5), CacheGroup(None))
    assert [value.name for value in inputs.block_tables] == [f"block_table.{g}" for g in range(4)]
    assert [value.dtype for value in inputs.keys] == [ir.DataType.FLOAT] * 3 + [ir.DataType.FLOAT16, ir.DataType.FLOAT]


def test_planning_changes_nothing() -> None:
    model, interface = build(Sketch())
    observation, found = seen(model, interface)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    plan_token_flat(observation, sites_of(found), max_context=MAX_CONTEXT)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_positions_left_in_the_graph_come_from_position_ids() -> None:
    """A rotary that is not folded goes on in the graph, on the positions of the step."""
    model, plan = planned(Sketch(rotary="op"))
    unfolded, interface = build(Sketch(rotary="op"))
    observation, found = seen(unfolded, interface)
    left = plan_token_flat(observation, [replace(site, rotary=None) for site in sites_of(found)], max_context=MAX_CONTEXT)
    assert isinstance(left, TokenFlatPlan), str(left)
    assert left.body.positions and not plan.body.positions
    steps = [[(0, list(range(20)))], [(1, list(range(5))), (0, [7])], [(0, [1, 2, 3])]]
    one, other = Paged(model, plan), Paged(unfolded, left)
    for work in steps:
        np.testing.assert_allclose(one.step(work), other.step(work), rtol=0, atol=1e-4)


def test_what_does_not_page_is_told() -> None:
    for sketch, word in ((Sketch(past=False, mask="none"), "bidirectional mask does not page"), (Sketch(conv=True), "Conv")):
        model, interface = build(sketch)
        observation, found = seen(model, interface)
        refusal = plan_token_flat(observation, sites_of(found), max_context=MAX_CONTEXT)
        assert isinstance(refusal, Refusal)
        assert word in str(refusal)
    assert isinstance(plan_token_flat(observation, (), max_context=MAX_CONTEXT), Refusal)


def test_a_mask_read_beside_attention_does_not_page() -> None:
    model, interface = build(Sketch())
    mask, logits = next(v for v in model.graph.inputs if v.name == "attention_mask"), next(v for v in model.graph.outputs if v.name == "logits")
    producer = logits.producer()
    cast = ir.node("Cast", [mask], attributes={"to": int(ir.DataType.FLOAT)}, name="cast")
    total = ir.node("ReduceSum", cast.outputs, attributes={"keepdims": 0}, name="total")
    add = ir.node("Add", [logits, total.outputs[0]], name="beside")
    for node in (cast, total, add):
        model.graph.append(node)
    assert producer is not None
    logits.name, add.outputs[0].name = "inner", "logits"
    add.outputs[0].type, add.outputs[0].shape = logits.type, logits.shape
    model.graph.outputs[0] = add.outputs[0]
    observation, found = seen(model, interface)
    assert isinstance(plan_token_flat(observation, sites_of(found), max_context=MAX_CONTEXT), Refusal)


def test_a_threshold_of_the_length_counts_up_to_the_context() -> None:
    """Logits that change once a sequence has 10,000 tokens: a row of tokens of many sequences would not. Fine where none gets that long."""
    model, interface = build(Sketch(past=False))
    ids, logits = next(v for v in model.graph.inputs if v.name == "input_ids"), next(v for v in model.graph.outputs if v.name == "logits")
    limit = ir.val("limit", const_value=ir.tensor(np.array([10_000]), name="limit"))
    model.graph.register_initializer(limit)
    length = ir.node("Shape", [ids], attributes={"start": 1, "end": 2}, name="length")
    over = ir.node("Greater", [length.outputs[0], limit], name="over")
    factor = ir.node("Cast", over.outputs, attributes={"to": int(ir.DataType.FLOAT)}, name="factor")
    add = ir.node("Add", [logits, factor.outputs[0]], name="beside")
    model.graph.extend([length, over, factor, add])
    logits.name, add.outputs[0].name = "inner", "logits"
    add.outputs[0].type, add.outputs[0].shape = logits.type, logits.shape
    model.graph.outputs[0] = add.outputs[0]
    observation, found = seen(model, interface)
    assert isinstance(plan_token_flat(observation, sites_of(found), max_context=MAX_CONTEXT), TokenFlatPlan)
    refusal = plan_token_flat(observation, sites_of(found), max_context=20_000)
    assert isinstance(refusal, Refusal) and "follows from lengths" in refusal.reason


def test_the_order_of_the_passes_is_held() -> None:
    model, plan = planned(Sketch())
    with pytest.raises(ir.passes.PreconditionError, match="LowerPaged"):
        CacheInterface(plan)(model)


def test_sizes_are_written_from_the_ids() -> None:
    ids = ir.val("ids", dtype=ir.DataType.INT64, shape=["b", "s"])
    start = ir.node("Identity", [ids], name="start")
    model = ir.Model(ir.Graph([ids], [], nodes=[start], opset_imports={"": 20}), ir_version=10)
    build = Builder(model.graph)
    with build.before(start):
        vector = build.sizes(ids, [Dim(1, ("B",)), Dim(-1), Dim(6, ("S",)), Dim(2, ("B", "S"))])
        scalar = build.sizes(ids, [Dim(3, ("S",))], scalar=True)
        fixed = build.sizes(ids, [Dim(4), Dim(0)])
    assert fixed.const_value is not None and fixed.const_value.numpy().tolist() == [4, 0]
    for value, name in ((vector, "vector"), (scalar, "scalar")):
        value.name, value.type = name, ir.TensorType(ir.DataType.INT64)
        model.graph.outputs.append(value)
    session: ort.InferenceSession = open_model(model)
    got = session.run(["vector", "scalar"], {"ids": np.zeros((2, 5), np.int64)})
    assert got[0].tolist() == [2, -1, 30, 20]
    assert got[1].shape == () and got[1] == 15
