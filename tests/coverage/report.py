"""Writes the matrix: docs/coverage.md for people, coverage.json for machines."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from exporters import EXPORTERS
from families import FAMILIES

Cell = dict[str, Any]

# A cell in a word. Everything that isn't `paged` or `–` is explained below the table.
PAGED, CANNOT, REFUSED, WRONG, ERROR = "paged", "–", "refused", "WRONG", "ERROR"

_INTRO = """# Coverage: families × exporters

Made by `make coverage` (`tests/coverage/run.py`); every cell is a tiny decoder with seeded random weights, exported, compiled with
`kv_cache="fp32"` and compared with torch's logits in prefill, in cached decode one token at a time, and in a ragged batch in which every
step mixes prompts with single tokens. Right means within 1e-4 of the largest logit. Exports that lose accuracy on purpose (fp16, int4) are
compared with their own graph, run by onnxruntime without fusions and at full accuracy; so are those whose graph isn't what torch computes,
by a mistake of the exporter that a note tells.

* `paged`: rewritten to paged attention, and right in every case.
* `refused`: octavo kept the graph's attention and says why (the note); what it runs is right, or it says that it can't run it.
* `–`: the exporter can't: it raised, or onnxruntime doesn't run what it wrote.
* `WRONG`: rewritten, and not within 1e-4. `ERROR`: octavo failed, timed out or crashed. Neither may appear here.
"""


def verdict(cell: Cell) -> tuple[str, str]:
    """The word for a cell, and its reason."""
    exported = cell["export"]
    if exported["status"] != "exported":
        return CANNOT, _short(exported.get("reason", exported["status"]))
    check = cell["check"]
    broken = exported.get("undriven", "")
    if broken and not broken.startswith("CannotDrive") and (check["status"], check.get("kind")) != ("right", "paged"):
        return CANNOT, f"onnxruntime doesn't run its graph: {_short(broken)}"
    if check["status"] == "wrong" and check["kind"] == "baseline" and not EXPORTERS[cell["exporter"]].exact:
        # The source itself, in its own precision.
        return REFUSED, f"baseline: {check['reason']} (as it stands it is {check['distance']:.1e} off its own full accuracy)"
    if check["status"] == "wrong":
        cases = ", ".join(f"{name} {value:.1e}" for name, value in check["distances"].items())
        return WRONG, f"{check['kind']}: {cases}"
    if check["status"] in ("right", "undriven"):
        # The compile goes on without a feature that failed; here that is a fault all the same.
        if "exception caught" in check["reason"]:
            return ERROR, _short(check["reason"])
        if check["kind"] == "paged":
            return PAGED, exported.get("off", "")
        # A graph that can't be paged and then can't be fed either is no worse than refused: nothing ran wrong.
        return REFUSED, f"{check['kind']}: {_short(check['reason'])}" + (" (and not fed as it stands)" if check["status"] == "undriven" else "")
    after = f" (`{check['kind']}` after: {check['reason']})" if check.get("kind") and "error" in check else ""
    return ERROR, _short(check.get("error") or check.get("reason") or check["status"]) + after


def _short(message: str) -> str:
    """A message without colours, paths of this machine, C++ signatures and advice."""
    message = re.sub(r"\x1b\[\d+m", "", message)
    message = re.sub(r"/onnxruntime_src/\S+ .*?(\) |$)", "", message)
    message = re.sub(r"/\S+/(\S+/model\.onnx)( failed)?", r"\1", message)
    message = re.sub(r"The /\S+ model", "The model", message)
    return message.split(" Please refer to")[0]


def summary(cell: Cell) -> str:
    """One line for the terminal."""
    if "check" in cell or cell["export"]["status"] != "exported":
        word, reason = verdict(cell)
        return f"{word} {reason}"[:200].strip()
    exported = cell["export"]
    return f"exported in {exported.get('seconds', 0):.1f} s" + (f", not run: {exported['undriven']}" if "undriven" in exported else "")


def write(cells: list[Cell], versions: dict[str, dict[str, str]], out: Path) -> None:
    """Writes `out`/coverage.md and `out`/coverage.json."""
    out.mkdir(parents=True, exist_ok=True)
    rows = [{"family": cell["family"], "exporter": cell["exporter"], **dict(zip(("verdict", "reason"), verdict(cell)))} for cell in cells]
    (out / "coverage.json").write_text(json.dumps({"versions": versions, "cells": rows}, indent=1) + "\n")
    (out / "coverage.md").write_text("\n".join([_INTRO, *_totals(rows), *_table(rows), *_notes(rows), *_versions(versions)]) + "\n")


def _totals(rows: list[Cell]) -> list[str]:
    counts = Counter(row["verdict"] for row in rows)
    exported = len(rows) - counts[CANNOT]
    families = len({row["family"] for row in rows if row["verdict"] == PAGED})
    share = 100 * counts[PAGED] / exported if exported else 0.0
    return [
        f"**{counts[PAGED]} of {exported} exported cells are paged ({share:.1f} %)**, in {families} families; {counts[REFUSED]} refused, "
        f"{counts[WRONG]} wrong, {counts[ERROR]} errors, {counts[CANNOT]} that the exporter can't make.", "",
    ]


def _table(rows: list[Cell]) -> list[str]:
    exporters = [name for name in EXPORTERS if any(row["exporter"] == name for row in rows)]
    words = {(row["family"], row["exporter"]): row["verdict"] for row in rows}
    notes = _numbers(rows)
    lines = ["| family | " + " | ".join(exporters) + " |", "|---" * (len(exporters) + 1) + "|"]
    for family in [name for name in FAMILIES if any(row["family"] == name for row in rows)]:
        shown = []
        for exporter in exporters:
            word = words.get((family, exporter), "")
            number = notes.get((family, exporter))
            shown.append(f"{word} [{number}]" if number else word)
        lines.append(f"| `{family}`: {FAMILIES[family].varies} | " + " | ".join(shown) + " |")
    return [*lines, ""]


def _numbers(rows: list[Cell]) -> dict[tuple[str, str], int]:
    """The note of each cell that has one, numbered by first appearance."""
    numbers: dict[tuple[str, str], int] = {}
    known: dict[tuple[str, str], int] = {}
    for row in rows:
        if row["reason"]:
            key = (row["verdict"], general(row["reason"]))
            numbers[row["family"], row["exporter"]] = known.setdefault(key, len(known) + 1)
    return numbers


def general(reason: str) -> str:
    """A reason without what only its cell has (layer numbers, node names, measured values), so that equal causes are counted together."""
    reason = re.sub(r"\d\.\d+e[-+]\d+|\binf\b", "…", reason)
    reason = re.sub(r"(\b(node_|val_)|/)[\w./:-]+", "…", reason)
    reason = re.sub(r"export a \S+ model|has no \S+$|torchscript\d+(-\w+)?|found … from \w+", "…", reason)
    return re.sub(r"\d+", "#", reason)


def _notes(rows: list[Cell]) -> list[str]:
    numbers = _numbers(rows)
    examples: dict[int, Cell] = {}
    counts: Counter[int] = Counter()
    for row in rows:
        if number := numbers.get((row["family"], row["exporter"])):
            examples.setdefault(number, row)
            counts[number] += 1
    lines = ["## Notes", ""]
    for number, row in examples.items():
        lines.append(f"{number}. {row['verdict']} × {counts[number]}, first in `{row['family']}` × `{row['exporter']}`: {row['reason']}")
    return [*lines, ""]


def _versions(versions: dict[str, dict[str, str]]) -> list[str]:
    return ["## Versions", "", *(f"* {name}: {', '.join(f'{p} {v}' for p, v in found.items())}" for name, found in versions.items())]
