"""Finding the linears of a graph: products by a constant matrix, what norms, gates and adds to them, and the tables of embeddings.

Nothing is changed. A product that is nearly a linear, and isn't taken, is refused with its reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from ..normalize import is_standard
from ..outcome import Refusal
from .gates import find_gates
from .names import named
from .norms import find_norms, is_constant
from .shapes import Shape, infer_shapes
from .site import EmbeddingSite, GateSite, LinearSite, Norm, Residual


@dataclass(frozen=True)
class Linears:
    """What was found. `norms` by their outputs; `sums` of two values of one shape that a norm reads, by the sum; `residuals` by the product (a
    linear's output, or a gate's) that is added to something.
    """

    sites: tuple[LinearSite, ...]
    embeddings: tuple[EmbeddingSite, ...]
    gates: tuple[GateSite, ...]
    norms: Mapping[ir.Value, Norm]
    sums: Mapping[ir.Value, tuple[ir.Value, ir.Value]]
    residuals: Mapping[ir.Value, Residual]
    refusals: tuple[Refusal, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """All that a map of weights can name."""
        return (*(site.name for site in self.sites), *(site.name for site in self.embeddings if site.name == "embed"))

    def by_input(self) -> list[list[LinearSite]]:
        """Linears that read one value, in execution order of the first."""
        found: dict[ir.Value, list[LinearSite]] = {}
        for site in self.sites:
            found.setdefault(site.input, []).append(site)
        return list(found.values())


def find_linears(model: ir.Model, ids: str = "input_ids") -> Linears:
    """The linears of a normalized graph in execution order. `ids` is the input that embeddings are looked up by."""
    graph, shapes = model.graph, infer_shapes(model.graph)
    unnamed: list[LinearSite] = []
    refusals: list[Refusal] = []
    for node in graph:
        found = _linear(node, shapes)
        if isinstance(found, LinearSite):
            unnamed.append(found)
        elif found is not None:
            refusals.append(found)
    norms = find_norms(graph, shapes)
    gates, refused = find_gates(model, unnamed)
    sites = named(graph, unnamed, gates, norms)
    by_node = {site.node: site for site in sites}
    gates = [_with_names(gate, by_node) for gate in gates]
    products = [site.output for site in sites] + [gate.output for gate in gates]
    residuals = {value: residual for value in products if (residual := _residual(value, shapes)) is not None}
    embeddings = tuple(table for node in graph if (table := _embedding(node, sites, ids)) is not None)
    sums = {norm.source: parts for norm in norms.values() if (parts := _sum(norm.source, shapes)) is not None}
    return Linears(tuple(sites), embeddings, tuple(gates), norms, sums, residuals, (*refusals, *refused))


def _linear(node: ir.Node, shapes: Mapping[ir.Value, Shape]) -> LinearSite | Refusal | None:
    if is_standard(node, "MatMul", "Gemm"):
        return _dense(node, shapes)
    if node.domain != "com.microsoft":
        return None
    x, weight = (node.inputs[0], node.inputs[1]) if len(node.inputs) > 1 else (None, None)
    if node.op_type == "MatMulNBits" and x is not None and weight is not None and weight.const_value is not None:
        K, M = node.attributes.get_int("K"), node.attributes.get_int("N")
        bias = node.inputs[5] if len(node.inputs) > 5 else None
        if x.dtype not in (None, ir.DataType.FLOAT):
            return Refusal(f"computed in {x.dtype.name.lower()}", str(node.name))
        if bias is not None and not _is_bias(bias, M, shapes):
            return Refusal("a bias that is no constant vector", str(node.name), f"{bias.name}: {shapes.get(bias)}")
        return _with_bias(LinearSite("", node, x, weight, True, K, M, bias, node.outputs[0]), shapes)
    if node.op_type in ("FusedMatMul", "FusedGemm") and weight is not None and _matrix(weight)[0] is not None:
        return Refusal("a product that onnxruntime has fused", str(node.name), f"{node.op_type}: export without its optimizer")
    return None


def _matrix(value: ir.Value) -> tuple[ir.Value | None, bool]:
    """The initializer [*, *] that `value` is, and whether through a Transpose."""
    node, turned = value.producer(), False
    if node is not None and is_standard(node, "Transpose") and tuple(node.attributes.get_ints("perm", (1, 0))) == (1, 0) and node.inputs[0] is not None:
        value, turned = node.inputs[0], True
    tensor = value.const_value
    return (None if tensor is None or value.is_graph_input() or len(tensor.shape) != 2 else value), turned


def _dense(node: ir.Node, shapes: Mapping[ir.Value, Shape]) -> LinearSite | Refusal | None:
    x, matrix = node.inputs[0], node.inputs[1]
    assert x is not None and matrix is not None
    weight, turned = _matrix(matrix)
    if weight is None:
        constant = matrix.const_value
        if constant is not None and len(constant.shape) > 2:
            return Refusal("a weight for each of a batch", str(node.name), f"{matrix.name} is {constant.dtype.name}{list(constant.shape)}")
        if constant is None and is_constant(matrix) and not is_constant(x):
            return Refusal("its weight is computed in the graph", str(node.name), f"{matrix.name}: expected an initializer, or one transposed")
        left = _matrix(x)[0]
        return None if left is None or node.op_type != "MatMul" else Refusal("its weight is on the left", str(node.name), str(left.name))
    if x.const_value is not None:
        return None
    assert weight.const_value is not None
    if weight.const_value.dtype != ir.DataType.FLOAT:
        return Refusal(f"computed in {weight.const_value.dtype.name.lower()}", str(node.name))
    bias = None
    if node.op_type == "Gemm":
        factors = node.attributes.get_float("alpha", 1.0), node.attributes.get_float("beta", 1.0)
        if node.attributes.get_int("transA", 0) or factors != (1.0, 1.0):
            return Refusal("a Gemm with factors, or of a transposed input", str(node.name), f"alpha, beta = {factors}")
        turned ^= bool(node.attributes.get_int("transB", 0))
        bias = node.inputs[2] if len(node.inputs) > 2 else None
    sizes = [int(size) for size in weight.const_value.shape]
    M, K = sizes if turned else reversed(sizes)
    if bias is not None and not _is_bias(bias, M, shapes):
        return Refusal("a bias that is no constant vector", str(node.name), f"{bias.name}: {shapes.get(bias)}")
    return _with_bias(LinearSite("", node, x, weight, turned, K, M, bias, node.outputs[0]), shapes)


def _is_bias(value: ir.Value, M: int, shapes: Mapping[ir.Value, Shape]) -> bool:
    return value.const_value is not None and not value.is_graph_input() and shapes.get(value) == (M,)


def _with_bias(site: LinearSite, shapes: Mapping[ir.Value, Shape]) -> LinearSite:
    """`site` with the constant vector that is added to it, if it has no bias yet."""
    added = _only_add(site.output)
    if site.bias is not None or added is None:
        return site
    node, other = added
    if not _is_bias(other, site.M, shapes):
        return site
    return LinearSite(site.name, site.node, site.input, site.weight, site.transposed, site.K, site.M, other, node.outputs[0])


def _only_add(value: ir.Value) -> tuple[ir.Node, ir.Value] | None:
    """The Add that is all that reads `value`, and its other operand."""
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output() or not is_standard(uses[0].node, "Add"):
        return None
    other = uses[0].node.inputs[1 - uses[0].idx]
    return None if other is None else (uses[0].node, other)


def _residual(value: ir.Value, shapes: Mapping[ir.Value, Shape]) -> Residual | None:
    added, shape = _only_add(value), shapes.get(value)
    if added is None or shape is None or shapes.get(added[1]) != shape or added[1].const_value is not None:
        return None
    return Residual(added[1], added[0].outputs[0])


def _sum(value: ir.Value, shapes: Mapping[ir.Value, Shape]) -> tuple[ir.Value, ir.Value] | None:
    node = value.producer()
    if node is None or not is_standard(node, "Add"):
        return None
    a, b = node.inputs[0], node.inputs[1]
    if a is None or b is None or a.const_value is not None or b.const_value is not None or value.is_graph_output():
        return None
    return (a, b) if shapes.get(a) is not None and shapes.get(a) == shapes.get(b) else None


def _embedding(node: ir.Node, sites: Sequence[LinearSite], name: str) -> EmbeddingSite | None:
    table = node.inputs[0] if is_standard(node, "Gather") and node.attributes.get_int("axis", 0) == 0 else None
    ids = node.inputs[1] if table is not None else None
    tensor = None if table is None else table.const_value
    if table is None or tensor is None or ids is None or table.is_graph_input() or len(tensor.shape) != 2 or tensor.dtype != ir.DataType.FLOAT:
        return None
    if not ids.is_graph_input() or ids.name != name or ids.dtype != ir.DataType.INT64:
        return None  # by position, or of few rows
    site = EmbeddingSite("embed", node, table, int(tensor.shape[1]), int(tensor.shape[0]))
    shared = next((linear for linear in sites if _is_table(linear, site)), None)
    return site if shared is None else EmbeddingSite(shared.name, node, shared.weight, site.K, site.M)


def _is_table(linear: LinearSite, table: EmbeddingSite) -> bool:
    """Whether a linear's weight is the table: the same initializer, or (some exporters write a turned copy) the same numbers."""
    if linear.packed or (linear.K, linear.M) != (table.K, table.M):
        return False
    if linear.weight is table.weight:
        return linear.transposed
    assert linear.weight.const_value is not None and table.weight.const_value is not None
    numbers = linear.weight.const_value.numpy()
    return np.array_equal(numbers if linear.transposed else numbers.T, table.weight.const_value.numpy())


def _with_names(gate: GateSite, sites: Mapping[ir.Node, LinearSite]) -> GateSite:
    return replace(gate, gate=replace(gate.gate, site=sites[gate.gate.site.node]), up=replace(gate.up, site=sites[gate.up.site.node]))
