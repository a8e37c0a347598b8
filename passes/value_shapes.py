"""How long each value is, learned by running the whole graph at tiny probes, with zeros for weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement
from math import prod
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from ..models.interface import GraphInterface
from .extract import cone, constant_proto, constants_of, open_session, piece, run
from .probe import Dim, Letters, ObservationError, Probe, by_name, by_place, feed_of, first_line, input_shape, is_static, port_of
from .value_kinds import Kinds, extent, is_stood_for

# Sizes that no two products of up to three letters fit alike (tests/passes/test_observe.py counts).
PROBES = (Probe(2, 3, 5), Probe(3, 5, 2), Probe(5, 2, 11))

# Sizes that only other inputs have, three to a name: primes that no product of the above holds.
_PRIMES = (17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89)

_SEQUENCES = {"SplitToSequence", "SequenceConstruct", "SequenceEmpty", "SequenceInsert", "SequenceErase", "SequenceMap", "Optional"}


@dataclass(frozen=True)
class Shapes:
    """What the probes taught. `letters` are what formulas may use; `unbatched` says why B is none of them (empty: it is one).

    `named` is how the sizes of inputs are read (None: every one is fixed).
    """

    dims: dict[ir.Value, tuple[Dim, ...] | None]
    probes: tuple[Probe, ...]
    letters: tuple[str, ...]
    unbatched: str
    named: Letters


def learn_shapes(model: ir.Model, interface: GraphInterface, kinds: Kinds) -> Shapes:
    """Runs the part of the graph that is more than constants at every probe. Raises ObservationError where it does not run."""
    wanted = [value for node in model.graph for value in node.outputs if kinds.kind[value] != "constant" and value.name]
    whole = cone(wanted, lambda value: kinds.kind[value] == "constant" and is_stood_for(value))
    tensors = (value for node in whole.nodes if node.op_type not in _SEQUENCES for value in node.outputs)
    asked = [value for value in tensors if value.name and isinstance(value.type, ir.TensorType | None)]
    inputs = [value for value in model.graph.inputs if value not in kinds.kind or kinds.kind[value] != "constant"]
    constants = [value for value in whole.leaves if kinds.kind[value] == "constant"]
    zeros = {str(value.name): known for value in constants if is_stood_for(value) and (known := extent(value)) is not None}
    infos = [ir.serde.serialize_value(value) for value in inputs]
    infos += [onnx.helper.make_tensor_value_info(name, int(dtype), shape) for name, (dtype, shape) in zeros.items()]
    closing = [onnx.helper.make_node("Shape", [str(value.name)], [f"octavo:shape.{i}"]) for i, value in enumerate(asked)]
    proto = piece(model, whole.nodes, infos, closing)
    proto.graph.initializer.extend(constant_proto(*item) for item in constants_of(constants).items() if item[0] not in zeros)
    try:
        session = open_session(proto)
    except Exception as error:  # onnxruntime raises a dozen unrelated classes
        if is_static(interface):
            return _declared(kinds, f"onnxruntime can't open the graph: {first_line(error)}")
        raise ObservationError(f"onnxruntime can't open the graph: {first_line(error)}") from error
    try:
        probes, found, unbatched, named = _run_probes(session, interface, inputs, _zeros(zeros))
    except ObservationError as error:
        if is_static(interface):
            return _declared(kinds, error.message)
        raise
    cached = any(port.role == "past_key" for port in interface.inputs)
    letters = (*(() if unbatched else ("B",)), "S", *(("P", "T") if cached else ()), *_others(named)) if named is not None else ()
    shapes: dict[ir.Value, tuple[Dim, ...] | None] = {}
    for value, kind in kinds.kind.items():
        known = extent(value) if kind == "constant" else None
        shapes[value] = None if known is None else tuple(Dim(size) for size in known[1])
    for value in inputs:
        observed = [list(input_shape(port_of(interface, value), probe, named)) for probe in probes]
        shapes[value] = fit_dims(observed, probes, letters)
    for index, value in enumerate(asked):
        shapes[value] = None if value in kinds.loose else fit_dims([shape[index].tolist() for shape in found], probes, letters)
    return Shapes(shapes, probes, letters, unbatched, named)


def _declared(kinds: Kinds, why: str) -> Shapes:
    """Shapes of a graph that can't be run (a type or an input that onnxruntime lacks) and needn't: every size is written in it."""
    dims = {
        value: tuple(Dim(int(size)) for size in value.shape) if value.shape is not None and value.shape.is_static() else None for value in kinds.kind
    }
    return Shapes({**dims}, (Probe(1, 1, 0),), (), why, None)


def _run_probes(
    session: ort.InferenceSession, interface: GraphInterface, inputs: Sequence[ir.Value], constants: Mapping[str, ort.OrtValue],
) -> tuple[tuple[Probe, ...], list[list[NDArray[Any]]], str, Letters]:
    """Shapes at every probe: with several sequences if the graph can, else with one, and then why (a batch of 1 is often baked in).

    Sizes of inputs that are no decoder's go by their names, and by their places where the graph doesn't run so.
    """
    if is_static(interface):
        only = Probe(1, 1, 0)
        return (only,), [_run_probe(session, interface, inputs, constants, only, None)], "every size is fixed", None
    cached = any(port.role == "past_key" for port in interface.inputs)
    first: ObservationError | None = None
    readings: list[dict[str, str]] = []
    for named in (by_name(interface), by_place(interface)):
        if named not in readings:
            readings.append(named)
    for named in readings:
        others = _others(named)
        several = tuple(
            Probe(p.batch, p.length, p.past if cached else 0, others={name: _PRIMES[(3 * i + n) % len(_PRIMES)] for i, name in enumerate(others)})
            for n, p in enumerate(PROBES)
        )
        try:
            return several, [_run_probe(session, interface, inputs, constants, probe, named) for probe in several], "", named
        except ObservationError as error:
            failed = error
        try:
            single = tuple(replace(probe, batch=1) for probe in several)
            return single, [_run_probe(session, interface, inputs, constants, probe, named) for probe in single], failed.message, named
        except ObservationError as error:
            first = first or error
    assert first is not None
    raise first


def _others(named: Letters) -> tuple[str, ...]:
    """Sizes that only other inputs have."""
    return tuple(dict.fromkeys(letter for letter in (named or {}).values() if letter not in ("B", "S", "P", "T")))


def _run_probe(
    session: ort.InferenceSession,
    interface: GraphInterface,
    inputs: Sequence[ir.Value],
    constants: Mapping[str, ort.OrtValue],
    probe: Probe,
    named: Letters,
) -> list[NDArray[Any]]:
    feeds = {str(value.name): feed_of(port_of(interface, value), value, probe, named) for value in inputs}
    try:
        return run(session, {**constants, **feeds})
    except Exception as error:
        raise ObservationError(
            f"onnxruntime can't run the graph at {probe}: {first_line(error)}",
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


def fit_dims(observed: Sequence[Sequence[int]], probes: Sequence[Probe], letters: Sequence[str]) -> tuple[Dim, ...] | None:
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
