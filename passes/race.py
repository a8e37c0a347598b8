"""How long a graph takes on this machine before and after a rewrite, as it would be served: onnxruntime's own fusions on, all threads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import exp, log
from time import perf_counter

import onnx_ir as ir

from ..models.interface import GraphInterface
from .extract import run
from .observe import Observation
from .probe import Letters, Probe, feed_of, port_of
from .trial_run import open_graph

Timer = Callable[[Callable[[], object]], float]
"""Seconds that a call takes."""

# Runs of each side: the fastest counts, since nothing makes a run faster than it is.
_RUNS = 5


def fastest(call: Callable[[], object]) -> float:
    """The default timer: the fastest of a few runs after one that warms up."""
    call()
    times = []
    for _ in range(_RUNS):
        start = perf_counter()
        call()
        times.append(perf_counter() - start)
    return min(times)


@dataclass(frozen=True)
class Finish:
    """Seconds of both sides in each situation. `ratio` is the geometric mean of ours over its own: above 1 the rewrite is slower."""

    situations: tuple[Probe, ...]
    own: tuple[float, ...]
    ours: tuple[float, ...]

    @property
    def ratio(self) -> float:
        return exp(sum(log(b / a) for a, b in zip(self.own, self.ours)) / len(self.own))

    def __str__(self) -> str:
        each = (f"{p.length} tokens over {p.past}: {a * 1e3:.2f} ms, rewritten {b * 1e3:.2f} ms" for p, a, b in zip(self.situations, self.own, self.ours))
        return "; ".join(each)


class Race:
    """Opened before the observed graph is changed; `against` then runs what became of it. Weights are random, sizes are the model's."""

    def __init__(self, observation: Observation, *, max_context: int, timer: Timer) -> None:
        self._interface, self._letters, self._cached, self._timer = observation.interface, observation.letters, observation.cached, timer
        self._runner = _Runner(observation.model, observation.interface, observation.letters)
        room = max(2, max_context)
        if observation.static:
            self._situations: tuple[Probe, ...] = observation.probes
        elif observation.cached:
            self._situations = (Probe(1, min(128, room), 0), Probe(1, 1, min(512, room - 1)))
        else:
            self._situations = (Probe(1, min(128, room), 0), Probe(1, min(512, room), 0))

    def against(self, model: ir.Model, interface: GraphInterface) -> Finish:
        """Both in turn, situation by situation. Of a graph that has lost its cache, or has got one, only runs from nothing are compared."""
        ours = _Runner(model, interface, self._letters)
        cached = any(port.role == "past_key" for port in interface.inputs)
        situations = tuple(probe for probe in self._situations if cached == self._cached or probe.past == 0)
        own, rewritten = [], []
        for probe in situations:
            own.append(self._timer(self._runner.at(probe)))
            rewritten.append(self._timer(ours.at(probe)))
        return Finish(situations, tuple(own), tuple(rewritten))


class _Runner:
    def __init__(self, model: ir.Model, interface: GraphInterface, letters: Letters) -> None:
        self._session, self._weights = open_graph(model, served=True)
        self._inputs, self._interface, self._letters = tuple(model.graph.inputs), interface, letters

    def at(self, probe: Probe) -> Callable[[], object]:
        feeds = {str(value.name): feed_of(port_of(self._interface, value), value, probe, self._letters) for value in self._inputs}
        return lambda: run(self._session, {**self._weights, **feeds})
