"""A diff as one HTML page that needs no network: both graphs side by side, laid out by the bundled dagre, changes coloured, layers folded."""

from __future__ import annotations

import json
from importlib.resources import files
from os import PathLike
from pathlib import Path
from typing import Any

from ..report import CompileReport
from .graph import Snapshot
from .model import GraphDiff
from .numbers import Numbers
from .render_terminal import cost_lines, headline, places_of, verdict_line
from .source import read_snapshot
from .structure import compare_snapshots
from .view import tone, view


def page(diff: GraphDiff, before: Snapshot, after: Snapshot, report: CompileReport | None = None) -> str:
    """The page, complete. With a report it also tells the compile: stage by stage, refusals in red with what came nearest."""
    data = {
        "summary": report.headline if report else headline(diff).removeprefix(f"{diff.before} → {diff.after}: "),
        "bad": not diff.ok or diff.moved or bool(report and report.refusals),
        "edits": [
            {"what": edit.what if not edit.inside else f"in {edit.inside}: {edit.what}", "count": edit.count, "tone": tone(edit), "where": places_of(edit)}
            for edit in diff.edits
        ],
        "cost": [_cells(line) for line in cost_lines(diff.cost_before, diff.cost_after)],
        "rules": [{"ok": verdict.ok, "text": verdict_line(verdict)} for verdict in diff.verdicts],
        "numbers": _numbers(diff.numbers), "report": _report(report),
        "before": view(before.graph, diff, "before", diff.before), "after": view(after.graph, diff, "after", diff.after),
    }
    # Inside a script nothing may look like the end of it, whatever names a model has.
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    filled = _asset("page.html")
    layout = f"/* {_licence()} */\n{_asset('dagre.min.js')}"
    for mark, content in (("/*CSS*/", _asset("page.css")), ("/*DAGRE*/", layout), ("/*JS*/", _asset("page.js")), ("/*DATA*/", text)):
        head, found, tail = filled.partition(mark)
        assert found, f"the template has no {mark}"
        filled = head + content + tail
    return filled


def compile_page(source: str | PathLike[str], artifact: str | PathLike[str], report: CompileReport) -> str:
    """The page of a compile: the source beside what became of it."""
    before, after = read_snapshot(source), read_snapshot(artifact)
    return page(compare_snapshots(before, after, (report.source, Path(artifact).name)), before, after, report)


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
    return {"rows": [head, *rows], "note": " ".join([*first, *numbers.notes])}


def _report(report: CompileReport | None) -> dict[str, Any] | None:
    if report is None:
        return None
    return {
        "refusals": [{"where": refusal.where, "reason": refusal.reason, "nearest": refusal.nearest} for refusal in report.refusals],
        "stages": [["stage", "nodes", "rewritten"], *(
            [outcome.stage, f"{outcome.nodes_before} → {outcome.nodes_after}", f"{outcome.rewritten} of {outcome.matched}" if outcome.matched else "–"]
            for outcome in report.outcomes
        )],
        "lines": [str(decision) for decision in report.decisions],
    }
