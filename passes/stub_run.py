"""A run of the token-flat graph with its attention stubbed: beside the proof of locality the other witness that rows don't see each other.

Each PagedAttention becomes a pointwise function of the row's own q, k and v, spelled in standard operators. Then, at one shape, changing
one row's token or position must leave the bits of every other row's logits alone; and a row must not depend on how many there are, or which
are asked for, beyond what onnxruntime's kernels may round differently at another shape.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from ..custom_ops.contract import DOMAIN
from ..models.interface import GraphInterface
from .extract import LARGE, constant_info, constant_proto, constants_of, open_session, piece, run
from .outcome import Refusal

# Rows of the run, and of the shorter one it is compared with.
ROWS, _FEWER = 8, 5


@dataclass(frozen=True)
class _Stubbed:
    """The graph with its attention stubbed, opened. Weights of LARGE bytes are random: what sees what does not depend on them."""

    session: ort.InferenceSession
    weights: Mapping[str, ort.OrtValue]

    def logits(self, input_ids: NDArray[Any], position_ids: NDArray[Any], logit_rows: NDArray[Any] | None = None) -> NDArray[Any]:
        """[R, V]; all rows where none are named."""
        rows = np.arange(len(input_ids)) if logit_rows is None else logit_rows
        step = {"input_ids": input_ids[None], "position_ids": position_ids[None], "logit_rows": rows}
        feeds = {port.name: step[port.name] for port in self.session.get_inputs() if port.name not in self.weights}
        return run(self.session, {**self.weights, **feeds})[0]


def row_refusals(model: ir.Model, interface: GraphInterface) -> tuple[Refusal, ...]:
    """Where a row's logits follow from another row, in a run of the token-flat graph with attention stubbed; empty where none does."""
    logits = interface.output("logits")
    if logits is None or not any(node.domain == DOMAIN and node.op_type == "PagedAttention" for node in model.graph):
        return (Refusal("the graph is not a token-flat decoder", "outputs", "expected logits, and PagedAttention"),)
    try:
        return tuple(_row_breaches(model, _stub(model, logits.name)))
    except KeyError as error:
        return (Refusal("an input of a step is read outside attention", str(error), "expected ids, positions and logit_rows alone"),)
    except Exception as error:  # onnxruntime raises a dozen unrelated classes
        return (Refusal("the rewritten graph does not run", "stubbed run", str(error).strip().splitlines()[0][:400]),)


def _row_breaches(model: ir.Model, stubbed: _Stubbed) -> Iterator[Refusal]:
    draw = np.random.default_rng(7)
    positions = np.arange(ROWS)
    width = stubbed.logits(np.zeros(1, np.int64), np.zeros(1, np.int64)).shape[1]
    ids = draw.choice(width, ROWS, replace=width < ROWS).astype(np.int64)
    base = stubbed.logits(ids, positions)
    if not np.isfinite(base).all():
        yield Refusal("logits are not finite with random weights", "stubbed run")
        return
    for row in (0, ROWS // 2, ROWS - 1):
        others = np.arange(ROWS) != row
        token = np.where(others, ids, (ids + 1) % width)
        place = np.where(others, positions, positions + 3)
        for what, found in (("token", stubbed.logits(token, positions)), ("position", stubbed.logits(ids, place))):
            seen = np.flatnonzero(others & (found.view(np.uint32) != base.view(np.uint32)).any(axis=1))
            if seen.size:
                nearest = f"changed the {what} of row {row} of {ROWS}"
                yield Refusal("a row's logits follow from another row", f"rows {seen.tolist()}", nearest)
            if what == "token" and np.array_equal(found[row], base[row]):
                yield Refusal("a row's logits do not follow from its own token", f"row {row}")
    bound = _rounding(model, width) * float(np.abs(base).max())
    for what, found, want in (
        (f"{_FEWER} rows alone", stubbed.logits(ids[:_FEWER], positions[:_FEWER]), base[:_FEWER]),
        ("logit_rows reversed", stubbed.logits(ids, positions, np.arange(ROWS)[::-1].copy()), base[::-1]),
    ):
        worst = float(np.abs(found - want).max()) if found.shape == want.shape else np.inf
        if worst > bound:
            nearest = f"differs by {worst:.3g}, bound {bound:.3g}"
            yield Refusal("a row's logits follow from how many rows there are, or which", what, nearest)


def _rounding(model: ir.Model, width: int) -> float:
    """How far a row may move, as a part of the largest logit, where a kernel adds in another order: n sums of K terms, each off by K·2⁻²⁴.

    K is the longest side of any weight but the vocabulary.
    """
    sums = sum(node.op_type.startswith(("MatMul", "Gemm", "Reduce")) or "Norm" in node.op_type for node in model.graph)
    tensors = constants_of(model.graph.initializers.values()).values()
    longest = max((int(size) for tensor in tensors for size in tensor.shape if int(size) != width), default=1)
    return max(1, sums) * longest * 2.0**-24


def _stub(model: ir.Model, logits: str) -> _Stubbed:
    nodes: list[onnx.NodeProto] = []
    stubs: list[onnx.TensorProto] = []
    for node in model.graph:
        if node.domain == DOMAIN and node.op_type == "PagedAttention":
            made, constants = _pointwise(node)
            nodes += made
            stubs += constants
        else:
            nodes.append(ir.serde.serialize_node(node))
    read = {name for node in nodes for name in node.input}
    tensors = {name: tensor for name, tensor in constants_of(model.graph.initializers.values()).items() if name in read}
    weights = {name: tensor for name, tensor in tensors.items() if drawn(tensor)}
    inputs = [ir.serde.serialize_value(value) for value in model.graph.inputs if value.name in read]
    inputs += [constant_info(name, tensor) for name, tensor in weights.items()]
    closing = onnx.helper.make_node("Identity", [logits], ["octavo:logits"])
    proto = piece(model, (), inputs, [closing])
    proto.graph.ClearField("node")
    proto.graph.node.extend([*nodes, closing])
    proto.graph.initializer.extend([*stubs, *(constant_proto(name, tensor) for name, tensor in tensors.items() if name not in weights)])
    kept = [entry for entry in proto.opset_import if entry.domain != DOMAIN]
    proto.ClearField("opset_import")
    proto.opset_import.extend(kept)
    return _Stubbed(open_session(proto), random_weights(weights))


def _pointwise(node: ir.Node) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """In place of attention: v · tanh(Σq) + tanh(Σk) per head. A function of the row's own q, k and v, and of each of them."""
    heads, groups = node.attributes.get_int("num_heads"), node.attributes.get_int("kv_num_heads")
    query, key, value = (str(operand.name) for operand in node.inputs[:3] if operand is not None)
    output = str(node.outputs[0].name)
    at = f"{output}:stub."
    targets = {"q": [0, heads, -1], "kv": [0, groups, 1, -1], "repeat": [1, 1, heads // groups, 1], "flat": [0, -1], "last": [-1]}
    constants = [onnx.numpy_helper.from_array(np.array(target, np.int64), at + name) for name, target in targets.items()]
    steps = (
        ("Reshape", query, "q", "q3"), ("ReduceSum", "q3", "last", "qs"), ("Tanh", "qs", "qt"),
        ("Reshape", key, "kv", "k4"), ("ReduceSum", "k4", "last", "ks"), ("Expand", "ks", "repeat", "kr"), ("Reshape", "kr", "q", "k3"),
        ("Tanh", "k3", "kt"), ("Reshape", value, "kv", "v4"), ("Expand", "v4", "repeat", "vr"), ("Reshape", "vr", "q", "v3"),
        ("Mul", "v3", "qt", "vq"), ("Add", "vq", "kt", "all"), ("Reshape", "all", "flat", output),
    )
    outer = {query, key, value, output}
    nodes = []
    for op, *names in steps:
        *inputs, result = (name if name in outer else at + name for name in names)
        nodes.append(onnx.helper.make_node(op, inputs, [result]))
    return nodes, constants


def drawn(tensor: ir.TensorProtocol) -> bool:
    """Weights; large integer tables (int32, int64) hold indices and stay as they are."""
    return tensor.nbytes >= LARGE and (tensor.dtype.is_floating_point() or tensor.dtype.bitwidth <= 8) and tensor.dtype != ir.DataType.BOOL


def random_weights(tensors: Mapping[str, ir.TensorProtocol]) -> dict[str, ort.OrtValue]:
    """Random contents, as views of one buffer per element width: memory for the largest weight, not for all."""
    draw = np.random.default_rng(3)
    buffers: dict[ir.DataType, NDArray[Any]] = {}
    feeds = {}
    for dtype in {tensor.dtype for tensor in tensors.values()}:
        count = max(int(np.prod(tensor.shape)) for tensor in tensors.values() if tensor.dtype == dtype)
        if dtype.is_floating_point() and dtype.bitwidth >= 16:
            buffers[dtype] = (0.05 * draw.standard_normal(count + len(tensors), np.float32)).astype(dtype.numpy())
        else:
            buffers[dtype] = draw.integers(0, 256, count + len(tensors), np.uint8)
    for index, (name, tensor) in enumerate(tensors.items()):
        size = int(np.prod(tensor.shape))
        view = buffers[tensor.dtype][index : index + size].reshape([int(n) for n in tensor.shape])
        raw = view.view(f"u{view.dtype.itemsize}")
        feeds[name] = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(raw, int(tensor.dtype))
    return feeds
