"""What a mask means, proved by evaluating it.

The graph's own mask is computed at probes chosen from the constants in its own cone: one sequence and two, with and without a past, lengths
around every such constant (a window of 4096 looks causal to a probe of 17), padding on the left and on the right. What it hides, and what
it adds to the scores that it doesn't hide, is compared with what each candidate predicts, and only agreement on every probe and every cell
is a proof. The rows of padding tokens are left out: nothing reads them, and exporters differ in what they make of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from ..extract import cone
from ..observe import ObservationError, Probe
from ..outcome import Refusal
from .laboratory import Array, Laboratory
from .mask_candidates import CANDIDATES, Candidate, Seen, find_slopes, meaning
from .mask_source import MaskError, MaskSource, Situation, bias, check_guards
from .site import Mask
from .sparse import sparse_situations

# Cells of one probe's mask, 4 bytes each in the graph's form: 8192 tokens without a past, seen by all of themselves.
_MOST_CELLS = (8192 + 1) ** 2
# Without a past all rows are probed: sixteen million cells, where a few rows over a past would do.
_LONGEST_WITHOUT_PAST = 4096


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
        seen = [self._see(source, situation) for situation in self._short()]
        for end in self._ends(source):
            seen.append(self._see_long(source, end, seen))
        slopes = find_slopes(seen, source.heads, anchored=source.sinks)
        found = self._explain(seen)
        if not isinstance(found, tuple):
            return Refusal("the mask is none that is known", where, found)
        candidate, mask = found
        return self._padding(source, where, candidate, replace(mask, slopes=slopes, positional=self._positional(source, seen)))

    def _see(self, source: MaskSource, situation: Situation) -> Seen:
        check_guards(source, self._lab, situation.probe)
        return Seen.of(situation, bias(source, self._lab, situation))

    def _explain(self, seen: list[Seen]) -> tuple[Candidate, Mask] | str:
        """The candidate that predicts everything seen, or where the one that came furthest went wrong."""
        tried = []
        for candidate in self._candidates:
            mask = candidate.fit(seen)
            if mask is None:
                continue
            wrong = next(((n, one) for n, one in enumerate(seen) if _differs(candidate, mask, one)), None)
            if wrong is None:
                return candidate, mask
            tried.append((wrong[0], candidate, mask, wrong[1]))
        return _difference(*max(tried, key=lambda attempt: attempt[0])[1:])

    def _short(self) -> list[Situation]:
        cached, batch = self._lab.observation.cached, 2 if self._lab.observation.batched else 1
        longest = self._max_context
        return [
            self._dense(Probe(batch, length, past))
            for past in ((0, 1, 7) if cached else (0,)) for length in (1, 2, 5, 19) if past + length <= longest or length == 1
        ]

    def _dense(self, probe: Probe) -> Situation:
        return Situation.dense(probe, self._lab.observation.keys(probe))

    def _ends(self, source: MaskSource) -> list[int]:
        """Lengths around every constant of the mask's cone, and the longest context: a threshold need not be written as a whole number."""
        ends = {end for c in self._constants(source) for end in (c - 1, c, c + 1)}
        ends.add(self._max_context if self._lab.observation.cached else min(self._max_context, _LONGEST_WITHOUT_PAST))
        return sorted(end for end in ends if 3 < end <= self._max_context)

    def _see_long(self, source: MaskSource, end: int, seen: list[Seen]) -> Seen:
        """The mask of sequences of `end` tokens: the last few of them over a past; without one, around the constants if that will do."""
        observation = self._lab.observation
        length = min(3, end) if observation.cached else end
        if length * end > 1 << 16:
            for situation in () if source.guards else sparse_situations(observation, source.roots(), end, sorted(self._constants(source))):
                try:
                    found = self._see(source, situation)
                    if isinstance(self._explain([*seen, found]), tuple):
                        return found
                except (MaskError, ObservationError, ValueError, IndexError):
                    continue
            if length * end > _MOST_CELLS:
                raise MaskError(f"constant {end} in its cone asks for a probe of {length} × {end} cells")
        return self._see(source, self._dense(Probe(1, length, end - length)))

    def _positional(self, source: MaskSource, seen: list[Seen]) -> bool:
        """Whether the mask is another one where positions don't count up by one."""
        observation = self._lab.observation
        port = observation.interface.input("position_ids")
        if port is None or not any(leaf.name == port.name for leaf in cone(list(source.roots()), observation.is_dims).leaves):
            return False
        counted = Probe(1, 6, 0)
        for positions in ([0, 1, 2, 0, 1, 2], [3, 4, 5, 6, 7, 8], [5, 3, 4, 0, 2, 1]):
            other = replace(counted, position_ids=np.array([positions]))
            first, second = (bias(source, self._lab, self._dense(probe)) for probe in (counted, other))
            if not np.array_equal(first, second, equal_nan=True):
                return True
        return False

    def _padding(self, source: MaskSource, where: str, candidate: Candidate, mask: Mask) -> Mask | Refusal:
        """Whether the graph's attention_mask hides keys, and hides nothing else than them."""
        if self._lab.observation.interface.input("attention_mask") is None:
            return mask
        hides: bool | None = None
        padded = []
        for probe in self._padded_probes():
            assert probe.attention_mask is not None
            one = self._see(source, self._dense(probe))
            rows = probe.attention_mask.astype(np.bool_)[:, None, probe.past:, None]
            base, real = candidate.predict(mask, one.at.queries, one.at.keys), np.ones((probe.batch, len(one.at.keys)), np.bool_)
            real[:, : probe.past + probe.length] = probe.attention_mask
            hidden = {True: base & real[:, None, None, :], False: base}
            agree = {padding: not np.any((one.visible ^ expected) & rows) for padding, expected in hidden.items()}
            if hides is None and (agree[True] or agree[False]):
                hides = agree[True]
            if hides is None or not agree[hides]:
                return Refusal("the mask treats padding in a way that is not known", where, f"mask: {candidate.name}, at {probe}")
            padded.append(replace(one, visible=one.visible & rows))
        if mask.slopes and not np.allclose(find_slopes(padded, source.heads, anchored=source.sinks), mask.slopes, rtol=1e-5):
            return Refusal("the slopes are others where there is padding", where, f"mask: {candidate.name}")
        return replace(mask, key_padding=bool(hides))

    def _padded_probes(self) -> Iterator[Probe]:
        batch = 2 if self._lab.observation.batched else 1
        for past in (0, 5) if self._lab.observation.cached else (0,):
            for left in (True, False):
                padding = np.ones((batch, past + 4), np.int64)
                padding[-1, slice(0, 2) if left else slice(-2, None)] = 0
                yield Probe(batch, 4, past, attention_mask=padding)

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
            source.heads, source.is_causal, source.cached_in_op, source.sinks, [self._prints.of(guard) for guard in source.guards],
            None if source.operand is None else self._prints.of(source.operand), None if source.chain is None else self._prints.chain(source.chain),
        )
        return hashlib.sha256(repr(spelled).encode()).hexdigest()


def _predicted(candidate: Candidate, mask: Mask, one: Seen) -> Array:
    return np.broadcast_to(candidate.predict(mask, one.at.queries, one.at.keys), one.visible.shape)


def _differs(candidate: Candidate, mask: Mask, one: Seen) -> bool:
    return not np.array_equal(_predicted(candidate, mask, one), one.visible)


def _difference(candidate: Candidate, mask: Mask, one: Seen) -> str:
    expected = _predicted(candidate, mask, one)
    b, h, query, key = (int(i) for i in np.argwhere(expected != one.visible)[0])
    words = {True: "visible", False: "hidden"}
    return (
        f"mask: nearest is {meaning(mask)}; at {one.at}, sequence {b}, head {h}, query {query}, key {key}: "
        f"expected {words[bool(expected[b, h, query, key])]}, found {words[bool(one.visible[b, h, query, key])]}"
    )
