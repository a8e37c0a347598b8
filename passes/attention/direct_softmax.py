"""A softmax between two products as a DirectSite: softmax(softcap(scale · q·kᵀ) + bias) · v, the bias being whatever the graph adds.

Cross attention, relative position biases, windows without causality, scores with other data added to them: the mask needs no meaning here.
The walk goes from the softmax back to one product of data through ops that scale, cap, add or hide, each by values that may be anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from ..build import Builder
from ..observe import Observation
from ..outcome import Refusal
from .chain import attribute
from .direct import DirectSite, GivenMask, Operand, Size, Visibility, four_dimensions, same, scalar, sizes_of
from .direct_operand import traced_operands
from .laboratory import Laboratory
from .mask_source import HIDDEN

_PASSED = frozenset({"Identity", "Dropout", "Cast"})
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


@dataclass(frozen=True)
class _Step:
    """A node between product and softmax, and which of its inputs leads to the product."""

    node: ir.Node
    path: int


def read_direct_softmax(node: ir.Node, lab: Laboratory, name: str) -> DirectSite | Refusal | None:
    """The site, or how far the walk got; None where no product of data lies on either side."""
    observation = lab.observation
    scores = node.inputs[0]
    assert scores is not None
    steps = _back_to_product(observation, scores)
    product = _forward_to_product(observation, node.outputs[0])
    if steps is None and product is None:
        return None
    if steps is None:
        return Refusal("the softmax's scores come from no product of query and key", name, f"scores: nothing but a sum of others behind {scores.name}")
    if product is None:
        return Refusal("the softmax's result goes into no product with values, or elsewhere too", name, f"softmax: node {node.name}")
    first = steps[0].node
    query, key, value = first.inputs[0], first.inputs[1], product.inputs[1]
    assert query is not None and key is not None and value is not None
    shapes = [sizes_of(v, observation) for v in (query, key, value, scores)]
    if any(shape is None for shape in shapes) or len({len(shape) for shape in shapes if shape is not None}) != 1:
        return Refusal("the sizes of the products are not known, or not of one rank", name, f"products: {shapes}")
    q, k, v, s = (shape for shape in shapes if shape is not None)
    if attribute(node, "axis", -1) not in (-1, len(s) - 1) or len(s) not in (3, 4):
        return Refusal("the softmax is not over the last of three or four dimensions", name, f"softmax: axis {attribute(node, 'axis', -1)} of {s}")
    operands = _operands(query, key, value, q, k, v)
    if isinstance(operands, str):
        return Refusal("the products are not of query, key and value", name, f"products: {operands}, found {q}, {k}, {v}")
    if any(operand.dtype not in _FLOATS for operand in (query, key, value)):
        return Refusal("attention is not in float32 or float16", name, f"types: {query.dtype}, {key.dtype}, {value.dtype}")
    read = _read_steps(observation, steps[1:], (*q[:-1], k[-1]))
    if isinstance(read, str):
        return Refusal("what happens to the scores is not understood", name, f"scores: {read}")
    output, layout = _end(product.outputs[0], len(s))
    scale, traced_query, traced_key, traced_value = traced_operands(lab, read.scale, *operands)
    return DirectSite(name, traced_query, traced_key, traced_value, scale, read.softcap, read.mask, output, layout)


def _back_to_product(observation: Observation, scores: ir.Value) -> list[_Step] | None:
    """The steps from the product (first) to the softmax. Of several products in a sum the one behind the fewest steps counts."""
    frontier: list[tuple[ir.Value, list[_Step]]] = [(scores, [])]
    for value, steps in frontier:
        node = value.producer()
        if node is None or node.domain != "" or len(steps) > 12 or len(frontier) > 64:
            continue
        data = [i for i, operand in enumerate(node.inputs) if operand is not None and observation.kind(operand) == "data"]
        if node.op_type == "MatMul" and len(data) == 2:
            return [_Step(node, 0), *steps]
        if node.op_type in _PASSED | {"Div", "Tanh"}:
            data = [0]
        elif node.op_type not in ("Add", "Sub", "Mul", "Where"):
            continue
        frontier += [(operand, [_Step(node, i), *steps]) for i in data if (operand := node.inputs[i]) is not None and not (node.op_type == "Where" and i == 0)]
    return None


def _forward_to_product(observation: Observation, result: ir.Value) -> ir.Node | None:
    """The product with the values, where the result goes there alone; a guard against rows of NaN is passed."""
    value = result
    while True:
        users = list(value.uses())
        if value.is_graph_output() or not users:
            return None
        guard = {use.node.op_type: use.node for use in users}
        if len(users) == 2 and set(guard) == {"IsNaN", "Where"}:
            where, test = guard["Where"], guard["IsNaN"].outputs[0]
            if where.inputs[0] is not test or where.inputs[2] is not value or len(list(test.uses())) != 1:
                return None
            value = where.outputs[0]
            continue
        if len(users) != 1 or users[0].node.domain != "":
            return None
        node = users[0].node
        if node.op_type == "MatMul":
            other = node.inputs[1]
            return node if users[0].idx == 0 and other is not None and observation.kind(other) == "data" else None
        if node.op_type not in _PASSED or users[0].idx != 0:
            return None
        value = node.outputs[0]


def _operands(
    query: ir.Value, key: ir.Value, value: ir.Value, q: list[Size], k: list[Size], v: list[Size],
) -> tuple[Operand, Operand, Operand] | str:
    """[…, S, D], […, D, T], […, T, E] with the same leading sizes, heads among them if there are four."""
    if not same(q[0], k[0], v[0]) or not same(q[-1], k[-2]) or not same(k[-1], v[-2]):
        return "sizes that belong together differ or are not known"
    size, value_size = q[-1], v[-1]
    if not isinstance(size, int) or not isinstance(value_size, int):
        return "head sizes are not fixed"
    if len(q) == 3:
        return Operand(query, "NSD", 1, size), Operand(key, "NDS", 1, size), Operand(value, "NSD", 1, value_size)
    heads, kv_heads = q[1], k[1]
    if not isinstance(heads, int) or not isinstance(kv_heads, int) or v[1] != kv_heads or kv_heads not in (1, heads):
        return "heads are not fixed, or not the same"
    return Operand(query, "BHSD", heads, size), Operand(key, "BHDS", kv_heads, size), Operand(value, "BHSD", kv_heads, value_size)


@dataclass(frozen=True)
class _Read:
    scale: float
    softcap: float
    mask: GivenMask


@dataclass(frozen=True)
class _Term:
    """`value` (of `rank` dimensions) times `factor` is added; or, where `hidden` is given, it is a choice: which side keeps the score."""

    value: ir.Value
    rank: int
    wide: bool
    factor: float = 1.0
    kept: bool | None = None


def _read_steps(observation: Observation, steps: list[_Step], scores: tuple[Size, ...]) -> _Read | str:
    scale, softcap, inner = 1.0, 0.0, 1.0
    terms: list[_Term] = []
    for step in steps:
        node, op = step.node, step.node.op_type
        others = [operand for i, operand in enumerate(node.inputs) if i != step.path and operand is not None]
        if op in _PASSED:
            if op == "Cast" and node.outputs[0].dtype not in _FLOATS:
                return f"a Cast to {node.outputs[0].dtype}"
        elif op == "Tanh":
            if terms or softcap:
                return "a Tanh behind a mask"
            softcap, inner, scale = 1.0, scale, 1.0
        elif op in ("Mul", "Div"):
            factor = _number(observation, others[0])
            if factor is None or factor == 0:
                return f"{op} by {others[0].name}, which is no single number"
            factor = 1 / factor if op == "Div" else factor
            scale *= factor
            if any(term.kept is not None for term in terms):
                return f"{op} behind a choice"
            terms = [_Term(t.value, t.rank, t.wide, t.factor * factor) for t in terms]
        else:
            term = _term(observation, step, scores)
            if isinstance(term, str):
                return term
            terms.append(term)
    if softcap:  # c·tanh(a·x): scores are a·c·x, capped at c
        scale, softcap = inner * scale, scale
        if softcap <= 0:
            return f"a softcap of {softcap}"
    return _Read(scale, softcap, SumMask(tuple(terms), len(scores)))


def _term(observation: Observation, step: _Step, scores: tuple[Size, ...]) -> _Term | str:
    node = step.node
    if node.op_type == "Where":
        hides = node.inputs[3 - step.path]
        number = None if hides is None else _number(observation, hides)
        if number is None or number > HIDDEN:
            return f"Where puts {None if hides is None else hides.name} in the scores' place, which does not hide"
        value = node.inputs[0]
        kept = step.path == 1
    elif node.op_type in ("Add", "Sub") and (node.op_type == "Add" or step.path == 0):
        value, kept = node.inputs[1 - step.path], None
    else:
        return f"{node.op_type} from another value"
    assert value is not None
    sizes = sizes_of(value, observation)
    if sizes is None or len(sizes) > len(scores):
        return f"the sizes of {value.name} are not known, or more than those of the scores"
    padded = [*[1] * (len(scores) - len(sizes)), *sizes]
    if any(size != 1 and not same(size, whole) for size, whole in zip(padded, scores)):
        return f"{value.name} of {sizes} is not spread over scores of {list(scores)}"
    return _Term(value, len(sizes), padded[-1] == scores[-1], -1.0 if node.op_type == "Sub" else 1.0, kept)


def _number(observation: Observation, value: ir.Value) -> float | None:
    """The one number that a constant, or what follows from fixed sizes, consists of."""
    sizes = sizes_of(value, observation)
    if observation.kind(value) == "data" or sizes is None or any(size != 1 for size in sizes):
        return None
    found = {float(observation.evaluate([value], probe)[0].reshape(-1)[0]) for probe in observation.probes}
    return found.pop() if len(found) == 1 else None


def _end(product: ir.Value, rank: int) -> tuple[ir.Value, Literal["BHSD", "BSHD", "NSD"]]:
    """Where the result goes on with tokens first, if a transpose does that alone."""
    if rank == 3:
        return product, "NSD"
    users = list(product.uses())
    if len(users) == 1 and not product.is_graph_output():
        user = users[0].node
        if (user.domain, user.op_type) == ("", "Transpose") and tuple(user.attributes.get_ints("perm", None) or ()) == (0, 2, 1, 3):
            return user.outputs[0], "BSHD"
    return product, "BHSD"


@dataclass(frozen=True)
class SumMask(GivenMask):
    """The sum of what is added, with what hides hidden. `rank` is that of the scores: with three the heads are folded into the batch."""

    terms: tuple[_Term, ...]
    rank: int

    @property
    def text(self) -> str:  # type: ignore[override]
        return "bias as given" if self.terms else "bidirectional"

    def write(self, build: Builder, S: ir.Value, T: ir.Value) -> Visibility:
        total: ir.Value | None = None
        for term in self.terms:
            value = self._spread(build, term)
            if term.kept is not None:
                total = self._hide(build, value, total, term.kept)
                continue
            value = build.cast(value, ir.DataType.FLOAT)
            if term.factor != 1:
                value = build.op("Mul", [value, scalar(build, term.factor, np.float32)])[0]
            if total is not None and total.dtype == ir.DataType.BOOL:
                total = self._float(build, total)
            total = value if total is None else build.op("Add", [total, value])[0]
        if total is not None and not any(term.wide for term in self.terms):  # one value for all keys: the op wants one for each
            shape = build.op("Concat", [build.integers([1, 1, 1]), T], {"axis": 0})[0]
            total = build.op("Expand", [total, shape])[0]
        return Visibility(total)

    def _spread(self, build: Builder, term: _Term) -> ir.Value:
        """A term in four dimensions, which the op spreads over the rest."""
        if self.rank == 4:
            return four_dimensions(build, term.value, term.rank)
        value = term.value if term.rank == 3 else build.op("Unsqueeze", [term.value, build.integers(list(range(3 - term.rank)))])[0]
        return build.op("Unsqueeze", [value, build.integers([1])])[0]

    def _hide(self, build: Builder, choice: ir.Value, total: ir.Value | None, kept: bool) -> ir.Value:
        if total is None:
            seen = choice if kept else build.op("Not", [choice])[0]
            return seen
        if total.dtype == ir.DataType.BOOL:
            total = self._float(build, total)
        hidden = scalar(build, -np.inf, np.float32)
        out = build.op("Where", [choice, total, hidden] if kept else [choice, hidden, total])[0]
        out.type = ir.TensorType(ir.DataType.FLOAT)
        return out

    def _float(self, build: Builder, seen: ir.Value) -> ir.Value:
        out = build.op("Where", [seen, scalar(build, 0, np.float32), scalar(build, -np.inf, np.float32)])[0]
        out.type = ir.TensorType(ir.DataType.FLOAT)
        return out
