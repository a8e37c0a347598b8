"""The parts that the graph of a GGUF decoder is put together from: nodes, constants, and the file's tensors as values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ..errors import ModelError
from .gguf_file import GgufFile, GgufTensor
from .gguf_weights import BLOCK, QUANTIZED, check_type, dequantize, pack_nibbles, split_blocks


@dataclass(frozen=True)
class _Matrix:
    """A stored matrix [M, K] as the graph has it: rows in `order` (None: as they are), [K, M] where `transposed`."""

    tensor: GgufTensor
    order: NDArray[np.intp] | None
    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        outer, inner = self.tensor.shape
        return (inner, outer) if self.transposed else (outer, inner)

    @property
    def block_axis(self) -> int:
        """Blocks lie along K."""
        return 0 if self.transposed else 1

    def split_shape(self, size: int) -> tuple[int, ...]:
        """The shape with K as (blocks, size)."""
        shape = list(self.shape)
        shape[self.block_axis : self.block_axis + 1] = [shape[self.block_axis] // BLOCK, size]
        return tuple(shape)

    def rows(self) -> GgufTensor:
        """The stored rows in order. A row holds whole blocks, so this is exact."""
        data = self.tensor.data if self.order is None else self.tensor.data[self.order]
        return GgufTensor(self.tensor.name, self.tensor.type, self.tensor.shape, data)

    def turned(self, values: NDArray[Any] | None) -> NDArray[Any]:
        assert values is not None, "minimums come with Q4_1 only"
        return np.ascontiguousarray(values.T) if self.transposed else values


class GraphParts:
    """Collects nodes and initializers, and remembers which tensors of the file have been used."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.used: set[str] = set()
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}

    def vector(self, stored: str, name: str, size: int, order: NDArray[np.intp] | None = None) -> ir.Value:
        """A stored vector as a float32 initializer, in `order`."""
        tensor = self.tensor(stored, (size,))
        return self.lazy(name, ir.DataType.FLOAT, (size,), lambda: dequantize(tensor)[slice(None) if order is None else order])

    def matrix(
        self, stored: str, module: str, shape: tuple[int, int], order: NDArray[np.intp] | None = None, *, transposed: bool = False
    ) -> ir.Value:
        """The float matrix of a tensor stored as `shape` [M, K]: an initializer, or a dequantization of blocks. `transposed`: [K, M]."""
        matrix = _Matrix(self.tensor(stored, shape), order, transposed)
        if matrix.tensor.type in QUANTIZED:
            return self.blocks(matrix, module)
        return self.lazy(f"{module}.weight", ir.DataType.FLOAT, matrix.shape, lambda: matrix.turned(dequantize(matrix.rows())))

    def blocks(self, matrix: _Matrix, module: str) -> ir.Value:
        """DequantizeLinear of a quantized matrix, and the Add of each block's minimum for Q4_1."""
        weight, path, axis = f"{module}.weight", f"{scope(module)}/weight", matrix.block_axis
        element = ir.DataType[QUANTIZED[matrix.tensor.type]]
        few = tuple(size // BLOCK if i == axis else size for i, size in enumerate(matrix.shape))
        values = self.lazy(f"{weight}_quantized", element, matrix.shape, lambda: matrix.turned(split_blocks(matrix.rows()).values))
        scale = self.lazy(f"{weight}_scale", ir.DataType.FLOAT, few, lambda: matrix.turned(split_blocks(matrix.rows()).scales))
        product = self.op("DequantizeLinear", [values, scale], f"{path}/DequantizeLinear", axis=axis, block_size=BLOCK)
        if matrix.tensor.type != "Q4_1":
            return product
        apart, one = matrix.split_shape(BLOCK), matrix.split_shape(1)
        minimum = self.lazy(
            f"{weight}_minimum", ir.DataType.FLOAT, one, lambda: matrix.turned(split_blocks(matrix.rows()).minimums).reshape(one)
        )
        blocks = self.op("Reshape", [product, self.shape(apart)], f"{path}/Reshape")
        shifted = self.op("Add", [blocks, minimum], f"{path}/Add")
        return self.op("Reshape", [shifted, self.shape(matrix.shape)], f"{path}/Reshape_1")

    def tensor(self, name: str, shape: tuple[int, ...]) -> GgufTensor:
        """The file's tensor `name`, which must have this shape (in NumPy's order) and a type that can be read."""
        tensor = self.file.tensors.get(name)
        if tensor is None:
            raise ModelError(f"{self.file.path} has no tensor {name!r}", hint="the file is incomplete: convert the model again")
        if tensor.shape != shape:
            message = f"{self.file.path}: tensor {name!r} has shape {list(tensor.shape)}, its metadata asks for {list(shape)}"
            raise ModelError(message, hint="the file is inconsistent: convert the model again")
        check_type(tensor)
        self.used.add(name)
        return tensor

    def lazy(self, name: str, dtype: ir.DataType, shape: tuple[int, ...], values: Callable[[], NDArray[Any]]) -> ir.Value:
        """An initializer whose values are made when they are written. Four-bit `values` come one a byte."""

        def tensor() -> ir.TensorProtocol:
            if dtype.bitwidth == 4:
                return ir.PackedTensor(pack_nibbles(values()), dtype, shape=shape, name=name)
            return ir.Tensor(np.ascontiguousarray(values()), dtype=dtype, name=name)

        return self.initializer(name, ir.LazyTensor(tensor, dtype, ir.Shape(shape), name=name))

    def constant(self, name: str, values: NDArray[Any] | np.generic) -> ir.Value:
        """A small or shared initializer; the same name gives the same value."""
        return self.initializers[name] if name in self.initializers else self.initializer(name, ir.Tensor(np.asarray(values), name=name))

    def shape(self, sizes: tuple[int, ...]) -> ir.Value:
        """A Reshape's target."""
        return self.constant("shape_" + "x".join(map(str, sizes)), np.array(sizes))

    def initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        assert name not in self.initializers, f"two initializers {name}"
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor)
        self.initializers[name] = value
        return value

    def op(self, op_type: str, inputs: Sequence[ir.Value], name: str, **attributes: Any) -> ir.Value:
        """A node with one output."""
        return self.node(op_type, inputs, name, **attributes)[0]

    def node(self, op_type: str, inputs: Sequence[ir.Value], name: str, outputs: int = 1, **attributes: Any) -> tuple[ir.Value, ...]:
        attrs = [ir.convenience.convert_attribute(key, value) for key, value in attributes.items()]
        node = ir.Node("", op_type, inputs, attrs, num_outputs=outputs, name=name)
        for i, value in enumerate(node.outputs):
            value.name = f"{name}/output_{i}"
        self.nodes.append(node)
        return tuple(node.outputs)


def scope(module: str) -> str:
    """model.layers.3.self_attn → /model/layers.3/self_attn, the way exporters scope nodes."""
    scopes: list[str] = []
    for part in module.split("."):
        if part.isdigit():
            scopes[-1] += f".{part}"
        else:
            scopes.append(part)
    return "/" + "/".join(scopes)
