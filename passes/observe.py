"""What a graph's values are, found by running it: constant, structural (follows from shapes and masks alone) or data; and how long each is.

    constant     weights, and what is computed from them alone
    structural   follows from shapes, attention_mask, position_ids and constants: masks, positions, rotary tables, reshape targets
    data         follows from what the tokens are, or from what is cached

Shapes are learned by running the whole graph at a few tiny probes with zeros for weights (no weight is read, and zeros cost no
memory), then written as formulas in B, S, P and T = P + S. A value whose shape follows from data or from a weight's content has none.
Structural values can be evaluated at any probe: their cone runs alone, and each `Shape` of an activation in it is answered by formula.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ..models.interface import GraphInterface
from .extract import ConeRunner, cone, prepare
from .probe import Dim, Letters, ObservationError, Probe, feed_of, first_line, input_shape, port_of
from .value_kinds import Kind, Kinds
from .value_shapes import Shapes, fit_dims, learn_shapes


def observe(model: ir.Model, interface: GraphInterface) -> Observation:
    """Runs `model` at tiny probes and says what its values are. `model` is not changed; nothing is written anywhere.

    Inputs of no known role are fed zeros, in sizes that go by their names. Raises ObservationError where an input has no known rank, or
    where the graph can't be run (sizes baked in).
    """
    kinds = Kinds(model.graph, interface)
    shapes = learn_shapes(model, interface, kinds)
    return Observation(model, interface, kinds, shapes)


class Observation:
    """What is known of a graph's values. It goes stale when the graph changes: values made later are unknown, asking is a KeyError."""

    def __init__(self, model: ir.Model, interface: GraphInterface, kinds: Kinds, shapes: Shapes) -> None:
        self.model = model
        self.interface = interface
        self._kinds = kinds
        self._shapes = shapes
        self._opened: dict[tuple[Any, ...], ConeRunner] = {}

    def kind(self, value: ir.Value) -> Kind:
        """Constant, structural or data."""
        return self._kinds.kind[value]

    def dims(self, value: ir.Value) -> tuple[Dim, ...] | None:
        """The value's shape as formulas; None where no formula fits, or where its shape follows from data."""
        if value not in self._shapes.dims and value in self._kinds.kind:
            return None  # a sequence, or an output that is not there
        return self._shapes.dims[value]

    def contents(self, value: ir.Value) -> tuple[Dim, ...] | None:
        """What the elements of a structural or constant integer `value` of rank 0 or 1 are, as formulas (a factor may be −1 or 0).

        None where no formula fits, or it has more than 16 elements. Masks are all ones: this tells what reshape targets and bounds mean.
        """
        dims = self.dims(value)
        if dims is None or len(dims) > 1 or any(dim.letters or dim.factor > 16 for dim in dims):
            return None
        found = [self.evaluate([value], probe)[0] for probe in self._shapes.probes]
        if found[0].dtype.kind not in "iu":
            return None
        return fit_dims([array.reshape(-1).tolist() for array in found], self._shapes.probes, self._shapes.letters)

    @property
    def cached(self) -> bool:
        """Whether the graph takes a cache: if not, `past` of a probe is 0."""
        return any(port.role == "past_key" for port in self.interface.inputs)

    @property
    def capacity(self) -> int | None:
        """How many places the graph's cache has, where it is written by index and never grows; None where it grows, or there is none."""
        sizes = [port.shape[2] for port in self.interface.inputs if port.role == "past_key" and port.shape is not None]
        return sizes[0] if sizes and isinstance(sizes[0], int) else None

    def keys(self, probe: Probe) -> int:
        """How many keys an attention sees before its mask: past and this step's, or all places of the cache."""
        return self.capacity or probe.past + probe.length

    @property
    def batched(self) -> bool:
        """Whether the graph ran with more than one sequence at once; if not, `batch` of a probe is 1 and `unbatched` says why."""
        return not self._shapes.unbatched

    @property
    def unbatched(self) -> str:
        """What onnxruntime said when the graph was run with several sequences; empty where that worked."""
        return self._shapes.unbatched

    @property
    def probes(self) -> tuple[Probe, ...]:
        """The situations in which the whole graph was run."""
        return self._shapes.probes

    @property
    def letters(self) -> Letters:
        """How sizes that only other inputs have are read, as `feed_of` takes it."""
        return self._shapes.named

    @property
    def static(self) -> bool:
        """Whether every input has fixed sizes: the graph runs in one situation, formulas are numbers, and nothing can be proved of others."""
        return self._shapes.named is None

    def evaluate(
        self, values: Sequence[ir.Value], probe: Probe, *, replace: Mapping[ir.Value, NDArray[Any]] | None = None,
    ) -> list[NDArray[Any]]:
        """Structural or constant `values` at `probe`. `replace` gives contents to values in their cones, in place of what computes them.

        Raises ObservationError where a value follows from data, or where onnxruntime can't compute it.
        """
        assert self.cached or probe.past == 0, "the graph takes no cache"
        assert probe.attention_mask is None or self.interface.input("attention_mask"), "the graph takes no attention_mask"
        assert probe.position_ids is None or self.interface.input("position_ids"), "the graph takes no position_ids"
        replace = replace or {}
        key = (tuple(values), tuple((value, array.dtype.str, array.ndim) for value, array in replace.items()))
        if key not in self._opened:
            self._opened[key] = self._open(values, replace, probe)
        runner = self._opened[key]
        feeds = {str(leaf.name): replace[leaf] if leaf in replace else self._leaf(leaf, probe) for leaf in runner.leaves}
        try:
            return runner.run(feeds)
        except Exception as error:
            names = ", ".join(str(value.name) for value in values)
            raise ObservationError(f"onnxruntime can't compute {names} at {probe}: {first_line(error)}", probe=probe) from error

    def _open(self, values: Sequence[ir.Value], replace: Mapping[ir.Value, NDArray[Any]], probe: Probe) -> ConeRunner:
        piece = cone(values, lambda value: value in replace or self.is_dims(value))
        types: dict[ir.Value, tuple[ir.DataType, int | None]] = {}
        for leaf in piece.leaves:
            if leaf in replace:
                types[leaf] = (ir.DataType.from_numpy(replace[leaf].dtype), replace[leaf].ndim)
            elif self.is_dims(leaf):
                types[leaf] = (ir.DataType.INT64, None)
            elif self.kind(leaf) == "data":
                raise ObservationError(f"{', '.join(str(v.name) for v in values)} follows from the content of {leaf.name}")
            elif self.kind(leaf) == "structural":
                assert leaf.dtype is not None
                types[leaf] = (leaf.dtype, len(input_shape(port_of(self.interface, leaf), probe, self._shapes.named)))
        try:
            return prepare(self.model, piece, types).open()
        except Exception as error:
            names = ", ".join(str(value.name) for value in values)
            raise ObservationError(f"onnxruntime can't open the cone of {names}: {first_line(error)}", probe=probe) from error

    def is_dims(self, value: ir.Value) -> bool:
        """Whether `value` is the Shape or Size of data: answered from the formulas, so that nothing behind it has to run."""
        node = value.producer()
        if node is None or node.op_type not in ("Shape", "Size") or node.domain not in ("", "ai.onnx"):
            return False
        operand = node.inputs[0]
        return operand is not None and self.kind(value) == "structural" and self.kind(operand) == "data"

    def _leaf(self, leaf: ir.Value, probe: Probe) -> NDArray[Any]:
        node = leaf.producer()
        if node is None:
            return feed_of(port_of(self.interface, leaf), leaf, probe, self._shapes.named)
        operand = node.inputs[0]
        assert operand is not None
        dims = self.dims(operand)
        if dims is None:
            raise ObservationError(f"the shape of {operand.name} fits no formula in B, S, P and T", probe=probe)
        sizes = np.array([dim.at(probe) for dim in dims], np.int64)
        if node.op_type == "Size":
            return np.array(sizes.prod(), np.int64)
        start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", None)
        return sizes[start:end]
