"""A process that compiles exported graphs with octavo and compares what comes out with the oracle. Speaks as worker.py does."""

from __future__ import annotations

import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import graph
import numpy as np
import octavo
from exporters import EXPORTERS
from families import FAMILIES, Family
from octavo.errors import UnsupportedError

# Of the largest logit, with float32 weights and cache.
GOOD = 1e-4
Rows = dict[str, np.ndarray]


def check(family: str, folder: str) -> dict[str, Any]:
    """Compiles `folder`/model.onnx and runs it in three ways. The answer's `status`:

    right    every case within GOOD of the oracle; `kind` says what the graph became, `reason` why where that isn't "paged"
    wrong    a case isn't: `distances` of all of them
    undriven octavo runs the graph as it stands and says that it can't feed it: a refusal, with nothing to compare
    error    compiling, loading or running raised: `reason`
    """
    source = Path(folder)
    artifact = source.parent / f"{source.name}.artifact"
    shutil.rmtree(artifact, ignore_errors=True)
    answer: dict[str, Any] = {}
    try:
        exporter = EXPORTERS[source.name]
        full = octavo.CompileOptions(kv_cache="fp32", **({"weights": "stored", "activations": "fp32"} if exporter.stores_quantized else {}))
        report = octavo.compile(source / "model.onnx", artifact, options=full)
        refusals = [str(refusal) for refusal in report.refusals]
        answer = {"kind": report.kind, "reason": _reason(report), "refusals": refusals[:6], "compile_seconds": round(report.seconds, 2)}
        expected = dict(np.load(_oracle(source)))
        with octavo.load(artifact, options=octavo.RuntimeOptions(threads=1, memory="512MiB")) as model:
            distances = compare(model, FAMILIES[family], expected, only_prefill=exporter.sideways and report.kind != "paged")
    except Exception as error:
        if answer.get("kind") not in ("paged", None) and isinstance(error, UnsupportedError):
            return {**answer, "status": "undriven"}
        return {**answer, "status": "error", "error": f"{type(error).__name__}: {error}"[:900], "trace": traceback.format_exc()[-2500:]}
    shutil.rmtree(artifact, ignore_errors=True)
    worst = max(distances.values())
    return {**answer, "status": "right" if worst <= GOOD else "wrong", "distance": worst, "distances": distances}


def _oracle(source: Path) -> Path:
    own = source / "oracle.npz"
    return own if own.is_file() else source.parent / "oracle.npz"


def _reason(report: Any) -> str:
    """Why the kind isn't "paged": the first refusal, else the decision about it."""
    if report.kind == "paged":
        return ""
    for refusal in report.refusals:
        return str(refusal)
    about = (f"{decision.feature}: {decision.reason}" for decision in report.decisions if decision.feature in ("kind", "paged"))
    return next(about, "no reason given")


def compare(model: Any, family: Family, expected: Rows, *, only_prefill: bool = False) -> dict[str, float]:
    """Distances of prefill, cached decode one token at a time, and a ragged batch, the worst sequence of each."""
    sequences = [expected[f"ids.{i}"] for i in range(len(family.lengths))]
    cases: dict[str, Callable[[], Rows]] = {
        "prefill": lambda: {f"prefill.{i}": model.predict(ids) for i, ids in enumerate(sequences)},
        "decode": lambda: _decode(model, sequences, family.decode),
        "ragged": lambda: _ragged(model, sequences, family.decode),
    }
    distances = {}
    for name, run in list(cases.items())[: 1 if only_prefill else None]:
        found = run()
        distances[name] = max(graph.distance(_expected(expected, key, family.decode), rows) for key, rows in found.items())
    return distances


def _expected(expected: Rows, key: str, decode: int) -> np.ndarray:
    """A model that torch has no cache for decodes what it prefills."""
    if key in expected:
        return expected[key]
    part, i = key.split(".")
    whole = expected[f"prefill.{i}"]
    return whole[-decode:] if part == "decode" else whole[:-decode]


def _decode(model: Any, sequences: list[np.ndarray], count: int) -> Rows:
    found = {}
    session = model.begin_session()
    for i, ids in enumerate(sequences):
        sequence = session.new_sequence()
        cut = len(ids) - count
        found[f"prefix.{i}"] = sequence.append(ids[:cut], rows="all")
        found[f"decode.{i}"] = np.concatenate([sequence.append(ids[t : t + 1]) for t in range(cut, len(ids))])
        sequence.close()
    session.close()
    return found


def _ragged(model: Any, sequences: list[np.ndarray], count: int) -> Rows:
    """All sequences in one batch, each a step later than the one before: every step but the first mixes prompts with single tokens."""
    session = model.begin_session()
    handles = [session.new_sequence() for _ in sequences]
    pieces = [[ids[: len(ids) - count], *(ids[t : t + 1] for t in range(len(ids) - count, len(ids)))] for ids in sequences]
    rows: list[list[np.ndarray]] = [[] for _ in sequences]
    for step in range(len(sequences) + count):
        now = [i for i in range(len(sequences)) if 0 <= step - i < len(pieces[i])]
        for i, found in zip(now, session.append_batch([(handles[i], pieces[i][step - i]) for i in now], rows="all")):
            rows[i].append(found)
    session.close()
    prefixes = {f"prefix.{i}": found[0] for i, found in enumerate(rows)}
    return {**prefixes, **{f"decode.{i}": np.concatenate(found[1:]) for i, found in enumerate(rows)}}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps({"octavo": octavo.__version__}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(check(**json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
