"""A graph as the page draws it: nodes with a few lines of text, folded layers as groups, edges, and which edits a node is part of.

A page has many graphs that differ little (a compile pass by pass), so graphs hold numbers, and what nodes say stands beside them once.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from .cost import made_of_weights
from .folding import Own, Repeat, fold
from .graph import Given, Graph, Port, Produced, Ref, Tensor
from .model import Edit, GraphDiff
from .write import names_of, templated

_TONES = {"inserted": "inserted", "removed": "removed", "replaced": "replaced"}
_LINES = 3

# What an edge joins: a node of the graph, or a port of it.
_End: TypeAlias = int | tuple[str, Port]


def tone(edit: Edit) -> str:
    """The colour of an edit; what came to the interface or went from it has that of nodes that did."""
    if edit.kind == "interface" and edit.what.startswith(("added", "removed")):
        return "inserted" if edit.what.startswith("added") else "removed"
    return _TONES.get(edit.kind, "changed")


@dataclass(frozen=True)
class View:
    """A graph as page.js draws it (`data`), and where each node of the graph is drawn. A body of a repeat stands once, for all iterations."""

    data: dict[str, Any]
    drawn: dict[int, int]     # node of the graph → place in data["nodes"]

    def marks(self, diff: GraphDiff, side: Literal["before", "after"]) -> dict[int, list[int]]:
        """Which edits a drawn node is part of."""
        found: dict[int, set[int]] = defaultdict(set)
        for index, edit in enumerate(diff.edits):
            for node in () if edit.inside else getattr(edit, side):
                if node in self.drawn:
                    found[self.drawn[node]].add(index)
        return {place: sorted(edits) for place, edits in sorted(found.items())}


class Views:
    """Makes views of the graphs of one page. What two nodes say in the same words is in `texts` once."""

    def __init__(self) -> None:
        self._texts: dict[tuple[tuple[str, ...], tuple[str, ...]], int] = {}

    @property
    def texts(self) -> list[list[Sequence[str]]]:
        """What nodes show, and what a click on them tells."""
        return [list(pair) for pair in self._texts]

    def view(self, graph: Graph) -> View:
        """Nodes are [text, group or -1, 1 for an input or output]; edges are pairs of places, one after the other."""
        drawn = _Drawn(graph, names_of(graph))
        nodes: list[list[int]] = []
        place: dict[_End, int] = {}
        groups: list[dict[str, int]] = []
        for item in fold(graph):
            rows = item.rows if isinstance(item, Repeat) else ((item,),)
            before = len(nodes)
            for offset, node in enumerate(rows[0]):
                if node not in drawn.merged:
                    place[node] = len(nodes)
                    text = drawn.text(node, item.sources[offset] if isinstance(item, Repeat) else None)
                    nodes.append([self._number(*text), len(groups) if isinstance(item, Repeat) else -1, 0])
            if isinstance(item, Repeat):
                groups.append({"count": len(item.rows), "size": len(nodes) - before})
        edges = list(drawn.edges())
        for end in (end for edge in edges for end in edge):
            if not isinstance(end, int) and end not in place:
                place[end] = len(nodes)
                _, port = end
                nodes.append([self._number((port.name, *([port.type] if port.type else [])), (port.type,)), -1, 1])
        shown = {node: drawn.merged.get(first, first) for node, first in drawn.stands.items()}
        data = {"total": len(graph.nodes), "nodes": nodes, "groups": groups, "edges": [place[end] for edge in edges for end in edge]}
        return View(data, {node: place[first] for node, first in shown.items() if first in place})

    def _number(self, lines: Sequence[str], details: Sequence[str]) -> int:
        return self._texts.setdefault((tuple(lines), tuple(details)), len(self._texts))


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
    def __init__(self, graph: Graph, names: list[str]) -> None:
        self.graph, self.names = graph, names
        self.stands = {node: node for node in range(len(graph.nodes))}
        self.own: set[int] = set()      # inputs of one layer each: told in the node's text
        self.merged, self.chains = _chains(graph)
        for item in fold(graph):
            if isinstance(item, Repeat):
                self.stands |= {node: first for row in item.rows for first, node in zip(item.rows[0], row)}
                self.own |= {ref.port for slots in item.sources for s in slots if isinstance(s, Own) for ref in s.refs if isinstance(ref, Given)}

    def text(self, index: int, sources: Sequence[Any] | None) -> tuple[list[str], list[str]]:
        """The lines of a node's box, and everything about it."""
        node = self.graph.nodes[index]
        reads = [self._read(ref, sources[slot] if sources else None) for slot, ref in enumerate(node.inputs)]
        attributes = [f"{name}={value}" for name, value in node.attributes]
        chain = [self.graph.nodes[other].op for other in self.chains.get(index, ())]
        if chain:
            weights = [ref.type for other in self.chains[index] for ref in self.graph.nodes[other].inputs if isinstance(ref, Tensor) and ref.hashed]
            lines = [" · ".join(dict.fromkeys([*chain, node.op])), *weights[:_LINES]]
        else:
            lines = [node.op.removeprefix("ai.octavo::"), *[*attributes, *filter(None, reads)][:_LINES]]
        details = [f"name {self.names[index]}", *([f"in the model {node.name}"] if node.name else []), *attributes,
                   *(f"input {slot}: {text}" if text else f"input {slot} from {self._name(ref)}" for slot, (text, ref) in enumerate(zip(reads, node.inputs)))]
        return lines, details

    def _read(self, ref: Ref, source: Any) -> str:
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

    def edges(self) -> Iterable[tuple[_End, _End]]:
        """Between drawn nodes, and from inputs and to outputs; what a body carries into its next iteration is told by the group alone."""
        edges: dict[tuple[_End, _End], None] = {}
        first = set(self.stands.values()) - self.merged.keys()
        for index, node in enumerate(self.graph.nodes):
            if index not in first:
                continue
            for ref in node.inputs:
                if isinstance(ref, Produced) and self.stands[ref.node] in first:
                    edges[self.stands[ref.node], index] = None
                elif isinstance(ref, Given) and ref.port not in self.own:
                    edges[("input", self.graph.inputs[ref.port]), index] = None
        # What every layer gives out is told by none of them; what one node gives is a node of its own.
        given = Counter((self.stands[ref.node], ref.output) for ref in self.graph.results if isinstance(ref, Produced))
        for port, result in zip(self.graph.outputs, self.graph.results):
            if isinstance(result, Produced) and result.node in first and given[result.node, result.output] == 1:
                edges[result.node, ("output", port)] = None
        return edges
