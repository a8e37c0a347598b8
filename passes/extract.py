"""Cutting pieces out of a graph and opening them in onnxruntime, without copying weights and without touching the graph.

A *cone* is everything that some values are computed from, back to where the caller says to stop. Constants of LARGE bytes or more
never enter the serialized piece: they become inputs of it and are fed as views of the memory (or the mapped file) they already lie in.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from ..custom_ops import register

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


def subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    """Bodies and branches of an If, Loop or Scan."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def reads(node: ir.Node) -> Iterator[ir.Value]:
    """All values that `node` depends on: its inputs, and what its subgraphs capture."""
    yield from (value for value in node.inputs if value is not None)
    for graph in subgraphs(node):
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


def is_large(tensor: ir.TensorProtocol) -> bool:
    """Whether a constant is fed and not serialized. Types that NumPy has no word for stay serialized."""
    return tensor.nbytes >= LARGE and tensor.dtype != ir.DataType.STRING and np.dtype(tensor.dtype.numpy()).kind in "fiub"


def input_info(name: str, dtype: ir.DataType | None, rank: int | None) -> onnx.ValueInfoProto:
    """A graph input of free dimensions."""
    assert dtype is not None, f"{name} has no type"
    return onnx.helper.make_tensor_value_info(name, int(dtype), None if rank is None else [None] * rank)


def constant_info(name: str, tensor: ir.TensorProtocol) -> onnx.ValueInfoProto:
    """A constant's declaration as a graph input, for feeding it."""
    return onnx.helper.make_tensor_value_info(name, int(tensor.dtype), [int(size) for size in tensor.shape])


def constant_proto(name: str, tensor: ir.TensorProtocol) -> onnx.TensorProto:
    """A constant, serialized."""
    proto = onnx.TensorProto(name=name, data_type=int(tensor.dtype), dims=[int(size) for size in tensor.shape])
    if tensor.dtype == ir.DataType.STRING:
        proto.string_data.extend(tensor.string_data())
    else:
        proto.raw_data = tensor.tobytes()
    return proto


def constants_of(values: Iterable[ir.Value]) -> dict[str, ir.TensorProtocol]:
    """The contents of initializers, by name."""
    return {str(value.name): value.const_value for value in values if value.const_value is not None}


def piece(
    model: ir.Model, nodes: Iterable[ir.Node], inputs: Sequence[onnx.ValueInfoProto], outputs: Sequence[onnx.NodeProto],
) -> onnx.ModelProto:
    """A model of `nodes` with `model`'s opsets and functions, without constants. Its outputs are those of `outputs`, closing nodes."""
    graph = onnx.GraphProto(name="piece")
    graph.node.extend(ir.serde.serialize_node(node) for node in nodes)
    graph.node.extend(outputs)
    graph.input.extend(inputs)
    graph.output.extend(onnx.ValueInfoProto(name=node.output[0]) for node in outputs)
    imports = [onnx.helper.make_opsetid(domain, version) for domain, version in model.opset_imports.items()]
    proto = onnx.helper.make_model(graph, opset_imports=imports, ir_version=min(model.ir_version, onnx.IR_VERSION))
    proto.functions.extend(ir.serde.serialize_function(function) for function in model.functions.values())
    return proto


def open_session(proto: onnx.ModelProto, *, custom_ops: bool = False, served: bool = False, threads: int = 1) -> ort.InferenceSession:
    """A session that computes what is written: no fusion, no prepacking, no arena; `threads` 0 are all. Raises onnxruntime's own errors.

    With `custom_ops` it knows the library's; raises LibraryError where that is missing. With `served` it runs as fast as it can.
    """
    options = ort.SessionOptions()
    if custom_ops:
        register(options)
    if served:
        options.enable_mem_pattern = False
        options.log_severity_level = 4
        return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.intra_op_num_threads = threads
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
    """An opened cone. `run` takes the leaves that are no constants, by name, and gives the outputs."""

    session: ort.InferenceSession
    constants: Feeds
    leaves: tuple[ir.Value, ...]

    def run(self, feeds: Feeds) -> list[NDArray[Any]]:
        return run(self.session, {**self.constants, **feeds})


@dataclass(frozen=True)
class PreparedCone:
    """A cone as it was when it was prepared: later changes of the graph don't reach it. Constants are still where they were."""

    proto: onnx.ModelProto
    constants: Mapping[str, ir.TensorProtocol]
    leaves: tuple[ir.Value, ...]

    def open(self, *, threads: int = 1, fed: Collection[str] = ()) -> ConeRunner:
        """Constants called as in `fed` can be given to `run` too, which then takes those. Raises onnxruntime's own errors."""
        proto = onnx.ModelProto()
        proto.CopyFrom(self.proto)
        large = {name: tensor for name, tensor in self.constants.items() if is_large(tensor) or name in fed}
        proto.graph.input.extend(constant_info(name, tensor) for name, tensor in large.items())
        small = ((name, tensor) for name, tensor in self.constants.items() if name not in large)
        proto.graph.initializer.extend(constant_proto(name, tensor) for name, tensor in small)
        return ConeRunner(open_session(proto, threads=threads), {name: ort_value(tensor.numpy()) for name, tensor in large.items()}, self.leaves)


def prepare(model: ir.Model, cone: Cone, leaf_types: Mapping[ir.Value, tuple[ir.DataType, int | None]]) -> PreparedCone:
    """`cone` for running. `leaf_types` gives element type and rank (None: free) of each leaf that is no constant."""
    inputs = [input_info(str(value.name), *kind) for value, kind in leaf_types.items()]
    outputs = [onnx.helper.make_node("Identity", [str(value.name)], [_OUTPUT.format(i)]) for i, value in enumerate(cone.outputs)]
    constants = constants_of(value for value in cone.leaves if value not in leaf_types)
    return PreparedCone(piece(model, cone.nodes, inputs, outputs), constants, tuple(leaf_types))
