"""A decoder without its cache, its attention left as it is: every past becomes an empty tensor made in the graph, every present goes."""

from __future__ import annotations

from dataclasses import replace
from time import perf_counter

import onnx_ir as ir

from ..models.interface import GraphInterface
from .build import Builder
from .cache_interface import forget_sizes
from .normalize import graph_size
from .observe import Dim, Observation
from .outcome import Outcome, PassResult

_CACHE_ROLES = ("past_key", "past_value", "present_key", "present_value")


class EmptyPast(ir.passes.InPlacePass):
    """The graph computes what it did for a sequence with nothing cached. `interface` is what is left of the graph's own."""

    def __init__(self, observation: Observation) -> None:
        super().__init__()
        self._observation = observation
        ports = observation.interface
        self.interface: GraphInterface = replace(
            ports, inputs=tuple(port for port in ports.inputs if port.role not in _CACHE_ROLES),
            outputs=tuple(port for port in ports.outputs if port.role not in _CACHE_ROLES),
        )

    def requires(self, model: ir.Model) -> None:
        if self._observation.model is not model or not self._observation.cached:
            raise ir.passes.PreconditionError("EmptyPast needs the observation of a decoder with a cache")

    def call(self, model: ir.Model) -> PassResult:
        start, (before, size), graph = perf_counter(), graph_size(model), model.graph
        build, inputs, outputs = Builder(graph), self._observation.interface.inputs, {port.name for port in self.interface.outputs}
        values = {value.name: value for value in graph.inputs}
        pasts = [values[port.name] for port in inputs if port.role in _CACHE_ROLES]
        ids = next(values[port.name] for port in inputs if port.role == "input_ids")
        with build.before(next(iter(graph))):
            for past in pasts:
                past.replace_all_uses_with(self._empty(build, ids, past))
        forget_sizes(graph)
        kept_outputs, kept_inputs = [v for v in graph.outputs if v.name in outputs], [v for v in graph.inputs if v not in pasts]
        graph.outputs.clear()
        graph.outputs.extend(kept_outputs)
        graph.inputs.clear()
        graph.inputs.extend(kept_inputs)
        ir.passes.common.RemoveUnusedNodesPass()(model)
        after, count = graph_size(model), len(pasts)
        outcome = Outcome("empty_past", "pasts", count, count, (), (), before, after[0], size, after[1], perf_counter() - start)
        return PassResult(model, True, outcome)

    def _empty(self, build: Builder, ids: ir.Value, past: ir.Value) -> ir.Value:
        """Zeros of the past's type with no positions: its dims are the batch's and fixed ones, and 0 where the past's length stands."""
        dims = self._observation.dims(past)
        assert dims is not None and past.dtype is not None, "a past was probed, so its sizes are known"
        batch = build.size(ids, 0)
        parts = [batch if dim == Dim(1, ("B",)) else build.integers([0 if "P" in dim.letters else dim.factor]) for dim in dims]
        shape = build.op("Concat", parts, {"axis": 0})[0]
        zero = build.op("ConstantOfShape", [shape])[0]
        zero.type = ir.TensorType(ir.DataType.FLOAT)
        return build.cast(zero, past.dtype)

    def ensures(self, model: ir.Model) -> None:
        left = {value.name for value in (*model.graph.inputs, *model.graph.outputs)}
        if left != {port.name for port in (*self.interface.inputs, *self.interface.outputs)}:
            raise ir.passes.PostconditionError(f"expected an interface without caches, found {sorted(map(str, left))}")
