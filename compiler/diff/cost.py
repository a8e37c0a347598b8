"""What a token costs in a graph, told from its weights and interface alone."""

from __future__ import annotations

import re
from collections import Counter

from .graph import BITS, Graph, Node, Produced, Ref, Snapshot, Tensor
from .model import Cost

# Products of activations with a weight, and where the weight is; those of our own contract carry their sizes as attributes.
_PRODUCTS = {
    "MatMul": (0, 1), "Gemm": (1,), "Conv": (1,), "MatMulInteger": (1,), "QLinearMatMul": (3,), "com.microsoft::MatMulNBits": (1,),
    "com.microsoft::FusedMatMul": (1,), "com.microsoft::DynamicQuantizeMatMul": (1,), "com.microsoft::MatMulIntegerToFloat": (1,),
}
_SIZED = ("ai.octavo::QuantLinear", "com.microsoft::MatMulNBits")
_TABLES = {"Gather": 0, "ai.octavo::QuantEmbedding": 1, "com.microsoft::GatherBlockQuantized": 0}
_CACHE = re.compile(r"past_key|past_value|^kv\.\d+\.|cache")


def cost_of(snapshot: Snapshot) -> Cost:
    """The costs of a model's main graph; calls of functions count as nodes."""
    graph = snapshot.graph
    made = made_of_weights(graph)
    tables = _table_rows(graph, made)
    weights = {tensor: tensor.nbytes for tensor in graph.tensors() if tensor.hashed}
    read = {tensor for index, node in enumerate(graph.nodes) if index not in tables for tensor in node.inputs if isinstance(tensor, Tensor)}
    return Cost(
        nodes=len(graph.nodes), ops=dict(sorted(Counter(node.op for node in graph.nodes).items())),
        flops=sum(2 * _product(node, made) for node in graph.nodes),
        weight_bytes=sum(size for tensor, size in weights.items() if tensor in read) + sum(tables.values()),
        cache_bytes=sum(_cache_bytes(port.type) for port in graph.inputs if _CACHE.search(port.name)), parameters=sum(weights.values()),
    )


def made_of_weights(graph: Graph) -> dict[int, int]:
    """Nodes that compute with weights alone, and how many elements come out: as many as the largest weight has."""
    made: dict[int, int] = {}
    for index, node in enumerate(graph.nodes):
        sizes = [ref.size if isinstance(ref, Tensor) else made.get(ref.node, -1) if isinstance(ref, Produced) else -1 for ref in node.inputs if ref]
        if sizes and min(sizes) >= 0 and max(sizes) > 1:
            made[index] = max(sizes)
    return made


def _size(ref: Ref, made: dict[int, int]) -> int:
    if isinstance(ref, Tensor):
        return ref.size
    return made.get(ref.node, 0) if isinstance(ref, Produced) else 0


def _product(node: Node, made: dict[int, int]) -> int:
    """Elements of the weight that a node multiplies a token by."""
    attributes = dict(node.attributes)
    if node.op in _SIZED:
        inner, outer = attributes.get("K", "0"), attributes.get("M", attributes.get("N", "0"))
        gated = 2 if attributes.get("gate", "0") != "0" else 1
        return int(inner) * int(outer) * gated if inner.isdigit() and outer.isdigit() else 0
    return max((_size(node.inputs[slot], made) for slot in _PRODUCTS.get(node.op, ()) if slot < len(node.inputs)), default=0)


def _table_rows(graph: Graph, made: dict[int, int]) -> dict[int, int]:
    """Nodes that read a table (or unpack one that is only looked up), and the bytes of one row of it."""
    found: dict[int, int] = {}
    readers: Counter[int] = Counter(ref.node for node in graph.nodes for ref in node.inputs if isinstance(ref, Produced))
    for index, node in enumerate(graph.nodes):
        slot = _TABLES.get(node.op)
        table = node.inputs[slot] if slot is not None and slot < len(node.inputs) else None
        if isinstance(table, Tensor) and table.hashed:
            rows = dict(node.attributes).get("M") if node.op.startswith("ai.octavo") else table.shape[0] if table.shape else None
            found[index] = table.nbytes // max(1, int(rows or 1))
        elif isinstance(table, Produced) and table.node in made and readers[table.node] == 1:
            inner = [ref for ref in graph.nodes[table.node].inputs if isinstance(ref, Tensor)]
            found[index] = 0
            found[table.node] = sum(ref.nbytes // max(1, ref.shape[0]) for ref in inner if ref.shape)
    return found


def _cache_bytes(type_text: str) -> int:
    """Bytes of one token in a cache input: the product of the sizes that are fixed. The layout's block axes are symbols."""
    match = re.fullmatch(r"(\w+)\[(.*)\]", type_text)
    if not match or match[1] not in BITS:
        return 0
    sizes = [size for size in match[2].split(", ") if size]
    total = BITS[match[1]] // 8
    for size in sizes:
        total *= int(size) if size.isdigit() else 1
    return total if any(not size.isdigit() for size in sizes) else 0
