"""The list of decisions of a loaded model: the artifact's own, then those of load and run."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import replace

from ..models.decision import Decision


class DecisionLog:
    """Append-only. Run-time decisions that repeat are kept once, with how often in their reason; at most MAX_RUN of them."""

    MAX_RUN = 256

    def __init__(self, decisions: Iterable[Decision] = ()) -> None:
        self._fixed = list(decisions)
        self._run: dict[Decision, int] = {}
        self._lock = threading.Lock()

    def load(self, feature: str, value: str, reason: str, where: str = "") -> None:
        with self._lock:
            self._fixed.append(Decision(feature, value, reason, stage="load", where=where))

    def run(self, feature: str, value: str, reason: str, where: str = "") -> None:
        decision = Decision(feature, value, reason, stage="run", where=where)
        with self._lock:
            if decision not in self._run and len(self._run) >= self.MAX_RUN:
                decision = Decision(feature, value, f"more than {self.MAX_RUN} different reasons", stage="run")
            self._run[decision] = self._run.get(decision, 0) + 1

    def all(self) -> tuple[Decision, ...]:
        with self._lock:
            counted = [d if n == 1 else replace(d, reason=f"{d.reason} ({n} times)") for d, n in self._run.items()]
            return (*self._fixed, *counted)
