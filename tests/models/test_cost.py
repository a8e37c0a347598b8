"""Counting in graphs: products, what a step reads whole, and attention against a count row by row."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from octavo.models.artifact import read_manifest
from octavo.models.cost import cache_bytes, step_cost
from octavo.models.spec import CacheGroup, CacheLayer, ModelSpec
from octavo.models.tiny import TINY
from octavo.runtime.kv.budget import block_bytes
from onnx import TensorProto, helper, numpy_helper

C = TINY["llama"]
K, M, V, L, H, G, D = (C[name] for name in (
    "hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"))
LINEARS = L * (K * (H + 2 * G) * D + H * D * K + 3 * K * M)


@pytest.mark.parametrize("weights, bits", [("fp32", 32), ("int8", 8), ("int4", 4)])
def test_products_do_not_depend_on_how_weights_are_stored(stored_weights, weights, bits):
    cost = step_cost(stored_weights / weights / "model.onnx")
    # The last layer's rows are gathered somewhere between its attention and the head.
    assert cost.per_token + cost.per_row == LINEARS + K * V and K * V <= cost.per_row <= K * V + LINEARS // L
    assert cost.attentions == tuple((layer, H) for layer in range(L))
    least = (LINEARS + K * V) * bits // 8
    assert least <= cost.weight_bytes <= least * 1.6, "with scales and norms, without the rotary table; the tied head once"


def test_a_source_counts_like_its_artifact(stored_weights):
    cost = step_cost(stored_weights / "model.onnx")
    assert cost.per_token == LINEARS + K * V and cost.per_row == 0, "it computes every row of logits"
    assert cost.attentions == ()


def test_weights_in_other_operators(tmp_path):
    def weight(name: str, shape: tuple[int, ...], dtype: type = np.float32) -> onnx.TensorProto:
        return numpy_helper.from_array(np.zeros(shape, dtype), name)

    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"]),
        helper.make_node("DequantizeLinear", ["q", "s"], ["d"], axis=0),
        helper.make_node("Transpose", ["d"], ["dt"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "dt"], ["y"]),
        helper.make_node("MatMulNBits", ["y", "nbits", "scales"], ["z"], domain="com.microsoft", K=32, N=8, bits=4, block_size=32),
        helper.make_node("MatMul", ["z", "z2"], ["w"]),
    ]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("ids", "z2", "w")]
    graph = helper.make_graph(nodes, "g", ports[:2], ports[2:], [
        weight("table", (100, 16)), weight("q", (32, 16), np.int8), weight("s", (32,)), weight("nbits", (8, 1, 16), np.uint8), weight("scales", (8,)),
    ])
    onnx.save(helper.make_model(graph), tmp_path / "g.onnx")
    cost = step_cost(tmp_path / "g.onnx")
    assert cost.per_token == 32 * 16 + 32 * 8
    assert cost.weight_bytes == 32 * 16 + 4 * 32 + 8 * 16 + 4 * 8, "a table of embeddings is read by rows"


@pytest.mark.parametrize("window", [None, 1, 5, 100])
def test_attention_of_a_prompt_row_by_row(stored_weights, window):
    cost = step_cost(stored_weights / "fp32" / "model.onnx")
    layers = tuple(CacheLayer(min(i, 1), G, D, D + 3, "fp16") for i in range(L))
    spec = ModelSpec(V, 512, layers, (CacheGroup(None), CacheGroup(window)))
    seen = [sum(p + 1 if w is None else min(p + 1, w) for p in range(37)) for w in (None, window)]
    assert cost.prefill(37, spec) == 37 * cost.per_token + cost.per_row + sum(H * (2 * D + 3) * seen[layer.group] for layer in layers)
    assert cost.prefill(37, None) == 37 * cost.per_token + cost.per_row


@pytest.mark.parametrize("cache", ["fp32", "fp16", "int8"])
def test_cache_bytes_are_those_of_the_blocks(stored_weights, cache):
    spec = read_manifest(stored_weights / "fp32" / "octavo.json").spec
    layers = tuple(CacheLayer(0, layer.kv_heads, layer.head_size, layer.value_size, cache) for layer in spec.cache_layers)
    spec = ModelSpec(spec.vocab_size, spec.max_context, layers, spec.cache_groups)
    assert cache_bytes(spec, 64) == block_bytes(spec, 64)
