"""Fills the matrix *families × exporters*: export, compile, run, compare with torch; then writes docs/coverage.md and coverage.json.

    python tests/coverage/run.py                                       # everything that is asked for and not in the cache yet
    python tests/coverage/run.py --families llama,gpt2 --exporters dynamo18,optimum
    python tests/coverage/run.py --only export --jobs 2                # the graphs alone: CACHE/{family}-{hash}/{exporter}/model.onnx
    python tests/coverage/run.py --keep paged --python4 …              # after a change: what is not paged again, and what is new

Two environments export (`--python5`: transformers 5, `--python4`: transformers 4.57 with optimum-onnx), a third process compiles and checks
(`--python`, with octavo installed); `--jobs` sets of these work side by side, each on a family of its own. Cells are cached by content under
`--cache`: an export by its family and the versions of its exporter, a check by the sources of octavo. A cell that crashes or takes too long
costs its process and nothing else.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cells import ROWS, asked
from exporters import EXPORTERS
from families import FAMILIES
from processes import Worker
from report import Report, summary

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
# A change to what an exporter is asked for makes its cached graphs stale: count up.
RECIPE = 1
# The cache has nothing about a cell, and this run was not asked to find out.
_UNKNOWN: dict[str, Any] = {"status": "unknown"}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=",".join(ROWS), help="comma-separated; default all, the principal ones first")
    parser.add_argument("--exporters", default=None, help="comma-separated; default what the matrix asks for, family by family")
    parser.add_argument("--only", choices=("export", "check", "report"), help="one part, over what the cache has; default all")
    parser.add_argument("--python", default=sys.executable, help="has octavo")
    parser.add_argument("--python5", default=sys.executable, help="has torch, transformers 5, onnxruntime-genai, octavo")
    parser.add_argument("--python4", default=None, help="has torch, transformers 4.57, optimum-onnx; without it its columns are left out")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "octavo-coverage")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds per cell and half")
    parser.add_argument("--jobs", type=int, default=1, help="families at a time")
    parser.add_argument("--fresh", action="store_true", help="do again what is asked for, whatever the cache has")
    parser.add_argument("--keep", choices=("none", "paged", "all"), default="none", help="checks that other sources of octavo made, and that still count")
    parser.add_argument("--gate", action="store_true", help="exit code 2 where a cell is wrong, an error or missing, or too few are paged")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of coverage.md and coverage.json")
    return parser.parse_args()


class Matrix:
    """Cells of a run: their folders, what the cache knows of them, and a set of workers that fills in the rest."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._cache: Path = arguments.cache
        # Two intra-op threads at most, wherever they come from: the cells are small, and the machine is somebody's.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
        pythons = {"transformers5": arguments.python5, "transformers4": arguments.python4}
        self._exporting = {
            name: Worker(python, HERE / "worker.py", self._cache / f"{name}.log", environment) for name, python in pythons.items() if python
        }
        self._checking = Worker(arguments.python, HERE / "checker.py", self._cache / "check.log", environment)
        self._octavo = _digest_of_octavo()

    def folder(self, family: str, exporter: str) -> Path:
        """The cell's folder; its name says what is in it, so another config or version has another."""
        worker = self._exporting[EXPORTERS[exporter].environment]
        worker.start()
        content = json.dumps([asdict(FAMILIES[family]), worker.versions, RECIPE], sort_keys=True)
        return self._cache / f"{family}-{hashlib.sha256(content.encode()).hexdigest()[:12]}" / exporter

    def export(self, family: str, exporter: str) -> dict[str, Any]:
        folder = self.folder(family, exporter)
        record = folder.parent / f"{exporter}.export.json"
        if record.is_file() and not (self._arguments.fresh and self._arguments.only in (None, "export")):
            known: dict[str, Any] = json.loads(record.read_text())
            if known["status"] != "timeout":  # a matter of the machine and its other work
                return known
        if self._arguments.only in ("check", "report"):
            return _UNKNOWN
        question = {"family": family, "exporter": exporter, "work": str(folder.parent), "tokenizer": str(self._cache / "tokenizer")}
        answer = self._exporting[EXPORTERS[exporter].environment].ask(question, self._arguments.timeout)
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(answer, indent=1) + "\n")
        return answer

    def check(self, family: str, exporter: str) -> dict[str, Any]:
        folder = self.folder(family, exporter)
        record = folder.parent / f"{exporter}.check.json"
        if record.is_file() and not self._arguments.fresh:
            known: dict[str, Any] = json.loads(record.read_text())
            if known.get("octavo") == self._octavo or self._kept(known):
                return {**known, "older": known.get("octavo") != self._octavo}
        if self._arguments.only == "report":
            return _UNKNOWN
        answer = self._checking.ask({"family": family, "folder": str(folder)}, self._arguments.timeout)
        answer["octavo"] = self._octavo
        record.write_text(json.dumps(answer, indent=1) + "\n")
        return answer

    def _kept(self, known: dict[str, Any]) -> bool:
        paged = (known["status"], known.get("kind")) == ("right", "paged")
        return self._arguments.keep == "all" or (self._arguments.keep == "paged" and paged)

    def cell(self, family: str, exporter: str) -> dict[str, Any]:
        exported = self.export(family, exporter)
        cell = {"family": family, "exporter": exporter, "export": exported}
        if exported["status"] == "exported" and self._arguments.only != "export":
            cell["check"] = self.check(family, exporter)
            cell["folder"] = str(self.folder(family, exporter))
        return cell

    def exporters(self, family: str) -> list[str]:
        """Those that the run asks for, of the environments that it has."""
        chosen = self._arguments.exporters
        wanted = chosen.split(",") if chosen else [name for name in EXPORTERS if asked(family, name)]
        return [name for name in wanted if EXPORTERS[name].environment in self._exporting]

    def versions(self) -> dict[str, dict[str, str]]:
        return {name: worker.versions for name, worker in self._exporting.items() if worker.versions}

    def close(self) -> None:
        for worker in [*self._exporting.values(), self._checking]:
            worker.close()


def _tokenizer(cache: Path) -> None:
    folder = cache / "tokenizer"
    if not folder.is_dir():
        from octavo.models.tiny import write_tiny_tokenizer

        folder.parent.mkdir(parents=True, exist_ok=True)
        write_tiny_tokenizer(folder)


def _digest_of_octavo() -> str:
    """A digest of everything in the package that can change what a compiled model computes."""
    import octavo

    root = Path(octavo.__file__).parent
    digest = hashlib.sha256()
    for room in ("models", "custom_ops", "passes", "compiler", "runtime"):
        for file in sorted((root / room).rglob("*")):
            if file.suffix in (".py", ".cc", ".h") and "build" not in file.parts:
                digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _fill(arguments: argparse.Namespace, families: Iterator[str]) -> tuple[list[dict[str, Any]], dict[str, dict[str, str]]]:
    """Takes families from the iterator, which others share, until there is none. The cells, and the versions of the exporters."""
    matrix = Matrix(arguments)
    cells = []
    try:
        for family in families:
            for exporter in matrix.exporters(family):
                cell = matrix.cell(family, exporter)
                if _UNKNOWN in (cell["export"], cell.get("check")):
                    continue
                print(f"{family:20s} {exporter:30s} {summary(cell)}", flush=True)
                cells.append(cell)
        return cells, matrix.versions()
    finally:
        matrix.close()


def main() -> None:
    arguments = _arguments()
    families = arguments.families.split(",")
    _tokenizer(arguments.cache)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        shared = iter(families)
        found = list(pool.map(lambda _: _fill(arguments, shared), range(arguments.jobs)))
    if arguments.only != "export":
        versions = {name: version for _, known in found for name, version in known.items()}
        report = Report([cell for cells, _ in found for cell in cells], families, versions)
        report.write(arguments.out)
        print(report.totals())
        if arguments.gate and (why := report.fault()):
            print(why, file=sys.stderr)
            raise SystemExit(2)


if __name__ == "__main__":
    main()
