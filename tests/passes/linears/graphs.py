"""Small graphs with random weights, and running them with octavo's ops."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from octavo.custom_ops import register
from octavo.models.onnx_reader import graph_interface, read_onnx
from octavo.models.tiny import TINY, build_llama, tiny_weights
from octavo.passes.attention.lower_paged import LowerPaged
from octavo.passes.attention.match import match_attention
from octavo.passes.cache_interface import CacheInterface, TokenFlatPlan, plan_token_flat
from octavo.passes.linears.lower_quant import QuantizeLinears
from octavo.passes.linears.precision import Precision
from octavo.passes.linears.weights import WeightPlan
from octavo.passes.logits import LogitRows
from octavo.passes.normalize import FoldDequantize, Normalize
from octavo.passes.observe import observe
from octavo.passes.outcome import Outcome
from octavo.passes.quantize.methods import quantizer
from octavo.passes.quantize.stored import Stored

Arrays = dict[str, np.ndarray]


def written(
    body: str, weights: Mapping[str, tuple[int, ...]], outputs: str = "float[n,m] y", *, inputs: str = "float[n,64] x", seed: int = 0,
) -> ir.Model:
    """A graph of this body. `weights` become random float32 initializers, vectors around 1, matrices around 0."""
    rng = np.random.default_rng(seed)
    declared = "".join(f", float[{','.join(map(str, shape))}] {name}" for name, shape in weights.items())
    header = '<ir_version: 11, opset_import: ["" : 23, "com.microsoft" : 1]>'
    model = ir.from_onnx_text(f"{header}\ng ({inputs}{declared}) => ({outputs}) {{ {body} }}")
    values = {str(value.name): value for value in model.graph.inputs}
    for name, shape in weights.items():
        value = values[name]
        model.graph.inputs.remove(value)
        array = rng.normal(1.0 if len(shape) == 1 else 0.0, 0.3, shape).astype(np.float32)
        value.const_value = ir.Tensor(array, name=name)
        model.graph.register_initializer(value)
    for node in model.graph:
        for value in node.outputs:
            value.type = value.type or ir.TensorType(ir.DataType.FLOAT)
    return model


def constants(model: ir.Model, arrays: Mapping[str, ir.TensorProtocol]) -> ir.Model:
    """Gives names that nodes read these contents; returns the graph."""
    for name, tensor in arrays.items():
        value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()))
        model.graph.register_initializer(value)
        for node in model.graph:
            for i, operand in enumerate(node.inputs):
                if operand is not None and operand.name == name:
                    node.replace_input_with(i, value)
    return model


def run(model: ir.Model, feeds: Arrays, *, fused: bool = False) -> list[np.ndarray]:
    options = ort.SessionOptions()
    if not fused:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    register(options)
    proto = ir.serde.serialize_model(model)
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(None, feeds)


def quantize(
    model: ir.Model, patterns: Mapping[str, Precision] | None = None, *, group_size: int = 32, activation_bits: int = 8, method: str = "rtn",
    stored: Mapping[str, Stored] | None = None, ids: str = "input_ids",
) -> Outcome:
    plan = WeightPlan(patterns or {"*": "int4"}, group_size, quantizer(method), activation_bits=activation_bits)  # type: ignore[arg-type]
    return QuantizeLinears(plan, stored or {}, ids)(model).outcome


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def token_flat(name: str = "llama", folder: Path | None = None, **changes: object) -> ir.Model:
    """The tiny decoder `name`, or the one in `folder`, token-flat with fp32 caches."""
    config = {**TINY[name], **changes}
    model = read_onnx(folder / "model.onnx") if folder is not None else build_llama(config, tiny_weights(config, 0))
    Normalize()(model)
    FoldDequantize()(model)
    observation = observe(model, graph_interface(model))
    sites = match_attention(model, observation, max_context=512)
    plan = plan_token_flat(observation, sites, max_context=512)  # type: ignore[arg-type]
    assert isinstance(plan, TokenFlatPlan), plan
    for stage in (LowerPaged(plan), LogitRows(plan), CacheInterface(plan)):
        stage(model)
    return model


def one_sequence(model: ir.Model, tokens: np.ndarray) -> Arrays:
    """A prefill of one sequence, logits of every row."""
    T, block = len(tokens), 16 * -(-len(tokens) // 16)
    block = max(16, 1 << (block - 1).bit_length())
    feeds = {
        "input_ids": tokens[None], "position_ids": np.arange(T)[None], "cumulative_sequence_length": np.array([0, T], np.int32),
        "past_seqlens": np.zeros(1, np.int32), "logit_rows": np.arange(T), "parent": np.arange(-1, T - 1, dtype=np.int32),
        "block_table.0": np.zeros((1, 1), np.int32), "slot_mapping.0": np.arange(T, dtype=np.int32),
    }
    for value in model.graph.inputs:
        if str(value.name).startswith("kv."):
            assert value.shape is not None
            feeds[str(value.name)] = np.zeros([dim if isinstance(dim, int) else {"N": 1, "P": block}[str(dim.value)] for dim in value.shape], np.float32)
    return feeds
