"""Writes the matrix: docs/coverage.md for people, coverage.json for machines."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from cells import PRINCIPAL, ROWS, asked
from exporters import EXPORTERS
from families import FAMILIES

Cell = dict[str, Any]

# A cell in a word. Everything that isn't `paged` or `–` is explained below the table.
PAGED, CANNOT, REFUSED, WRONG, ERROR = "paged", "–", "refused", "WRONG", "ERROR"

# The share of the cells that must page, in percent, below which the matrix isn't good enough.
SHARE = 95

# How far off its own full accuracy a source may compute, where it isn't rewritten: 16-bit floats, activations rounded to int8.
COARSE = 5e-2

_ALLOWED = (
    "MLA", "recurrent or convolutional state", "prefix-LM", "encoder-decoder", "rotary that depends on data", "per-tensor dynamic quantization",
    "experts dispatched across tokens", "If-merged decoder", "static shapes",
)

_INTRO = """# Coverage: families × exporters

Made by `make coverage` (`tests/coverage/run.py`); every cell is a tiny decoder with seeded random weights, exported, compiled with
`kv_cache="fp32"` and compared with torch's logits in prefill, in cached decode one token at a time, and in a ragged batch in which every
step mixes prompts with single tokens. Right means within 1e-4 of the largest logit. Exports that lose accuracy on purpose (fp16, int4) are
compared with their own graph, run by onnxruntime without fusions and at full accuracy (int4 is compiled with `weights="stored"` and
`activations="fp32"`, which keeps the weights to the bit and rounds nothing else); so are those whose graph isn't what torch computes, by a
mistake of the exporter that a note tells.

* `paged`: rewritten to paged attention, and right in every case.
* `refused`: octavo kept the graph's attention and says why (the note); what it runs is right, or it says that it can't run it.
* `–`: the exporter can't: it raised, or onnxruntime doesn't run what it wrote.
* empty: not asked for (`tests/coverage/cells.py`). Principal families are exported by every main exporter, and some of them by exporters that
  take long or differ little from a main one; the other families by one exporter of each kind. `?` is asked for and not there yet.
* `WRONG`: rewritten, and not within 1e-4. `ERROR`: octavo failed, timed out or crashed. Neither may appear here.
"""


def verdict(cell: Cell) -> tuple[str, str]:
    """The word for a cell, and its reason."""
    exported = cell["export"]
    if exported["status"] == "timeout":
        return ERROR, f"the export {exported['reason']}"
    if exported["status"] != "exported":
        return CANNOT, _short(exported.get("reason", exported["status"]))
    check = cell["check"]
    broken = exported.get("undriven", "")
    if broken and not broken.startswith("CannotDrive") and (check["status"], check.get("kind")) != ("right", "paged"):
        return CANNOT, f"onnxruntime doesn't run its graph: {_short(broken)}"
    if check["status"] == "wrong" and check["kind"] != "paged" and check["distance"] < COARSE and not EXPORTERS[cell["exporter"]].exact:
        # The source itself, in its own precision.
        return REFUSED, f"{check['kind']}: {check['reason']} (as it stands it is {check['distance']:.1e} off its own full accuracy)"
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


class Share:
    """How many of some rows are what: the part of them that must page, and the part that does."""

    def __init__(self, rows: list[Cell]) -> None:
        self.counts = Counter(row["verdict"] for row in rows)
        self.allowed = Counter(row["allowed"] for row in rows if row["allowed"])
        self.exported = len(rows) - self.counts[CANNOT]
        self.must = self.exported - self.allowed.total()
        self.families = len({row["family"] for row in rows if row["verdict"] == PAGED})

    @property
    def percent(self) -> float:
        return 100 * self.counts[PAGED] / max(1, self.must)

    def __str__(self) -> str:
        counts, every = self.counts, 100 * self.counts[PAGED] / max(1, self.exported)
        return (
            f"**{counts[PAGED]} of the {self.must} exported cells that must page do ({self.percent:.1f} %)**, in {self.families} families; "
            f"{every:.1f} % of all {self.exported}, with the {self.allowed.total()} allowed refusals. {counts[REFUSED]} are refused, {counts[WRONG]} wrong, "
            f"{counts[ERROR]} errors; {counts[CANNOT]} the exporter can't make."
        )


class Report:
    """The matrix's cells, judged. `families` are the rows that were asked for: cells of them that are not there are missing."""

    def __init__(self, cells: list[Cell], families: list[str], versions: dict[str, dict[str, str]]) -> None:
        self._versions = dict(sorted(versions.items(), reverse=True))
        places = {(family, exporter): i for i, (family, exporter) in enumerate((f, e) for f in ROWS for e in EXPORTERS)}
        self._rows = sorted((_row(cell) for cell in cells), key=lambda row: places[row["family"], row["exporter"]])
        self._older = sum(cell.get("check", {}).get("older", False) for cell in cells)
        there = {(row["family"], row["exporter"]) for row in self._rows}
        self._missing = [place for place in places if place[0] in families and asked(*place) and place not in there]
        self._all = Share(self._rows)
        self._principal = Share([row for row in self._rows if row["family"] in PRINCIPAL])

    def fault(self) -> str:
        """Why the matrix isn't good enough; empty where it is."""
        counts = self._all.counts
        if counts[WRONG] + counts[ERROR]:
            return f"{counts[WRONG]} cells are wrong and {counts[ERROR]} errors; none may be"
        if self._missing:
            return f"{len(self._missing)} cells are missing, {self._missing[0][0]} × {self._missing[0][1]} first"
        low = next((share for share in (self._principal, self._all) if share.percent < SHARE), None)
        return f"{low.percent:.1f} % of the cells that must page do; at least {SHARE} % have to" if low else ""

    def totals(self) -> str:
        return f"Principal families: {self._principal}\n\nAll: {self._all}"

    def write(self, out: Path) -> None:
        """Writes `out`/coverage.md and `out`/coverage.json."""
        out.mkdir(parents=True, exist_ok=True)
        (out / "coverage.json").write_text(json.dumps({"versions": self._versions, "cells": self._rows}, indent=1) + "\n")
        allowed = ", ".join(f"{name} ({self._all.allowed[name]})" for name in _ALLOWED)
        about = [f"Refusals that are allowed, with how many cells have them: {allowed}.", ""]
        if self._missing:
            about += [f"{len(self._missing)} cells are missing (shown as `?`).", ""]
        if self._older:
            about += [f"{self._older} of the checks were made by earlier sources of octavo than the rest.", ""]
        tables = [
            "## Principal families", "", *self._table([row for row in self._rows if row["family"] in PRINCIPAL]),
            "## Other families", "", *self._table([row for row in self._rows if row["family"] not in PRINCIPAL]),
        ]
        parts = [_INTRO, self.totals(), "", *about, *tables, *_notes(self._rows), *_version_lines(self._versions)]
        (out / "coverage.md").write_text("\n".join(parts) + "\n")

    def _table(self, rows: list[Cell]) -> list[str]:
        exporters = [name for name in EXPORTERS if any(row["exporter"] == name for row in rows)]
        words = {(row["family"], row["exporter"]): row["verdict"] for row in rows} | dict.fromkeys(self._missing, "?")
        notes = _numbers(self._rows)
        lines = ["| family | " + " | ".join(exporters) + " |", "|---" * (len(exporters) + 1) + "|"]
        for family in [name for name in ROWS if any(row["family"] == name for row in rows)]:
            shown = []
            for exporter in exporters:
                word = words.get((family, exporter), "")
                number = notes.get((family, exporter))
                shown.append(f"{word} [{number}]" if number else word)
            lines.append(f"| `{family}`: {FAMILIES[family].varies} | " + " | ".join(shown) + " |")
        return [*lines, ""]


def _row(cell: Cell) -> Cell:
    word, reason = verdict(cell)
    row = {"family": cell["family"], "exporter": cell["exporter"], "verdict": word, "reason": reason}
    return {**row, "allowed": _allowed(row) if word == REFUSED else ""}


def _allowed(row: Cell) -> str:
    """Which allowed refusal a refused cell is; empty where it should page."""
    named = next((name for name in _ALLOWED if name in row["reason"]), "")    # octavo says which it is
    found = FAMILIES[row["family"]].expected or EXPORTERS[row["exporter"]].expected or named
    assert not found or found in _ALLOWED, found
    return found


def _numbers(rows: list[Cell]) -> dict[tuple[str, str], int]:
    """The note of each cell that has one, numbered by first appearance."""
    numbers: dict[tuple[str, str], int] = {}
    known: dict[tuple[str, str, str], int] = {}
    for row in rows:
        if row["reason"]:
            key = (row["verdict"], row["allowed"], general(row["reason"]))
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
        allowed = f" ({row['allowed']}: allowed)" if row["allowed"] else ""
        where, why = f"`{row['family']}` × `{row['exporter']}`", _clipped(row["reason"], 200 if row["verdict"] == CANNOT else 400)
        lines.append(f"{number}. {row['verdict']} × {counts[number]}{allowed}, first in {where}: {why}")
    return [*lines, ""]


def _clipped(text: str, length: int) -> str:
    return text if len(text) <= length else text[: text.rindex(" ", 0, length)] + " …"


def _version_lines(versions: dict[str, dict[str, str]]) -> list[str]:
    return ["## Versions", "", *(f"* {name}: {', '.join(f'{p} {v}' for p, v in found.items())}" for name, found in versions.items())]
