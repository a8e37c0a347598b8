"""Cutting pieces out of a graph and opening them in onnxruntime, without copying weights and without touching the graph.

A *cone* is everything that some values are computed from, back to where the caller says to stop. Constants of LARGE bytes or more
never enter the serialized piece: they become inputs of it and are fed as views of the memory (or the mapped file) they already lie in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

# Below this a constant is cheaper to serialize than to feed, and some kernels insist that small operands (axes, scales) are initializers.
LARGE = 1 << 16

# Output i of a piece; no exporter writes such a name.
_OUTPUT = "octavo:output.{}"

Feeds = Mapping[str, NDArray[Any] | ort.OrtValue]


def captured(graph: ir.Graph) -> Iterator[ir.Value]:
    """Values of outer scopes that `graph`, a subgraph of an If, Loop or Scan, reads."""
    inner: set[ir.Value] = set(graph.inputs) | set(graph.initializers.values())
    for node in graph:
        for value in reads(node):
            if value not in inner:
                yield value
        inner.update(node.outputs)
    yield from (value for value in graph.outputs if value not in inner)


def reads(node: ir.Node) -> Iterator[ir.Value]:
    """All values that `node` depends on: its inputs, and what its subgraphs capture."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield from captured(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS:
            for graph in attribute.as_graphs():
                yield from captured(graph)


@dataclass(frozen=True)
class Cone:
    """What `outputs` are computed from: `nodes` in execution order, and `leaves`, the values at which it stops, initializers included."""

    outputs: tuple[ir.Value, ...]
    nodes: tuple[ir.Node, ...]
    leaves: tuple[ir.Value, ...]


def cone(outputs: Sequence[ir.Value], stop: Callable[[ir.Value], bool] = lambda value: False) -> Cone:
    """The backward cone of `outputs`. It ends at graph inputs, initializers, and values for which `stop` holds."""
    nodes: dict[ir.Node, None] = {}
    leaves: dict[ir.Value, None] = {}
    pending: list[tuple[ir.Node, Iterator[ir.Value]]] = []
    entered: set[ir.Node] = set()

    def enter(value: ir.Value) -> None:
        node = value.producer()
        if node is None or stop(value):
            leaves[value] = None
        elif node not in entered:
            entered.add(node)
            pending.append((node, reads(node)))

    for output in outputs:  # an explicit stack: a decoder's cone is thousands of nodes deep
        enter(output)
        while pending:
            node, operands = pending[-1]
            operand = next(operands, None)
            if operand is not None:
                enter(operand)
            else:
                nodes[node] = None
                pending.pop()
    return Cone(tuple(outputs), tuple(nodes), tuple(leaves))


def array_of(value: ir.Value) -> NDArray[Any]:
    """An initializer's contents, as a view of its memory or mapped file where it has one."""
    tensor = value.const_value
    assert tensor is not None, f"{value.name} is no constant"
    return tensor.numpy()


def is_large(value: ir.Value) -> bool:
    """Whether an initializer is fed and not serialized. Types that NumPy has no word for stay serialized."""
    tensor = value.const_value
    return tensor is not None and tensor.nbytes >= LARGE and np.dtype(tensor.dtype.numpy()).kind in "fiub"


def input_info(name: str, dtype: ir.DataType | None, rank: int | None) -> onnx.ValueInfoProto:
    """A graph input of free dimensions."""
    assert dtype is not None, f"{name} has no type"
    return onnx.helper.make_tensor_value_info(name, int(dtype), None if rank is None else [None] * rank)


def constant_info(value: ir.Value) -> onnx.ValueInfoProto:
    """An initializer's declaration as a graph input, for feeding it."""
    tensor = value.const_value
    assert tensor is not None, f"{value.name} is no constant"
    return onnx.helper.make_tensor_value_info(str(value.name), int(tensor.dtype), [int(size) for size in tensor.shape])


def piece(
    model: ir.Model,
    nodes: Iterable[ir.Node],
    inputs: Sequence[onnx.ValueInfoProto],
    initializers: Iterable[ir.Value],
    outputs: Sequence[onnx.NodeProto],
) -> onnx.ModelProto:
    """A model of `nodes` with `model`'s opsets and functions. `outputs` are closing nodes with one output each: the piece's outputs."""
    graph = onnx.GraphProto(name="piece")
    graph.node.extend(ir.serde.serialize_node(node) for node in nodes)
    graph.node.extend(outputs)
    graph.input.extend(inputs)
    graph.initializer.extend(_initializer(value) for value in initializers)
    graph.output.extend(onnx.ValueInfoProto(name=node.output[0]) for node in outputs)
    imports = [onnx.helper.make_opsetid(domain, version) for domain, version in model.opset_imports.items()]
    proto = onnx.helper.make_model(graph, opset_imports=imports, ir_version=min(model.ir_version, onnx.IR_VERSION))
    proto.functions.extend(ir.serde.serialize_function(function) for function in model.functions.values())
    return proto


def _initializer(value: ir.Value) -> onnx.TensorProto:
    tensor = value.const_value
    assert tensor is not None
    proto = onnx.TensorProto(name=value.name, data_type=int(tensor.dtype), dims=[int(d) for d in tensor.shape])
    if tensor.dtype == ir.DataType.STRING:
        proto.string_data.extend(tensor.string_data())
    else:
        proto.raw_data = tensor.tobytes()
    return proto


def open_session(proto: onnx.ModelProto) -> ort.InferenceSession:
    """A session that computes what is written: no fusion, no prepacking, no arena, one thread. Raises onnxruntime's own errors."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.intra_op_num_threads = 1
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    options.log_severity_level = 4  # what fails is raised, and told by who catches it
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(session: ort.InferenceSession, feeds: Feeds) -> list[NDArray[Any]]:
    """All outputs, in order."""
    values = {name: feed if isinstance(feed, ort.OrtValue) else ort_value(feed) for name, feed in feeds.items()}
    return [output.numpy() for output in session.run_with_ort_values(None, values)]


def ort_value(array: NDArray[Any]) -> ort.OrtValue:
    """A view of `array`, or of a copy where it is not contiguous."""
    return ort.OrtValue.ortvalue_from_numpy(array if array.flags.c_contiguous else array.copy(order="C"))


@dataclass(frozen=True)
class ConeRunner:
    """An opened cone. `run` takes the leaves that are no initializers, by name, and gives the outputs."""

    session: ort.InferenceSession
    constants: Feeds
    leaves: tuple[ir.Value, ...]

    def run(self, feeds: Feeds) -> list[NDArray[Any]]:
        return run(self.session, {**self.constants, **feeds})


def open_cone(model: ir.Model, cone: Cone, leaf_types: Mapping[ir.Value, tuple[ir.DataType, int | None]]) -> ConeRunner:
    """Opens `cone`; `leaf_types` gives element type and rank (None: free) of each leaf that is no initializer. Raises onnxruntime's own."""
    constants = [value for value in cone.leaves if value not in leaf_types]
    large = {value for value in constants if is_large(value)}
    inputs = [input_info(str(value.name), *kind) for value, kind in leaf_types.items()]
    inputs += [constant_info(value) for value in constants if value in large]
    outputs = [onnx.helper.make_node("Identity", [str(value.name)], [_OUTPUT.format(i)]) for i, value in enumerate(cone.outputs)]
    session = open_session(piece(model, cone.nodes, inputs, (value for value in constants if value not in large), outputs))
    return ConeRunner(session, {str(value.name): ort_value(array_of(value)) for value in large}, tuple(leaf_types))
