"""What a token costs in a graph, told from its weights and interface alone. Which inputs are weights is `models/cost.py`'s table."""

from __future__ import annotations

import re
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator

from ...models.cost import PRODUCTS, ROWS_OF, SIZED, sized_product
from .graph import BITS, Graph, Node, Produced, Ref, Snapshot, Tensor
from .model import Cost

_CACHE = re.compile(r"past_key|past_value|^kv\.\d+\.|cache")
_ATTENTIONS = (
    "Attention", "ai.octavo::PagedAttention", "ai.octavo::FlashAttention", "com.microsoft::GroupQueryAttention", "com.microsoft::MultiHeadAttention",
    "com.microsoft::PagedAttention", "com.microsoft::DecoderMaskedMultiHeadAttention", "com.microsoft::SparseAttention",
)
# An attention's output goes through so many nodes at most (transposes, a gate, a norm) before the product that takes it up.
_FAR = 24


def cost_of(snapshot: Snapshot) -> Cost:
    """The costs of a model's main graph; calls of functions count as nodes."""
    graph = snapshot.graph
    made = made_of_weights(graph)
    whole, rows = _weights_read(graph, made)
    weights = {tensor: tensor.nbytes for tensor in graph.tensors() if tensor.hashed}
    return Cost(
        nodes=len(graph.nodes), ops=dict(sorted(Counter(node.op for node in graph.nodes).items())),
        flops=sum(2 * _product(node, made) for node in graph.nodes), attention_flops=sum(4 * width for width in _widths(graph, made)),
        weight_bytes=sum(tensor.nbytes for tensor in whole) + rows,
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
    if node.op in SIZED:
        sizes = {key: int(value) for key, value in node.attributes if value.isdigit()}
        return sized_product(sizes) if "K" in sizes and sizes.keys() & {"M", "N"} else 0
    return max((_size(node.inputs[slot], made) for slot in PRODUCTS.get(node.op, ()) if slot < len(node.inputs)), default=0)


def _weights_read(graph: Graph, made: dict[int, int]) -> tuple[set[Tensor], int]:
    """Weights that are read whole, and the bytes of one row of each table. Nodes that unpack a table for nothing else are part of its rows."""
    readers = Counter(ref.node for node in graph.nodes for ref in node.inputs if isinstance(ref, Produced))
    unpack: set[int] = set()
    rows = 0
    for node in graph.nodes:
        count = dict(node.attributes).get("M", "") if node.op == "ai.octavo::QuantEmbedding" else ""
        pending = [node.inputs[slot] for slot in ROWS_OF.get(node.op, ()) if slot < len(node.inputs)]
        while pending:
            ref = pending.pop()
            if isinstance(ref, Tensor) and ref.hashed and ref.shape:
                rows += ref.nbytes // max(1, int(count) if count.isdigit() else ref.shape[0])
            elif isinstance(ref, Produced) and ref.node in made and readers[ref.node] == 1:
                unpack.add(ref.node)
                pending += graph.nodes[ref.node].inputs
    whole = {ref for index, node in enumerate(graph.nodes) if index not in unpack for slot, ref in enumerate(node.inputs)
             if isinstance(ref, Tensor) and ref.hashed and slot not in ROWS_OF.get(node.op, ())}
    return whole, rows


def _widths(graph: Graph, made: dict[int, int]) -> Iterator[int]:
    """Of each attention the width of what it hands on (query heads × value size): the inner size of the product that takes it up."""
    readers: dict[int, list[int]] = defaultdict(list)
    for index, node in enumerate(graph.nodes):
        for read in {ref.node for ref in node.inputs if isinstance(ref, Produced)}:
            readers[read].append(index)
    for index, node in enumerate(graph.nodes):
        start = index if node.op in _ATTENTIONS else _context(graph, index, readers, made) if node.op == "Softmax" else None
        found = next(_ahead(graph, start, readers, lambda node: _product(node, made) > 0), None) if start is not None else None
        if found is not None:
            yield _inner(graph, found, made)


def _context(graph: Graph, softmax: int, readers: dict[int, list[int]], made: dict[int, int]) -> int | None:
    """The product of probabilities with values that reads a Softmax; None where it is no attention's."""
    return next(_ahead(graph, softmax, readers, lambda node: node.op == "MatMul" and not _product(node, made), far=6), None)


def _ahead(graph: Graph, start: int, readers: dict[int, list[int]], wanted: Callable[[Node], bool], far: int = _FAR) -> Iterator[int]:
    """Nodes after `start` that are wanted, the nearest first; at most `far` are looked at."""
    seen, pending = {start}, deque(readers[start])
    while pending and len(seen) <= far:
        index = pending.popleft()
        if index in seen:
            continue
        seen.add(index)
        if wanted(graph.nodes[index]):
            yield index
        pending += readers[index]


def _inner(graph: Graph, index: int, made: dict[int, int]) -> int:
    """The inner size of a product with a weight."""
    node = graph.nodes[index]
    attributes = dict(node.attributes)
    if node.op in SIZED:
        return int(attributes["K"])
    weight = max((node.inputs[slot] for slot in PRODUCTS[node.op] if slot < len(node.inputs)), key=lambda ref: _size(ref, made))
    turned = attributes.get("transB") == "1"
    size = _size(weight, made)
    while isinstance(weight, Produced):     # what unpacks it keeps its rows, or turns them to columns
        turned ^= graph.nodes[weight.node].op == "Transpose"
        weight = max(graph.nodes[weight.node].inputs, key=lambda ref: _size(ref, made))
    rows = weight.shape[0] if isinstance(weight, Tensor) and weight.shape else 1
    return size // max(1, rows) if turned else rows


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
