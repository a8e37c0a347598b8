"""The last pass over a rewritten graph: what is dead goes, what is left runs in order and has names that say where it stands."""

from __future__ import annotations

from collections import Counter
from time import perf_counter

import onnx_ir as ir
from onnx_ir.passes import common

from .extract import subgraphs
from .normalize import graph_size
from .outcome import Outcome, PassResult

_STEPS = (
    common.RemoveUnusedNodesPass(),
    common.RemoveUnusedFunctionsPass(),
    common.RemoveUnusedOpsetsPass(),
    common.TopologicalSortPass(),
)


class Cleanup(ir.passes.InPlacePass):
    """1. Dead nodes, initializers, functions and opset imports go. 2. Nodes are in execution order. 3. Node i of an op type is named
    `{Op}_{i}`, its first output like it and the others `{Op}_{i}.{k}`: the same graph gets the same names however it was made. Names of
    inputs, outputs and initializers stay, and so does metadata.
    """

    def call(self, model: ir.Model) -> PassResult:
        start, (nodes, size) = perf_counter(), graph_size(model)
        modified = False
        for step in _STEPS:
            modified |= step(model).modified
        renamed = _rename(model.graph)
        after = graph_size(model)
        gone, seconds = nodes - after[0], perf_counter() - start
        outcome = Outcome("cleanup", "dead nodes", gone, gone, (), (), nodes, after[0], size, after[1], seconds)
        return PassResult(model, modified or renamed, outcome)

    def ensures(self, model: ir.Model) -> None:
        graph = model.graph
        seen = set(graph.inputs) | set(graph.initializers.values())
        for node in graph:
            if any(value is not None and value not in seen for value in node.inputs):
                raise ir.passes.PostconditionError(f"{node.name} runs before what it reads")
            seen.update(node.outputs)
        names = Counter(value.name for value in seen)
        if repeated := [name for name, count in names.items() if name and count > 1]:
            raise ir.passes.PostconditionError(f"names are not unique: {repeated[:4]}")


def _rename(graph: ir.Graph) -> bool:
    """Gives the names of rule 3; True where one was another."""
    kept = {value.name for value in (*graph.inputs, *graph.outputs, *graph.initializers.values())}
    kept |= {value.name for node in graph for inner in subgraphs(node) for value in _inner_values(inner)}
    outputs, counts, changed = set(graph.outputs), Counter[str](), False
    for node in graph:
        names = _names(node, counts)
        while not kept.isdisjoint(names):
            names = _names(node, counts)
        changed |= node.name != names[0]
        node.name = names[0]
        for value, new in zip(node.outputs, names):
            if value not in outputs and value.name and value.name != new:
                value.name, changed = new, True
    return changed


def _names(node: ir.Node, counts: Counter[str]) -> list[str]:
    """The next names for a node of this op type and its outputs."""
    name = f"{node.op_type}_{counts[node.op_type]}"
    counts[node.op_type] += 1
    return [name, *(f"{name}.{index}" for index in range(1, len(node.outputs)))]


def _inner_values(graph: ir.Graph) -> list[ir.Value]:
    """Values that live in a subgraph: outer names must not shadow theirs."""
    values = [*graph.inputs, *graph.initializers.values()]
    for node in graph:
        values += node.outputs
        for inner in subgraphs(node):
            values += _inner_values(inner)
    return values
