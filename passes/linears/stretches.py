"""Calibration text on its way through a graph, stretch by stretch: what each linear reads when the linears before it are rounded already.

That is GPTQ as its paper has it: a layer makes up for what the layers before it have lost, which it sees in their outputs alone. A stretch ends
where the input of some linears is known. Every node runs once for each piece of the text, and what later stretches read is kept until they have.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ...models.interface import GraphInterface
from ..attention.site import AttentionSite
from ..extract import Cone, ConeRunner, PreparedCone, cone, ort_value, prepare
from ..quantize.methods import Seen
from .averages import Averaged, averaged, averaged_sum
from .match import find_linears
from .pieces import Pieces
from .site import LinearSite

Array = NDArray[np.float32]
Numbers = NDArray[np.generic]
# Pieces of the text in which attentions are read: all of one's probabilities cost as much as several runs of it.
_ATTENDED = 8


@dataclass(frozen=True)
class _Part:
    """A cone as it was: the passes to come give values other names. `handed` are its leaves that earlier stretches have computed."""

    prepared: PreparedCone
    handed: tuple[str, ...]


@dataclass(frozen=True)
class _Average:
    """An attention whose values come from the weight `name` and the input `source`."""

    name: str
    source: str
    attention: Averaged
    operands: _Part
    output: _Part


@dataclass(frozen=True)
class _Stretch:
    """What makes the input of `linears`, by the names of their weights. It is the first of `kept`, the outputs of `part`; the others are what
    later stretches read. Afterwards nobody reads those called `spent`.
    """

    linears: dict[str, LinearSite]
    part: _Part
    kept: tuple[str, ...]
    spent: tuple[str, ...]
    averages: tuple[_Average, ...]

    @property
    def weights(self) -> set[str]:
        """Constants that it reads."""
        return set(self.part.prepared.constants)


class Stretches:
    """A decoder that was normalized and dequantized, prepared before any target changes it, with its attentions. It isn't changed here either.

    Memory: what later stretches read, for all pieces; 4·K² bytes for each input that was passed and not asked for. `averaged` counts the linears
    whose XᵀX is of averages (averages.py). Raises RequestError where there are no tokens.
    """

    def __init__(self, model: ir.Model, interface: GraphInterface, sequences: Sequence[Sequence[int]], attentions: Sequence[AttentionSite] = ()) -> None:
        self._pieces = Pieces(interface, sequences)
        self._values: list[dict[str, Numbers]] = [{} for _ in self._pieces.tokens]
        self._stretches = deque(_planned(model, self._pieces.ids, attentions))
        self._linears = {name: site for stretch in reversed(self._stretches) for name, site in stretch.linears.items()}
        self._ahead = set(self._linears)
        self._seen: dict[str, tuple[Seen, ...]] = {}
        self._averages: dict[str, _Average] = {}    # of the last stretch: what they read is there until the next
        self._spent: tuple[str, ...] = ()
        self._rounded: dict[str, Array] = {}
        self.averaged = 0

    def seen(self, name: str) -> tuple[Seen, ...] | None:
        """What the linear of the weight `name` reads (of several, the first); None where there is none, and when asked for again."""
        while name in self._ahead:
            self._go_on()
        if (average := self._averages.pop(name, None)) is not None and name in self._seen:
            self._average(name, average)
        return self._seen.pop(name, None)

    def rounded(self, name: str, values: Array) -> None:
        """`values` [M, K] take the place of the weight `name` in what is still to come. One that the graph has packed stays as it is there."""
        if not self._linears[name].packed and any(name in stretch.weights for stretch in self._stretches):
            self._rounded[name] = values if self._linears[name].transposed else np.ascontiguousarray(values.T)

    def _go_on(self) -> None:
        """The next stretch, for all pieces of the text."""
        for values in self._values:
            for name in self._spent:
                values.pop(name, None)
        stretch = self._stretches.popleft()
        runner, K = self._opened(stretch.part), next(iter(stretch.linears.values())).K
        total = np.zeros((K, K), np.float32)
        for tokens, values in zip(self._pieces.tokens, self._values):
            values.update(zip(stretch.kept, runner.run(self._feeds(stretch.part, tokens, values))))
            rows = np.asarray(values[stretch.kept[0]], np.float32).reshape(-1, K)
            total += rows.T @ rows
        for name, site in stretch.linears.items():
            self._seen.setdefault(name, (Seen(np.arange(site.M), total),))
        self._averages, self._spent = {average.name: average for average in stretch.averages}, stretch.spent
        self._ahead -= set(stretch.linears)
        needed = set[str]().union(*(later.weights for later in self._stretches))
        self._rounded = {name: weight for name, weight in self._rounded.items() if name in needed}

    def _average(self, name: str, average: _Average) -> None:
        """The values' rows of a linear read averages, if they are found and the attention is linear in them."""
        attention, first, second = average.attention, average.operands, average.output
        linear, (total,) = attention.linear, (seen.hessian for seen in self._seen[name])
        constant = first.prepared.constants[name].numpy()
        weight = constant if linear.transposed else constant.T
        operands, output = self._opened(first), self._opened(second)
        found, rows = np.zeros_like(total), None
        for tokens, values in list(zip(self._pieces.tokens, self._values))[:_ATTENDED]:
            inputs = np.asarray(values[average.source], np.float32).reshape(-1, linear.K)
            given = [np.asarray(array, np.float32) for array in operands.run(self._feeds(first, tokens, values))]
            rows = attention.rows(inputs, weight, given) if rows is None else rows
            feeds = {**self._feeds(second, tokens, values), **dict(zip(attention.names, given))}
            probabilities = None if rows is None else attention.probabilities(given, partial(_output, output, feeds, attention.names[0]))
            if rows is None or probabilities is None:
                return
            found += averaged_sum(inputs, probabilities)
        assert rows is not None
        others = np.setdiff1d(np.arange(linear.M), rows)
        self._seen[name] = (Seen(rows, found), *((Seen(others, total),) if len(others) else ()))
        self.averaged += 1

    def _opened(self, part: _Part) -> ConeRunner:
        """With the weights that were rounded in the places of their floats."""
        mine = {name: ort_value(weight) for name, weight in self._rounded.items() if name in part.prepared.constants}
        runner = part.prepared.open(threads=0, fed=mine)
        return ConeRunner(runner.session, {**runner.constants, **mine}, runner.leaves)

    def _feeds(self, part: _Part, tokens: Sequence[int], values: Mapping[str, Numbers]) -> dict[str, Numbers]:
        return {**self._pieces.feeds(part.prepared.leaves, tokens), **{name: values[name] for name in part.handed if name in values}}


def _output(runner: ConeRunner, feeds: Mapping[str, Numbers], name: str, values: Array) -> Array:
    """An attention's output for other `values`."""
    return np.asarray(runner.run({**feeds, name: values})[0], np.float32)


def _planned(model: ir.Model, ids: str, attentions: Sequence[AttentionSite]) -> list[_Stretch]:
    matched = find_linears(model, ids)
    readers = {group[0].input: group for group in matched.by_input()}
    sites = [site for site in matched.sites if not site.packed]
    made: dict[ir.Value, int] = {}      # in which stretch

    def known(last: int) -> Callable[[ir.Value], bool]:
        """Whether a value has been computed with stretch `last`. One without a type can't be handed on, and is computed again."""
        return lambda value: made.get(value, last + 1) <= last and value.dtype is not None

    parts: list[Cone] = []
    for i, value in enumerate(readers):
        parts.append(cone([value], known(i - 1)))
        for node in parts[i].nodes:
            for output in node.outputs:
                made.setdefault(output, i)
    order = {value: i for i, value in enumerate(readers)}
    averages: list[list[Averaged]] = [[] for _ in parts]
    for attention in attentions:
        found = averaged(attention, sites, lambda linear: known(order[linear.input]))
        if found is not None:
            averages[order[found.linear.input]].append(found)
    last: dict[ir.Value, int] = {}      # which stretch reads a value for the last time
    for i, part in enumerate(parts):
        for read in (part, *(needed for each in averages[i] for needed in (each.operands, each.output))):
            last |= {leaf: i for leaf in read.leaves if leaf in made}
        last.setdefault(part.outputs[0], i)
    stretches = list[_Stretch]()
    for i, (value, whole) in enumerate(zip(readers, parts)):
        kept = (value, *(other for other in last if made.get(other) == i and other is not value))
        spent = tuple(str(other.name) for other, reader in last.items() if reader == i)
        prepared = tuple(
            _Average(str(each.linear.weight.name), str(value.name), each, _prepared(model, each.operands), _prepared(model, each.output))
            for each in averages[i]
        )
        linears = {str(site.weight.name): site for site in readers[value]}
        handed_on = _prepared(model, Cone(kept, whole.nodes, whole.leaves))
        stretches.append(_Stretch(linears, handed_on, tuple(str(other.name) for other in kept), spent, prepared))
    return stretches


def _prepared(model: ir.Model, part: Cone) -> _Part:
    given = [leaf for leaf in part.leaves if leaf.is_graph_input() or leaf.producer() is not None]
    handed = tuple(str(leaf.name) for leaf in given if not leaf.is_graph_input())
    return _Part(prepare(model, part, {leaf: (leaf.dtype or ir.DataType.FLOAT, None) for leaf in given}), handed)
