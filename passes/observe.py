"""What a graph's values are, found by running it: constant, structural (follows from shapes and masks alone) or data; and how long each is.

    constant     weights, and what is computed from them alone
    structural   follows from shapes, attention_mask, position_ids and constants: masks, positions, rotary tables, reshape targets
    data         follows from what the tokens are, or from what is cached

Shapes are learned by running the whole graph at a few tiny probes with zeros for weights (no weight is read, and zeros cost no
memory), then written as formulas in B, S, P and T = P + S. A value whose shape follows from data or from a weight's content has none.
Structural values can be evaluated at any probe: their cone runs alone, and each `Shape` of an activation in it is answered by formula.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from math import prod
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from ..errors import OctavoError
from ..models.interface import GraphInterface, GraphPort
from .extract import LARGE, ConeRunner, cone, constant_proto, constants_of, open_session, piece, prepare, reads, run

Kind = Literal["constant", "structural", "data"]
LETTERS = ("B", "S", "P", "T")


class ObservationError(OctavoError):
    """The graph can't be run at a probe, or a value can't be evaluated. `probe` is the first that failed, None where it is about none."""

    def __init__(self, message: str, *, probe: Probe | None = None, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.probe = probe


@dataclass(frozen=True, eq=False)
class Probe:
    """One concrete situation: `batch` sequences, `length` new tokens each, over `past` cached ones.

    attention_mask [B, P+S] (None: ones) and position_ids [B, S] (None: P … P+S−1 in each row) are cast to the graph's own types.
    """

    batch: int
    length: int
    past: int
    attention_mask: NDArray[Any] | None = None
    position_ids: NDArray[Any] | None = None

    def letter(self, letter: str) -> int:
        return {"B": self.batch, "S": self.length, "P": self.past, "T": self.past + self.length}[letter]

    def __str__(self) -> str:
        given = [name for name in ("attention_mask", "position_ids") if getattr(self, name) is not None]
        return f"batch {self.batch}, {self.length} tokens over {self.past}" + "".join(f", own {name}" for name in given)


@dataclass(frozen=True)
class Dim:
    """A dimension as `factor` × a product of letters out of B, S, P and T = P + S, sorted; a constant one has no letters."""

    factor: int
    letters: tuple[str, ...] = ()

    def at(self, probe: Probe) -> int:
        return self.factor * prod(probe.letter(letter) for letter in self.letters)

    def __str__(self) -> str:
        return "·".join((*((str(self.factor),) if self.factor != 1 or not self.letters else ()), *self.letters))


# Sizes that no two products of up to three letters fit alike (tests/passes/test_observe.py counts).
_PROBES = (Probe(2, 3, 5), Probe(3, 5, 2), Probe(5, 2, 11))

# Which inputs decide an op's output *shape* by their content (none, where a standard op is not listed).
_SHAPE_OPERANDS: dict[str, tuple[int, ...]] = {
    "Reshape": (1,), "Expand": (1,), "Tile": (1,), "ConstantOfShape": (0,), "Range": (0, 1, 2), "Slice": (1, 2, 3, 4), "Squeeze": (1,),
    "Unsqueeze": (1,), "Split": (1,), "SplitToSequence": (1,), "SequenceAt": (1,), "Pad": (1, 3), "TopK": (1,), "OneHot": (1,),
    "Resize": (1, 2, 3), "Upsample": (1,), "CenterCropPad": (1,), "MaxUnpool": (2,), "NonZero": (0,), "Compress": (1,), "Unique": (0,),
    "NonMaxSuppression": (0, 1, 2, 3, 4), "StringSplit": (0,), "If": (0,), "Loop": (0, 1), "AffineGrid": (1,), "Col2Im": (1, 2),
    "BlackmanWindow": (0,), "HannWindow": (0,), "HammingWindow": (0,), "DFT": (1, 2), "STFT": (1, 3), "MelWeightMatrix": (0, 1),
    **dict.fromkeys(
        ("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp",
         "ReduceSumSquare"), (1,)),
}
_CONTRIB_SHAPE_OPERANDS: dict[str, tuple[int, ...]] = {"GroupQueryAttention": (5, 6)}
_RANDOM = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}
_SEQUENCES = {"SplitToSequence", "SequenceConstruct", "SequenceEmpty", "SequenceInsert", "SequenceErase", "SequenceMap", "Optional"}
_STRUCTURAL_ROLES = ("attention_mask", "position_ids")


def observe(model: ir.Model, interface: GraphInterface) -> Observation:
    """Runs `model` at tiny probes and says what its values are. `model` is not changed; nothing is written anywhere.

    Raises ObservationError where an input has no known role or an unknown size, or where the graph can't be run (sizes baked in).
    """
    kinds = _Kinds(model.graph, interface)
    shapes = _learn_shapes(model, interface, kinds)
    return Observation(model, interface, kinds, shapes)


class _Kinds:
    """Kind of every value of the main graph, and whether its shape follows from content (`loose`) that a probe of zeros can't stand for."""

    def __init__(self, graph: ir.Graph, interface: GraphInterface) -> None:
        roles = {port.name: port.role for port in interface.inputs}
        self.kind: dict[ir.Value, Kind] = {}
        self.loose: set[ir.Value] = set()
        self._unread: set[ir.Value] = set()  # computed from a constant that the probes replace by zeros
        for value in graph.initializers.values():
            self.kind[value] = "constant"
            if _is_large(value):
                self._unread.add(value)
        for value in graph.inputs:
            if value not in self.kind:
                self.kind[value] = "structural" if roles.get(str(value.name)) in _STRUCTURAL_ROLES else "data"
        for node in graph:
            self._node(node)

    def _node(self, node: ir.Node) -> None:
        operands = list(reads(node))
        kinds = {self.kind[value] for value in operands}
        kind: Kind = "data" if "data" in kinds or node.op_type in _RANDOM else "structural" if "structural" in kinds else "constant"
        loose = any(value in self.loose for value in operands)
        unread = any(value in self._unread for value in operands)
        if node.op_type in ("Shape", "Size") and node.domain in ("", "ai.onnx"):
            # the dims themselves are what is asked for: loose ones are as bad as data, others follow from the probe alone
            kind, unread = ("data" if loose else "constant" if kind == "constant" else "structural"), False
            loose = False
        elif any(self.kind[value] == "data" or value in self._unread for value in _shape_operands(node)):
            loose = True
        for output in node.outputs:
            self.kind[output] = kind
            if loose:
                self.loose.add(output)
            if unread or (kind == "constant" and _is_large(output)):
                self._unread.add(output)


def _shape_operands(node: ir.Node) -> Iterable[ir.Value]:
    if node.domain in ("", "ai.onnx"):
        places: Sequence[int] = _SHAPE_OPERANDS.get(node.op_type, ())
    elif node.domain == "com.microsoft":
        places = _CONTRIB_SHAPE_OPERANDS.get(node.op_type, ())
    else:
        return list(reads(node))  # nothing is known about it
    return [value for place in places if place < len(node.inputs) and (value := node.inputs[place]) is not None]


def _extent(value: ir.Value) -> tuple[ir.DataType, tuple[int, ...]] | None:
    """Type and shape of a constant, as far as they are known without computing it."""
    known = value.const_value if value.const_value is not None else value
    dtype, shape = known.dtype, known.shape
    if dtype is None or dtype == ir.DataType.STRING or shape is None or not all(isinstance(size, int) for size in shape):
        return None
    return dtype, tuple(int(size) for size in shape)


def _is_large(value: ir.Value) -> bool:
    """Whether zeros stand for a constant while shapes are learned: it is a weight, or takes as long to compute as one."""
    extent = _extent(value)
    return extent is not None and prod(extent[1]) * extent[0].itemsize >= LARGE


# ---- learning shapes

@dataclass(frozen=True)
class _Shapes:
    """What the probes taught. `letters` are what formulas may use; `unbatched` says why B is none of them (empty: it is one)."""

    dims: dict[ir.Value, tuple[Dim, ...] | None]
    probes: tuple[Probe, ...]
    letters: tuple[str, ...]
    unbatched: str


def _learn_shapes(model: ir.Model, interface: GraphInterface, kinds: _Kinds) -> _Shapes:
    wanted = [value for node in model.graph for value in node.outputs if kinds.kind[value] != "constant" and value.name]
    whole = cone(wanted, lambda value: kinds.kind[value] == "constant" and _is_large(value))
    tensors = (value for node in whole.nodes if node.op_type not in _SEQUENCES for value in node.outputs)
    asked = [value for value in tensors if value.name and isinstance(value.type, ir.TensorType | None)]
    inputs = [value for value in model.graph.inputs if value not in kinds.kind or kinds.kind[value] != "constant"]
    constants = [value for value in whole.leaves if kinds.kind[value] == "constant"]
    zeros = {str(value.name): extent for value in constants if _is_large(value) and (extent := _extent(value)) is not None}
    infos = [ir.serde.serialize_value(value) for value in inputs]
    infos += [onnx.helper.make_tensor_value_info(name, int(dtype), shape) for name, (dtype, shape) in zeros.items()]
    closing = [onnx.helper.make_node("Shape", [str(value.name)], [f"octavo:shape.{i}"]) for i, value in enumerate(asked)]
    proto = piece(model, whole.nodes, infos, closing)
    proto.graph.initializer.extend(constant_proto(*item) for item in constants_of(constants).items() if item[0] not in zeros)
    try:
        session = open_session(proto)
    except Exception as error:  # onnxruntime raises a dozen unrelated classes
        raise ObservationError(f"onnxruntime can't open the graph: {_first_line(error)}") from error
    probes, found, unbatched = _run_probes(session, interface, inputs, _zeros(zeros))
    cached = any(port.role == "past_key" for port in interface.inputs)
    letters = (*(() if unbatched else ("B",)), "S", *(("P", "T") if cached else ()))
    shapes: dict[ir.Value, tuple[Dim, ...] | None] = {}
    for value, kind in kinds.kind.items():
        extent = _extent(value) if kind == "constant" else None
        shapes[value] = None if extent is None else tuple(Dim(size) for size in extent[1])
    for value in inputs:
        observed = [list(_input_shape(_port(interface, value), probe)) for probe in probes]
        shapes[value] = _fit(observed, probes, letters)
    for index, value in enumerate(asked):
        shapes[value] = None if value in kinds.loose else _fit([shape[index].tolist() for shape in found], probes, letters)
    return _Shapes(shapes, probes, letters, unbatched)


def _run_probes(
    session: ort.InferenceSession, interface: GraphInterface, inputs: Sequence[ir.Value], constants: Mapping[str, ort.OrtValue],
) -> tuple[tuple[Probe, ...], list[list[NDArray[Any]]], str]:
    """Shapes at every probe: with several sequences if the graph can, else with one, and then why (a batch of 1 is often baked in)."""
    cached = any(port.role == "past_key" for port in interface.inputs)
    several = tuple(probe if cached else Probe(probe.batch, probe.length, 0) for probe in _PROBES)
    try:
        return several, [_run_probe(session, interface, inputs, constants, probe) for probe in several], ""
    except ObservationError as error:
        single = tuple(Probe(1, probe.length, probe.past) for probe in several)
        return single, [_run_probe(session, interface, inputs, constants, probe) for probe in single], error.message


def _run_probe(
    session: ort.InferenceSession,
    interface: GraphInterface,
    inputs: Sequence[ir.Value],
    constants: Mapping[str, ort.OrtValue],
    probe: Probe,
) -> list[NDArray[Any]]:
    feeds = {str(value.name): _feed(_port(interface, value), value, probe) for value in inputs}
    try:
        return run(session, {**constants, **feeds})
    except Exception as error:
        raise ObservationError(
            f"onnxruntime can't run the graph at {probe}: {_first_line(error)}",
            probe=probe, hint="export it with dynamic sizes for batch, sequence and past",
        ) from error


def _zeros(extents: Mapping[str, tuple[ir.DataType, tuple[int, ...]]]) -> dict[str, ort.OrtValue]:
    """Zeros in each type and shape: views of one buffer that is never written, so the system backs all of it by a single page."""
    widths = {name: max(1, int(dtype.itemsize)) for name, (dtype, _) in extents.items()}
    buffer = np.zeros(max((prod(shape) * widths[name] for name, (_, shape) in extents.items()), default=0), np.uint8)
    feeds = {}
    for name, (dtype, shape) in extents.items():
        view = buffer[: prod(shape) * widths[name]].view(f"u{widths[name]}").reshape(shape)
        feeds[name] = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(view, int(dtype))
    return feeds


def _port(interface: GraphInterface, value: ir.Value) -> GraphPort:
    port = next((port for port in interface.inputs if port.name == value.name), None)
    if port is None or port.role not in ("input_ids", "attention_mask", "position_ids", "past_key", "past_value"):
        raise ObservationError(f"graph input {value.name} has no role that a decoder's input can have")
    return port


def _input_shape(port: GraphPort, probe: Probe) -> tuple[int, ...]:
    if port.role == "attention_mask":
        return (probe.batch, probe.past + probe.length)
    shape = port.shape
    if port.role == "input_ids":
        return (probe.batch, probe.length)
    if port.role == "position_ids":  # some graphs have one row of positions for all sequences
        return (1 if shape and shape[0] == 1 else probe.batch, probe.length)
    if shape is None or len(shape) != 4 or not isinstance(shape[1], int) or not isinstance(shape[3], int):
        raise ObservationError(f"graph input {port.name}, a cache, has no fixed number of heads and head size: {shape}")
    return (probe.batch, shape[1], probe.past, shape[3])


def _feed(port: GraphPort, value: ir.Value, probe: Probe) -> NDArray[Any]:
    dtype = value.dtype
    assert dtype is not None, f"graph input {value.name} has no type"
    shape = _input_shape(port, probe)
    if port.role == "attention_mask":
        array = np.ones(shape) if probe.attention_mask is None else np.asarray(probe.attention_mask)
    elif port.role == "position_ids":
        counted = np.tile(np.arange(probe.past, probe.past + probe.length), (shape[0], 1))
        array = counted if probe.position_ids is None else np.asarray(probe.position_ids)
    else:
        array = np.zeros(shape)
    assert array.shape == shape, f"{port.role} of the probe has shape {array.shape}, not {shape}"
    return array.astype(dtype.numpy())


def _fit(observed: Sequence[Sequence[int]], probes: Sequence[Probe], letters: Sequence[str]) -> tuple[Dim, ...] | None:
    if len({len(shape) for shape in observed}) != 1:
        return None
    dims = [_fit_dim(sizes, probes, letters) for sizes in zip(*observed)]
    return tuple(dim for dim in dims if dim is not None) if None not in dims else None


def _fit_dim(sizes: Sequence[int], probes: Sequence[Probe], letters: Sequence[str]) -> Dim | None:
    for count in range(4):
        for product in combinations_with_replacement(letters, count):
            unit = Dim(1, product)
            factor, rest = divmod(sizes[0], unit.at(probes[0]))
            if rest == 0 and all(factor * unit.at(probe) == size for size, probe in zip(sizes, probes)):
                return Dim(factor, product)
    return None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:400] if str(error).strip() else type(error).__name__


# ---- what was seen

class Observation:
    """What is known of a graph's values. It goes stale when the graph changes: values made later are unknown, asking is a KeyError."""

    def __init__(self, model: ir.Model, interface: GraphInterface, kinds: _Kinds, shapes: _Shapes) -> None:
        self.model = model
        self.interface = interface
        self._kinds = kinds
        self._shapes = shapes
        self._opened: dict[tuple[Any, ...], ConeRunner] = {}

    def kind(self, value: ir.Value) -> Kind:
        """Constant, structural or data."""
        return self._kinds.kind[value]

    def dims(self, value: ir.Value) -> tuple[Dim, ...] | None:
        """The value's shape as formulas; None where no formula fits, or where its shape follows from data."""
        if value not in self._shapes.dims and value in self._kinds.kind:
            return None  # a sequence, or an output that is not there
        return self._shapes.dims[value]

    def contents(self, value: ir.Value) -> tuple[Dim, ...] | None:
        """What the elements of a structural or constant integer `value` of rank 0 or 1 are, as formulas (a factor may be −1 or 0).

        None where no formula fits, or it has more than 16 elements. Masks are all ones: this tells what reshape targets and bounds mean.
        """
        dims = self.dims(value)
        if dims is None or len(dims) > 1 or any(dim.letters or dim.factor > 16 for dim in dims):
            return None
        found = [self.evaluate([value], probe)[0] for probe in self._shapes.probes]
        if found[0].dtype.kind not in "iu":
            return None
        return _fit([array.reshape(-1).tolist() for array in found], self._shapes.probes, self._shapes.letters)

    @property
    def cached(self) -> bool:
        """Whether the graph takes a cache: if not, `past` of a probe is 0."""
        return any(port.role == "past_key" for port in self.interface.inputs)

    @property
    def batched(self) -> bool:
        """Whether the graph ran with more than one sequence at once; if not, `batch` of a probe is 1 and `unbatched` says why."""
        return not self._shapes.unbatched

    @property
    def unbatched(self) -> str:
        """What onnxruntime said when the graph was run with several sequences; empty where that worked."""
        return self._shapes.unbatched

    def evaluate(
        self, values: Sequence[ir.Value], probe: Probe, *, replace: Mapping[ir.Value, NDArray[Any]] | None = None,
    ) -> list[NDArray[Any]]:
        """Structural or constant `values` at `probe`. `replace` gives contents to values in their cones, in place of what computes them.

        Raises ObservationError where a value follows from data, or where onnxruntime can't compute it.
        """
        assert self.cached or probe.past == 0, "the graph takes no cache"
        assert probe.attention_mask is None or self.interface.input("attention_mask"), "the graph takes no attention_mask"
        assert probe.position_ids is None or self.interface.input("position_ids"), "the graph takes no position_ids"
        replace = replace or {}
        key = (tuple(values), tuple((value, array.dtype.str, array.ndim) for value, array in replace.items()))
        if key not in self._opened:
            self._opened[key] = self._open(values, replace, probe)
        runner = self._opened[key]
        feeds = {str(leaf.name): replace[leaf] if leaf in replace else self._leaf(leaf, probe) for leaf in runner.leaves}
        try:
            return runner.run(feeds)
        except Exception as error:
            names = ", ".join(str(value.name) for value in values)
            raise ObservationError(f"onnxruntime can't compute {names} at {probe}: {_first_line(error)}", probe=probe) from error

    def _open(self, values: Sequence[ir.Value], replace: Mapping[ir.Value, NDArray[Any]], probe: Probe) -> ConeRunner:
        piece = cone(values, lambda value: value in replace or self.is_dims(value))
        types: dict[ir.Value, tuple[ir.DataType, int | None]] = {}
        for leaf in piece.leaves:
            if leaf in replace:
                types[leaf] = (ir.DataType.from_numpy(replace[leaf].dtype), replace[leaf].ndim)
            elif self.is_dims(leaf):
                types[leaf] = (ir.DataType.INT64, None)
            elif self.kind(leaf) == "data":
                raise ObservationError(f"{', '.join(str(v.name) for v in values)} follows from the content of {leaf.name}")
            elif self.kind(leaf) == "structural":
                assert leaf.dtype is not None
                types[leaf] = (leaf.dtype, 2)
        try:
            return prepare(self.model, piece, types).open()
        except Exception as error:
            names = ", ".join(str(value.name) for value in values)
            raise ObservationError(f"onnxruntime can't open the cone of {names}: {_first_line(error)}", probe=probe) from error

    def is_dims(self, value: ir.Value) -> bool:
        """Whether `value` is the Shape or Size of data: answered from the formulas, so that nothing behind it has to run."""
        node = value.producer()
        if node is None or node.op_type not in ("Shape", "Size") or node.domain not in ("", "ai.onnx"):
            return False
        operand = node.inputs[0]
        return operand is not None and self.kind(value) == "structural" and self.kind(operand) == "data"

    def _leaf(self, leaf: ir.Value, probe: Probe) -> NDArray[Any]:
        node = leaf.producer()
        if node is None:
            return _feed(_port(self.interface, leaf), leaf, probe)
        operand = node.inputs[0]
        assert operand is not None
        dims = self.dims(operand)
        if dims is None:
            raise ObservationError(f"the shape of {operand.name} fits no formula in B, S, P and T", probe=probe)
        sizes = np.array([dim.at(probe) for dim in dims], np.int64)
        if node.op_type == "Size":
            return np.array(sizes.prod(), np.int64)
        start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", None)
        return sizes[start:end]
