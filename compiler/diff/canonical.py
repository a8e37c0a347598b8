"""The one order of a graph's nodes: depth first from the outputs, inputs in their order. What no output needs is not there.

The order follows from what the graph computes alone, so that neither names nor the exporter's order show, and a node that is put in moves
no other. Nothing here recurses over nodes: a chain may be as long as a model is deep.
"""

from __future__ import annotations

from dataclasses import replace

from ...errors import ModelError
from .graph import Graph, Node, Outer, Produced, Ref, Snapshot


def canonical(snapshot: Snapshot) -> Snapshot:
    """The same model with its nodes in canonical order, without dead nodes, unused functions and domains that nothing uses."""
    functions = {name: _ordered(graph)[0] for name, graph in snapshot.functions}
    graph, captures = _ordered(snapshot.graph)
    assert not captures, "the main graph has nothing around it"
    used: dict[str, None] = {}
    pending = _ops(graph)
    while pending:
        op = pending.pop()
        if op in functions and op not in used:
            used[op] = None
            pending += _ops(functions[op])
    kept = tuple(sorted((name, functions[name]) for name in used))
    domains = {op.rpartition("::")[0] or "ai.onnx" for body in (graph, *(body for _, body in kept)) for op in _ops(body)}
    return Snapshot(graph, kept, tuple(sorted((domain, version) for domain, version in snapshot.opsets if domain in domains)))


def _ops(graph: Graph) -> list[str]:
    return [op for node in graph.nodes for op in (node.op, *(op for _, inner in node.subgraphs for op in _ops(inner)))]


def _ordered(graph: Graph) -> tuple[Graph, list[int]]:
    """The graph in order, and which captures it reads, in the order in which it reads them."""
    order = _walk(graph)
    place = {old: new for new, old in enumerate(order)}
    captures: dict[int, int] = {}
    used = [1] * len(graph.nodes)

    def moved(ref: Ref) -> Ref:
        if isinstance(ref, Produced):
            used[ref.node] = max(used[ref.node], ref.output + 1)
            return Produced(place[ref.node], ref.output)
        return Outer(captures.setdefault(ref.index, len(captures))) if isinstance(ref, Outer) else ref

    # Subgraphs first: they tell which captures there are, and so what else a node reads.
    bodies = {old: _bodies(graph.nodes[old]) for old in order if graph.nodes[old].subgraphs}
    nodes = [bodies.get(old, graph.nodes[old]) for old in order]
    nodes = [replace(node, inputs=tuple(moved(ref) for ref in node.inputs)) for node in nodes]
    results = tuple(moved(ref) for ref in graph.results)
    nodes = [replace(node, outputs=used[old]) if not _counts(node) else node for old, node in zip(order, nodes)]
    return Graph(graph.inputs, graph.outputs, results, tuple(nodes)), list(captures)


def _counts(node: Node) -> bool:
    """Whether the number of outputs is part of the meaning, used or not."""
    return node.op in ("Split", "If", "Loop", "Scan", "SequenceMap") or "::" in node.op


def _bodies(node: Node) -> Node:
    """The node with its subgraphs in order, and its captures in the order of their first use."""
    plain = len(node.inputs) - node.captures
    order: dict[int, int] = {}
    bodies = []
    for name, body in node.subgraphs:
        ordered, captures = _ordered(body)
        mapping = [order.setdefault(index, len(order)) for index in captures]
        bodies.append((name, _recaptured(ordered, mapping)))
    captured = tuple(node.inputs[plain + index] for index in order)
    return replace(node, inputs=(*node.inputs[:plain], *captured), subgraphs=tuple(bodies), captures=len(order))


def _recaptured(graph: Graph, mapping: list[int]) -> Graph:
    def moved(ref: Ref) -> Ref:
        return Outer(mapping[ref.index]) if isinstance(ref, Outer) else ref

    nodes = tuple(replace(node, inputs=tuple(moved(ref) for ref in node.inputs)) for node in graph.nodes)
    return replace(graph, nodes=nodes, results=tuple(moved(ref) for ref in graph.results))


def _walk(graph: Graph) -> list[int]:
    """Nodes that the results need, each after those it reads. ModelError where they read each other in a circle."""
    state = [0] * len(graph.nodes)      # 0 not seen, 1 on the way, 2 done
    order: list[int] = []
    for result in graph.results:
        stack = [(result.node, 0)] if isinstance(result, Produced) and not state[result.node] else []
        if stack:
            state[stack[0][0]] = 1
        while stack:
            index, slot = stack.pop()
            inputs = graph.nodes[index].inputs
            while slot < len(inputs):
                ref = inputs[slot]
                slot += 1
                if isinstance(ref, Produced) and state[ref.node] != 2:
                    if state[ref.node] == 1:
                        raise ModelError("its nodes read each other in a circle", hint="export the model again")
                    stack.append((index, slot))
                    stack.append((ref.node, 0))
                    state[ref.node] = 1
                    break
            else:
                state[index] = 2
                order.append(index)
    return order
