"""Proof that nothing but attention looks sideways: outside the sites, row t of every value follows from token t and its position alone.

Tokens are followed from the ids to the logits, and to each site's q, k and v; a site's output starts anew. What enters from the structural
side is either the same in every situation, or has one row per token: those values are handed on, and `position_sources` decides whether
their rows follow from the position alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from .attention.site import AttentionSite
from .dispatch import DISPATCHING, dispatch_reason
from .extract import cone
from .observe import Observation, ObservationError, Probe
from .outcome import Refusal
from .positions import situations, thresholds_in
from .token_axis import Dims, Sideways, TokenAxis, View, for_one_sequence, token_dimension
from .token_rules import RULES

Layout = Literal["BHSD", "BSH"]

# Inputs that say what shape to give: they may follow S, and what comes of them is seen in the result's shape.
_TARGETS = {("Reshape", 1), ("Expand", 1), ("Tile", 1), ("Slice", 1), ("Slice", 2)}


@dataclass(frozen=True)
class Locality:
    """`refusals` is empty where the proof holds. `positional` are the structural values with a row per token that enter outside the sites;
    `axes` tells where the tokens of each data value lie.
    """

    refusals: tuple[Refusal, ...]
    positional: tuple[ir.Value, ...]
    axes: dict[ir.Value, TokenAxis]


def trace_tokens(
    observation: Observation, sites: Sequence[AttentionSite], *, folded: Sequence[AttentionSite] = (), max_context: int,
) -> Locality:
    """Follows the token axis through the whole graph, for sequences of up to `max_context` tokens.

    Of the sites in `folded` the rotary embedding belongs to the site, of others it is part of the graph. Rows of structural values are not
    judged here, but handed on.
    """
    return _Trace(observation, sites, folded, max_context).run()


class _Trace:
    """One proof. A value without an axis that is data was refused, or follows from one that was: each cause is reported once."""

    def __init__(
        self, observation: Observation, sites: Sequence[AttentionSite], folded: Sequence[AttentionSite], max_context: int,
    ) -> None:
        self.max_context = max_context
        self.model = observation.model
        self.observation = observation
        self.starts = [(site.output, site.output_layout) for site in sites]
        self.ends: list[tuple[ir.Value, Layout]] = []
        for site in sites:
            if site in folded:
                self.ends += [(site.query, site.query_layout), (site.key, site.key_layout)]
            else:
                self.ends += [(site.turned_query, site.turned_query_layout), (site.turned_key, site.turned_key_layout)]
            self.ends.append((site.value, site.value_layout))
        self.axes: dict[ir.Value, TokenAxis] = {}
        self.refusals: list[Refusal] = []
        self.positional: dict[ir.Value, None] = {}
        self.fixed: dict[ir.Value, str] = {}  # must be the same in every situation; value -> the node that needs it

    def run(self) -> Locality:
        for port in self.observation.interface.inputs:
            if port.role == "input_ids":
                self.axes[next(value for value in self.model.graph.inputs if value.name == port.name)] = TokenAxis(1)
        for value, layout in self.starts:
            try:
                self.axes[value] = self._where(value, layout)
            except Sideways as found:
                self.refusals.append(Refusal(found.reason, str(value.name), found.nearest))
        logits = [value for value in self.model.graph.outputs if self._is_logits(value)]
        if not logits:
            self.refusals.append(Refusal("the graph has no logits", "outputs"))
        ends = [*self.ends, *((value, "BSH") for value in logits)]
        starts = set(self.axes)
        for node in cone([value for value, _ in ends], lambda value: value in starts or self.observation.kind(value) != "data").nodes:
            self._node(node)
        for value, layout in ends:
            self._end(value, layout)
        self._check_fixed()
        return Locality(tuple(self.refusals), tuple(self.positional), self.axes)

    def _is_logits(self, value: ir.Value) -> bool:
        return any(port.role == "logits" and port.name == value.name for port in self.observation.interface.outputs)

    def _node(self, node: ir.Node) -> None:
        operands = [value for value in node.inputs if value is not None and self.observation.kind(value) == "data"]
        lost = [value for value in operands if value not in self.axes]
        for value in lost:
            if value.producer() is None:
                self._refuse(node, "it reads the cache outside of attention", str(value.name))
        if lost:
            return
        try:
            if node.domain in ("", "ai.onnx") and node.op_type in DISPATCHING:
                raise Sideways(dispatch_reason(node, lambda value: self.observation.kind(value) == "data"), str(node.name))
            rule = RULES.get(("" if node.domain == "ai.onnx" else node.domain, node.op_type))
            if rule is None:
                raise Sideways(f"{node.op_type} has no rule that says it works on each token alone", self._inputs(node))
            view = self._view(node)
            axis = rule(view)
            for output, result in zip((value for value in node.outputs if value.name), view.results):
                self._confirm(output, result, axis)
        except Sideways as found:
            self._refuse(node, f"{node.op_type}: {found.reason}", found.nearest)
        except ObservationError as error:
            self._refuse(node, f"{node.op_type}: {error.message}")

    def _view(self, node: ir.Node) -> View:
        axes = tuple(None if value is None else self._operand(node, index, value) for index, value in enumerate(node.inputs))
        shapes = tuple(None if value is None or not value.name else self._dims(value) for value in node.inputs)
        results = tuple(self._dims(value) for value in node.outputs if value.name)
        opset = self.model.opset_imports.get("", 1)
        return View(node, axes, shapes, results, opset, partial(self._constant, node))

    def _operand(self, node: ir.Node, index: int, value: ir.Value) -> TokenAxis | None:
        kind = self.observation.kind(value)
        if kind == "data":
            return self.axes[value]
        if kind == "constant" or (node.op_type, index) in _TARGETS:
            return None
        dims = self._dims(value)
        place = token_dimension(dims)
        if place is None:
            self.fixed.setdefault(value, str(node.name))
            return None
        if dims[place].factor != 1:
            raise Sideways("a structural value has several rows per token", f"{value.name}: [{', '.join(map(str, dims))}]")
        self.positional[value] = None
        return TokenAxis(place)

    def _dims(self, value: ir.Value) -> Dims:
        dims = self.observation.dims(value)
        if dims is None:
            raise Sideways("a shape fits no formula in B, S, P and T", str(value.name))
        return for_one_sequence(dims)

    def _constant(self, node: ir.Node, index: int) -> NDArray[Any]:
        value = node.inputs[index]
        assert value is not None
        if self.observation.kind(value) == "data":
            raise Sideways("a parameter follows from data", str(value.name))
        if self.observation.kind(value) == "structural":
            self.fixed.setdefault(value, str(node.name))
        return self.observation.evaluate([value], Probe(1, 3, 5 if self.observation.cached else 0))[0]

    def _confirm(self, value: ir.Value, dims: Dims, axis: TokenAxis) -> None:
        """The shape that was observed must have its tokens where the rule says."""
        place = token_dimension(dims)
        if place != axis.axis or dims[place].factor != axis.outer * axis.inner:
            raise Sideways("its result has no row for each token", f"expected {axis}, found [{', '.join(map(str, dims))}]")
        self.axes[value] = axis

    def _where(self, value: ir.Value, layout: Layout) -> TokenAxis:
        """Where a value of this layout has its tokens: [B, heads, S, D], or elements in the order (B, S, …) whatever the shape."""
        dims = self._dims(value)
        place = token_dimension(dims)
        if place is None or (layout == "BHSD" and (place != 2 or len(dims) != 4 or dims[2].factor != 1)):
            raise Sideways(f"it has no rows in layout {layout}", f"shape [{', '.join(map(str, dims))}]")
        if layout == "BSH" and any(dim.factor != 1 for dim in dims[:place]):
            raise Sideways("tokens are not its outermost dimension", f"shape [{', '.join(map(str, dims))}]")
        return TokenAxis(place, 1, dims[place].factor)

    def _end(self, value: ir.Value, layout: Layout) -> None:
        if value not in self.axes:
            if not self.refusals:  # a graph input, or not data at all: nothing before it was refused
                self.refusals.append(Refusal("it does not follow from the tokens", str(value.name)))
            return
        try:
            expected = self._where(value, layout)
            if self.axes[value] != expected:
                raise Sideways("tokens are not where they belong", f"{self.axes[value]}, expected {expected}")
        except Sideways as found:
            self.refusals.append(Refusal(found.reason, str(value.name), found.nearest))

    def _check_fixed(self) -> None:
        """Structural values without rows must be the same at all lengths and masks: a scale by √S, or a bound P, looks sideways."""
        try:
            for value, index in _differing(self.observation, list(self.fixed), self.max_context):
                nearest = f"differs at {index}"
                self.refusals.append(Refusal(f"{value.name} follows from lengths or from attention_mask", self.fixed[value], nearest))
        except ObservationError as error:
            self.refusals.append(Refusal(error.message, "structural values"))

    def _refuse(self, node: ir.Node, reason: str, nearest: str = "") -> None:
        self.refusals.append(Refusal(reason, str(node.name), nearest))

    def _inputs(self, node: ir.Node) -> str:
        return ", ".join(str(self.axes[value]) for value in node.inputs if value is not None and value in self.axes)


def _differing(observation: Observation, values: Sequence[ir.Value], max_context: int) -> Iterable[tuple[ir.Value, Probe]]:
    """Values that are not the same at all situations, each with the first that shows it."""
    if not values:
        return
    first, *rest = situations(observation, thresholds_in(observation, values, max_context))
    expected = observation.evaluate(values, first)
    told: set[ir.Value] = set()
    for probe in rest:
        for value, want, got in zip(values, expected, observation.evaluate(values, probe)):
            if value not in told and not np.array_equal(want, got, equal_nan=want.dtype.kind == "f"):
                told.add(value)
                yield value, probe
