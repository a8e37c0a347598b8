"""onnxruntime's profile of a session, summed up: where the time of which steps went."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

OpTimes = dict[str, float]
"""Op type → milliseconds, and OUTSIDE: what the steps took beside their nodes."""

OUTSIDE = "outside nodes"


def read_profile(path: Path, phases: Mapping[str, tuple[int, int]]) -> dict[str, OpTimes]:
    """Times of each phase, (its first step, its number of steps) counted over the session's runs. Threads' own events are left out."""
    events = json.loads(path.read_text(encoding="utf-8"))
    runs = sorted((event["ts"], event["ts"] + event["dur"]) for event in events if event["name"] == "model_run")
    nodes = [event for event in events if event["cat"] == "Node" and event["name"].endswith("_kernel_time")]
    found = {}
    for phase, (first, count) in phases.items():
        steps = runs[first : first + count]
        assert len(steps) == count, "every step is a run of the session"
        begin, end = (steps[0][0], steps[-1][1]) if steps else (0, 0)
        times: OpTimes = {}
        for event in nodes:
            if begin <= event["ts"] < end:
                op = event["args"]["op_name"]
                times[op] = times.get(op, 0.0) + event["dur"] / 1000
        times[OUTSIDE] = sum(stop - start for start, stop in steps) / 1000 - sum(times.values())
        found[phase] = times
    return found
