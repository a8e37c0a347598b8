"""Where a linear stands, read from the graph and not from an exporter's names.

    layers.3.attn.q .k .v .qkv .o      what attention 3 reads, and what reads it
    layers.3.mlp.gate .up .gate_up .down
    head                               the last, whose rows are the logits
    embed                              a table of embeddings that no linear shares
    input                              before the first attention, and none of these

Attentions are counted in execution order. A layer with several linears of one place numbers them: `layers.3.mlp.up`, `layers.3.mlp.up.1`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import onnx_ir as ir

from ..extract import reads
from .norms import is_constant
from .site import GateSite, LinearSite, Norm

ATTENTIONS = frozenset({"PagedAttention", "FlashAttention", "GroupQueryAttention", "MultiHeadAttention", "Attention"})
_OPERANDS = ("q", "k", "v")
# What a value is computed from, back to the nearest linears and attentions: indices of both.
Near = tuple[frozenset[int], frozenset[int]]


def named(graph: ir.Graph, sites: Sequence[LinearSite], gates: Sequence[GateSite], norms: Mapping[ir.Value, Norm]) -> list[LinearSite]:
    """`sites`, in execution order, with their names."""
    places = _Places(graph, sites, norms)
    names: list[str | None] = [places.around_attention(i) for i in range(len(sites))]
    streams = {places.stream(site): layer for i, site in enumerate(sites) if (layer := places.read_by(i)) is not None}
    gated = {id(rows.site.node): place for gate in gates for rows, place in ((gate.up, "up"), (gate.gate, "gate"))}
    gated |= {id(gate.gate.site.node): "gate_up" for gate in gates if gate.gate.site.node is gate.up.site.node}
    layers: list[int | None] = [None if name is None or "." not in name else int(name.split(".")[1]) for name in names]
    for i, site in enumerate(sites):
        if names[i] is not None:
            continue
        linears, attentions = places.near(site.input)
        above = [layer for j in linears if (layer := layers[j]) is not None] + list(attentions)
        layers[i] = streams.get(places.stream(site), max(above, default=None))
        inside = bool(linears) and not attentions and all((names[j] or "").partition(".mlp.")[2] in ("gate", "up", "gate_up") for j in linears)
        place = gated.get(id(site.node), "down" if inside else "up")
        names[i] = "input" if layers[i] is None else f"layers.{layers[i]}.mlp.{place}"
    counts = Counter[str]()
    found: list[LinearSite] = []
    for site, name in zip(sites, names):
        assert name is not None
        found.append(replace(site, name=f"{name}.{counts[name]}" if counts[name] else name))
        counts[name] += 1
    return found


class _Places:
    """What lies before and behind each linear."""

    def __init__(self, graph: ir.Graph, sites: Sequence[LinearSite], norms: Mapping[ir.Value, Norm]) -> None:
        self._graph, self._sites, self._norms = graph, sites, norms
        self._linear = {site.node: i for i, site in enumerate(sites)}
        self._attention = {node: i for i, node in enumerate(node for node in graph if node.op_type in ATTENTIONS)}
        self._near: dict[ir.Value, Near] = {}
        self._readers: dict[ir.Value, frozenset[tuple[int, int]]] = {}
        for node in graph:
            self._forwards(node)
        for node in reversed(list(graph)):
            self._backwards(node)

    def _forwards(self, node: ir.Node) -> None:
        empty: Near = (frozenset(), frozenset())
        if node in self._linear:
            found: Near = (frozenset({self._linear[node]}), empty[1])
        elif node in self._attention:
            found = (empty[0], frozenset({self._attention[node]}))
        else:
            parts = [self._near.get(value, empty) for value in reads(node)]
            found = (empty[0].union(*(part[0] for part in parts)), empty[1].union(*(part[1] for part in parts)))
        for value in node.outputs:
            self._near[value] = found

    def _backwards(self, node: ir.Node) -> None:
        behind = frozenset[tuple[int, int]]().union(*(self._readers.get(value, frozenset()) for value in node.outputs))
        for place, value in enumerate(node.inputs):
            if value is None or node in self._linear:
                continue
            found = {(self._attention[node], place)} if node in self._attention and place < len(_OPERANDS) else behind
            self._readers[value] = self._readers.get(value, frozenset()) | (frozenset() if node in self._attention and place >= len(_OPERANDS) else found)

    def near(self, value: ir.Value) -> Near:
        """The linears and attentions that `value` is computed from without another between."""
        return self._near.get(value, (frozenset(), frozenset()))

    def stream(self, site: LinearSite) -> ir.Value:
        """What a linear reads, before its norm."""
        norm = self._norms.get(site.input)
        if norm is not None:
            return norm.source
        node = site.input.producer()
        if node is not None and node.op_type == "LayerNormalization" and node.inputs[0] is not None:
            return node.inputs[0]
        return site.input

    def read_by(self, index: int) -> int | None:
        """The first attention that reads this linear as query, key or value."""
        return min((layer for layer, _ in self._readers.get(self._sites[index].output, ())), default=None)

    def around_attention(self, index: int) -> str | None:
        """The name of a linear next to an attention, or of the head."""
        site, layer = self._sites[index], self.read_by(index)
        if layer is not None:
            places = sorted(place for reader, place in self._readers[site.output] if reader == layer)
            alone = places == [0] and self._packed(layer)
            return f"layers.{layer}.attn.{'qkv' if alone else ''.join(_OPERANDS[place] for place in places)}"
        attentions = self.near(site.input)[1]
        if attentions:
            return f"layers.{max(attentions)}.attn.o"
        return "head" if self._is_head(site.output) else None

    def _packed(self, layer: int) -> bool:
        """Whether an attention has all three in its first input."""
        node = next(node for node, i in self._attention.items() if i == layer)
        return len(node.inputs) < 2 or node.inputs[1] is None

    def _is_head(self, value: ir.Value) -> bool:
        """Whether `value` goes to an output of the graph, with nothing but constants joining it on the way."""
        while not value.is_graph_output():
            uses = list(value.uses())
            if len({use.node for use in uses}) != 1 or uses[0].node in self._linear:
                return False
            node = uses[0].node
            if any(other is not None and other is not value and not is_constant(other) for other in node.inputs):
                return False
            value = node.outputs[0]
        return True
