"""The ops of com.microsoft written out, against onnxruntime's own kernels on random operands."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from octavo.models.onnx_reader import graph_interface
from octavo.passes.attention.expand import ExpandAttentionOps, unequal_lengths
from octavo.passes.attention.match import match_attention
from octavo.passes.attention.site import AttentionSite
from octavo.passes.normalize import Normalize
from octavo.passes.observe import observe
from onnx import TensorProto, helper

B, S, P, H, G, D = 2, 3, 5, 4, 2, 16


def graph(op: str, inputs: dict[str, Any], outputs: int, attributes: dict[str, Any], opset: int = 17) -> onnx.ModelProto:
    """One node. `inputs` maps names to arrays ("" where absent), in the op's order."""
    def kind(array: np.ndarray) -> int:
        return helper.np_dtype_to_tensor_dtype(array.dtype)

    names = [name if array is not None else "" for name, array in inputs.items()]
    given = {name: array for name, array in inputs.items() if array is not None}
    sums = [name for name in given if name == "lengths"]
    nodes = [helper.make_node("ReduceSum", ["mask"], ["lengths"], keepdims=0)] if sums else []
    feeds = {name: array for name, array in given.items() if name != "lengths"}
    if sums:
        feeds["mask"] = given["lengths"]
        nodes = [helper.make_node("ReduceSum", ["mask", "axis"], ["lengths"], keepdims=0)]
    nodes.append(helper.make_node(op, names, [f"out{i}" for i in range(outputs)], domain="com.microsoft", **attributes))
    infos = [helper.make_tensor_value_info(name, kind(array), array.shape) for name, array in feeds.items()]
    results = [helper.make_tensor_value_info(f"out{i}", TensorProto.FLOAT, None) for i in range(outputs)]
    constants = [onnx.numpy_helper.from_array(np.array([1]), "axis")] if sums else []
    made = helper.make_graph(nodes, "one", infos, results, constants)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)], ir_version=10)


def outputs_of(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {port.name: feeds[port.name] for port in session.get_inputs()})


def f32(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def tables(width: int) -> dict[str, np.ndarray]:
    angles = np.arange(32)[:, None] * 10000.0 ** (-np.arange(width // 2) / (width // 2))
    return {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}


def gqa(packed: bool = False, past: int = P, batch: int = 1, S: int = S, **extra: Any) -> dict[str, Any]:
    rows = {"query": f32(batch, S, (H + 2 * G) * D), "key": None, "value": None} if packed else {
        "query": f32(batch, S, H * D), "key": f32(batch, S, G * D), "value": f32(batch, S + 0, G * D) + 1}
    lengths = {"seqlens_k": np.full(batch, past + S - 1, np.int32), "total": np.array(past + S, np.int32)}
    caches = {"past_key": f32(batch, G, past, D), "past_value": f32(batch, G, past, D) - 1}
    return {**rows, **caches, **lengths, **{name: extra.get(name) for name in ("cos", "sin", "position_ids", "bias", "sink")}}


GROUP = {"num_heads": H, "kv_num_heads": G}
MULTI = {"num_heads": H}
rows = {"query": f32(B, S, H * D), "key": f32(B, S, H * D) + 0.5, "value": f32(B, S, H * D) - 0.5}
project = {"input": f32(B, S, 24), "weights": f32(24, 3 * H * D) / 5, "bias": f32(3 * H * D)}
mask = np.array([[1, 1, 1], [1, 1, 0]], np.int32)

CASES: dict[str, tuple[str, dict[str, Any], int, dict[str, Any]]] = {
    "gqa": ("GroupQueryAttention", gqa(), 3, GROUP),
    "gqa prompt of two": ("GroupQueryAttention", gqa(past=0, batch=2), 3, GROUP),
    "gqa one token of two": ("GroupQueryAttention", gqa(batch=2, S=1), 3, GROUP),
    "gqa packed": ("GroupQueryAttention", gqa(packed=True), 3, GROUP),
    "gqa rotary": ("GroupQueryAttention", gqa(**tables(D)), 3, {**GROUP, "do_rotary": 1}),
    "gqa rotary interleaved": ("GroupQueryAttention", gqa(packed=True, **tables(D)), 3, {**GROUP, "do_rotary": 1, "rotary_interleaved": 1}),
    "gqa rotary of two": ("GroupQueryAttention", gqa(past=0, batch=2, **tables(D)), 3, {**GROUP, "do_rotary": 1}),
    "gqa window": ("GroupQueryAttention", gqa(), 3, {**GROUP, "local_window_size": 4}),
    "gqa softcap scale": ("GroupQueryAttention", gqa(), 3, {**GROUP, "softcap": 2.0, "scale": 0.7}),
    "gqa smooth": ("GroupQueryAttention", gqa(), 3, {**GROUP, "smooth_softmax": 1}),
    "gqa sink": ("GroupQueryAttention", gqa(sink=f32(H)), 3, GROUP),
    "gqa bias": ("GroupQueryAttention", gqa(bias=f32(1, H, S, P + S)), 3, GROUP),
    "mha": ("MultiHeadAttention", rows, 1, MULTI),
    "mha scale": ("MultiHeadAttention", rows, 1, {**MULTI, "scale": 0.9}),
    "mha causal": ("MultiHeadAttention", rows, 1, {**MULTI, "unidirectional": 1}),
    "mha bias": ("MultiHeadAttention", {**rows, "bias": f32(3 * H * D)}, 1, MULTI),
    "mha masked": ("MultiHeadAttention", {**rows, "bias": None, "key_mask": mask}, 1, MULTI),
    "mha attention bias": ("MultiHeadAttention", {**rows, "bias": None, "key_mask": None, "added": f32(1, H, S, S)}, 1, MULTI),
    "mha past": ("MultiHeadAttention", {
        **rows, "bias": None, "key_mask": None, "added": None, "past_key": f32(B, H, P, D), "past_value": f32(B, H, P, D) * 2}, 3, MULTI),
    "mha cross": ("MultiHeadAttention", {"query": f32(B, S, H * D), "key": f32(B, H, 7, D), "value": f32(B, H, 7, D) + 1}, 1, MULTI),
    "attention": ("Attention", project, 1, MULTI),
    "attention causal": ("Attention", project, 1, {**MULTI, "unidirectional": 1}),
    "attention masked": ("Attention", {**project, "mask": mask}, 1, MULTI),
    "attention lengths": ("Attention", {**project, "lengths": mask}, 1, MULTI),
    "attention past": ("Attention", {**project, "mask": None, "past": f32(2, B, H, P, D)}, 2, {**MULTI, "unidirectional": 1}),
    "attention sizes": ("Attention", {**project, "weights": f32(24, 2 * H * D + H * 8) / 5, "bias": f32(2 * H * D + H * 8)}, 1, {
        **MULTI, "qkv_hidden_sizes": [H * D, H * D, H * 8]}),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_written_out_is_what_the_kernel_computes(name: str) -> None:
    op, inputs, outputs, attributes = CASES[name]
    proto = graph(op, inputs, outputs, attributes)
    feeds = {name: array for name, array in inputs.items() if array is not None} | {"mask": inputs.get("lengths", inputs.get("mask"))}
    want = outputs_of(proto, feeds)
    model = ir.from_proto(proto)
    Normalize()(model)
    assert ExpandAttentionOps()(model).outcome.rewritten == 1  # type: ignore[attr-defined]
    assert not any(node.op_type == op for node in model.graph)
    for got, expected in zip(outputs_of(ir.to_proto(model), feeds), want, strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-5 * max(1.0, float(np.abs(expected).max())))


PACKED = {
    "query, key and value": {"query": np.stack([array.reshape(B, S, H, D) for array in rows.values()], axis=3)},
    "key and value": {"query": rows["query"], "key": np.stack([rows[name].reshape(B, S, H, D) for name in ("key", "value")], axis=3)},
}


@pytest.mark.parametrize("name", PACKED)
def test_packed_operands_are_the_separate_ones(name: str) -> None:
    """onnxruntime computes them on other machines than CPUs: the oracle is its kernel on the operands unpacked."""
    [want] = outputs_of(graph("MultiHeadAttention", rows, 1, MULTI), rows)
    model = ir.from_proto(graph("MultiHeadAttention", PACKED[name], 1, MULTI))
    assert ExpandAttentionOps()(model).outcome.rewritten == 1  # type: ignore[attr-defined]
    [got] = outputs_of(ir.to_proto(model), PACKED[name])
    np.testing.assert_allclose(got, want, atol=1e-5)


STAYS = {
    "an attribute of another time": ("MultiHeadAttention", rows, 1, {**MULTI, "mood": 1}),
    "a quantized cache": ("GroupQueryAttention", gqa(), 3, {**GROUP, "k_quant_type": "PER_TENSOR"}),
    "lengths of no known meaning": ("Attention", {**project, "counts": np.array([3, 2], np.int32)}, 1, MULTI),
    "rotary of its own": ("Attention", project, 1, {**MULTI, "do_rotary": 1}),
    "a shared buffer": ("DecoderMaskedMultiHeadAttention", {**rows, "key_mask": None, "bias": None, "past_key": f32(B, H, P, D), "past_value": f32(
        B, H, P, D), "past_sequence_length": np.array(3, np.int32)}, 3, MULTI),
}


@pytest.mark.parametrize("name", STAYS)
def test_what_is_not_written_out_stays_and_says_why(name: str) -> None:
    model = ir.from_proto(graph(*STAYS[name]))
    outcome = ExpandAttentionOps()(model).outcome  # type: ignore[attr-defined]
    assert outcome.rewritten == 0 and len(outcome.notes) == 1 and "stays" in outcome.notes[0]
    assert any(node.op_type == STAYS[name][0] for node in model.graph)


BUILDER = """
<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
g (int64[b,s] input_ids, int64[b,t] attention_mask, float[b,2,p,d] past_0_key, float[b,2,p,d] past_0_value)
 => (float[b,s,64] logits, float[b,2,t,d] present_0_key, float[b,2,t,d] present_0_value)
<float[8,128] table = {TABLE}, int64[1] axis = {1}, int64 less = {LESS}, int64 place = {1}>
{
    packed = Gather(table, input_ids)
    counted = ReduceSum(attention_mask, axis)
    last = Sub(counted, less)
    seqlens = Cast<to = 6>(last)
    shape = Shape(attention_mask)
    total64 = Gather(shape, place)
    total = Cast<to = 6>(total64)
    logits, present_0_key, present_0_value = com.microsoft.GroupQueryAttention<num_heads = 4, kv_num_heads = 2>(
        packed, "", "", past_0_key, past_0_value, seqlens, total)
}
""".replace("TABLE", ", ".join(["0.25"] * 8 * 128))


def builder(less: int) -> tuple[ir.Model, ExpandAttentionOps]:
    model = ir.from_onnx_text(BUILDER.replace("LESS", str(less)))
    Normalize()(model)
    expansion = ExpandAttentionOps()
    expansion(model)
    return model, expansion


def test_a_builders_decoder_is_a_site_with_a_cache() -> None:
    """Its head size is in no declared shape; its mask is the lengths that it is given, held against those of past and tokens."""
    model, expansion = builder(1)
    observation = observe(model, graph_interface(model))
    assert observation.cached and unequal_lengths(observation, expansion.lengths, 64) is None
    [site] = match_attention(model, observation, max_context=64)
    assert isinstance(site, AttentionSite), str(site)
    assert (site.num_heads, site.kv_heads, site.head_size, site.mask.kind) == (4, 2, 16, "causal") and site.cache is not None


def test_lengths_that_are_other_than_those_of_past_and_tokens_are_refused() -> None:
    model, expansion = builder(2)
    refusal = unequal_lengths(observe(model, graph_interface(model)), expansion.lengths, 64)
    assert refusal is not None and "other lengths" in refusal.reason and "seqlens_k" in refusal.nearest
