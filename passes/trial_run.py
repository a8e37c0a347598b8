"""A run of a lowered graph on stock operators at a few tiny probes: it loads, it runs, and its outputs are as long as the source's were.

The lowerings to GroupQueryAttention and FlashAttention keep most of the exporter's graph and the sizes written in it. What those say of
other inputs than the lowered graph has can break shape inference or onnxruntime's reuse of buffers, and then at the first step of a user.
"""

from __future__ import annotations

from dataclasses import replace
from time import perf_counter

import onnx_ir as ir
import onnxruntime as ort

from ..custom_ops.contract import DOMAIN
from ..models.interface import GraphInterface, GraphPort
from .extract import constant_info, constant_proto, constants_of, open_session, piece, run
from .normalize import graph_size
from .observe import Observation
from .outcome import Outcome, Refusal
from .probe import Dim, Probe, feed_of, first_line, port_of
from .stub_run import drawn, random_weights


class Trial:
    """Made before the graph that was observed is changed, and run on what became of it."""

    def __init__(self, observation: Observation) -> None:
        self._probes, self._letters, self._cached = observation.probes, observation.letters, observation.cached
        self._lengths: dict[str, tuple[Dim, ...] | None] = {str(value.name): observation.dims(value) for value in observation.model.graph.outputs}
        self._ports = observation.interface.outputs
        self._grows = self._cached and observation.capacity is None

    def run(self, model: ir.Model, interface: GraphInterface, *, batched: bool) -> Outcome:
        """Of a graph for one sequence a run, `batched` is False."""
        start, (nodes, size) = perf_counter(), graph_size(model)
        probes = [self._situation(probe, interface, batched=batched) for probe in self._probes]
        refusals = self._refusals(model, interface, probes)
        count = len(probes)
        return Outcome("trial", "runs", count, 0 if refusals else count, refusals, (), nodes, nodes, size, size, perf_counter() - start)

    def _situation(self, probe: Probe, interface: GraphInterface, *, batched: bool) -> Probe:
        cached = any(port.role == "past_key" for port in interface.inputs)
        past = probe.past if self._cached else 1    # where only the lowered graph has a cache, the source says nothing of one
        return replace(probe, batch=probe.batch if batched else 1, past=past if cached else 0)

    def _refusals(self, model: ir.Model, interface: GraphInterface, probes: list[Probe]) -> tuple[Refusal, ...]:
        try:
            session, weights = open_graph(model)
        except Exception as error:  # onnxruntime raises a dozen unrelated classes
            return (Refusal("the lowered graph does not load", "trial run", first_line(error)),)
        for probe in probes:
            feeds = {str(value.name): feed_of(port_of(interface, value), value, probe, self._letters) for value in model.graph.inputs}
            try:
                found = run(session, {**weights, **feeds})
            except Exception as error:
                return (Refusal("the lowered graph does not run", f"trial run: {probe}", first_line(error)),)
            for value, array in zip(model.graph.outputs, found, strict=True):
                port = next(port for port in interface.outputs if port.name == value.name)
                expected = self._expected(port, probe)
                if expected is not None and expected != array.shape:
                    reason = f"output {port.name} is not as long as the source's"
                    return (Refusal(reason, f"trial run: {probe}", f"expected {expected}, found {array.shape}"),)
        return ()

    def _expected(self, port: GraphPort, probe: Probe) -> tuple[int, ...] | None:
        """What the source's output of the same purpose has for a shape here; None where there is none, or it follows no formula.

        A source that takes no past gives keys and values of its own tokens alone, and one whose cache has a fixed number of places all of
        them: there the lowered graph's are held to what it says of them.
        """
        if port.role in ("present_key", "present_value") and probe.past and not self._grows and port.shape is not None:
            return tuple(size if isinstance(size, int) else probe.letter(str(size)) for size in port.shape)
        same = [other for other in self._ports if other.name == port.name]
        same += [other for other in self._ports if other.role == port.role != "other" and other.layer == port.layer]
        dims = self._lengths[same[0].name] if same else None
        return None if dims is None else tuple(dim.at(probe) for dim in dims)


def open_graph(model: ir.Model, *, served: bool = False) -> tuple[ort.InferenceSession, dict[str, ort.OrtValue]]:
    """The graph as it will be written, with the sizes that it says its values have; weights are random. `served`: as `open_session` has it."""
    tensors = constants_of(model.graph.initializers.values())
    weights = {name: tensor for name, tensor in tensors.items() if drawn(tensor)}
    inputs = [ir.serde.serialize_value(value) for value in model.graph.inputs] + [constant_info(name, tensor) for name, tensor in weights.items()]
    proto = piece(model, model.graph, inputs, ())
    proto.graph.initializer.extend(constant_proto(name, tensor) for name, tensor in tensors.items() if name not in weights)
    proto.graph.output.extend(ir.serde.serialize_value(value) for value in model.graph.outputs)
    said = (value for node in model.graph for value in node.outputs if value.type is not None and value not in model.graph.outputs)
    proto.graph.value_info.extend(ir.serde.serialize_value(value) for value in said)
    return open_session(proto, custom_ops=DOMAIN in model.opset_imports, served=served), random_weights(weights)
