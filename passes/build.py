"""Writing nodes into a graph: the few operators that lowerings need, with their constants shared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from .observe import Dim


class Builder:
    """Collects nodes and puts them before a place in `graph`. Equal constants become one initializer."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._nodes: list[ir.Node] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}

    @contextmanager
    def before(self, place: ir.Node) -> Iterator[None]:
        """Nodes made inside go before `place`."""
        yield
        self._graph.insert_before(place, self._nodes)
        self._nodes = []

    @contextmanager
    def after(self, place: ir.Node) -> Iterator[None]:
        """Nodes made inside go after `place`."""
        yield
        self._graph.insert_after(place, self._nodes)
        self._nodes = []

    def op(
        self, op_type: str, inputs: Sequence[ir.Value | None], attributes: Mapping[str, Any] | None = None, *, domain: str = "",
        name: str = "", outputs: int = 1,
    ) -> list[ir.Value]:
        """A node and its outputs. The first is typed like the first input, but for the two operators that say otherwise."""
        attrs = [ir.convenience.convert_attribute(key, value) for key, value in (attributes or {}).items()]
        node = ir.Node(domain, op_type, list(inputs), attrs, num_outputs=outputs, name=name or None)
        self._nodes.append(node)
        first = inputs[0]
        if op_type == "Shape":
            node.outputs[0].type = ir.TensorType(ir.DataType.INT64)
        elif op_type == "Cast":
            node.outputs[0].type = ir.TensorType(ir.DataType(node.attributes.get_int("to")))
        elif first is not None and first.type is not None:
            node.outputs[0].type = first.type
        return list(node.outputs)

    def constant(self, array: NDArray[Any], hint: str) -> ir.Value:
        """An initializer with these contents, named after `hint` and made once."""
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._constants:
            name, number = hint, 0
            while name in self._graph.initializers:
                number += 1
                name = f"{hint}.{number}"
            tensor = ir.Tensor(array, name=name)
            value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
            self._graph.register_initializer(value)
            self._constants[key] = value
        return self._constants[key]

    def integers(self, numbers: Sequence[int]) -> ir.Value:
        """A vector of int64."""
        return self.constant(np.array(numbers, np.int64), f"octavo.integers.{'_'.join(map(str, numbers))}")

    def reshape(self, value: ir.Value, shape: Sequence[int]) -> ir.Value:
        """`shape` has at most one −1; a 0 keeps the dimension in its place. What is declared of the result are its fixed sizes alone."""
        out = self.op("Reshape", [value, self.integers(shape)])[0]
        out.shape = ir.Shape([size if size > 0 else None for size in shape])
        return out

    def transpose(self, value: ir.Value, order: Sequence[int]) -> ir.Value:
        return self.op("Transpose", [value], {"perm": list(order)})[0]

    def cast(self, value: ir.Value, dtype: ir.DataType | None) -> ir.Value:
        """`value` itself where it has that type already."""
        if dtype is None or value.dtype == dtype:
            return value
        return self.op("Cast", [value], {"to": int(dtype)})[0]

    def sizes(self, ids: ir.Value, dims: Sequence[Dim], *, scalar: bool = False) -> ir.Value:
        """An int64 vector of sizes: products of a factor, B and S, which are the dimensions of `ids`."""
        assert all(set(dim.letters) <= {"B", "S"} for dim in dims), f"sizes other than of the ids: {dims}"
        if not any(dim.letters for dim in dims):
            array = np.array([dim.factor for dim in dims], np.int64)
            return self.constant(array.reshape(()) if scalar else array, "octavo.sizes")
        parts = [self._size(ids, dim) for dim in dims]
        joined = parts[0] if len(parts) == 1 else self.op("Concat", parts, {"axis": 0})[0]
        return self.op("Squeeze", [joined, self.integers([0])])[0] if scalar else joined

    def size(self, value: ir.Value, axis: int) -> ir.Value:
        """One dimension of `value`, int64 [1]. Not by Shape's own bounds, which opset 14 does not have."""
        return self.op("Gather", [self.op("Shape", [value])[0], self.integers([axis])])[0]

    def _size(self, ids: ir.Value, dim: Dim) -> ir.Value:
        factors = [self.integers([dim.factor])] if dim.factor != 1 or not dim.letters else []
        for letter in dim.letters:
            factors.append(self.size(ids, "BS".index(letter)))
        product = factors[0]
        for factor in factors[1:]:
            product = self.op("Mul", [product, factor])[0]
        return product
