"""A compile seen pass by pass: the canonical graph after each of them."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from ...passes.outcome import Outcome
from .graph import Snapshot
from .live import LiveReader


@dataclass(frozen=True)
class Step:
    """What a pass did, and what it left."""

    outcome: Outcome
    snapshot: Snapshot


class Trace:
    """A `Watch` that keeps every graph, and the source's. They hold no weights."""

    source: Snapshot

    def __init__(self) -> None:
        self._reader = LiveReader()
        self._steps: list[Step] = []
        self._mark = 0

    @property
    def steps(self) -> tuple[Step, ...]:
        """Of a target that failed nothing is left, as nothing of it is left in the graph."""
        return tuple(self._steps)

    def close(self) -> None:
        self._reader.close()

    def start(self, model: ir.Model) -> None:
        self.source = self._reader.snapshot(model)

    def after(self, outcome: Outcome, model: ir.Model) -> None:
        self._steps.append(Step(outcome, self._reader.snapshot(model)))

    def begin(self) -> None:
        self._mark = len(self._steps)

    def undone(self) -> None:
        del self._steps[self._mark :]
