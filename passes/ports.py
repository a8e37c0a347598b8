"""Inputs and outputs in the types that a graph had before it was computed in float32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from time import perf_counter

import onnx_ir as ir

from ..models.interface import GraphInterface, GraphPort
from ..models.roles import dtype_name
from .build import Builder
from .normalize import graph_size
from .outcome import Outcome, PassResult


class RestorePorts(ir.passes.InPlacePass):
    """Casts at the edges of a graph that was widened, so that whoever feeds it by name need not know. `types` are by the ports' names."""

    def __init__(self, types: Mapping[str, ir.DataType]) -> None:
        super().__init__()
        self._types = types

    def call(self, model: ir.Model) -> PassResult:
        start, (before, size), graph, count = perf_counter(), graph_size(model), model.graph, 0
        build = Builder(graph)
        with build.before(next(iter(graph))):
            for index, value in enumerate(list(graph.inputs)):
                dtype = self._types.get(str(value.name))
                if dtype is None or value.dtype == dtype:
                    continue
                given = ir.Value(name=value.name, type=ir.TensorType(dtype), shape=value.shape)
                value.replace_all_uses_with(build.cast(given, value.dtype))
                value.name, graph.inputs[index], count = f"{value.name}:widened", given, count + 1
        for index, value in enumerate(list(graph.outputs)):
            dtype, producer = self._types.get(str(value.name)), value.producer()
            if dtype is None or producer is None or value.dtype == dtype:
                continue
            with build.after(producer):
                result = build.cast(value, dtype)
            name, value.name = value.name, f"{value.name}:widened"
            result.name, result.shape, graph.outputs[index], count = name, value.shape, result, count + 1
        after = graph_size(model)
        outcome = Outcome("restore_ports", "ports", count, count, (), (), before, after[0], size, after[1], perf_counter() - start)
        return PassResult(model, bool(count), outcome)


def half_ports(model: ir.Model) -> dict[str, ir.DataType]:
    """Types of the inputs and outputs that are in half precision, by name."""
    half = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    return {str(value.name): value.dtype for value in (*model.graph.inputs, *model.graph.outputs) if value.dtype in half}


def restored(interface: GraphInterface, types: Mapping[str, ir.DataType]) -> GraphInterface:
    """The interface with these types."""
    def port(given: GraphPort) -> GraphPort:
        return replace(given, dtype=dtype_name(types[given.name].name)) if given.name in types else given

    return GraphInterface(tuple(map(port, interface.inputs)), tuple(map(port, interface.outputs)))
