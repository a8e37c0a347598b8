"""What a decoder's step costs: bytes of weights and cache that it reads, and multiply-adds, counted in the graph itself.

Only what grows with the model is counted: products with weights, and attention. Norms, activations and sampling are left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..custom_ops.contract import CACHE_FORMATS
from .spec import ModelSpec

# Here and in `compiler/diff/cost.py` an op carries its domain unless that is ai.onnx.

# Products of activations with a weight → the inputs that the weight may be; those of SIZED say the weight's sizes in attributes.
PRODUCTS: dict[str, tuple[int, ...]] = {
    "MatMul": (0, 1), "Gemm": (1,), "Conv": (1,), "MatMulInteger": (1,), "QLinearMatMul": (3,), "com.microsoft::FusedMatMul": (0, 1),
    "com.microsoft::DynamicQuantizeMatMul": (1,), "com.microsoft::MatMulIntegerToFloat": (1,),
}
SIZED = ("ai.octavo::QuantLinear", "com.microsoft::MatMulNBits")
# Ops that read single rows of a table (embeddings, rotary angles) → the inputs that such tables are, and not read whole.
ROWS_OF: dict[str, tuple[int, ...]] = {
    "Gather": (0,), "com.microsoft::GatherBlockQuantized": (0, 2, 3), "ai.octavo::QuantEmbedding": (1,), "ai.octavo::PagedAttention": (8, 9),
    "RotaryEmbedding": (1, 2, 3), "com.microsoft::RotaryEmbedding": (2, 3), "com.microsoft::GroupQueryAttention": (7, 8),
}
# What a stored weight goes through on its way to a product, as the importers write it.
_SHAPING = ("DequantizeLinear", "Cast", "Transpose", "Reshape", "Identity", "Add")


def sized_product(attributes: Mapping[str, int]) -> int:
    """Elements of the weight of an op of SIZED."""
    return attributes["K"] * attributes["M" if "M" in attributes else "N"] * (2 if attributes.get("gate") else 1)


@dataclass(frozen=True)
class StepCost:
    """`weight_bytes`: what a step reads of the weights, once, however many tokens it has. Multiply-adds of products with weights: `per_token`
    of each token, `per_row` of each row of logits. `attentions`: cache layer and query heads of each PagedAttention.
    """

    weight_bytes: int
    per_token: int
    per_row: int
    attentions: tuple[tuple[int, int], ...]

    def prefill(self, length: int, spec: ModelSpec | None) -> int:
        """Multiply-adds of a prompt of `length` tokens from nothing to its last row of logits; attention counts the keys that a row sees."""
        total = length * self.per_token + self.per_row
        for at, heads in self.attentions if spec is not None else ():
            assert spec is not None
            layer = spec.cache_layers[at]
            window = min(spec.cache_groups[layer.group].window or length, length)
            seen = window * (window + 1) // 2 + (length - window) * window
            total += heads * (layer.head_size + layer.value_size) * seen
        return total


def step_cost(graph: Path) -> StepCost:
    """Counts in the model file `graph`; the weights themselves are not read."""
    import onnx

    model = onnx.load(graph, load_external_data=False)
    elements = {tensor.name: math.prod(tensor.dims) for tensor in model.graph.initializer}
    nbytes = {tensor.name: elements[tensor.name] * _bits(tensor.data_type) // 8 for tensor in model.graph.initializer}
    whole: set[str] = set()
    rows = {"logit_rows"}   # values of which there is one row for each row of logits
    per_token = per_row = 0
    attentions = []
    for node in model.graph.node:
        if node.op_type in _SHAPING and (known := [elements[name] for name in node.input[:2] if name in elements]):
            elements[node.output[0]] = max(known)
        of_rows = not rows.isdisjoint(node.input)
        if of_rows:
            rows.update(node.output)
        whole |= {name for at, name in enumerate(node.input) if name in nbytes and at not in ROWS_OF.get(_op(node), ())}
        products = _products(node, elements)
        per_row, per_token = per_row + products * of_rows, per_token + products * (not of_rows)
        if node.op_type == "PagedAttention":
            heads = next(attribute.i for attribute in node.attribute if attribute.name == "num_heads")
            attentions.append((int(node.input[3].split(".")[1]), int(heads)))
    return StepCost(sum(nbytes[name] for name in whole), per_token, per_row, tuple(attentions))


def cache_bytes(spec: ModelSpec, length: float) -> float:
    """Bytes of keys and values that one more token reads after `length` tokens of its sequence."""
    total = 0.0
    for layer in spec.cache_layers:
        window = spec.cache_groups[layer.group].window
        nbytes = CACHE_FORMATS[layer.cache].bytes_per_token(layer.kv_heads, layer.head_size, layer.value_size)
        total += nbytes * (length if window is None else min(length, window))
    return total


def _products(node: Any, elements: dict[str, int]) -> int:
    """Multiply-adds of one row of a product with a weight; 0 for another node."""
    op = _op(node)
    if op in SIZED:
        return sized_product({attribute.name: int(attribute.i) for attribute in node.attribute})
    return max((elements.get(node.input[slot], 0) for slot in PRODUCTS.get(op, ()) if slot < len(node.input)), default=0)


def _op(node: Any) -> str:
    return f"{node.domain}::{node.op_type}" if node.domain not in ("", "ai.onnx") else str(node.op_type)


def _bits(data_type: int) -> int:
    import onnx

    if data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):
        return 4
    return int(onnx.helper.tensor_dtype_to_np_dtype(data_type).itemsize) * 8 if data_type != onnx.TensorProto.STRING else 0
