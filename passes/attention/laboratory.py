"""Where chains are run: two small probes with all sizes different, and the values that chains read from outside, evaluated once."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, Final, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ..observe import Observation, ObservationError, Probe
from .chain import LINEAR, MOVES, SCORES, Chain, Graph, passable
from .fingerprint import Fingerprints

Array = NDArray[Any]

Layout = Literal["BHSD", "BSH"]
BHSD: Final = "BHSD"
BSH: Final = "BSH"


class Laboratory:
    """The probes at which a graph is matched, and what its structural values are there."""

    def __init__(self, observation: Observation) -> None:
        self.observation = observation
        self.graph = Graph(observation.model.graph, lambda value: observation.kind(value) == "data")
        batch = 2 if observation.batched else 1
        self.probes = (Probe(batch, 3, 5), Probe(1, 4, 2)) if observation.cached else (Probe(batch, 3, 0), Probe(1, 5, 0))
        self._sides: dict[Probe, dict[ir.Value, Array]] = {probe: {} for probe in self.probes}
        self.fingerprints = Fingerprints(observation)
        self._fill()

    def _fill(self) -> None:
        """All that chains may read, in one run a probe: opening a session for each chain would take seconds."""
        is_data, ops = self.graph.is_data, MOVES | LINEAR | SCORES
        wanted = dict.fromkeys(
            value
            for node in self.graph.order if node.op_type in ops and passable(node, ops, is_data) and is_data(node.outputs[0])
            for value in node.inputs if value is not None and value.const_value is None and not is_data(value) and not self._is_weight(value)
        )
        for probe in self.probes:
            try:
                self._sides[probe].update(zip(wanted, self.observation.evaluate(list(wanted), probe), strict=True))
            except ObservationError:  # one of them can't be had; each is then asked for alone, where it is needed
                continue

    def _is_weight(self, value: ir.Value) -> bool:
        """Whether a value is a constant as large as a weight: computing it (from a quantized one) takes longer than all else here."""
        dims = self.observation.dims(value) if self.observation.kind(value) == "constant" else ()
        return dims is None or prod(dim.factor for dim in dims) > 1 << 16

    def side(self, value: ir.Value, probe: Probe) -> Array:
        """A constant or structural value. Raises ObservationError where it can't be computed."""
        if value.const_value is not None:
            return value.const_value.numpy()
        known = self._sides.setdefault(probe, {})
        if value not in known:
            known[value] = self.observation.evaluate([value], probe)[0]
        return known[value]

    def shape(self, value: ir.Value, probe: Probe) -> tuple[int, ...] | None:
        """The value's shape at a probe; None where it follows no formula."""
        dims = self.observation.dims(value)
        return None if dims is None else tuple(dim.at(probe) for dim in dims)

    def run(self, chain: Chain, leaves: Sequence[Array], probe: Probe) -> Array | None:
        """The chain's target for these leaves; None where the chain can't be run on them."""
        try:
            with np.errstate(all="ignore"):
                return chain.run(leaves, {side: self.side(side, probe) for side in chain.sides})
        except (ObservationError, ValueError, IndexError, TypeError):
            return None


def fits_layout(shape: tuple[int, ...], layout: str, probe: Probe, heads: int, size: int) -> bool:
    """Whether a value of this shape can have the layout: [B, heads, S, size], or [B, S] before anything of heads·size elements."""
    if layout == BHSD:
        return shape == (probe.batch, heads, probe.length, size)
    return len(shape) > 2 and shape[:2] == (probe.batch, probe.length) and int(np.prod(shape[2:])) == heads * size


def heads_first(array: Array, layout: str, probe_batch: int, heads: int, size: int) -> Array:
    """A value of `layout` as [B, heads, S, size]."""
    if layout == BHSD:
        return array.reshape(probe_batch, heads, -1, size)
    return array.reshape(probe_batch, -1, heads, size).transpose(0, 2, 1, 3)


def laid_out(array: Array, layout: str, shape: tuple[int, ...]) -> Array:
    """[B, heads, S, size] as a value of `layout` and `shape`."""
    return (array if layout == BHSD else array.transpose(0, 2, 1, 3)).reshape(shape)
