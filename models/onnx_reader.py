"""Reads an ONNX model, from a file or from memory, into an onnx_ir model of our own that passes may change.

Nothing is opened before `external_data` has checked where it lies, and weights stay on disk, mapped when they are read.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import onnx
import onnx_ir as ir
from onnx_ir.serde import TensorProtoTensor

from ..errors import ModelError, UnsafePathError
from .external_data import ExternalEntry, check_entry, check_external_paths, model_file
from .interface import GraphInterface
from .roles import Triple, guess_interface

# The newest ai.onnx opset whose meaning Octavo's rules know.
MAX_OPSET = 25
# Initializers stand apart from graph inputs since IR version 4; 3 lists them in both, which reads just as well. Older ones carry no opset.
MIN_IR_VERSION = 3

Source: TypeAlias = str | os.PathLike[str] | onnx.ModelProto | ir.Model

_EXPORT_AGAIN = "export the model again, or load and save it with a current onnx package"


def read_onnx(source: Source) -> ir.Model:
    """An onnx_ir model that shares nothing with `source` that a pass could change: not the file, not the proto, not the ir.Model.

    Functions are kept; tensors in other files stay there (`ir.ExternalTensor` with an absolute folder); tensors of a proto or ir.Model
    handed in lend their bytes. Raises ModelError for what is missing, truncated, no model, or newer than `MAX_OPSET` or the onnx package
    knows, and UnsafePathError for external data that breaks a rule of `external_data`.
    """
    if isinstance(source, ir.Model):
        return _checked(_own_copy(source), "the ir.Model")
    if isinstance(source, onnx.ModelProto):
        _check_proto(source, "the ModelProto")
        model = _from_proto(source, "the ModelProto")
        _map_tensors(model, _lent)
        return _checked(model, "the ModelProto")
    path = model_file(source)
    check_external_paths(path)
    try:
        # The format is given, since onnx would otherwise guess it (text, json) from the file's name.
        proto = onnx.load_model(path, format="protobuf", load_external_data=False)
    except Exception as error:  # protobuf's DecodeError, or the file can't be read
        raise ModelError(f"{path} is not an ONNX model, or it is truncated: {error}", hint=_EXPORT_AGAIN) from error
    _check_proto(proto, str(path))
    model = _from_proto(proto, str(path))
    folder = path.parent.resolve()
    _map_tensors(model, lambda tensor: _placed(tensor, folder))
    return _checked(model, str(path))


def graph_interface(model: ir.Model) -> GraphInterface:
    """The model's inputs and outputs with the roles that `roles.guess_interface` gives them. Inputs with an initializer are no inputs."""
    inputs = [value for value in model.graph.inputs if value.name not in model.graph.initializers]
    return guess_interface([_triple(value) for value in inputs], [_triple(value) for value in model.graph.outputs])


def _triple(value: ir.Value) -> Triple:
    dtype = value.dtype.name if isinstance(value.type, ir.TensorType) else str(value.type)
    shape = None if value.shape is None else [size if isinstance(size, int) else size.value for size in value.shape]
    return value.name or "", dtype, shape


def _check_proto(proto: onnx.ModelProto, what: str) -> None:
    """What onnx_ir would drop or trip over without a word a user could act on."""
    if not proto.HasField("graph"):
        raise ModelError(f"{what} is not an ONNX model: it holds no graph", hint="give the path of an .onnx file")
    if not MIN_IR_VERSION <= proto.ir_version <= onnx.IR_VERSION:
        raise ModelError(
            f"{what} has IR version {proto.ir_version}; onnx {onnx.__version__} reads {MIN_IR_VERSION} to {onnx.IR_VERSION}",
            hint=_EXPORT_AGAIN if proto.ir_version < MIN_IR_VERSION else "upgrade onnx, or export for an older IR version",
        )
    if proto.training_info:
        raise ModelError(f"{what} carries training information, which Octavo doesn't read", hint="export the model for inference")
    graphs = [proto.graph]
    while graphs:
        graph = graphs.pop()
        if graph.sparse_initializer:
            raise ModelError(f"{what} has sparse initializers, which Octavo doesn't read", hint="export the model with dense weights")
        graphs += [g for node in graph.node for attr in node.attribute for g in (*attr.graphs, *([attr.g] if attr.HasField("g") else []))]


def _from_proto(proto: onnx.ModelProto, what: str) -> ir.Model:
    try:
        return ir.from_proto(proto)
    except Exception as error:  # onnx_ir raises whatever a malformed proto leads it into
        raise ModelError(f"{what} is malformed: {_innermost(error)}", hint=_EXPORT_AGAIN) from error


def _own_copy(source: ir.Model) -> ir.Model:
    """A clone whose tensors and types, which onnx_ir's clone shares, are our own too: renaming a value would rename the user's tensor."""
    try:
        model = source.clone()
    except Exception as error:  # unsorted nodes, values of an outer scope that is not there
        raise ModelError(f"the ir.Model can't be copied: {_innermost(error)}", hint="sort its nodes: ir.Graph.sort()") from error
    _map_tensors(model, _lent)
    for value in _values(model):
        value.type = copy.deepcopy(value.type)
    return model


def _checked(model: ir.Model, what: str) -> ir.Model:
    """The model, after its opset and every tensor have been held against what the model says."""
    for graph in (model.graph, *model.functions.values()):
        version = graph.opset_imports.get("", graph.opset_imports.get("ai.onnx"))
        if version is not None and version > MAX_OPSET:
            hint = f"export with opset_version={MAX_OPSET} or less"
            raise ModelError(f"{what} uses opset {version}; Octavo reads up to {MAX_OPSET}", hint=hint)
    if not model.graph.opset_imports:
        raise ModelError(f"{what} is not a model that can run: it imports no opset", hint=_EXPORT_AGAIN)
    for tensor in _tensors(model):
        _check_tensor(tensor, what)
    return model


def _check_tensor(tensor: ir.TensorProtocol, what: str) -> None:
    """Refuses a tensor whose bytes are fewer or more than its type and shape need."""
    if any(not isinstance(size, int) or size < 0 for size in tensor.shape):
        raise ModelError(f"{what}: tensor {tensor.name!r} has no valid shape: {tensor.shape}", hint=_EXPORT_AGAIN)
    if isinstance(tensor, ir.ExternalTensor):
        if tensor.dtype == ir.DataType.STRING:
            raise ModelError(f"{what}: tensor {tensor.name!r} keeps strings in external data", hint=_EXPORT_AGAIN)
        _check_external(tensor, what)
    elif isinstance(tensor, TensorProtoTensor) and tensor.raw.HasField("raw_data") and len(tensor.raw.raw_data) != tensor.nbytes:
        size = len(tensor.raw.raw_data)
        raise ModelError(f"{what}: tensor {tensor.name!r} needs {tensor.nbytes} bytes and has {size}", hint=_EXPORT_AGAIN)


def _check_external(tensor: ir.ExternalTensor, what: str) -> None:
    if not os.path.isabs(tensor.base_dir):
        # Without a folder there is no boundary, and onnx_ir then checks none.
        raise UnsafePathError(
            f"{what}: tensor {tensor.name!r} lies in {str(tensor.location)!r}, beside a file that is not known here",
            hint="pass the path of the .onnx file, or load with an absolute path (ir.load), or load the data too (onnx.load)",
        )
    if tensor.length is not None and tensor.length != tensor.nbytes:
        message = f"{what}: tensor {tensor.name!r} needs {tensor.nbytes} bytes and its external data has {tensor.length}"
        raise ModelError(message, hint=_EXPORT_AGAIN)
    check_entry(ExternalEntry(tensor.name or "", str(tensor.location), tensor.offset or 0, tensor.nbytes), tensor.base_dir)


def _placed(tensor: ir.TensorProtocol, folder: Path) -> ir.TensorProtocol:
    """Tells an external tensor its absolute folder; other tensors of a file that we have read ourselves are ours already."""
    if isinstance(tensor, ir.ExternalTensor):
        tensor.base_dir = folder
    return tensor


def _lent(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """Another tensor with the same bytes, so that our names and folders never show on the user's."""
    if isinstance(tensor, ir.ExternalTensor):
        name = tensor.name or ""
        return ir.ExternalTensor(
            tensor.location, tensor.offset, tensor.length, tensor.dtype, shape=tensor.shape, name=name, base_dir=tensor.base_dir
        )
    if isinstance(tensor, TensorProtoTensor):
        _check_tensor(tensor, "the ModelProto")
    shape = ir.Shape(tensor.shape.numpy(), frozen=True)
    if tensor.dtype == ir.DataType.STRING:
        return ir.StringTensor(tensor.string_data(), shape=shape, name=tensor.name)
    return ir.LazyTensor(lambda: tensor, dtype=tensor.dtype, shape=shape, name=tensor.name)


def _map_tensors(model: ir.Model, mapped: Callable[[ir.TensorProtocol], ir.TensorProtocol]) -> None:
    """Replaces every tensor of the model: initializers, constants, attributes, in subgraphs and functions too."""
    for value in _values(model):
        if value.const_value is not None:
            value.const_value = mapped(value.const_value)
    for node in _nodes(model):
        for name, attr in list(node.attributes.items()):
            if attr.is_ref():
                continue
            if attr.type == ir.AttributeType.TENSOR:
                node.attributes[name] = ir.Attr(name, attr.type, mapped(attr.value), doc_string=attr.doc_string)
            elif attr.type == ir.AttributeType.TENSORS:
                node.attributes[name] = ir.Attr(name, attr.type, [mapped(tensor) for tensor in attr.value], doc_string=attr.doc_string)


def _tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    for value in _values(model):
        if value.const_value is not None:
            yield value.const_value
    for node in _nodes(model):
        for attr in node.attributes.values():
            if not attr.is_ref() and attr.type == ir.AttributeType.TENSOR:
                yield attr.value
            elif not attr.is_ref() and attr.type == ir.AttributeType.TENSORS:
                yield from attr.value


def _values(model: ir.Model) -> Iterator[ir.Value]:
    """Each value once."""
    for function in model.functions.values():
        yield from function.inputs
    subgraphs = (graph for function in model.functions.values() for graph in function.subgraphs())
    for graph in (*model.graphs(), *subgraphs):
        yield from dict.fromkeys((*graph.inputs, *graph.initializers.values()))
    for node in _nodes(model):
        yield from node.outputs


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()


def _innermost(error: BaseException) -> str:
    """The message at the bottom of a chain of wrapped errors, which is the one that names the cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error) or type(error).__name__
