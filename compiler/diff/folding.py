"""Finds what repeats: thirty equal layers are one body and a table of what differs between them.

A run of the canonical order whose nodes look alike at a distance p is tried as a repeat of bodies of p nodes. It is one if every input of a
body node is the same thing in each iteration: a node of the same iteration, the same node of the one before (*carried*), one thing outside
that all read (*shared*), or a weight or graph input of each iteration's own (*own*). What shared values need stands in the middle of the
first layer where they are first read; it is moved in front of it, and the first layer then joins the others.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from .graph import Given, Graph, Node, Produced, Ref, Tensor

# Shorter bodies, or so little saved, read better as they are.
_SHORTEST, _LEAST_SAVED = 3, 8
# Places in a period at which a body may begin are tried from the narrowest cut on.
_TRIES = 48
# So many repeats of a graph are looked for, of bodies up to so many nodes: what a graph made to be slow gets.
_MOST_REPEATS, _LONGEST = 64, 4096


@dataclass(frozen=True)
class Local:
    """An input that is output `output` of body node `offset` of the same iteration."""

    offset: int
    output: int


@dataclass(frozen=True)
class Carried:
    """The same of the iteration before; in the first it is `first`."""

    offset: int
    output: int
    first: Ref


@dataclass(frozen=True)
class Own:
    """A weight or graph input for each iteration."""

    refs: tuple[Ref, ...]


Source: TypeAlias = Local | Carried | Own | Ref


@dataclass(frozen=True)
class Repeat:
    """`rows[k][o]` is the node of the graph that body node `o` is in iteration k; `sources[o]` what it reads, slot by slot."""

    rows: tuple[tuple[int, ...], ...]
    sources: tuple[tuple[Source, ...], ...]


Item: TypeAlias = int | Repeat


def fold(graph: Graph) -> tuple[Item, ...]:
    """The graph's nodes as they are told: one by one or as repeats, each after what it reads."""
    if len(graph.nodes) < _SHORTEST * 2:
        return tuple(range(len(graph.nodes)))
    return tuple(_fold(_Looks(graph), tuple(range(len(graph.nodes))), iter(range(_MOST_REPEATS))))


def _fold(looks: _Looks, order: Sequence[int], budget: Iterator[int]) -> list[Item]:
    run = _longest_run(looks.ids[list(order)]) if len(order) >= _SHORTEST * 2 and next(budget, None) is not None else None
    found = _place(looks, order, *run) if run else None
    if found is None:
        return list(order)
    before, repeat, after = found
    return [*_fold(looks, before, budget), repeat, *_fold(looks, after, budget)]


class _Looks:
    """What each node looks like from nearby: equal numbers, equal looks."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        numbers: dict[Hashable, int] = {}
        self.ids = np.array([numbers.setdefault(self._look(node), len(numbers)) for node in graph.nodes], np.int64)

    def _look(self, node: Node) -> Hashable:
        return node.op, node.attributes, node.subgraphs, node.outputs, node.captures, tuple(map(self._kind, node.inputs))

    def _kind(self, ref: Ref) -> Hashable:
        """A graph input looks as an output of a node does: the first layer may read the one where others read the other."""
        if isinstance(ref, Produced):
            return ref.output
        if isinstance(ref, Tensor):
            return ref.type
        return 0 if isinstance(ref, Given) else str(ref)


def _longest_run(ids: np.ndarray) -> tuple[int, int, int] | None:
    """(start, end, period) of the run that saves most lines; None where nothing repeats."""
    best, found = _LEAST_SAVED - 1, None
    for period in range(_SHORTEST, min(len(ids) // 2, _LONGEST) + 1):
        if len(ids) - period <= best:
            break
        edges = np.flatnonzero(np.concatenate(([True], ids[:-period] != ids[period:], [True])))
        lengths = np.diff(edges) - 1
        at = int(lengths.argmax())
        saved = int(lengths[at]) // period * period
        if saved > best:
            best, found = saved, (int(edges[at]), int(edges[at] + lengths[at]) + period, period)
    return found


def _place(looks: _Looks, order: Sequence[int], start: int, end: int, period: int) -> tuple[list[int], Repeat, list[int]] | None:
    """The best place of the bodies in a run: (what stands before, the repeat, what stands after)."""
    best, narrowest = None, None
    for crossing, at in _starts(looks.graph, order, start, end, period)[:_TRIES]:
        count = (end - at) // period
        if count < 2:
            continue
        if best is not None and crossing != narrowest:
            break
        rows = [tuple(order[at + k * period : at + (k + 1) * period]) for k in range(count)]
        sources = _sources(looks.graph, rows)
        if sources is None:
            continue
        before, after = list(order[:at]), list(order[at + count * period :])
        # A first layer that others' needs interrupt; and then perhaps one before it.
        while (earlier := _earlier(looks, before, rows[0], sources)) is not None:
            joined = _sources(looks.graph, [earlier, *rows])
            if joined is None:
                break
            rows, sources = [earlier, *rows], joined
            taken = set(earlier)
            before = [node for node in before if node not in taken]
        carried = len({(s.offset, s.output) for row in sources for s in row if isinstance(s, Carried)})
        rank = (-len(rows), carried, at)
        if best is None or rank < best[0]:
            best, narrowest = (rank, (before, Repeat(tuple(rows), tuple(sources)), after)), crossing
    return best[1] if best else None


def _starts(graph: Graph, order: Sequence[int], start: int, end: int, period: int) -> list[tuple[int, int]]:
    """(values that cross into the next body, where a body could begin), the narrowest places first."""
    place = {node: i for i, node in enumerate(order)}
    last: dict[Produced, int] = {}
    for i, node in enumerate(order):
        for ref in graph.nodes[node].inputs:
            if isinstance(ref, Produced):
                last[ref] = i
    made = np.array([place.get(ref.node, -1) for ref in last], np.int64)
    read = np.array(list(last.values()), np.int64)
    found = []
    for at in range(start, min(start + period, end - 2 * period + 1)):
        cut = at + period
        found.append((int(np.count_nonzero((made >= at) & (made < cut) & (read >= cut))), at))
    return sorted(found)


def _sources(graph: Graph, rows: Sequence[tuple[int, ...]]) -> list[tuple[Source, ...]] | None:
    """What each body node reads; None where the rows are no repeat."""
    places = [{node: offset for offset, node in enumerate(row)} for row in rows]
    everything = set().union(*places)
    found = []
    for offset in range(len(rows[0])):
        slots = []
        for slot in range(len(graph.nodes[rows[0][offset]].inputs)):
            source = _source([graph.nodes[row[offset]].inputs[slot] for row in rows], places, everything, offset)
            if source is False:
                return None
            slots.append(source)
        found.append(tuple(slots))
    return found    # type: ignore[return-value]


def _source(refs: list[Ref], places: list[dict[int, int]], everything: set[int], offset: int) -> Source | bool:
    """One slot over all iterations; False where it is not the same thing in each."""
    first, second = refs[0], refs[1]
    if isinstance(second, Produced) and second.node in places[1]:
        local = Local(places[1][second.node], second.output)
        same = all(isinstance(r, Produced) and r.output == local.output and places[k].get(r.node) == local.offset for k, r in enumerate(refs))
        return local if same and local.offset < offset else False
    if isinstance(second, Produced) and second.node in places[0]:
        at, output = places[0][second.node], second.output
        for k, ref in enumerate(refs[1:]):
            if not (isinstance(ref, Produced) and ref.output == output and places[k].get(ref.node) == at):
                return False
        return False if isinstance(first, Produced) and first.node in everything else Carried(at, output, first)
    if isinstance(second, Produced):
        return second if all(ref == second for ref in refs) and second.node not in everything else False
    if all(ref == first for ref in refs):
        return first
    if all(isinstance(ref, Given) for ref in refs) or all(isinstance(ref, Tensor) and ref.type == first.type for ref in refs):  # type: ignore[union-attr]
        return Own(tuple(refs))
    return False


def _earlier(looks: _Looks, before: list[int], row: tuple[int, ...], sources: list[tuple[Source, ...]]) -> tuple[int, ...] | None:
    """The nodes before `row` that are one more iteration in front of it; None where there is none.

    They are found from what the first iteration carries, back along the inputs, and then from there along the readers.
    """
    graph, available = looks.graph, set(before)
    found: dict[int, int] = {}
    pending = [
        (s.offset, s.first) for slots in sources for s in slots if isinstance(s, Carried) and isinstance(s.first, Produced) and s.first.output == s.output
    ]
    while True:
        while pending:
            offset, ref = pending.pop()
            assert isinstance(ref, Produced)
            if found.get(offset, ref.node) != ref.node or ref.node not in available or looks.ids[ref.node] != looks.ids[row[offset]]:
                return None
            if offset in found:
                continue
            found[offset] = ref.node
            for source, inner in zip(sources[offset], graph.nodes[ref.node].inputs):
                if isinstance(source, Local):
                    if not (isinstance(inner, Produced) and inner.output == source.output):
                        return None
                    pending.append((source.offset, inner))
        missing = [offset for offset in range(len(row)) if offset not in found]
        if not missing:
            break
        grown = _reader(looks, before, row, sources, found, missing)
        if grown is None:
            return None
        pending.append(grown)
    nodes = tuple(found[offset] for offset in range(len(row)))
    if len(set(nodes)) != len(nodes):
        return None
    # What stays in front of the repeat must not need it.
    taken = set(nodes)
    for node in before[before.index(min(nodes, key=before.index)) :]:
        if node not in taken and any(isinstance(ref, Produced) and ref.node in taken for ref in graph.nodes[node].inputs):
            return None
    return nodes


def _reader(
    looks: _Looks, before: list[int], row: tuple[int, ...], sources: list[tuple[Source, ...]], found: dict[int, int], missing: list[int],
) -> tuple[int, Produced] | None:
    """A missing offset whose node is known by reading one that was found."""
    taken = set(found.values())
    for offset in missing:
        for slot, source in enumerate(sources[offset]):
            if isinstance(source, Local) and source.offset in found:
                wanted = Produced(found[source.offset], source.output)
                for node in before:
                    if node not in taken and looks.ids[node] == looks.ids[row[offset]] and looks.graph.nodes[node].inputs[slot] == wanted:
                        return offset, Produced(node, 0)
    return None
