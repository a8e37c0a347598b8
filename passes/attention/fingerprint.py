"""A name for what a value is computed by, so that masks and tables written out once a layer are evaluated once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import onnx_ir as ir

from ..extract import LARGE, cone, reads
from ..observe import Observation
from .chain import Chain


class Fingerprints:
    """Equal fingerprints: same ops with the same attributes over the same inputs. The dims of an activation count by their formulas."""

    def __init__(self, observation: Observation) -> None:
        self._observation = observation
        self._known: dict[ir.Value, str] = {}

    def of(self, value: ir.Value) -> str:
        """The fingerprint of a structural or constant value."""
        if value not in self._known:
            for node in cone([value], lambda v: v in self._known or self._is_cut(v)).nodes:
                for index, output in enumerate(node.outputs):
                    self._known.setdefault(output, _digest(index, *self._spell(node)))
        if value not in self._known:
            self._known[value] = self._leaf(value)
        return self._known[value]

    def chain(self, chain: Chain) -> str:
        """The fingerprint of what a chain does, wherever its leaves come from."""
        names = {leaf: f"leaf {index} {self._observation.dims(leaf)}" for index, leaf in enumerate(chain.leaves)}
        for node in chain.nodes:
            spelled = [names[v] if v in names else "-" if v is None else self.of(v) for v in node.inputs]
            for index, output in enumerate(node.outputs):
                names[output] = _digest(index, node.domain, node.op_type, _attributes(node), *spelled)
        return names[chain.target]

    def constants(self, values: Iterable[ir.Value]) -> list[ir.Value]:
        """All initializers in the cones of `values`."""
        return [leaf for leaf in cone(list(values), self._is_cut).leaves if leaf.const_value is not None]

    def _is_cut(self, value: ir.Value) -> bool:
        """The dims of an activation: what lies behind them has no part in the value."""
        node = value.producer()
        if node is None or node.op_type not in ("Shape", "Size") or self._observation.kind(value) == "data":
            return False
        return any(operand is not None and self._observation.kind(operand) == "data" for operand in node.inputs)

    def _spell(self, node: ir.Node) -> list[object]:
        return [node.domain, node.op_type, _attributes(node), *("-" if v is None else self.of(v) for v in node.inputs), *(
            self.of(v) for v in reads(node) if v not in node.inputs)]

    def _leaf(self, value: ir.Value) -> str:
        node, tensor = value.producer(), value.const_value
        if node is not None:
            assert node.inputs[0] is not None
            dims = self._observation.dims(node.inputs[0])
            return _digest(node.op_type, _attributes(node), dims or node.inputs[0].name)
        if tensor is not None and tensor.nbytes < LARGE:
            return _digest(tensor.dtype, tuple(tensor.shape), tensor.tobytes())
        return _digest("named", value.name)


def _attributes(node: ir.Node) -> str:
    return repr(sorted((name, attribute.type, _plain(attribute)) for name, attribute in node.attributes.items()))


def _plain(attribute: ir.Attr) -> object:
    value = attribute.value
    if isinstance(value, ir.TensorProtocol):
        return (value.dtype, tuple(value.shape), hashlib.sha256(value.tobytes()).hexdigest())
    return str(value)


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()
