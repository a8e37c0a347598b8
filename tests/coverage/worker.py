"""A process that exports on request: one JSON line in, one JSON line out. `run.py` starts it in each environment and kills it when a cell
takes too long; the torch model of the last family stays in memory, since importing and building would take longer than most exports.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import graph
import numpy as np
import torch
import torch_model
import transformers
from exporters import EXPORTERS, Subject, quiet
from families import FAMILIES, token_ids

GOOD = 1e-4
_PACKAGES = ("torch", "transformers", "optimum-onnx", "onnx", "onnxscript", "onnxruntime", "onnxruntime-genai")

def versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


class Exporting:
    """The exports of this process. The last family stays loaded."""

    def __init__(self) -> None:
        self._subject: Subject | None = None

    def _load(self, family: str, work: Path, tokenizer: Path) -> Subject:
        """The family's torch model, with torch's logits in `work/oracle.npz`."""
        if self._subject is None or self._subject.work != work:
            with quiet():
                model = torch_model.build(FAMILIES[family])
            work.mkdir(parents=True, exist_ok=True)
            self._subject = Subject(FAMILIES[family], model, work, tokenizer)
        if not (work / "oracle.npz").is_file():
            np.savez(work / "new.npz", **torch_model.logits(self._subject.model, self._subject.family))
            os.replace(work / "new.npz", work / "oracle.npz")
        return self._subject

    def export(self, family: str, exporter: str, work: str, tokenizer: str) -> dict[str, Any]:
        """Exports one cell into `work/exporter`, and runs the graph as it stands.

        `status` is "exported" (with `distance` to torch, or `undriven`: why the graph could not be run) or "cannot" (with the `reason`).
        A graph that doesn't give torch's logits has its own in `oracle.npz` beside it, and `off` says so where that isn't on purpose.
        """
        folder = Path(work)
        try:
            subject = self._load(family, folder, Path(tokenizer))
        except Exception as error:
            return {"status": "cannot", "reason": _line(error)}
        out = folder / exporter
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        chosen = EXPORTERS[exporter]
        try:
            with quiet():
                chosen.export(subject, out)
        except Exception as error:
            shutil.rmtree(out, ignore_errors=True)
            return {"status": "cannot", "reason": _line(error), "trace": traceback.format_exc()[-2000:]}
        expected = dict(np.load(folder / "oracle.npz"))
        try:
            path, like = str(out / "model.onnx"), subject.family
            source = path if chosen.exact else graph.at_full_accuracy(path)
            found = graph.logits_of(source, token_ids(like), like.decode, head_size=like.head_size, capacity=like.capacity)
        except Exception as error:
            return {"status": "exported", "undriven": _line(error)}
        distances = {name: graph.distance(expected[name], rows) for name, rows in found.items() if name in expected}
        worst = max(distances, key=lambda name: distances[name])
        answer = {"status": "exported", "distance": distances[worst]}
        if not distances[worst] <= GOOD:
            # What a user brings is the graph, and that is what has to be kept.
            np.savez(out / "oracle.npz", **{name: rows for name, rows in expected.items() if name.startswith("ids.")}, **found)
            if chosen.exact:
                answer["off"] = f"its graph is {distances[worst]:.1e} off torch in {worst.split('.')[0]}"
        return answer


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:600]


def main() -> None:
    # Exporters print; the answers have a channel of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    print(json.dumps(versions()), file=answers, flush=True)
    exporting = Exporting()
    for line in sys.stdin:
        print(json.dumps(exporting.export(**json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
