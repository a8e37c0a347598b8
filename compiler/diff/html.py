"""A diff, or a compile pass by pass, as one HTML page that needs no network: both graphs side by side, changes coloured, layers folded.

The bundled dagre lays them out in the browser.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from os import PathLike
from pathlib import Path
from typing import Any

from ...passes.outcome import Outcome
from ..report import CompileReport
from .graph import Snapshot
from .model import GraphDiff
from .numbers import Numbers
from .render_terminal import cost_lines, headline, places_of, verdict_line
from .structure import compare_snapshots
from .trace import Trace
from .view import View, Views, tone


def page(diff: GraphDiff, before: Snapshot, after: Snapshot) -> str:
    """The page of a diff, complete."""
    views = Views()
    graphs = [views.view(before.graph), views.view(after.graph)]
    data = {
        "kind": "octavo diff", "summary": headline(diff).removeprefix(f"{diff.before} → {diff.after}: "), "bad": not diff.ok or diff.moved,
        "titles": [diff.before, diff.after], "graphs": graphs,
        "rules": [{"ok": verdict.ok, "text": verdict_line(verdict)} for verdict in diff.verdicts],
        "numbers": _numbers(diff.numbers), "report": None,
    }
    return _page({**data, "steps": [_step("", diff, (0, 1), graphs)]}, views)


def compile_page(trace: Trace, artifact: str | PathLike[str], report: CompileReport) -> str:
    """The page of a compile: the source beside what became of it, as a whole and pass by pass; refusals in red with what came nearest."""
    views = Views()
    # A compile that was given up leaves the graph as it was, whatever its passes tried.
    last = trace.source if report.kind == "baseline" or not trace.steps else trace.steps[-1].snapshot
    steps: list[dict[str, Any]] = []
    graphs, previous = [views.view(trace.source.graph)], trace.source
    for step in trace.steps:
        places = len(graphs) - 1, len(graphs) - 1
        if step.snapshot != previous:
            graphs.append(views.view(step.snapshot.graph))
            places = len(graphs) - 2, len(graphs) - 1
        diff = compare_snapshots(previous, step.snapshot)
        steps.append(_step(step.outcome.stage, diff, places, graphs) | {"outcome": _outcome(step.outcome)})
        previous = step.snapshot
    whole = _step("all passes", compare_snapshots(trace.source, last), (0, 0 if last is trace.source else len(graphs) - 1), graphs)
    data = {
        "kind": "octavo compile", "summary": report.headline, "bad": bool(report.refusals), "titles": [report.source, Path(artifact).name], "graphs": graphs,
        "steps": [whole, *steps], "rules": [], "numbers": _numbers(None), "report": {
            "refusals": [{"where": refusal.where, "reason": refusal.reason, "nearest": refusal.nearest} for refusal in report.refusals],
            "lines": [str(decision) for decision in report.decisions],
        },
    }
    return _page(data, views)


def _step(name: str, diff: GraphDiff, places: tuple[int, int], graphs: Sequence[View]) -> dict[str, Any]:
    """One diff of a page: its edits, and which nodes of its two graphs they are."""
    return {
        "name": name, "before": places[0], "after": places[1], "cost": [_cells(line) for line in cost_lines(diff.cost_before, diff.cost_after)],
        "edits": [
            {"what": edit.what if not edit.inside else f"in {edit.inside}: {edit.what}", "count": edit.count, "tone": tone(edit), "where": places_of(edit)}
            for edit in diff.edits
        ],
        "marks": [graphs[places[0]].marks(diff, "before"), graphs[places[1]].marks(diff, "after")],
    }


def _outcome(outcome: Outcome) -> dict[str, Any]:
    counts = f"{outcome.rewritten} of {outcome.matched} {outcome.what}" if outcome.matched else ""
    return {
        "nodes": f"{outcome.nodes_before} → {outcome.nodes_after}", "counts": counts, "notes": list(outcome.notes),
        "refusals": [str(refusal) for refusal in outcome.refusals],
    }


def _page(data: dict[str, Any], views: Views) -> str:
    # Inside a script nothing may look like the end of it, whatever names a model has.
    told = {**data, "graphs": [view.data for view in data["graphs"]], "texts": views.texts}
    text = json.dumps(told, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    filled = _asset("page.html")
    layout = f"/* {_licence()} */\n{_asset('dagre.min.js')}"
    for mark, content in (("/*CSS*/", _asset("page.css")), ("/*DAGRE*/", layout), ("/*JS*/", _asset("page.js")), ("/*DATA*/", text)):
        head, found, tail = filled.partition(mark)
        assert found, f"the template has no {mark}"
        filled = head + content + tail
    return filled


def _asset(name: str) -> str:
    return files(__package__).joinpath("page", name).read_text(encoding="utf-8")


def _licence() -> str:
    return _asset("dagre.LICENSE.txt").replace("*/", "").replace("/*", "").strip()


def _cells(line: str) -> list[str]:
    name, _, rest = line.partition(" ")
    return [name.rstrip(":"), rest]


def _numbers(numbers: Numbers | None) -> dict[str, Any]:
    if numbers is None:
        return {"rows": [], "note": ""}
    head = [["", "relative", "limit", "mean KL", "top-1"], False]
    rows = [
        [[f"{case.runs}, {case.case}", f"{case.relative:.1e}", f"{case.limit:.0e}", "–" if case.mean_kl is None else f"{case.mean_kl:.0e}",
          "–" if case.top1 is None else f"{case.top1:.3f}"], not case.ok]
        for case in numbers.cases
    ]
    first = [f"First divergent node: {numbers.first}."] if numbers.first else []
    first += [f"Introduced by the pass {numbers.fault}."] if numbers.fault else []
    return {"rows": [head, *rows], "note": " ".join([*first, *numbers.notes])}
