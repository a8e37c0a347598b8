"""From an ONNX file to a canonical `Snapshot`, without reading its weights into memory, running it or loading a library."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import onnx

from ...custom_ops.contract import DOMAIN, OPS
from ...errors import ModelError
from .canonical import canonical
from .constants import Constants, dtype_name, name_of
from .graph import Given, Graph, Node, Outer, Port, Produced, Ref, Snapshot, Tensor
from .hashing import Hasher
from .skeleton import read_skeleton

_EXPORT_AGAIN = "export the model again, or load and save it with a current onnx package"
_STANDARD = ("", "ai.onnx")
# protobuf refuses more than 100 nested messages; a subgraph takes three of them.
_DEEPEST = 32


def read_onnx_snapshot(path: Path, *, weights: bool = True) -> Snapshot:
    """The canonical form of the model at `path`. ModelError or UnsafePathError for what can't be read or may not be."""
    path = path.resolve()
    skeleton = read_skeleton(path)
    hasher = Hasher()
    try:
        return read_proto(skeleton.proto, Constants(path, skeleton, hasher, weights))
    except ModelError as error:
        raise type(error)(f"{path}: {error.message}", hint=error.hint) from error
    finally:
        hasher.close()


def read_proto(proto: onnx.ModelProto, constants: Constants) -> Snapshot:
    """The canonical form of a model whose tensors `constants` reads. ModelError for one that is malformed."""
    opsets = _opsets(proto.opset_import)
    reader = _Reader(constants, opsets)
    graph = reader.graph(proto.graph, _Scope(), interface=True)
    functions = {}
    for function in proto.functions:
        name = f"{name_of(function.domain)}::{name_of(function.name)}" + (f":{name_of(function.overload)}" if function.overload else "")
        if name in functions:
            raise ModelError(f"the function {name} is there twice", hint=_EXPORT_AGAIN)
        functions[name] = _Reader(constants, opsets | _opsets(function.opset_import)).function(function)
    return canonical(Snapshot(graph, tuple(functions.items()), tuple(opsets.items())))


def _opsets(entries: Iterable[onnx.OperatorSetIdProto]) -> dict[str, int]:
    return {name_of(entry.domain) or "ai.onnx": entry.version for entry in entries}


@dataclass
class _Scope:
    """Names of one graph. A name that is not here is looked for around it, and becomes a capture."""

    depth: int = 0
    names: dict[str, Ref] = field(default_factory=dict)
    outer: Callable[[str], Ref] | None = None

    def define(self, name: str, ref: Ref) -> None:
        if name_of(name) in self.names:
            raise ModelError(f"the value {name!r} is defined twice", hint=_EXPORT_AGAIN)
        self.names[name] = ref

    def resolve(self, name: str) -> Ref:
        if not name_of(name):
            return None
        if name not in self.names:
            if self.outer is None:
                raise ModelError(f"the value {name!r} is read and nothing produces it", hint=_EXPORT_AGAIN)
            self.names[name] = self.outer(name)
        return self.names[name]


@dataclass
class _Reader:
    constants: Constants
    opsets: dict[str, int]
    symbols: dict[str, str] = field(default_factory=dict)

    def graph(self, proto: onnx.GraphProto, scope: _Scope, *, interface: bool = False) -> Graph:
        if scope.depth > _DEEPEST:
            raise ModelError("its graphs are nested too deeply", hint=_EXPORT_AGAIN)
        if proto.sparse_initializer:
            raise ModelError("it has sparse initializers, which Octavo doesn't read", hint="export the model with dense weights")
        for tensor in proto.initializer:
            scope.define(tensor.name, self.constants.tensor(tensor))
        # Up to IR version 3 initializers are inputs too, and later they may be: a default that nobody has to give.
        given = [value for value in proto.input if value.name not in scope.names]
        for i, value in enumerate(given):
            scope.define(value.name, Given(i))
        nodes = self.nodes(proto.node, scope)
        results = tuple(scope.resolve(value.name) for value in proto.output)
        inputs = tuple(self._port(value, f"in{i}", interface) for i, value in enumerate(given))
        outputs = tuple(self._port(value, f"out{i}", interface) for i, value in enumerate(proto.output))
        for ports in (inputs, outputs):
            if len({port.name for port in ports}) != len(ports):
                raise ModelError("two inputs or two outputs have one name", hint=_EXPORT_AGAIN)
        return Graph(inputs, outputs, results, nodes)

    def function(self, proto: onnx.FunctionProto) -> Graph:
        scope = _Scope()
        for i, name in enumerate(proto.input):
            scope.define(name, Given(i))
        nodes = self.nodes(proto.node, scope)
        results = tuple(scope.resolve(name) for name in proto.output)
        return Graph(
            tuple(Port(f"in{i}") for i in range(len(proto.input))), tuple(Port(f"out{i}") for i in range(len(proto.output))), results, nodes,
        )

    def nodes(self, protos: Iterable[onnx.NodeProto], scope: _Scope) -> tuple[Node, ...]:
        """The nodes, in whatever order they stand. A Constant becomes the tensor it holds."""
        kept: list[onnx.NodeProto] = []
        for proto in protos:
            constant = self._constant(proto)
            if constant is not None:
                scope.define(proto.output[0], constant)
                continue
            for output, name in enumerate(proto.output):
                if name:
                    scope.define(name, Produced(len(kept), output))
            kept.append(proto)
        return tuple(self._node(proto, scope) for proto in kept)

    def _node(self, proto: onnx.NodeProto, scope: _Scope) -> Node:
        domain = "" if proto.domain in _STANDARD else name_of(proto.domain)
        op = (f"{domain}::" if domain else "") + name_of(proto.op_type) + (f":{name_of(proto.overload)}" if proto.overload else "")
        captured: dict[str, Ref] = {}

        def capture(name: str) -> Ref:
            captured.setdefault(name, scope.resolve(name))
            return Outer(list(captured).index(name))

        attributes: dict[str, str] = {}
        subgraphs: list[tuple[str, Graph]] = []
        for attribute in proto.attribute:
            graphs = [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]
            if name_of(attribute.name) in attributes or any(name == attribute.name for name, _ in subgraphs):
                raise ModelError(f"node {proto.name!r} has the attribute {attribute.name!r} twice", hint=_EXPORT_AGAIN)
            for graph in graphs:
                subgraphs.append((attribute.name, self.graph(graph, _Scope(scope.depth + 1, outer=capture))))
            if not graphs:
                attributes[attribute.name] = self._attribute(attribute)
        defaults = _defaults(domain, proto.op_type, self.opsets.get(domain or "ai.onnx", 1))
        inputs = [scope.resolve(name) for name in proto.input]
        while inputs and inputs[-1] is None:
            inputs.pop()
        return Node(
            op, (*inputs, *captured.values()), tuple(sorted((k, v) for k, v in attributes.items() if defaults.get(k) != v)),
            tuple(sorted(subgraphs, key=lambda pair: pair[0])), len(proto.output), len(captured), name_of(proto.name),
            tuple(proto.output),
        )

    def _constant(self, proto: onnx.NodeProto) -> Tensor | None:
        if proto.op_type != "Constant" or proto.domain not in _STANDARD or len(proto.attribute) != 1 or len(proto.output) != 1:
            return None
        a = proto.attribute[0]
        if a.name == "value" and a.HasField("t"):
            return self.constants.tensor(a.t)
        kinds = {"value_int": (onnx.TensorProto.INT64, a.i), "value_ints": (onnx.TensorProto.INT64, list(a.ints)),
                 "value_float": (onnx.TensorProto.FLOAT, a.f), "value_floats": (onnx.TensorProto.FLOAT, list(a.floats)),
                 "value_string": (onnx.TensorProto.STRING, a.s), "value_strings": (onnx.TensorProto.STRING, list(a.strings))}
        if a.name not in kinds or a.ref_attr_name:
            return None
        dtype, value = kinds[a.name]
        values = value if isinstance(value, list) else [value]
        return self.constants.tensor(onnx.helper.make_tensor(a.name, dtype, [len(values)] if isinstance(value, list) else [], values))

    def _attribute(self, a: onnx.AttributeProto) -> str:
        if a.ref_attr_name:
            return f"@{json.dumps(name_of(a.ref_attr_name))}"
        kind = a.type
        if kind == onnx.AttributeProto.TENSOR:
            return _tensor_text(self.constants.tensor(a.t))
        if kind == onnx.AttributeProto.TENSORS:
            return "[" + ", ".join(_tensor_text(self.constants.tensor(t)) for t in a.tensors) + "]"
        if kind in (onnx.AttributeProto.TYPE_PROTO, onnx.AttributeProto.TYPE_PROTOS):
            types = [a.tp] if kind == onnx.AttributeProto.TYPE_PROTO else list(a.type_protos)
            return json.dumps(" ".join(self._type(t) for t in types))
        return attribute_text(a)

    def _port(self, value: onnx.ValueInfoProto, plain: str, interface: bool) -> Port:
        """Inside functions and subgraphs ports go by their place, and what types say follows from the graph around them."""
        return Port(value.name, self._type(value.type)) if interface else Port(plain)

    def _type(self, proto: onnx.TypeProto, depth: int = 0) -> str:
        if depth > _DEEPEST:
            raise ModelError("a type is nested too deeply", hint=_EXPORT_AGAIN)
        which = proto.WhichOneof("value")
        if which in ("tensor_type", "sparse_tensor_type"):
            tensor = getattr(proto, which)
            name = ("sparse " if which == "sparse_tensor_type" else "") + dtype_name(tensor.elem_type)
            return name + (f"[{', '.join(map(self._dim, tensor.shape.dim))}]" if tensor.HasField("shape") else "")
        if which in ("sequence_type", "optional_type"):
            return f"{which.split('_')[0]}({self._type(getattr(proto, which).elem_type, depth + 1)})"
        if which == "map_type":
            return f"map({dtype_name(proto.map_type.key_type)}, {self._type(proto.map_type.value_type, depth + 1)})"
        return "" if which is None else which

    def _dim(self, dim: onnx.TensorShapeProto.Dimension) -> str:
        """A number; `s0`, `s1`, … for names in order of appearance, inside of sums too; `?` for what has no name."""
        if dim.HasField("dim_value"):
            return str(dim.dim_value)
        if not dim.dim_param:
            return "?"
        return self.symbols.setdefault(name_of(dim.dim_param), f"s{len(self.symbols)}")


def attribute_text(a: onnx.AttributeProto) -> str:
    """The value of an attribute that holds numbers or text. float32 as short as it can be told apart."""
    kinds: dict[int, Callable[[], str]] = {
        onnx.AttributeProto.INT: lambda: str(a.i), onnx.AttributeProto.INTS: lambda: _list(map(str, a.ints)),
        onnx.AttributeProto.FLOAT: lambda: _float(a.f), onnx.AttributeProto.FLOATS: lambda: _list(map(_float, a.floats)),
        onnx.AttributeProto.STRING: lambda: _string(a.s), onnx.AttributeProto.STRINGS: lambda: _list(map(_string, a.strings)),
    }
    if a.type not in kinds:
        raise ModelError(f"the attribute {a.name!r} is of a type that Octavo doesn't read", hint=_EXPORT_AGAIN)
    return kinds[a.type]()


def _list(values: Iterable[str]) -> str:
    return f"[{', '.join(values)}]"


def _float(value: float) -> str:
    return str(np.float32(value))


def _string(value: bytes) -> str:
    return json.dumps(value.decode("utf-8", "surrogateescape"))


def _tensor_text(tensor: Tensor) -> str:
    return tensor.type + tensor.content


@cache
def _defaults(domain: str, op: str, version: int) -> dict[str, str]:
    """The text of each attribute's default, as far as an op's schema or our own contract tells it."""
    if domain == DOMAIN and op in OPS:
        return {a.name: _float(a.default) if a.type == "float" else str(a.default) for a in OPS[op].attributes if a.default is not None}
    try:
        schema = onnx.defs.get_schema(op, version, domain)
    except (onnx.defs.SchemaError, TypeError):
        return {}
    known = (onnx.AttributeProto.INT, onnx.AttributeProto.INTS, onnx.AttributeProto.FLOAT, onnx.AttributeProto.FLOATS,
             onnx.AttributeProto.STRING, onnx.AttributeProto.STRINGS)
    return {a.name: attribute_text(a.default_value) for a in schema.attributes.values() if a.default_value.type in known}
