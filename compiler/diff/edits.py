"""From matched graphs to the fewest edits that tell them apart: what was put in, taken out, replaced, rewired, or set to another value.

An edge that differs is told by the unmatched nodes on it, where there are any, else by itself. Unmatched nodes that hang together are one
edit; in layers that both graphs repeat they hang together only within a layer. Equal edits are then one line with a count (`folded`).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field

from .folding import Repeat
from .graph import Given, Graph, Node, Outer, Produced, Ref, Tensor
from .matching import Matching, match, paired
from .model import Edit, EditKind
from .write import names_of

MOST_PLACES = 64
Same = Callable[[int, int], bool]
_Key = tuple[str, int]    # ("a", node of before) or ("b", node of after)


@dataclass(frozen=True)
class Found:
    """An edit at one place. `role` tells equal lines apart that are not the same edit at another place."""

    kind: EditKind
    what: str
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    role: Hashable = None
    inside: str = ""
    place: str = ""


def graph_edits(before: Graph, after: Graph, *, inside: str = "", outer: Same | None = None) -> list[Edit]:
    """The edits of nodes and of what they read; interfaces are compared elsewhere. `outer` says which captures are the same."""
    matching = match(before, after)
    comparison = _Comparison(matching, outer or (lambda one, other: one == other), inside)
    return folded(list(comparison.found()), matching, inside) + comparison.nested


def folded(found: list[Found], matching: Matching, inside: str) -> list[Edit]:
    """Equal edits as one, in the order of their first places."""
    names = names_of(matching.before), names_of(matching.after)
    groups: dict[Hashable, list[Found]] = {}
    for edit in found:
        groups.setdefault((edit.kind, edit.what, edit.role), []).append(edit)
    return [
        Edit(
            first.kind, first.what, len(group), tuple(_place(edit, matching, names) for edit in group[:MOST_PLACES]),
            tuple(node for edit in group for node in edit.before), tuple(node for edit in group for node in edit.after), inside,
        )
        for group in groups.values() for first in group[:1]
    ]


def _place(edit: Found, matching: Matching, names: tuple[list[str], list[str]]) -> str:
    if edit.after:
        node, name = matching.after.nodes[edit.after[0]], names[1][edit.after[0]]
    elif edit.before:
        node, name = matching.before.nodes[edit.before[0]], names[0][edit.before[0]]
    else:
        return edit.place
    return f"{name} ({node.name})" if node.name else name


@dataclass
class _Comparison:
    matching: Matching
    outer: Same
    inside: str
    nested: list[Edit] = field(default_factory=list)

    def __post_init__(self) -> None:
        m = self.matching
        self.layers = _layers(m)
        self.open = {("a", i) for i in range(len(m.before.nodes)) if i not in m.pairs} | {
            ("b", j) for j in range(len(m.after.nodes)) if j not in m.back}
        self.roles = _roles(m)

    def found(self) -> Iterator[Found]:
        tensors: dict[tuple[Tensor, Tensor], list[tuple[int, int, int]]] = defaultdict(list)
        touching: list[tuple[_Key, _Key]] = []
        rewired: list[Found] = []
        for x, y in sorted(self.matching.pairs.items()):
            one, other = self.matching.before.nodes[x], self.matching.after.nodes[y]
            rewired += self._attributes(x, y, one, other)
            slots = []
            for slot, (p, q) in enumerate(_slots(one, other)):
                if self.same(p, q):
                    continue
                if isinstance(p, Tensor) and isinstance(q, Tensor):
                    tensors[p, q].append((x, y, slot))
                elif not self._explained(p, q, touching):
                    slots.append((slot, p, q))
            rewired += self._rewired(x, y, one, slots)
        for port, p, q in self._results():
            if not self.same(p, q) and not self._explained(p, q, touching):
                rewired.append(Found("rewired", f"output {port}: {self._source(p, 'a')} → {self._source(q, 'b')}", place=port))
        yield from self._regions(touching)
        yield from rewired
        yield from self._tensors(tensors)

    def same(self, p: Ref, q: Ref) -> bool:
        """Whether two references of matched nodes mean the same."""
        if isinstance(p, Produced) and isinstance(q, Produced):
            return self.matching.pairs.get(p.node) == q.node and p.output == q.output
        if isinstance(p, Given) and isinstance(q, Given):
            if self.inside:
                return p.port == q.port
            return self.matching.before.inputs[p.port].name == self.matching.after.inputs[q.port].name
        return self.outer(p.index, q.index) if isinstance(p, Outer) and isinstance(q, Outer) else p == q

    def _results(self) -> Iterator[tuple[str, Ref, Ref]]:
        before = {port.name: ref for port, ref in zip(self.matching.before.outputs, self.matching.before.results)}
        for port, ref in zip(self.matching.after.outputs, self.matching.after.results):
            if port.name in before:
                yield port.name, before[port.name], ref

    def _explained(self, p: Ref, q: Ref, touching: list[tuple[_Key, _Key]]) -> bool:
        """Whether an edge differs because of a node that was put in or taken out; both on one edge belong together."""
        one = ("a", p.node) if isinstance(p, Produced) and ("a", p.node) in self.open else None
        other = ("b", q.node) if isinstance(q, Produced) and ("b", q.node) in self.open else None
        if one and other:
            touching.append((one, other))
        return bool(one or other)

    def _attributes(self, x: int, y: int, one: Node, other: Node) -> list[Found]:
        old, new = dict(one.attributes), dict(other.attributes)
        changes = [f"{name} {old.get(name, '(default)')} → {new.get(name, '(default)')}"
                   for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
        if [name for name, _ in one.subgraphs] != [name for name, _ in other.subgraphs]:
            changes.append("its subgraphs")
        else:
            plain = len(one.inputs) - one.captures, len(other.inputs) - other.captures
            moved = [self.same(p, q) for p, q in zip(one.inputs[plain[0] :], other.inputs[plain[1] :])]
            for (name, p), (_, q) in zip(one.subgraphs, other.subgraphs):
                if p != q or not all(moved):
                    inside = f"{self.inside}/{one.op} {name}".lstrip("/")
                    self.nested += graph_edits(
                        p, q, inside=inside, outer=lambda i, j: self.same(one.inputs[plain[0] + i], other.inputs[plain[1] + j]),
                    )
        return [Found("attribute", f"{one.op}: {', '.join(changes)}", (x,), (y,))] if changes else []

    def _rewired(self, x: int, y: int, node: Node, slots: list[tuple[int, Ref, Ref]]) -> list[Found]:
        if len(slots) == 2 and self.same(slots[0][1], slots[1][2]) and self.same(slots[1][1], slots[0][2]):
            return [Found("rewired", f"{node.op}: inputs {slots[0][0]} and {slots[1][0]} swapped", (x,), (y,), self.roles[x])]
        return [
            Found("rewired", f"{node.op} input {slot}: {self._source(p, 'a')} → {self._source(q, 'b')}", (x,), (y,), self.roles[x])
            for slot, p, q in slots
        ]

    def _source(self, ref: Ref, side: str) -> str:
        graph = self.matching.before if side == "a" else self.matching.after
        if isinstance(ref, Produced):
            return graph.nodes[ref.node].op + (f" output {ref.output}" if ref.output else "")
        if isinstance(ref, Given):
            return f"input {graph.inputs[ref.port].name}"
        return "nothing" if ref is None else ref.type + (ref.content if not ref.hashed else "") if isinstance(ref, Tensor) else "a value outside"

    def _tensors(self, tensors: dict[tuple[Tensor, Tensor], list[tuple[int, int, int]]]) -> Iterator[Found]:
        for (p, q), edges in tensors.items():
            op = self.matching.before.nodes[edges[0][0]].op
            many = len(edges) > 1 and (p.hashed or q.hashed)
            for a, b, s in edges[:1] if many else edges:
                by = f"{op} input {s}" + (f" and {len(edges) - 1} more" if many else "")
                kind, what = _constant(p, q, by)
                nodes = (tuple(e[0] for e in edges), tuple(e[1] for e in edges)) if many else ((a,), (b,))
                yield Found(kind, what, *nodes, role=self.roles[a] if p.hashed else None)

    def _regions(self, touching: list[tuple[_Key, _Key]]) -> Iterator[Found]:
        joined = _Union(self.open)
        for side, graph in (("a", self.matching.before), ("b", self.matching.after)):
            for index, node in enumerate(graph.nodes):
                for ref in node.inputs:
                    if not isinstance(ref, Produced):
                        continue
                    one, other = (side, index), (side, ref.node)
                    if {one, other} <= self.open and self.layers.get(one) == self.layers.get(other):
                        joined.join(one, other)
        for one, other in touching:
            if self.layers.get(one) == self.layers.get(other):
                joined.join(one, other)
        self._meet(joined, touching)
        regions: dict[_Key, list[_Key]] = defaultdict(list)
        for key in sorted(self.open):
            regions[joined.find(key)].append(key)
        for members in sorted(regions.values(), key=lambda keys: min(index for _, index in keys)):
            yield self._region([i for side, i in members if side == "a"], [j for side, j in members if side == "b"])

    def _meet(self, joined: _Union, touching: list[tuple[_Key, _Key]]) -> None:
        """What was taken out and what was put in of one layer, or of the rest, belong together where no match tells them apart."""
        matched = {joined.find(key) for pair in touching for key in pair}
        by_layer: dict[Hashable, dict[str, list[_Key]]] = defaultdict(lambda: {"a": [], "b": []})
        for root in dict.fromkeys(joined.find(key) for key in sorted(self.open)):
            if root not in matched:
                by_layer[self.layers.get(root)][root[0]].append(root)
        for layer, sides in by_layer.items():
            if sides["a"] and sides["b"] and (layer is not None or len(self.matching.pairs) < len(self.open)):
                for root in (*sides["a"], *sides["b"]):
                    joined.join(sides["a"][0], root)

    def _region(self, out: list[int], put: list[int]) -> Found:
        before, after = self.matching.before, self.matching.after
        removed, inserted = [before.nodes[i] for i in out], [after.nodes[j] for j in put]
        role = tuple(map(_shape, removed)), tuple(map(_shape, inserted))
        if not out:
            return Found("inserted", f"inserted {_ops(inserted)}{self._between(after, put, 'b')}", (), tuple(put), role)
        if not put:
            return Found("removed", f"removed {_ops(removed)}{self._between(before, out, 'a')}", tuple(out), (), role)
        return Found("replaced", f"replaced {_ops(removed)} by {_ops(inserted)}", tuple(out), tuple(put), role)

    def _between(self, graph: Graph, nodes: list[int], side: str) -> str:
        """` after X before Y`: what a small region reads and what reads it."""
        if len(nodes) > 3:
            return ""
        mine = set(nodes)
        sources = dict.fromkeys(
            self._source(ref, side) for i in nodes for ref in graph.nodes[i].inputs
            if not isinstance(ref, Tensor) and ref is not None and not (isinstance(ref, Produced) and ref.node in mine)
        )
        readers = [f"{node.op} input {slot}" for index, node in enumerate(graph.nodes) if index not in mine
                   for slot, ref in enumerate(node.inputs) if isinstance(ref, Produced) and ref.node in mine]
        readers += [f"output {port.name}" for port, ref in zip(graph.outputs, graph.results) if isinstance(ref, Produced) and ref.node in mine]
        after = f" after {' and '.join(sources)}" if sources else ""
        return after + (f" before {readers[0]}" + (f" and {len(readers) - 1} more" if len(readers) > 1 else "") if readers else "")


class _Union:
    """Sets that grow together."""

    def __init__(self, keys: set[_Key]) -> None:
        self._parent = {key: key for key in keys}

    def find(self, key: _Key) -> _Key:
        while self._parent[key] != key:
            self._parent[key] = self._parent[self._parent[key]]
            key = self._parent[key]
        return key

    def join(self, one: _Key, other: _Key) -> None:
        first, second = sorted((self.find(one), self.find(other)))
        self._parent[second] = first


def _slots(one: Node, other: Node) -> Iterator[tuple[Ref, Ref]]:
    """Inputs side by side; what subgraphs capture is compared inside them."""
    p, q = one.inputs[: len(one.inputs) - one.captures], other.inputs[: len(other.inputs) - other.captures]
    for slot in range(max(len(p), len(q))):
        yield p[slot] if slot < len(p) else None, q[slot] if slot < len(q) else None


def _layers(matching: Matching) -> dict[_Key, Hashable]:
    """(repeat, iteration) of each node in a repeat that both graphs have, as far as both have that iteration."""
    found: dict[_Key, Hashable] = {}
    for index, (one, other) in enumerate(paired(*matching.folds)):
        for k, (row_a, row_b) in enumerate(zip(one.rows, other.rows)):
            found |= {("a", node): (index, k) for node in row_a} | {("b", node): (index, k) for node in row_b}
    return found


def _roles(matching: Matching) -> dict[int, Hashable]:
    """What a node of `before` is in its layer, so that the same node of other layers has the same role."""
    found: dict[int, Hashable] = {index: ("node", index) for index in range(len(matching.before.nodes))}
    for number, item in enumerate(item for item in matching.folds[0] if isinstance(item, Repeat)):
        found |= {node: ("body", number, offset) for row in item.rows for offset, node in enumerate(row)}
    return found


def _shape(node: Node) -> Hashable:
    return node.op, node.attributes, tuple(ref.type if isinstance(ref, Tensor) else None for ref in node.inputs)


def _ops(nodes: list[Node]) -> str:
    if len(nodes) == 1:
        attributes = ", ".join(f"{key}={value}" for key, value in nodes[0].attributes)
        return nodes[0].op + (f"({attributes})" if attributes else "")
    counts = Counter(node.op for node in nodes).most_common()
    listed = ", ".join(f"{count} {op}" if count > 1 else op for op, count in counts[:6])
    return f"{len(nodes)} nodes ({listed}{', …' if len(counts) > 6 else ''})"


def _constant(p: Tensor, q: Tensor, by: str) -> tuple[EditKind, str]:
    if p.dtype != q.dtype:
        return "dtype", f"{by}: {p.type} → {q.type}"
    if p.shape != q.shape:
        values = f"{p.type}{p.content} → {q.type}{q.content}" if not (p.hashed or q.hashed) else f"{p.type} → {q.type}"
        return "shape", f"{by}: {values}"
    if p.hashed or q.hashed:
        return "weight", f"{by}: contents of {p.type} changed"
    return "constant", f"{by}: {p.type}{p.content} → {q.content}"


