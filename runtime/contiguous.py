"""Runs decoders in their exporter's own form, one sequence a step: with past and present where the graph has them, else from all tokens.

A sequence's past is immutable: each step makes new arrays. So a fork shares them, and a failed step has nothing to undo.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort

from ..errors import SavedSequenceError, UnsupportedError
from ..models.interface import GraphInterface, GraphPort
from .executor import Logits, step_error
from .plan import Limits, SequenceState, Slice, StepPlan
from .saved import CacheState

_LAYOUT = "contiguous"


@dataclass(frozen=True)
class PastTokens:
    """Past values in the order of the graph's inputs; each (1, G, length, D)."""

    values: tuple[ort.OrtValue, ...]


class ContiguousExecutor:
    """An Executor for one sequence a step, of a graph that `why_not_a_decoder` says nothing against.

    `max_context` None: the graph's own bound is not known.
    """

    def __init__(self, session: ort.InferenceSession, interface: GraphInterface, *, max_context: int | None) -> None:
        self._session = session
        ids, logits = interface.input("input_ids"), interface.output("logits")
        assert ids is not None and logits is not None, why_not_a_decoder(interface)
        self._ids, self._logits = ids, logits
        self._positions = interface.input("position_ids")
        self._mask = interface.input("attention_mask")
        self._past = tuple(port for port in interface.inputs if port.role in ("past_key", "past_value"))
        self._present = tuple(_present_of(interface, port) for port in self._past)
        # Half of a decoder that was exported in two parts takes a prompt like an answer.
        self._one_token = bool(self._past) and any(port is not None and _tokens_fixed(port) == 1 for port in (ids, self._positions))
        self.limits = Limits(1, None)
        self.max_context = max_context
        self.max_cached: int | None = None
        self._num_open = 0
        self.vocab_size = self._find_vocab_size()

    @property
    def has_cache(self) -> bool:
        return bool(self._past)

    def open(self, scope: str | None = None) -> SequenceState:
        self._num_open += 1
        return SequenceState([], self._no_past(), scope=scope)

    def fork(self, sequence: SequenceState) -> SequenceState:
        self._num_open += 1
        return SequenceState(list(sequence.tokens), sequence.cache, sequence.num_cached, sequence.scope)

    def truncate(self, sequence: SequenceState, length: int) -> None:
        if length < sequence.num_cached:
            kept = [np.ascontiguousarray(value.numpy()[:, :, :length]) for value in sequence.cache.values]
            sequence.cache = PastTokens(tuple(map(ort.OrtValue.ortvalue_from_numpy, kept)))
            sequence.num_cached = length

    def close(self, sequence: SequenceState) -> None:
        self._num_open -= 1
        sequence.cache, sequence.num_cached = None, 0

    def adopt(self, sequence: SequenceState, limit: int) -> None:
        pass            # each sequence has arrays of its own

    def disown(self, sequence: SequenceState) -> None:
        pass

    def put_aside(self, sequence: SequenceState) -> None:
        pass            # the arrays are nobody else's memory

    def reserve(self, sequence: SequenceState, stop: int) -> bool:
        return True     # arrays are allocated as a sequence grows; an allocation that fails is a failed step

    def unreserve(self, sequence: SequenceState) -> None:
        pass            # nothing is ever promised

    def save(self, sequence: SequenceState) -> CacheState:
        return CacheState(_LAYOUT, sequence.num_cached, tuple(value.numpy() for value in sequence.cache.values))

    def restore(self, sequence: SequenceState, state: CacheState) -> None:
        if state.layout != _LAYOUT:
            return
        shapes = [(np.dtype(port.dtype), (1, port.shape[1], state.length, port.shape[3])) for port in self._past if port.shape is not None]
        if [(array.dtype, array.shape) for array in state.arrays] != shapes:
            raise SavedSequenceError("the saved cache is none of this model's", hint="compute the sequence again from its tokens")
        sequence.cache = PastTokens(tuple(map(ort.OrtValue.ortvalue_from_numpy, state.arrays)))
        sequence.num_cached = state.length

    def execute(self, plan: StepPlan) -> list[Logits]:
        (part,) = plan.slices
        try:
            logits, past = self._run(part)
        except Exception as error:
            raise step_error(error) from error
        part.sequence.cache, part.sequence.num_cached = past, part.stop
        return [logits]

    def stats(self) -> dict[str, int]:
        return {"sequences": self._num_open}

    def check(self) -> None:
        assert self._num_open >= 0

    def _run(self, part: Slice) -> tuple[Logits, PastTokens]:
        start = part.start if self._past else 0
        ids, past = part.sequence.tokens[start : part.stop], part.sequence.cache
        found = []
        for at in range(0, len(ids), 1 if self._one_token else len(ids)):
            rows, past = self._forward(ids[at : at + 1] if self._one_token else ids, start + at, past)
            found.append(rows)
        rows = np.concatenate(found)
        if part.num_rows > len(rows):
            raise UnsupportedError(f"the graph gives {len(rows)} rows of logits for {len(ids)} tokens", hint='ask for rows="last"')
        return rows[len(rows) - part.num_rows :], past

    def _forward(self, ids: list[int], start: int, past: PastTokens) -> tuple[Logits, PastTokens]:
        """Logits of `ids`, or of the last of them where the graph gives no more, and the past with them."""
        feeds = {self._ids.name: _ort([ids], self._ids)}
        if self._positions is not None:
            feeds[self._positions.name] = _ort([range(start, start + len(ids))], self._positions)
        if self._mask is not None:
            feeds[self._mask.name] = _ort(np.ones((1, start + len(ids))), self._mask)
        feeds.update(zip((port.name for port in self._past), past.values))
        names = [self._logits.name, *(port.name for port in self._present)]
        logits, *present = self._session.run_with_ort_values(names, feeds)
        rows = np.asarray(logits.numpy(), np.float32)[0]
        if len(rows) not in (1, len(ids)):
            raise UnsupportedError(f"the graph gives {len(rows)} rows of logits for {len(ids)} tokens", hint='ask for rows="last"')
        return rows, PastTokens(tuple(present))

    def _no_past(self) -> PastTokens:
        shapes = [(1, port.shape[1], 0, port.shape[3]) for port in self._past if port.shape is not None]
        return PastTokens(tuple(_ort(np.zeros(shape), port) for shape, port in zip(shapes, self._past)))

    def _find_vocab_size(self) -> int:
        width = self._logits.shape[-1] if self._logits.shape else None
        if isinstance(width, int):
            return width
        # Exporters may leave the last dimension open; one token tells.
        probe = SequenceState([0], self._no_past())
        try:
            logits, _ = self._run(Slice(probe, 0, 1, 0))
        except Exception as error:
            raise step_error(error) from error
        return int(logits.shape[-1])


def _tokens_fixed(port: GraphPort) -> int | None:
    size = port.shape[1] if port.shape is not None and len(port.shape) == 2 else None
    return size if isinstance(size, int) else None


_FLOATS = ("float32", "float16", "float64")
_FED = ("input_ids", "position_ids", "attention_mask", "past_key", "past_value")


def why_not_a_decoder(interface: GraphInterface) -> str:
    """What keeps a graph from being driven as a decoder, or ""."""
    logits = interface.output("logits")
    if logits is None:
        return "it has no logits"
    if logits.dtype not in _FLOATS:
        return f"its logits have the type {logits.dtype}, which NumPy lacks"
    if interface.input("input_ids") is None:
        return "none of its inputs is known to be the token ids"
    unknown = [port.name for port in interface.inputs if port.role not in _FED]
    if unknown:
        return f"nothing tells what to feed to its input {unknown[0]!r}"
    for port in interface.inputs:
        if port.role in ("past_key", "past_value"):
            shape = port.shape or ()
            if port.dtype not in _FLOATS:
                return f"its past {port.name!r} has the type {port.dtype}, which NumPy lacks"
            if len(shape) != 4 or not isinstance(shape[1], int) or not isinstance(shape[3], int):
                return f"its past {port.name!r} has the shape {shape}, not (batch, heads, past, head size) with both sizes fixed"
            if interface.output("present_key" if port.role == "past_key" else "present_value", port.layer) is None:
                return f"its past {port.name!r} has no present"
    return ""


def _present_of(interface: GraphInterface, past: GraphPort) -> GraphPort:
    present = interface.output("present_key" if past.role == "past_key" else "present_value", past.layer)
    assert present is not None     # why_not_a_decoder has looked
    return present


def _ort(values: Any, port: GraphPort) -> ort.OrtValue:
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(np.asarray(values), dtype=np.dtype(port.dtype)))
