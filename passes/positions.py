"""Which values of a graph are the tokens' positions, and whether what is computed from them follows from each token's position alone.

The rewritten graph has tokens of many sequences in one row and is given their positions. So a rotary table or a position embedding may stay
only if its row t is a function of position t: not of the other positions, of how many there are, of the past's length, or of a mask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from .extract import cone
from .observe import Observation, ObservationError, Probe
from .outcome import Refusal
from .token_axis import Sideways, for_one_sequence, token_dimension

# Positions that are always looked at; those around each constant of the cone come to them (a threshold is written down somewhere).
_POSITIONS = (0, 1, 2, 3, 7, 12)

# Elementwise kernels may round the last bits differently in a vector's tail than in its body; nothing else may differ.
_ULPS = 8


@dataclass(frozen=True)
class PositionSource:
    """A value that is P … P+S−1 on every probe: to be replaced by position_ids [1, T], cast to `dtype` and laid out in `rank` dimensions,
    the tokens along `axis` and 1 elsewhere.
    """

    value: ir.Value
    axis: int
    rank: int
    dtype: ir.DataType


def position_sources(observation: Observation, values: Sequence[ir.Value], *, max_context: int) -> dict[ir.Value, PositionSource] | Refusal:
    """What to replace by positions so that each row of `values` (structural) follows from its token's position, and from nothing else.

    Decided by evaluation: of single positions, and of the same positions in other company, lengths, pasts and masks. Positions below
    `max_context` around every constant in the cone are among them. Values that count no tokens have no rows, and are passed over.
    """
    try:
        values = [value for value in values if _token_place(observation, value) is not None]
        if not values:
            return {}
        thresholds = thresholds_in(observation, values, max_context)
        candidates = _positions_among(observation, values, thresholds)
        leaves = cone(values, lambda value: value in candidates or observation.is_dims(value)).leaves
        sources = {leaf: candidates[leaf] for leaf in leaves if leaf in candidates}
        return _first_disagreement(observation, values, tuple(sources.values()), thresholds) or sources
    except Sideways as found:
        return Refusal(found.reason, str(values[0].name), found.nearest)
    except ObservationError as error:
        return Refusal(f"positions can't be evaluated: {error.message}", str(values[0].name))


def situations(observation: Observation, thresholds: Sequence[int] = ()) -> tuple[Probe, ...]:
    """Lengths, also beyond `thresholds`, and masks with padding where the graph takes one: none of it may change what is called fixed."""
    shapes = ((3, 5), (5, 2), (1, 11), (7, 0)) if observation.cached else ((3, 0), (5, 0), (1, 0), (8, 0))
    beyond = [(3, c + shift) if observation.cached else (c + shift, 0) for c in thresholds for shift in (-4, -2, 1)]
    probes = [Probe(1, *shape) for shape in (*shapes, *beyond)]
    if observation.interface.input("attention_mask"):
        for length, past in shapes[:2]:
            mask = np.ones((1, past + length), np.int64)
            mask[0, : (past + length) // 2] = 0
            probes.append(Probe(1, length, past, attention_mask=mask))
    return tuple(probes)


def thresholds_in(observation: Observation, values: Sequence[ir.Value], max_context: int) -> tuple[int, ...]:
    """Whole numbers that are written in the cone, as far as positions can reach them."""
    found: set[int] = set()
    for leaf in cone(values, observation.is_dims).leaves:
        tensor = leaf.const_value
        if tensor is not None and int(np.prod(tensor.shape)) <= 64 and tensor.dtype != ir.DataType.STRING:
            numbers = np.asarray(tensor.numpy()).astype(np.float64).reshape(-1)
            found.update(int(n) for n in numbers if max(_POSITIONS) < n < max_context and n == int(n))
    return tuple(sorted(found))


def _positions_among(observation: Observation, values: Sequence[ir.Value], thresholds: tuple[int, ...]) -> dict[ir.Value, PositionSource]:
    """Integer values in the cones of `values` that are P + arange(S), also where a threshold is crossed. Where the graph takes position_ids
    and is given others, such a value must be those, or not follow from them.
    """
    whole = cone(values, observation.is_dims)
    possible: dict[ir.Value, int] = {}
    for value in dict.fromkeys((*values, *whole.leaves, *(output for node in whole.nodes for output in node.outputs))):
        place = _row(observation, value)
        if place is not None:
            possible[value] = place
    probes = [probe for probe in situations(observation, thresholds) if probe.attention_mask is None]
    if observation.interface.input("position_ids"):
        probes += [replace(probe, position_ids=np.array([[9, 4, 21, 16, 11, 5, 30, 2][: probe.length]])) for probe in probes[:2]]
    found: dict[ir.Value, PositionSource] = {}
    for number, probe in enumerate(probes):
        asked = list(found) if number else list(possible)
        expected = [np.arange(probe.past, probe.past + probe.length)]
        expected += [] if probe.position_ids is None else [probe.position_ids[0]]
        for value, array in zip(asked, observation.evaluate(asked, probe) if asked else ()):
            if array.dtype.kind not in "iu" or not any(np.array_equal(array.reshape(-1), positions) for positions in expected):
                found.pop(value, None)
            elif number == 0:
                found[value] = PositionSource(value, possible[value], array.ndim, ir.DataType.from_numpy(array.dtype))
    return found


def _row(observation: Observation, value: ir.Value) -> int | None:
    """The token dimension of a structural integer value of shape [1…, S, …1]; None for others."""
    if observation.kind(value) != "structural" or (value.dtype is not None and not value.dtype.is_integer()):
        return None
    try:
        place = _token_place(observation, value)
    except Sideways:
        return None
    return place if place is not None and all(dim.factor == 1 for dim in observation.dims(value) or ()) else None


def _token_place(observation: Observation, value: ir.Value) -> int | None:
    """The dimension of `value` that counts tokens. Sideways where a length goes into its shape in any other way."""
    dims = observation.dims(value)
    if dims is None:
        raise Sideways("its shape fits no formula in B, S, P and T", str(value.name))
    return token_dimension(for_one_sequence(dims))


def _first_disagreement(
    observation: Observation, values: Sequence[ir.Value], sources: tuple[PositionSource, ...], thresholds: tuple[int, ...],
) -> Refusal | None:
    """Rows of positions in company against the same positions alone."""
    chosen = sorted({*_POSITIONS, *(p for c in thresholds for p in (c - 1, c, c + 1))})
    past = 5 if observation.cached else 0
    alone = {p: _rows(observation, values, sources, Probe(1, 1, past), np.array([p])) for p in chosen}
    draw = np.random.default_rng(0)
    for probe in (*situations(observation, thresholds), Probe(1, len(chosen), past)):
        positions = draw.permutation(chosen)[: probe.length] if probe.length <= len(chosen) else draw.choice(chosen, probe.length)
        for index, (value, rows) in enumerate(zip(values, _rows(observation, values, sources, probe, positions))):
            for position, row in zip(positions.tolist(), rows):
                want = alone[position][index][0]
                if not _agree(want, row):
                    nearest = f"position {position} at {probe}"
                    return Refusal("its rows do not follow from the position alone", str(value.name), nearest)
    return None


def _rows(
    observation: Observation, values: Sequence[ir.Value], sources: tuple[PositionSource, ...], probe: Probe, positions: NDArray[Any],
) -> list[NDArray[Any]]:
    """`values` with the sources replaced by `positions`, tokens first."""
    given: Mapping[ir.Value, NDArray[Any]] = {source.value: laid(source, positions) for source in sources}
    arrays = observation.evaluate(values, probe, replace=given)
    rows = []
    for value, array in zip(values, arrays):
        place = _token_place(observation, value)
        if place is None or array.shape[place] != len(positions):
            raise Sideways("it has no row per token", f"shape {array.shape} for {len(positions)} tokens")
        rows.append(np.moveaxis(array, place, 0))
    return rows


def laid(source: PositionSource, positions: NDArray[Any]) -> NDArray[Any]:
    """`positions` [S] as `source` has them."""
    shape = [1] * source.rank
    shape[source.axis] = len(positions)
    return positions.astype(source.dtype.numpy()).reshape(shape)


def _agree(want: NDArray[Any], got: NDArray[Any]) -> bool:
    if want.dtype.kind != "f":
        return np.array_equal(want, got)
    bound = _ULPS * float(np.finfo(want.dtype).eps)
    return np.allclose(got.astype(np.float64), want.astype(np.float64), rtol=bound, atol=bound, equal_nan=True)
