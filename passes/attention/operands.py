"""Where a site's query, key and value come from: back through scales, repeated heads, the cache and transposes to this step's tokens.

Every step is proved by running it on index numbers: element [b, h, t, d] of what the product reads must be element [b, h // (H // G), t, d]
of the value we take instead, for t over the cached tokens and this step's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ..observe import Probe
from ..outcome import Refusal
from .chain import MOVES, SCALES, Chain
from .laboratory import BHSD, BSH, Array, Laboratory, Layout, fits_layout, laid_out
from .rotary import Rotation, find_rotation

Canon = Callable[[Array, Probe], Array]
"""Turns what the product reads into [B, H, T, D] (T = S for a query)."""


@dataclass(frozen=True)
class Operand:
    """A site's query, key or value: `value` of `layout` with `heads` heads, times `factor`, after `past` if there is one, turned by `rotation`."""

    value: ir.Value
    layout: Layout
    heads: int
    factor: float
    past: ir.Value | None
    rotation: Rotation | None
    nodes: tuple[ir.Node, ...]
    turned: ir.Value
    turned_layout: Layout


@dataclass(frozen=True)
class _Place:
    value: ir.Value
    layout: Layout
    heads: int
    factor: float
    past: ir.Value | None
    nodes: tuple[ir.Node, ...]


def find_operand(
    lab: Laboratory, role: str, target: ir.Value, canon: Canon, num_heads: int, size: int, where: str, *, heads: int | None = None,
) -> Operand | Refusal:
    """The operand `target` of a product, `canon` saying how the product reads it. `size` is D (E for a value); `heads` (None: any) says
    how many it must have, where it could be taken before or after they are repeated.
    """
    found = _furthest(lab, target, SCALES, canon, num_heads, size, heads=heads)
    if found is None:
        spelled = target.producer().op_type if target.producer() is not None else "a graph input"
        return Refusal(
            f"the {role} can't be traced to this step's tokens", where,
            f"operands: expected a movement of [B, heads, S, {size}] (after a past, heads repeated h // (H // G)), found {target.name} from {spelled}",
        )
    rotation = None if role == "value" else find_rotation(lab, found.value, found.layout, found.heads, size)
    origin = found
    if rotation is not None:
        source = rotation.chain.leaves[0]

        def from_rotation(array: Array, probe: Probe) -> Array:
            return rotation.read_in(array, probe)

        origin = _furthest(lab, source, MOVES, from_rotation, found.heads, size, past=False, heads=found.heads) or _Place(
            source, rotation.layout_in, found.heads, 1.0, None, ()
        )
    turning = () if rotation is None else rotation.chain.nodes
    return Operand(
        origin.value, origin.layout, found.heads, found.factor, found.past, rotation,
        (*origin.nodes, *turning, *found.nodes) if rotation is not None else found.nodes, found.value, found.layout,
    )


def _furthest(
    lab: Laboratory, target: ir.Value, ops: Iterable[str], canon: Canon, num_heads: int, size: int, past: bool = True,
    heads: int | None = None,
) -> _Place | None:
    best: _Place | None = None
    for computed, chain in lab.graph.walk(target, frozenset(ops)):
        given = [leaf for leaf in chain.leaves if leaf not in computed]
        if len(computed) != 1 or len(given) > (1 if past else 0):
            continue
        places = {_place(lab, chain, computed[0], given[0] if given else None, canon, num_heads, size, probe) for probe in lab.probes}
        place = next(iter(places)) if len(places) == 1 else None
        if place is None or heads not in (None, place.heads):
            continue
        if all(_place(lab, chain, computed[0], given[0] if given else None, canon, num_heads, size, probe) == place for probe in _full(lab)):
            best = place
    return best


def _place(
    lab: Laboratory, chain: Chain, leaf: ir.Value, past: ir.Value | None, canon: Canon, num_heads: int, size: int, probe: Probe,
) -> _Place | None:
    """How `leaf` (and `past`) reach the product at this probe, if that is a layout we know."""
    shape = lab.shape(leaf, probe)
    past_shape = () if past is None else lab.shape(past, probe)
    if shape is None or past_shape is None:
        return None
    count = int(np.prod(shape))
    heads, rest = divmod(count, probe.batch * probe.length * size)
    if rest or heads == 0 or num_heads % heads or (past is not None and past_shape != (probe.batch, heads, lab.observation.capacity or probe.past, size)):
        return None
    sizes = {leaf: shape, **({} if past is None else {past: past_shape})}
    # Two runs: ones tell the factor, indices (exact in float64 far beyond any probe) tell where each element comes from.
    factors = lab.run(chain, [np.ones(sizes[v]) for v in chain.leaves], probe)
    offsets = {leaf: 0, **({} if past is None else {past: count})}
    moved = lab.run(chain, [offsets[v] + np.arange(np.prod(sizes[v]), dtype=np.float64).reshape(sizes[v]) for v in chain.leaves], probe)
    if factors is None or moved is None or factors.size == 0:
        return None
    factor = float(factors.flat[0])
    if factor == 0 or not np.all(factors == factor):
        return None
    try:
        indices = np.rint(canon(moved / factor, probe))
    except ValueError:
        return None
    numbers = np.arange(count)
    layouts: tuple[Layout, ...] = (BSH, BHSD)
    for layout in layouts:
        step = numbers.reshape(probe.batch, probe.length, heads, size).transpose(0, 2, 1, 3) if layout == BSH else numbers.reshape(
            probe.batch, heads, probe.length, size)
        cached = None if past is None else count + np.arange(np.prod(past_shape)).reshape(past_shape)
        expected = np.repeat(_after(cached, step, probe), num_heads // heads, axis=1)
        if fits_layout(shape, layout, probe, heads, size) and indices.shape == expected.shape and np.array_equal(indices, expected):
            return _Place(leaf, layout, heads, factor, past, chain.nodes)
    return None


def _after(cached: Array | None, step: Array, probe: Probe) -> Array:
    """This step's keys or values [B, G, S, D] after the cached ones; those of a cache with more places stay behind."""
    return step if cached is None else np.concatenate([cached[:, :, : probe.past], step, cached[:, :, probe.past + probe.length :]], axis=2)


def grown_cache(lab: Laboratory, operand: Operand, size: int, outputs: Iterable[ir.Value]) -> ir.Value | None:
    """The graph output that is past and this step's (rotated) keys or values, one after the other, [B, G, P+S, size], or in their places."""
    assert operand.past is not None
    for output in outputs:
        if not lab.graph.is_data(output):
            continue
        for computed, chain in lab.graph.walk(output, MOVES):
            if computed == (operand.turned,) and set(chain.leaves) == {operand.turned, operand.past} and all(
                _is_grown(lab, chain, operand, size, probe) for probe in (*lab.probes, *_full(lab))
            ):
                return output
    return None


def _full(lab: Laboratory) -> list[Probe]:
    """Every place of a cache that has a fixed number of them: an index may wrap, stop or shift where no short probe comes to."""
    return [] if lab.observation.capacity is None else [Probe(1, lab.observation.capacity, 0)]


def _is_grown(lab: Laboratory, chain: Chain, operand: Operand, size: int, probe: Probe) -> bool:
    batch, heads = probe.batch, operand.heads
    places = lab.observation.capacity or probe.past
    past = np.arange(batch * heads * places * size).reshape(batch, heads, places, size)
    step = past.size + np.arange(batch * heads * probe.length * size).reshape(batch, heads, probe.length, size)
    shape = lab.shape(operand.turned, probe)
    assert shape is not None
    leaves = {operand.past: past, operand.turned: laid_out(step, operand.turned_layout, shape)}
    grown = lab.run(chain, [leaves[v] for v in chain.leaves], probe)
    return grown is not None and np.array_equal(grown, _after(past, step, probe))
