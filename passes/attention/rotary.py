"""Rotary embeddings: recognised by what they do to unit vectors, and read into tables by position.

A rotation turns pairs of a head's first r elements by an angle that depends on the position: pairs (i, i + r/2), or (2i, 2i+1) if interleaved.
Whether the graph writes it as one op, as x·cos + rotate_half(x)·sin or over split halves does not matter: the chain is run on vectors that
have a one in the first of each pair, which answer with the cosine there and the sine in the second, exactly as the graph computes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from ..observe import Observation, ObservationError, Probe
from ..outcome import Refusal
from .chain import LINEAR, Chain, rotate
from .laboratory import BHSD, BSH, Array, Laboratory, Layout, heads_first, laid_out

# No context is longer: larger numbers in a cone are no lengths.
_LONGEST = 1 << 21

# One unit in the last place of a float32 near 1: onnxruntime's vectorized sine and its scalar tail differ by that much.
_ULP = 1.2e-7


@dataclass(frozen=True)
class Rotation:
    """`chain` turns its one leaf ([B, heads, S, head_size] in `layout_in`) into its target (`layout_out`)."""

    chain: Chain
    layout_in: Layout
    layout_out: Layout
    heads: int
    head_size: int
    width: int
    interleaved: bool

    def read_in(self, array: Array, probe: Probe) -> Array:
        """The leaf's array as [B, heads, S, head_size]."""
        return heads_first(array, self.layout_in, probe.batch, self.heads, self.head_size)


def find_rotation(lab: Laboratory, rotated: ir.Value, layout: Layout, heads: int, size: int) -> Rotation | None:
    """The rotation that ends in `rotated`, from the nearest value that it turns; None where there is none."""
    for computed, chain in lab.graph.walk(rotated, LINEAR):
        if len(computed) != 1 or chain.leaves != computed or not chain.nodes:
            continue
        layouts: tuple[Layout, ...] = (BSH, BHSD)
        for layout_in in layouts:
            found = _recognise(lab, chain, layout_in, layout, heads, size)
            if found is not None:
                return found
    return None


def _recognise(lab: Laboratory, chain: Chain, layout_in: Layout, layout_out: Layout, heads: int, size: int) -> Rotation | None:
    probe = lab.probes[0]
    first = _respond(lab, chain, layout_in, layout_out, heads, size, probe, np.arange(size) == 0)
    if first is None:
        return None
    reached = np.flatnonzero(np.any(first != 0, axis=(0, 1, 2)))
    if len(reached) != 2 or reached[0] != 0:
        return None
    partner = int(reached[1])
    forms = [(2 * partner, False)]
    if partner == 1:
        even = _respond(lab, chain, layout_in, layout_out, heads, size, probe, np.arange(size) % 2 == 0)
        assert even is not None
        forms.insert(0, (int(np.flatnonzero(np.any(even[..., 1::2] != 0, axis=(0, 1, 2)))[-1]) * 2 + 2, True))
    for width, interleaved in forms:
        rotation = Rotation(chain, layout_in, layout_out, heads, size, width, interleaved)
        if width <= size and all(_turns(lab, rotation, probe) for probe in lab.probes):
            return rotation
    return None


def _respond(
    lab: Laboratory, chain: Chain, layout_in: str, layout_out: str, heads: int, size: int, probe: Probe, head: Array,
) -> Array | None:
    """What the chain makes of `head` (one head's vector, or an array [B, heads, S, D]) in every place."""
    shape = lab.shape(chain.leaves[0], probe)
    full = (probe.batch, heads, probe.length, size)
    if shape is None or int(np.prod(shape)) != int(np.prod(full)):
        return None
    out = lab.run(chain, [laid_out(np.broadcast_to(head, full).astype(np.float32), layout_in, shape)], probe)
    return None if out is None or out.size != int(np.prod(full)) else heads_first(out, layout_out, probe.batch, heads, size)


def _pairs(width: int, interleaved: bool) -> tuple[slice, slice]:
    return (slice(0, width, 2), slice(1, width, 2)) if interleaved else (slice(0, width // 2), slice(width // 2, width))


def _angles(lab: Laboratory, rotation: Rotation, probe: Probe) -> tuple[Array, Array] | None:
    """cos and sin [B, S, r/2] at a probe, as the graph has them for the first head."""
    first, second = _pairs(rotation.width, rotation.interleaved)
    head = np.zeros(rotation.head_size, np.float32)
    head[first] = 1
    out = _respond(lab, rotation.chain, rotation.layout_in, rotation.layout_out, rotation.heads, rotation.head_size, probe, head)
    return None if out is None else (out[:, 0, :, first], out[:, 0, :, second])


def _turns(lab: Laboratory, rotation: Rotation, probe: Probe) -> bool:
    """Whether the chain turns random vectors as its angles say, every head alike and nothing else touched."""
    angles = _angles(lab, rotation, probe)
    vectors = np.random.default_rng(0).standard_normal((probe.batch, rotation.heads, probe.length, rotation.head_size)).astype(np.float32)
    out = _respond(lab, rotation.chain, rotation.layout_in, rotation.layout_out, rotation.heads, rotation.head_size, probe, vectors)
    if angles is None or out is None:
        return False
    cos, sin = (angle[:, None] for angle in angles)
    expected = rotate(vectors, cos, sin, rotation.interleaved)
    return bool(np.max(np.abs(out - expected)) <= 1e-5 * max(1.0, float(np.max(np.abs(expected)))))


@dataclass(frozen=True)
class RotaryTables:
    """cos and sin [max_context, r/2] float32 by position, the graph's own values. `frozen` says what is left out (empty: nothing): the graph
    turns sequences that are longer than these by other angles.
    """

    cos: Array
    sin: Array
    frozen: str = ""


def read_tables(lab: Laboratory, rotation: Rotation, max_context: int, where: str) -> RotaryTables | Refusal:
    """The tables up to `max_context`; refused where they are not a function of position alone in every sequence of up to so many tokens.

    All positions are read in one probe from 0; a few tokens over a long and a short past, lengths around each whole number in the angles'
    cone and, where the graph takes them, positions out of order must then give the rows of that table. A refusal tells a shorter context in
    which they do.
    """
    thresholds = _thresholds(lab, rotation)
    found = _read(lab, rotation, max_context, where, thresholds)
    if not isinstance(found, Refusal):
        return replace(found, frozen=_frozen(lab, rotation, found, thresholds))
    for shorter in sorted({c + shift for c in thresholds for shift in (-1, 0, 1) if 8 <= c + shift < max_context}, reverse=True):
        if not isinstance(_read(lab, rotation, shorter, where, thresholds), Refusal):
            return replace(found, nearest=f"{found.nearest}; max_context={shorter} would do, with the angles of sequences of up to {shorter} tokens")
    return found


def _thresholds(lab: Laboratory, rotation: Rotation) -> tuple[int, ...]:
    """Whole numbers in the cone of the angles: where a length makes a difference, it is written down somewhere."""
    numbers: set[int] = set()
    for value in lab.fingerprints.constants(rotation.chain.sides):
        tensor = value.const_value
        if tensor is not None and tensor.size <= 16 and tensor.dtype != ir.DataType.STRING:
            array = np.asarray(tensor.numpy(), np.float64).reshape(-1)
            numbers.update(int(x) for x in array if 1 < x < _LONGEST and x == int(x))
    return tuple(sorted(numbers))


def _read(lab: Laboratory, rotation: Rotation, max_context: int, where: str, thresholds: Sequence[int]) -> RotaryTables | Refusal:
    try:
        whole = _angles(lab, rotation, Probe(1, max_context, 0))
        if whole is None:
            return Refusal("the rotary tables can't be evaluated", where, f"rotary: expected angles for {max_context} positions")
        cos, sin = (np.ascontiguousarray(angle[0], dtype=np.float32) for angle in whole)
        tables = RotaryTables(cos, sin)
        for probe in _other_probes(lab.observation, max_context, thresholds):
            if not _follows(lab, rotation, tables, probe):
                return Refusal(
                    "the rotary angles depend on more than the position", where,
                    f"rotary: at {probe} expected the angles of one sequence of {max_context} tokens, found others",
                )
    except ObservationError as error:
        return Refusal("the rotary tables can't be evaluated", where, str(error))
    return tables


def _follows(lab: Laboratory, rotation: Rotation, tables: RotaryTables, probe: Probe) -> bool:
    """Whether the angles at a probe are the tables' rows, as far as those go."""
    angles = _angles(lab, rotation, probe)
    at = np.tile(np.arange(probe.past, probe.past + probe.length), (probe.batch, 1)) if probe.position_ids is None else probe.position_ids
    known = at < len(tables.cos)
    tolerance = _ULP * max(1.0, float(np.max(np.abs(tables.cos))))
    return angles is not None and all(
        float(np.max(np.abs(angle[known] - table[at[known]]))) <= tolerance for angle, table in zip(angles, (tables.cos, tables.sin))
    )


def _frozen(lab: Laboratory, rotation: Rotation, tables: RotaryTables, thresholds: Sequence[int]) -> str:
    """What a sequence that is longer than the tables does to the first positions' angles, where the graph can be asked."""
    count, observation = len(tables.cos), lab.observation
    for c in (c for c in thresholds if c >= count - 1):
        longer = Probe(1, c + 2, 0)
        if observation.interface.input("position_ids") is not None:
            longer = Probe(1, 4, 0, position_ids=np.array([[0, 1, count - 1, c + 1]]))
        elif c > 1 << 14:
            continue
        try:
            if not _follows(lab, rotation, tables, longer):
                return f"angles of sequences of up to {count} tokens; the graph turns tokens of longer ones (over {c}) by others"
        except ObservationError:
            continue
    return ""


def _other_probes(observation: Observation, max_context: int, thresholds: Sequence[int]) -> list[Probe]:
    several = 2 if observation.batched else 1
    short = min(5, max_context)
    near = sorted({c + shift for c in thresholds for shift in (-1, 0, 1) if short < c + shift < max_context})
    probes = [Probe(several, short, 0), Probe(1, 1, 0), Probe(1, min(2, max_context), 0), Probe(1, max(1, max_context // 2), 0)]
    if observation.cached and max_context > 16:
        probes += [Probe(1, 2, max_context - 2), Probe(several, 3, 7), Probe(1, 1, max_context // 2)]
        probes += [Probe(1, 2, end - 2) for end in near]
    else:
        probes += [Probe(1, end, 0) for end in near]
    if observation.interface.input("position_ids") is not None and max_context >= 8:
        order = np.array([[3, 0, min(7, max_context - 1), max_context - 1, 1]])
        probes.append(Probe(1, 5, 0, position_ids=order))
    return probes


def context_bound(observation: Observation) -> tuple[int, str] | None:
    """The smallest number of positions in the graph's own tables (learned positions, rotary caches, masks baked in), and the table's name."""
    bounds: list[tuple[int, str]] = []
    if observation.capacity is not None:
        bounds.append((observation.capacity, "its cache"))
    for node in observation.model.graph:
        if node.op_type == "Gather" and len(node.inputs) == 2:
            found = _rows(observation, node, node.inputs[0], node.inputs[1])
        elif node.op_type == "RotaryEmbedding" and len(node.inputs) > 3:
            table, index = (1, 3) if node.domain == "" else (2, 1)
            found = _rows(observation, node, node.inputs[table], node.inputs[index])
        elif node.op_type == "Slice":
            found = _square(observation, node.inputs[0])
        else:
            continue
        if found is not None:
            bounds.append(found)
    return min(bounds, default=None)


def _rows(observation: Observation, node: ir.Node, table: ir.Value | None, index: ir.Value | None) -> tuple[int, str] | None:
    """The rows of a constant table that is read by something structural."""
    if table is None or index is None or observation.kind(table) != "constant" or observation.kind(index) != "structural":
        return None
    if not _counts(observation, index):
        return None
    dims = observation.dims(table)
    if dims is None or len(dims) != 2 or dims[0].letters or node.attributes.get_int("axis", 0) != 0:
        return None
    return dims[0].factor, str(table.name)


def _counts(observation: Observation, index: ir.Value) -> bool:
    """Whether an index grows by one with each token more: of types, or of distances in buckets, a table has no row for each."""
    dims = observation.dims(index)
    if dims is None or sum(bool(set(dim.letters) - {"B"}) for dim in dims) != 1:
        return False
    try:
        short, long = (int(observation.evaluate([index], Probe(1, length, 0))[0].max()) for length in (3, 8))
    except (ObservationError, ValueError):
        return True
    return long - short == 5


def _square(observation: Observation, data: ir.Value | None) -> tuple[int, str] | None:
    """The side of a constant mask [..., n, n] that is cut to the run's length."""
    dims = None if data is None or observation.kind(data) != "constant" else observation.dims(data)
    if dims is None or len(dims) < 2 or dims[-1] != dims[-2] or dims[-1].factor < 2 or any(dim.factor != 1 for dim in dims[:-2]):
        return None
    assert data is not None
    return dims[-1].factor, str(data.name)
