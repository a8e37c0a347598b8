"""What a mask means, proved by evaluating it.

The graph's own mask is computed at probes chosen from the constants in its own cone: one sequence and two, with and without a past, lengths
around every such constant (a window of 4096 looks causal to a probe of 17), padding on the left and on the right. What it hides is compared
with what each candidate predicts, and only agreement on every probe and every cell is a proof. The rows of padding tokens are left out:
nothing reads them, and exporters differ in what they make of them.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from ..observe import ObservationError, Probe
from ..outcome import Refusal
from .chain import MOVES, Chain
from .laboratory import Array, Laboratory
from .site import Mask

# Scores at or below this are hidden. exp of it is 0 in float32 whatever the other scores are; the smallest in use is BERT's −10000.
HIDDEN = -9000.0

# Cells of one probe's mask, 4 bytes each in the graph's form: 8192 tokens without a past, seen by all of themselves.
_MOST_CELLS = (8192 + 1) ** 2


@dataclass(frozen=True)
class MaskSource:
    """Where a site's mask is computed: a `chain` from raw scores to the softmax, or an op's mask `operand` and its `is_causal`.

    `cached_in_op` says that the op itself puts the past before the keys, by which its causal triangle then shifts.
    """

    heads: int
    chain: Chain | None = None
    operand: ir.Value | None = None
    is_causal: bool = False
    cached_in_op: bool = False

    def roots(self) -> tuple[ir.Value, ...]:
        """The values whose cones decide the mask."""
        return self.chain.sides if self.chain is not None else () if self.operand is None else (self.operand,)


class MaskError(Exception):
    """The mask isn't a plain choice of visible keys: the reason, as found at one probe."""


def bias(source: MaskSource, lab: Laboratory, probe: Probe) -> Array:
    """What is added to the scores, [B|1, H|1, S, T]; −inf where an op hides by other means. Raises MaskError, ObservationError."""
    S, T = probe.length, probe.past + probe.length
    if source.chain is not None:
        return _cells(_chain_bias(source.chain, lab, probe), probe, source.heads)
    added = np.zeros((1, 1, S, T), np.float32)
    if source.operand is not None:
        mask = lab.observation.evaluate([source.operand], probe)[0]
        if mask.shape[-1] not in (1, T):
            raise MaskError(f"a mask of {mask.shape[-1]} keys for {T}")
        added = _cells(np.where(mask, np.float32(0), np.float32(-np.inf)) if mask.dtype == np.bool_ else mask, probe, source.heads)
    if source.is_causal:
        offset = probe.past if source.cached_in_op else 0
        added = np.where(np.tri(S, T, offset, dtype=np.bool_), added, np.float32(-np.inf))
    return added


def _chain_bias(chain: Chain, lab: Laboratory, probe: Probe) -> Array:
    shape = lab.shape(chain.leaves[0], probe)
    if shape is None:
        raise MaskError("the shape of the scores follows no formula")
    if not any(node.op_type in MOVES for node in chain.nodes):
        shape = (1,) * len(shape)  # nothing reads its sizes: the scores of a long probe need not be there
    sides = lab.observation.evaluate(list(chain.sides), probe) if chain.sides else []
    with np.errstate(all="ignore"):
        return chain.run([np.zeros(shape, np.float32)], dict(zip(chain.sides, sides)))


def _cells(added: Array, probe: Probe, heads: int) -> Array:
    lead, (S, T) = added.shape[:-2], (probe.length, probe.past + probe.length)
    count = int(np.prod(lead))
    if count == 1:
        outer = (1, 1)
    elif count == probe.batch and lead[0] == probe.batch:
        outer = (probe.batch, 1)
    elif count == probe.batch * heads:
        outer = (probe.batch, heads)
    elif count == heads:
        outer = (1, heads)
    else:
        raise MaskError(f"a mask of leading sizes {lead} for {probe.batch} sequences and {heads} heads")
    return np.broadcast_to(added.reshape(*outer, *added.shape[-2:]), (*outer, S, T))


def visible(source: MaskSource, lab: Laboratory, probe: Probe) -> Array:
    """Which keys each query sees, bool [B|1, H|1, S, T]. Raises MaskError where a visible score is changed."""
    added = bias(source, lab, probe)
    seen = added > HIDDEN
    changed = seen & (added != 0)
    if np.any(changed):
        cell = tuple(int(i) for i in np.argwhere(changed)[0])
        raise MaskError(f"{added[cell]} is added to the score of query {cell[2]} and key {cell[3]}, which is visible")
    return seen


class Candidate(ABC):
    """A meaning that a mask may have. `fit` reads its parameters off what was seen, `predict` says what it would hide."""

    name: str

    @abstractmethod
    def fit(self, seen: list[tuple[Probe, Array]]) -> Mask | None: ...

    @abstractmethod
    def predict(self, mask: Mask, probe: Probe) -> Array:
        """bool, broadcastable to [B, H, S, T]."""


class Causal(Candidate):
    """Query i over a past of P sees keys 0 … P + i."""

    name = "causal"

    def fit(self, seen: list[tuple[Probe, Array]]) -> Mask:
        return Mask("causal")

    def predict(self, mask: Mask, probe: Probe) -> Array:
        return np.tri(probe.length, probe.past + probe.length, probe.past, dtype=np.bool_)


class Window(Candidate):
    """Query i over a past of P sees the last w of the keys 0 … P + i; w is read off the longest row that hides a past key."""

    name = "window"

    def fit(self, seen: list[tuple[Probe, Array]]) -> Mask | None:
        for _, cells in seen:
            row = cells[0, 0, -1]
            if not row[0]:
                return Mask("window", window=max(1, int(row.sum())))
        return None

    def predict(self, mask: Mask, probe: Probe) -> Array:
        assert mask.window is not None
        full, causal = (probe.length, probe.past + probe.length), Causal().predict(mask, probe)
        return causal & ~np.tri(*full, probe.past - mask.window, dtype=np.bool_)


class Bidirectional(Candidate):
    """Every query sees every key."""

    name = "bidirectional"

    def fit(self, seen: list[tuple[Probe, Array]]) -> Mask:
        return Mask("bidirectional")

    def predict(self, mask: Mask, probe: Probe) -> Array:
        return np.ones((probe.length, probe.past + probe.length), np.bool_)


CANDIDATES: tuple[Candidate, ...] = (Causal(), Window(), Bidirectional())


class MaskProver:
    """Proves masks of one graph. Masks computed alike (layer after layer) are evaluated once."""

    def __init__(self, lab: Laboratory, max_context: int, candidates: tuple[Candidate, ...] = CANDIDATES) -> None:
        self._lab = lab
        self._max_context = max_context
        self._candidates = candidates
        self._prints = lab.fingerprints
        self._proved: dict[str, Mask | Refusal] = {}

    def prove(self, source: MaskSource, where: str) -> Mask | Refusal:
        """The mask's meaning, or the first probe that no candidate explains."""
        key = self._key(source)
        if key not in self._proved:
            try:
                self._proved[key] = self._prove(source, where)
            except (MaskError, ObservationError, ValueError, IndexError) as error:
                self._proved[key] = Refusal("the mask is none that is known", where, f"mask: {error}")
        found = self._proved[key]
        return replace(found, where=where) if isinstance(found, Refusal) else found

    def _prove(self, source: MaskSource, where: str) -> Mask | Refusal:
        for root in source.roots():
            if self._lab.graph.is_data(root):
                return Refusal("the mask depends on data", where, f"mask: expected a value of shapes and attention_mask, found {root.name}")
        seen = [(probe, visible(source, self._lab, probe)) for probe in self._probes(source)]
        tried = []
        for candidate in self._candidates:
            mask = candidate.fit(seen)
            if mask is None:
                continue
            wrong = next(((n, p, cells) for n, (p, cells) in enumerate(seen) if not np.array_equal(
                np.broadcast_to(candidate.predict(mask, p), cells.shape), cells)), None)
            if wrong is None:
                return self._padding(source, where, candidate, mask)
            tried.append((wrong[0], candidate, mask, wrong[1], wrong[2]))
        _, candidate, mask, probe, cells = max(tried, key=lambda attempt: attempt[0])
        return Refusal("the mask is none that is known", where, _difference(candidate, mask, probe, cells, np.ones(cells.shape[-2:], np.bool_)))

    def _padding(self, source: MaskSource, where: str, candidate: Candidate, mask: Mask) -> Mask | Refusal:
        """Whether the graph's attention_mask hides keys, and hides nothing else than them."""
        port = self._lab.observation.interface.input("attention_mask")
        if port is None:
            return mask
        hides: bool | None = None
        for probe in self._padded_probes():
            assert probe.attention_mask is not None
            cells = visible(source, self._lab, probe)
            real = probe.attention_mask.astype(np.bool_)
            base, rows = candidate.predict(mask, probe), real[:, None, probe.past:, None]
            hidden = {True: base & real[:, None, None, :], False: base}
            agree = {padding: not np.any((cells ^ expected) & rows) for padding, expected in hidden.items()}
            if hides is None and (agree[True] or agree[False]):
                hides = agree[True]
            if hides is None or not agree[hides]:
                return Refusal("the mask treats padding in a way that is not known", where, f"mask: {candidate.name}, at {probe}")
        return replace(mask, key_padding=bool(hides))

    def _padded_probes(self) -> Iterator[Probe]:
        batch = 2 if self._lab.observation.batched else 1
        for past in (0, 5) if self._lab.observation.cached else (0,):
            for left in (True, False):
                padding = np.ones((batch, past + 4), np.int64)
                padding[-1, slice(0, 2) if left else slice(-2, None)] = 0
                yield Probe(batch, 4, past, attention_mask=padding)

    def _probes(self, source: MaskSource) -> Iterator[Probe]:
        """Small ones first; then lengths around every constant of the mask's cone, and the longest context over a past."""
        cached, batch = self._lab.observation.cached, 2 if self._lab.observation.batched else 1
        for past in (0, 1, 7) if cached else (0,):
            for length in (1, 2, 5, 19):
                yield Probe(batch, length, past)
        ends = {end for c in self._constants(source) for end in (c - 1, c, c + 1)}
        if cached:
            ends.add(self._max_context)
        for end in sorted(end for end in ends if 3 < end <= self._max_context):
            length = min(3, end) if cached else end
            if length * end > _MOST_CELLS:
                raise MaskError(f"constant {end} in its cone asks for a probe of {length} × {end} cells")
            yield Probe(1, length, end - length)

    def _constants(self, source: MaskSource) -> set[int]:
        """Whole numbers in the mask's cone, as values and as sizes of constants, up to max_context."""
        found: set[int] = set()
        for value in self._prints.constants(source.roots()):
            tensor = value.const_value
            assert tensor is not None
            found.update(int(size) for size in tensor.shape if isinstance(size, int))
            if tensor.size <= 16 and tensor.dtype != ir.DataType.STRING:
                array = np.asarray(tensor.numpy(), np.float64).reshape(-1)
                whole = array[np.isfinite(array) & (np.abs(array) <= self._max_context)]
                found.update(int(abs(x)) for x in whole if x == int(x))
        return found

    def _key(self, source: MaskSource) -> str:
        spelled = (
            source.heads, source.is_causal, source.cached_in_op, None if source.operand is None else self._prints.of(source.operand),
            None if source.chain is None else self._prints.chain(source.chain),
        )
        return hashlib.sha256(repr(spelled).encode()).hexdigest()


def _difference(candidate: Candidate, mask: Mask, probe: Probe, cells: Array, rows: Array) -> str:
    expected = np.broadcast_to(candidate.predict(mask, probe), cells.shape)
    b, h, query, key = (int(i) for i in np.argwhere(expected != cells)[0])
    words = {True: "visible", False: "hidden"}
    meaning = f"{candidate.name} {mask.window}" if mask.window else candidate.name
    return (
        f"mask: nearest is {meaning}; at {probe}, sequence {b}, head {h}, query {query}, key {key}: "
        f"expected {words[bool(expected[b, h, query, key])]}, found {words[bool(cells[b, h, query, key])]}"
    )
