"""Which node of one graph is which of the other: by what they are, not by where they stand or what they are called.

From the surest sign to the weakest, each applied to what is left: the whole cone above and below a node, with the contents of weights; the
weights it reads; its neighbours' matches; the cones again without contents; the place in a body of layers; the neighbours, with other
attributes. A sign that fits several nodes counts only where it fits as many on both sides.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from .folding import Item, Repeat, fold
from .graph import Given, Graph, Node, Outer, Produced, Ref, Tensor

# Sequences longer than this are not aligned: what no better sign has matched by then is another graph.
_LONGEST = 1200
# Two bodies, or what is left of two graphs, are the same thing changed where at least this share of the shorter one is found in the other.
_ALIKE = 0.5


@dataclass(frozen=True)
class Matching:
    """`pairs` maps nodes of `before` to nodes of `after`; `back` is its inverse."""

    before: Graph
    after: Graph
    pairs: dict[int, int]
    back: dict[int, int]
    folds: tuple[tuple[Item, ...], tuple[Item, ...]]


def match(before: Graph, after: Graph) -> Matching:
    """Matches the nodes of two canonical graphs. Equal nodes match; a node matches at most one, of the same op."""
    matcher = _Matcher(before, after)
    matcher.run()
    return Matching(before, after, matcher.pairs, matcher.back, matcher.folds)


class _Side:
    """What is known of one graph's nodes, in numbers that mean the same on both sides."""

    def __init__(self, graph: Graph, number: Callable[[Hashable], int]) -> None:
        self.graph = graph
        self.readers: list[list[tuple[int, int, int]]] = [[] for _ in graph.nodes]     # (reader, slot, output)
        for index, node in enumerate(graph.nodes):
            for slot, ref in enumerate(node.inputs):
                if isinstance(ref, Produced):
                    self.readers[ref.node].append((index, slot, ref.output))
        self.exact = [number(("exact", _look(node), tuple(map(self._content, node.inputs)))) for node in graph.nodes]
        self.shape = [number(("shape", _look(node), tuple(map(self._type, node.inputs)))) for node in graph.nodes]
        self.weights = [number((node.op, _weights(node))) if _weights(node) else -1 for node in graph.nodes]
        self.up = {"exact": self._up(self.exact, number), "shape": self._up(self.shape, number)}
        self.down = {"exact": self._down(self.exact, number), "shape": self._down(self.shape, number)}

    def _content(self, ref: Ref) -> Hashable:
        if isinstance(ref, Produced):
            return ref.output
        return self.graph.inputs[ref.port].name if isinstance(ref, Given) else ref

    def _type(self, ref: Ref) -> Hashable:
        if isinstance(ref, Produced):
            return ref.output
        if isinstance(ref, (Given, Outer)):
            return type(ref).__name__
        return ref.type if isinstance(ref, Tensor) and ref.hashed else ref

    def _up(self, look: list[int], number: Callable[[Hashable], int]) -> list[int]:
        found: list[int] = []
        for index, node in enumerate(self.graph.nodes):
            above = tuple(found[ref.node] if isinstance(ref, Produced) else self._name(ref) for ref in node.inputs)
            found.append(number(("up", look[index], above)))
        return found

    def _name(self, ref: Ref) -> Hashable:
        return self.graph.inputs[ref.port].name if isinstance(ref, Given) else None

    def _down(self, look: list[int], number: Callable[[Hashable], int]) -> list[int]:
        ends: dict[int, list[tuple[str, int]]] = defaultdict(list)
        for port, ref in zip(self.graph.outputs, self.graph.results):
            if isinstance(ref, Produced):
                ends[ref.node].append((port.name, ref.output))
        found = [0] * len(self.graph.nodes)
        for index in reversed(range(len(self.graph.nodes))):
            below = tuple(sorted((found[reader], slot, output) for reader, slot, output in self.readers[index]))
            found[index] = number(("down", look[index], below, tuple(sorted(ends[index]))))
        return found


def _look(node: Node) -> Hashable:
    return node.op, node.attributes, node.subgraphs, node.captures


def _weights(node: Node) -> tuple[tuple[int, str], ...]:
    return tuple((slot, ref.content) for slot, ref in enumerate(node.inputs) if isinstance(ref, Tensor) and ref.hashed)


class _Matcher:
    def __init__(self, before: Graph, after: Graph) -> None:
        numbers: dict[Hashable, int] = {}

        def number(key: Hashable) -> int:
            return numbers.setdefault(key, len(numbers))

        self.a, self.b = _Side(before, number), _Side(after, number)
        self.pairs: dict[int, int] = {}
        self.back: dict[int, int] = {}
        self.folds = (fold(before), fold(after))

    def run(self) -> None:
        a, b = self.a, self.b
        for kind in ("exact", "shape"):
            self._by_key(list(zip(a.up[kind], a.down[kind])), list(zip(b.up[kind], b.down[kind])))
            self._by_key(a.up[kind], b.up[kind])
            self._by_key(a.down[kind], b.down[kind])
            self._by_key(a.weights, b.weights)
            self._spread(self._same_shape)
        for first, second in paired(*self.folds):
            self._align([first.rows[0]], [second.rows[0]], list(zip(first.rows, second.rows)))
        self._align([self._left(a, self.pairs)], [self._left(b, self.back)], None)
        self._spread(self._same_shape)
        self._spread(self._same_op)

    def _left(self, side: _Side, matched: dict[int, int]) -> Sequence[int]:
        return [index for index in range(len(side.graph.nodes)) if index not in matched]

    def _same_shape(self, x: int, y: int) -> bool:
        return self.a.shape[x] == self.b.shape[y]

    def _same_op(self, x: int, y: int) -> bool:
        return self.a.graph.nodes[x].op == self.b.graph.nodes[y].op

    def _join(self, x: int, y: int) -> None:
        self.pairs[x], self.back[y] = y, x

    def _by_key(self, keys_a: Sequence[Hashable], keys_b: Sequence[Hashable]) -> None:
        """Matches what has a key that as many have on the other side, in canonical order."""
        left, right = _groups(keys_a, self.pairs), _groups(keys_b, self.back)
        for key, nodes in left.items():
            others = right.get(key, [])
            if key != -1 and len(nodes) == len(others):
                for x, y in zip(nodes, others):
                    self._join(x, y)

    def _spread(self, agree: Callable[[int, int], bool]) -> None:
        """From outputs and matches to their neighbours: what a slot reads; the only reader of an output in a slot."""
        for one, other in self._ends():
            if one not in self.pairs and other not in self.back and agree(one, other):
                self._join(one, other)
        pending = sorted(self.pairs.items())
        while pending:
            x, y = pending.pop()
            for one, other in (*self._above(x, y), *self._below(x, y)):
                if one not in self.pairs and other not in self.back and agree(one, other):
                    self._join(one, other)
                    pending.append((one, other))

    def _ends(self) -> Iterable[tuple[int, int]]:
        """What makes the outputs of one name."""
        named = dict(zip((port.name for port in self.b.graph.outputs), self.b.graph.results))
        for port, one in zip(self.a.graph.outputs, self.a.graph.results):
            other = named.get(port.name)
            if isinstance(one, Produced) and isinstance(other, Produced) and one.output == other.output:
                yield one.node, other.node

    def _above(self, x: int, y: int) -> Iterable[tuple[int, int]]:
        for one, other in zip(self.a.graph.nodes[x].inputs, self.b.graph.nodes[y].inputs):
            if isinstance(one, Produced) and isinstance(other, Produced) and one.output == other.output:
                yield one.node, other.node

    def _below(self, x: int, y: int) -> Iterable[tuple[int, int]]:
        left, right = self._readers(self.a, x, self.pairs), self._readers(self.b, y, self.back)
        for key, nodes in left.items():
            others = right.get(key, [])
            if len(nodes) == len(others) == 1:
                yield nodes[0], others[0]

    def _readers(self, side: _Side, index: int, matched: dict[int, int]) -> dict[Hashable, list[int]]:
        found: dict[Hashable, list[int]] = defaultdict(list)
        for reader, slot, output in side.readers[index]:
            if reader not in matched:
                found[side.graph.nodes[reader].op, slot, output].append(reader)
        return found

    def _align(self, a: Sequence[Sequence[int]], b: Sequence[Sequence[int]], rows: Sequence[tuple[Sequence[int], Sequence[int]]] | None) -> None:
        """Matches the longest common sequences of looks, in all `rows` alike; nothing where too little is common."""
        (x,), (y,) = a, b
        if not x or not y or max(len(x), len(y)) > _LONGEST:
            return
        looks = [self.a.shape[i] for i in x], [self.b.shape[j] for j in y]
        blocks = SequenceMatcher(None, *looks, autojunk=False).get_matching_blocks()
        if sum(block.size for block in blocks) < _ALIKE * min(len(x), len(y)):
            return
        for first, second in rows if rows is not None else [(x, y)]:
            for block in blocks:
                for k in range(block.size):
                    one, other = first[block.a + k], second[block.b + k]
                    if one not in self.pairs and other not in self.back and self._same_op(one, other):
                        self._join(one, other)


def _groups(keys: Sequence[Hashable], matched: dict[int, int]) -> dict[Hashable, list[int]]:
    found: dict[Hashable, list[int]] = defaultdict(list)
    for index, key in enumerate(keys):
        if index not in matched:
            found[key].append(index)
    return found


def paired(before: Sequence[Item], after: Sequence[Item]) -> list[tuple[Repeat, Repeat]]:
    """Repeats of two graphs that are each other's: the same number in the same order, and nearly as many iterations."""
    left, right = ([item for item in items if isinstance(item, Repeat)] for items in (before, after))
    if len(left) != len(right):
        left, right = ([item for item in items if len(item.rows) == max((len(r.rows) for r in items), default=0)][:1] for items in (left, right))
    return [(x, y) for x, y in zip(left, right) if abs(len(x.rows) - len(y.rows)) <= max(1, len(x.rows) // 10)]
