"""Logits only for the rows that are asked for: the hidden rows are gathered as early as nothing mixes tokens any more.

In a prefill of 2,048 tokens one row is sampled; the head, the last norm and the last layer's MLP then run for that row alone.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

import onnx_ir as ir

from .build import Builder
from .observe import Dim, Observation
from .outcome import Outcome, PassResult, Refusal

if TYPE_CHECKING:
    from .cache_interface import TokenFlatPlan

# Ops that give each row from the same row of their inputs, where the rows' axis is not the one they work along.
_ROWWISE = frozenset({
    "Abs", "Add", "BiasGelu", "Cast", "Clip", "Div", "Elu", "Erf", "Exp", "FastGelu", "Gelu", "HardSigmoid", "HardSwish", "Identity",
    "LeakyRelu", "Log", "MatMul", "Max", "Min", "Mish", "Mul", "Neg", "Pow", "QuickGelu", "Reciprocal", "Relu", "Sigmoid", "Softplus", "Sqrt",
    "Sub", "Swish", "Tanh", "ThresholdedRelu", "Where",
})
_ALONG_AN_AXIS = frozenset({
    "RMSNormalization", "SimplifiedLayerNormalization", "LayerNormalization", "ReduceMean", "ReduceSum", "ReduceMax", "Softmax", "Split", "Slice",
})
_TOKENS = Dim(1, ("S",))


@dataclass(frozen=True)
class RowsAt:
    """Where rows are gathered: `value`, whose dimension `axis` counts the tokens."""

    value: ir.Value
    axis: int


def find_rows(observation: Observation, logits: ir.Value, mixing: Collection[ir.Value]) -> RowsAt | Refusal:
    """The earliest value that all logits are computed from row by row. The walk ends at `mixing` values (the sites' outputs)."""
    order = {node: index for index, node in enumerate(observation.model.graph)}
    axis = _token_axis(observation, logits)
    if axis is None:
        return Refusal("the logits have no rows of tokens", str(logits.name), f"shape {observation.dims(logits)}")
    best, frontier = RowsAt(logits, axis), {logits}
    while True:
        latest = max(frontier, key=lambda value: order.get(value.producer(), -1))
        node = latest.producer()
        if node is None or latest in mixing or not _is_rowwise(observation, node):
            return best
        frontier -= set(node.outputs)
        frontier |= {value for value in node.inputs if value is not None and observation.kind(value) == "data"}
        if len(frontier) == 1 and frontier.isdisjoint(mixing):
            value = next(iter(frontier))
            found = _token_axis(observation, value)
            if found is not None and observation.kind(value) == "data" and value.dtype is not None and value.dtype.is_floating_point():
                best = RowsAt(value, found)


def _token_axis(observation: Observation, value: ir.Value) -> int | None:
    """The dimension that counts this step's tokens, if exactly one does and nothing else follows from lengths (but the batch)."""
    dims = observation.dims(value)
    if dims is None or [dim for dim in dims if set(dim.letters) - {"B"}] != [_TOKENS]:
        return None
    return dims.index(_TOKENS)


def _is_rowwise(observation: Observation, node: ir.Node) -> bool:
    data = [value for value in node.inputs if value is not None and observation.kind(value) == "data"]
    others = [value for value in node.inputs if value is not None and value not in data]
    if any(observation.kind(value) != "constant" for value in others):
        return False
    places = [(_token_axis(observation, value), observation.dims(value) or ()) for value in (*data, *node.outputs)]
    axes = {None if place is None else place - len(dims) for place, dims in places}
    axis = next(iter(axes))
    if len(axes) != 1 or axis is None:
        return False  # the tokens move, or are summed
    if node.op_type in _ROWWISE and node.domain in ("", "com.microsoft"):
        return node.op_type != "MatMul" or (axis == -2 and node.inputs[1] in others and len(observation.dims(node.inputs[1]) or ()) == 2)
    return node.domain in ("", "com.microsoft") and node.op_type in _ALONG_AN_AXIS and axis == -2 and _spares_rows(observation, node)


def _spares_rows(observation: Observation, node: ir.Node) -> bool:
    """Whether the op works along the last axis alone, rows being the one before (a Slice: takes all rows as they are)."""
    assert node.inputs[0] is not None
    rank = len(observation.dims(node.inputs[0]) or ())
    if node.op_type == "Slice":
        steps = node.inputs[4] if len(node.inputs) > 4 else None
        constant = None if steps is None else ir.convenience.get_const_tensor(steps)
        return steps is None or (constant is not None and bool((constant.numpy() == 1).all()))
    if node.op_type.startswith("Reduce"):
        given = node.inputs[1] if len(node.inputs) > 1 else None
        constant = None if given is None else ir.convenience.get_const_tensor(given)
        axes = node.attributes.get_ints("axes", ()) if constant is None else constant.numpy().reshape(-1).tolist()
        return [int(axis) % rank for axis in axes] == [rank - 1] and node.attributes.get_int("keepdims", 1) == 1
    default = 0 if node.op_type == "Split" else -1
    return node.attributes.get_int("axis", default) % rank == rank - 1


class LogitRows(ir.passes.InPlacePass):
    """Gathers `logit_rows` where the plan says, and makes the only output `logits` [R, V]."""

    def __init__(self, plan: TokenFlatPlan) -> None:
        super().__init__()
        self._plan = plan

    def call(self, model: ir.Model) -> PassResult:
        start, graph, plan = perf_counter(), model.graph, self._plan
        before, build = len(graph), Builder(graph)
        value, producer = plan.rows.value, plan.rows.value.producer()
        uses = list(value.uses())
        assert producer is not None
        with build.after(producer):
            gathered = build.op("Gather", [value, plan.inputs.logit_rows], {"axis": plan.rows.axis})[0]
        for use in uses:
            use.node.replace_input_with(use.idx, gathered)
        old = plan.body.logits
        if old.name == "logits":
            old.name = "logits.rows"
        logits = gathered if value is old else old
        last = logits.producer()
        assert last is not None
        with build.after(last):
            out = build.reshape(logits, [-1, plan.spec.vocab_size])
        out.name, out.type = "logits", ir.TensorType(ir.DataType.FLOAT)
        out.shape = ir.Shape(["R", plan.spec.vocab_size])
        graph.outputs.clear()
        graph.outputs.append(out)
        outcome = Outcome(
            "logit_rows", "gather", 1, 1, notes=(f"rows are gathered at {value.name}",), nodes_before=before, nodes_after=len(graph),
            seconds=perf_counter() - start,
        )
        return PassResult(model, True, outcome)

    def ensures(self, model: ir.Model) -> None:
        if [value.name for value in model.graph.outputs] != ["logits"] or not self._plan.inputs.logit_rows.uses():
            raise ir.passes.PostconditionError("the logits are not of the rows asked for")
