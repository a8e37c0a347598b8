"""A graph as the page draws it: nodes with a few lines of text, folded layers as groups, edges, and which edits a node is part of."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

from .cost import made_of_weights
from .folding import Own, Repeat, fold
from .graph import Given, Graph, Produced, Ref, Tensor
from .model import Edit, GraphDiff
from .write import names_of, templated

_TONES = {"inserted": "inserted", "removed": "removed", "replaced": "replaced"}
# The strongest of a node's edits colours it.
_ORDER = ("replaced", "inserted", "removed", "changed", "same")
_LINES = 3


def tone(edit: Edit) -> str:
    """The colour of an edit; what came to the interface or went from it has that of nodes that did."""
    if edit.kind == "interface" and edit.what.startswith(("added", "removed")):
        return "inserted" if edit.what.startswith("added") else "removed"
    return _TONES.get(edit.kind, "changed")


def view(graph: Graph, diff: GraphDiff, side: str, title: str) -> dict[str, Any]:
    """What page.js draws of one side ("before" or "after"). A body of a repeat stands once, with the edits of all its iterations."""
    mark = side[0]
    edits: dict[int, list[int]] = defaultdict(list)
    for index, edit in enumerate(diff.edits):
        for node in () if edit.inside else getattr(edit, side):
            edits[node].append(index)
    drawn = _Drawn(graph, mark, names_of(graph))
    for node, found in list(edits.items()):
        if drawn.merged.get(node, node) != node:
            edits[drawn.merged[node]] = sorted({*edits[drawn.merged[node]], *found})
    nodes: list[dict[str, Any]] = []
    groups: list[dict[str, Any]] = []
    for item in fold(graph):
        if isinstance(item, int):
            if item in drawn.merged:
                continue
            nodes.append(drawn.node(item, "", edits[item], diff, None))
            continue
        group = f"{mark}r{len(groups)}"
        body = [
            drawn.node(row[0], group, sorted({index for node in row for index in edits[node]}), diff, item.sources[offset])
            for offset, row in enumerate(zip(*item.rows)) if row[0] not in drawn.merged
        ]
        nodes += body
        strongest = min((node["tone"] for node in body), key=_ORDER.index)
        groups.append({"id": group, "count": len(item.rows), "size": len(body), "tone": strongest})
    ports, edges = drawn.edges()
    return {"title": title, "total": len(graph.nodes), "nodes": ports + nodes, "groups": groups, "edges": edges}


def _chains(graph: Graph) -> tuple[dict[int, int], dict[int, list[int]]]:
    """Nodes that prepare a weight (unpack, reshape, add a minimum) are drawn as one, at the last of them.

    Gives node → that last one, for all but it, and the last one → the others in order.
    """
    made = made_of_weights(graph)
    readers: dict[int, list[int]] = defaultdict(list)
    for index, node in enumerate(graph.nodes):
        for ref in node.inputs:
            if isinstance(ref, Produced):
                readers[ref.node].append(index)
    merged: dict[int, int] = {}
    for index in sorted(made, reverse=True):
        if len(readers[index]) == 1 and readers[index][0] in made:
            merged[index] = merged.get(readers[index][0], readers[index][0])
    chains: dict[int, list[int]] = defaultdict(list)
    for index in sorted(merged):
        chains[merged[index]].append(index)
    return merged, chains


class _Drawn:
    def __init__(self, graph: Graph, mark: str, names: list[str]) -> None:
        self.graph, self.mark, self.names = graph, mark, names
        self.stands = {node: node for node in range(len(graph.nodes))}
        self.own: set[int] = set()      # inputs of one layer each: told in the node's text
        self.merged, self.chains = _chains(graph)
        for item in fold(graph):
            if isinstance(item, Repeat):
                self.stands |= {node: first for row in item.rows for first, node in zip(item.rows[0], row)}
                self.own |= {ref.port for slots in item.sources for s in slots if isinstance(s, Own) for ref in s.refs if isinstance(ref, Given)}

    def node(self, index: int, group: str, edits: list[int], diff: GraphDiff, sources: Any) -> dict[str, Any]:
        node = self.graph.nodes[index]
        tones = [tone(diff.edits[edit]) for edit in edits] or ["same"]
        reads = [self._text(ref, sources[slot] if sources else None) for slot, ref in enumerate(node.inputs)]
        attributes = [f"{name}={value}" for name, value in node.attributes]
        chain = [self.graph.nodes[other].op for other in self.chains.get(index, ())]
        if chain:
            weights = [ref.type for other in self.chains[index] for ref in self.graph.nodes[other].inputs if isinstance(ref, Tensor) and ref.hashed]
            lines = [" · ".join(dict.fromkeys([*chain, node.op])), *weights[:_LINES]]
        else:
            lines = [node.op.removeprefix("ai.octavo::"), *[*attributes, *filter(None, reads)][:_LINES]]
        details = [f"name {self.names[index]}", *([f"in the model {node.name}"] if node.name else []), *attributes,
                   *(f"input {slot}: {text or self._name(ref)}" for slot, (text, ref) in enumerate(zip(reads, node.inputs)))]
        return {
            "id": f"{self.mark}{index}", "group": group, "lines": lines, "details": details, "tone": min(tones, key=_ORDER.index), "edits": edits,
            "text": " ".join([*chain, node.op, self.names[index], node.name, *attributes, *filter(None, reads)]),
        }

    def _text(self, ref: Ref, source: Any) -> str:
        """What an input is that has no edge: a weight's type, a small value, an input of the layer's own."""
        if isinstance(ref, Tensor):
            return ref.type if ref.hashed else f"{ref.dtype}{ref.content}"
        if isinstance(ref, Given) and ref.port in self.own:
            refs = source.refs if isinstance(source, Own) else (ref,)
            names = [self.graph.inputs[other.port].name for other in refs if isinstance(other, Given)]
            return templated(names) or names[0]
        return ""

    def _name(self, ref: Ref) -> str:
        if isinstance(ref, Produced):
            return self.names[ref.node] + (f":{ref.output}" if ref.output else "")
        return self.graph.inputs[ref.port].name if isinstance(ref, Given) else "none"

    def edges(self) -> tuple[list[dict[str, Any]], list[list[str]]]:
        """Inputs and outputs as nodes, and all edges; what a body carries into its next iteration is told by the group alone."""
        ports: dict[str, dict[str, Any]] = {}
        edges: dict[tuple[str, str], None] = {}
        first = set(self.stands.values()) - self.merged.keys()
        for index, node in enumerate(self.graph.nodes):
            if index not in first:
                continue
            for ref in node.inputs:
                if isinstance(ref, Produced) and self.stands[ref.node] in first:
                    edges[f"{self.mark}{self.stands[ref.node]}", f"{self.mark}{index}"] = None
                elif isinstance(ref, Given) and ref.port not in self.own:
                    ports[f"{self.mark}i{ref.port}"] = self._port(f"{self.mark}i{ref.port}", self.graph.inputs[ref.port].name, self.graph.inputs[ref.port].type)
                    edges[f"{self.mark}i{ref.port}", f"{self.mark}{index}"] = None
        # What every layer gives out is told by none of them; what one node gives is a node of its own.
        given = Counter((self.stands[ref.node], ref.output) for ref in self.graph.results if isinstance(ref, Produced))
        for index, (port, result) in enumerate(zip(self.graph.outputs, self.graph.results)):
            if isinstance(result, Produced) and result.node in first and given[result.node, result.output] == 1:
                ports[f"{self.mark}o{index}"] = self._port(f"{self.mark}o{index}", port.name, port.type)
                edges[f"{self.mark}{result.node}", f"{self.mark}o{index}"] = None
        return list(ports.values()), [list(edge) for edge in edges]

    def _port(self, name: str, text: str, type_text: str) -> dict[str, Any]:
        return {"id": name, "group": "", "lines": [text, type_text] if type_text else [text], "details": [type_text], "tone": "port", "edits": [],
                "text": f"{text} {type_text}"}

