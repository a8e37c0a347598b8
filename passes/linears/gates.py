"""Gated products: act(gate)·up. What the activation is, is found by evaluating it, whatever operators it is spelled with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import get_args

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ...custom_ops.quant_reference import activate
from ..extract import cone, prepare
from ..normalize import is_standard
from ..outcome import Refusal
from .shapes import ints
from .site import Gate, GateSite, LinearSite, Rows

_POINTWISE = frozenset({
    "Abs", "Add", "Cast", "Clip", "Div", "Elu", "Erf", "Exp", "FastGelu", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Log", "Max", "Min",
    "Mish", "Mul", "Neg", "Pow", "QuickGelu", "Reciprocal", "Relu", "Sigmoid", "Softplus", "Sqrt", "Sub", "Swish", "Tanh", "ThresholdedRelu",
})
# Relative to 1 + |x|. gelu and gelu_tanh are 1.4e-4 apart there, the others more; onnxruntime's erf and exp are within 1e-6 of the function.
_PROBES = np.concatenate([np.linspace(-12, 12, 2001), [-80.0, -30.0, 30.0, 80.0]]).astype(np.float32)
_NEAR = 2e-5


def find_gates(model: ir.Model, sites: Sequence[LinearSite]) -> tuple[list[GateSite], list[Refusal]]:
    """Every act(gate)·up whose two products have one input and no other reader. Refusals: a gate by another function."""
    rows = _rows(sites)
    gates: list[GateSite] = []
    refusals: list[Refusal] = []
    for node in model.graph:
        if not is_standard(node, "Mul"):
            continue
        for activated, up in ((node.inputs[0], node.inputs[1]), (node.inputs[1], node.inputs[0])):
            found = None if activated is None or up is None or up not in rows else _gate(model, node, activated, up, rows)
            if isinstance(found, GateSite):
                gates.append(found)
                break
            if found is not None:
                refusals.append(found)
    return gates, refusals


def _rows(sites: Sequence[LinearSite]) -> dict[ir.Value, Rows]:
    """Values that are outputs of linears: all of one, or the halves that a Split makes of it."""
    rows: dict[ir.Value, Rows] = {}
    for site in sites:
        rows[site.output] = Rows(site, 0, site.M, site.output)
        uses = list(site.output.uses())
        split = uses[0].node if len(uses) == 1 and uses[0].idx == 0 else None
        if split is None or not is_standard(split, "Split") or len(split.outputs) != 2 or split.attributes.get_int("axis", 0) != -1:
            continue
        sizes = ints(split.inputs[1]) if len(split.inputs) > 1 else [site.M // 2, site.M - site.M // 2]
        if sizes == [site.M // 2] * 2 and site.M % 2 == 0:
            for half, value in enumerate(split.outputs):
                rows[value] = Rows(site, half * site.M // 2, (half + 1) * site.M // 2, value)
    return rows


def _gate(model: ir.Model, product: ir.Node, activated: ir.Value, up: ir.Value, rows: Mapping[ir.Value, Rows]) -> GateSite | Refusal | None:
    if activated in rows or len(activated.uses()) != 1 or len(up.uses()) != 1:
        return None  # a plain product of two linears, or one that somebody else reads
    whole = cone([activated], lambda value: value in rows)
    data = [leaf for leaf in whole.leaves if leaf.const_value is None]
    if len(data) != 1 or data[0] not in rows or not all(node.op_type in _POINTWISE for node in whole.nodes):
        return None
    gate, upper = rows[data[0]], rows[up]
    if gate.site.input is not upper.site.input or gate.stop - gate.start != upper.stop - upper.start:
        return None
    constants = [leaf.const_value for leaf in whole.leaves if leaf.const_value is not None]
    if any(use.node not in whole.nodes for use in gate.value.uses()) or any(tensor.size != 1 for tensor in constants):
        return None
    activation = _name(_evaluated(model, activated, gate.value))
    if activation is None:
        known = ", ".join(get_args(Gate))
        return Refusal("a gate by another function", str(product.name), f"{' '.join(node.op_type for node in whole.nodes)}: expected one of {known}")
    return GateSite(gate, upper, activation, product.outputs[0])


def _evaluated(model: ir.Model, activated: ir.Value, gate: ir.Value) -> NDArray[np.float32]:
    runner = prepare(model, cone([activated], lambda value: value is gate), {gate: (ir.DataType.FLOAT, 1)}).open()
    return runner.run({str(gate.name): _PROBES})[0]


def _name(found: NDArray[np.float32]) -> Gate | None:
    for name in get_args(Gate):
        if (np.abs(found - activate(name, _PROBES)) / (1 + np.abs(_PROBES))).max() <= _NEAR:
            return name
    return None
