"""A graph in memory as a canonical `Snapshot`: what a compile looks like between two passes, without writing it anywhere."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from weakref import WeakKeyDictionary

import onnx
import onnx_ir as ir

from ...passes.extract import constant_proto, reads
from .constants import Constants, dtype_name
from .graph import Snapshot, Tensor
from .hashing import Hasher, digest_of
from .read import read_proto
from .skeleton import Skeleton

# Tensors up to so many bytes are serialized with the graph: those that a snapshot tells by value are among them.
_SMALL = 1024


class LiveReader:
    """Reads graphs of one compile. Each weight is hashed once, however many passes leave it as it is."""

    def __init__(self) -> None:
        self._hasher = Hasher()
        self._digests: WeakKeyDictionary[ir.TensorProtocol, str] = WeakKeyDictionary()      # a pass may drop its weights meanwhile

    def close(self) -> None:
        self._hasher.close()

    def snapshot(self, model: ir.Model) -> Snapshot:
        """The canonical form of `model` as it is now."""
        mark = secrets.token_hex(8)
        proto, large = proto_of(model)
        proto.graph.initializer.extend(
            onnx.TensorProto(name=name, data_type=int(tensor.dtype), dims=[int(size) for size in tensor.shape], doc_string=mark)
            for name, tensor in large.items())
        skeleton = Skeleton(proto, secrets.token_hex(8), ())
        return read_proto(proto, _LiveConstants(Path(), skeleton, self._hasher, mark=mark, large=large, reader=self))

    def digest(self, tensor: ir.TensorProtocol) -> str:
        """As of the same bytes in a file."""
        if tensor not in self._digests:
            self._digests[tensor] = self._hashed(tensor)
        return self._digests[tensor]

    def _hashed(self, tensor: ir.TensorProtocol) -> str:
        if isinstance(tensor, ir.ExternalTensor):
            return self._hasher.digest(Path(tensor.path).resolve(), tensor.offset or 0, tensor.nbytes)
        return digest_of([tensor.tobytes()])


@dataclass(frozen=True)
class _LiveConstants(Constants):
    mark: str = ""
    large: dict[str, ir.TensorProtocol] = field(default_factory=dict)
    reader: LiveReader = field(default_factory=LiveReader)

    def tensor(self, proto: onnx.TensorProto) -> Tensor:
        if proto.doc_string != self.mark:
            return super().tensor(proto)
        return Tensor(dtype_name(proto.data_type), tuple(proto.dims), self.reader.digest(self.large[proto.name]))


def proto_of(model: ir.Model) -> tuple[onnx.ModelProto, dict[str, ir.TensorProtocol]]:
    """The model as protobuf, but for its large initializers: they are given beside it, by name.

    Between the passes of a lowering nodes read inputs that the graph does not declare yet: here it does.
    """
    graph = model.graph
    proto = onnx.ModelProto(ir_version=min(model.ir_version, onnx.IR_VERSION))
    proto.opset_import.extend(onnx.helper.make_opsetid(domain, version) for domain, version in model.opset_imports.items())
    proto.functions.extend(ir.serde.serialize_function(function) for function in model.functions.values())
    proto.graph.name = "g"
    proto.graph.node.extend(ir.serde.serialize_node(node) for node in graph)
    proto.graph.input.extend(ir.serde.serialize_value(value) for value in (*graph.inputs, *_undeclared(graph)))
    proto.graph.output.extend(ir.serde.serialize_value(value) for value in graph.outputs)
    large: dict[str, ir.TensorProtocol] = {}
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and tensor.nbytes > _SMALL and tensor.dtype != ir.DataType.STRING:
            large[name] = tensor
        elif tensor is not None:
            proto.graph.initializer.append(constant_proto(name, tensor))
    return proto, large


def _undeclared(graph: ir.Graph) -> Iterator[ir.Value]:
    known = {*graph.inputs, *graph.initializers.values()}
    for node in graph:
        for value in reads(node):
            if value.producer() is None and value not in known:
                known.add(value)
                yield value
