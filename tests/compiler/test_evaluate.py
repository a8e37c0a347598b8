"""`evaluate` against the same figures computed with NumPy from the logits alone; models that are worse must look worse."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import octavo
import pytest
from octavo.compiler.evaluate import evaluate_runners, windows_of
from octavo.errors import CapacityError, ModelError, OptionError, RequestError
from octavo.models.tiny import tiny_llama_onnx

TEXT = "A careful shop collates: one person turns the leaves, another follows in a copy that is known to be good. " * 8


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """`model.onnx`, artifacts of it in three formats, `other/` of other weights, and `text.txt`."""
    folder = tmp_path_factory.mktemp("evaluate")
    tiny_llama_onnx(folder)
    (folder / "text.txt").write_text(TEXT)
    for name, weights, cache in (("exact", "fp32", "fp32"), ("int8", "int8", "int8"), ("int4", "int4", "int8")):
        octavo.compile(folder / "model.onnx", folder / name, options=octavo.CompileOptions(weights=weights, kv_cache=cache))
    octavo.compile(tiny_llama_onnx(folder / "source", seed=5), folder / "other")
    return folder


class Fixed:
    """A model that has the same logits for every token."""

    def __init__(self, *logits: float) -> None:
        self.row = np.array(logits, np.float32)

    def predict(self, ids: np.ndarray) -> np.ndarray:
        return np.tile(self.row, (len(ids), 1))


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(np.float64(logits))
    return e / e.sum(axis=-1, keepdims=True)


def test_figures_are_those_of_numpy(place):
    context, count = 96, 250
    report = octavo.evaluate(place / "int4", place / "text.txt", against=place / "model.onnx", context=context, tokens=count)
    with octavo.load(place / "int4") as ours, octavo.load(place / "model.onnx", options=octavo.RuntimeOptions(optimize_graph=False)) as theirs:
        ids = ours.tokenizer.encode(TEXT)[:count]
        windows = [ids[:96], ids[96:192], ids[192:]]
        q, p = (np.concatenate([softmax(model.predict(w)) for w in windows]) for model in (ours, theirs))
    target = [(at, token) for start, w in zip((0, 96, 192), windows) for at, token in zip(range(start, start + len(w)), w[1:])]
    kl = (p * (np.log(p) - np.log(q))).sum(axis=1)
    d = report.divergence
    assert (report.rows, report.predicted, report.context) == (count, count - 3, context)
    for name, value in {
        "mean_kl": kl.mean(), "median_kl": np.median(kl), "p99_kl": np.percentile(kl, 99), "max_kl": kl.max(),
        "mean_kl_error": kl.std(ddof=1) / math.sqrt(count), "perplexity": math.exp(-np.mean([math.log(p[t]) for t in target])),
    }.items():
        assert getattr(d, name) == pytest.approx(value, rel=1e-6, abs=1e-9), name
    assert d.top1 == (q.argmax(axis=1) == p.argmax(axis=1)).mean()
    assert report.perplexity == pytest.approx(math.exp(-np.mean([math.log(q[t]) for t in target])), rel=1e-9)


def test_a_worse_model_looks_worse(place):
    """Exact, int8, int4, other weights altogether: each further from the source."""
    reports = [octavo.evaluate(place / name, place / "text.txt", against=place / "model.onnx", tokens=200) for name in ("exact", "int8", "int4", "other")]
    kl = [report.divergence.mean_kl for report in reports]
    assert kl[0] < 1e-9 < kl[1] < kl[2] < kl[3] and kl[3] > 0.1, kl
    assert reports[0].divergence.top1 == 1 and reports[3].divergence.top1 < 0.6
    assert reports[0].perplexity == pytest.approx(reports[0].divergence.perplexity, rel=1e-5)


def test_any_two_can_be_compared(place):
    """An artifact against an artifact, and a graph alone."""
    same = octavo.evaluate(place / "int4", place / "text.txt", against=place / "int4", tokens=100)
    assert same.divergence.mean_kl == same.divergence.max_kl == 0 and same.divergence.top1 == 1
    alone = octavo.evaluate(place / "model.onnx", place / "text.txt", tokens=100)
    assert alone.divergence is None and alone.against is None and "against" not in alone.to_text()


def test_known_distributions():
    ids = [np.array([0, 1, 1, 0]), np.array([1, 0])]
    found = evaluate_runners(Fixed(0, math.log(3)), Fixed(1, 1), ids)
    kl = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert found["divergence"].mean_kl == pytest.approx(kl) == found["divergence"].max_kl
    assert found["divergence"].perplexity == pytest.approx(2) and found["divergence"].top1 == 0, "of two equals the first counts"
    assert found["perplexity"] == pytest.approx(math.exp(-(2 * math.log(0.75) + 2 * math.log(0.25)) / 4))
    assert (found["rows"], found["predicted"]) == (6, 4)
    wide = evaluate_runners(Fixed(*[0.0] * 50), None, ids)
    assert wide["perplexity"] == pytest.approx(50) and wide["perplexity_error"] == pytest.approx(0) and "divergence" not in wide


def test_large_logits_do_not_overflow():
    found = evaluate_runners(Fixed(1e4, -1e4), Fixed(1e4, -1e4), [np.array([0, 0])])
    assert found["perplexity"] == 1 and found["divergence"].mean_kl == 0


@pytest.mark.parametrize("length, context, sizes", [(10, 4, [4, 4, 2]), (9, 4, [4, 4]), (8, 4, [4, 4]), (3, 8, [3])])
def test_windows_hold_every_token_that_can_be_used(length, context, sizes):
    windows = list(windows_of(np.arange(length), context))
    assert [len(window) for window in windows] == sizes and np.array_equal(np.concatenate(windows), np.arange(sum(sizes)))


def test_bad_input(place, tmp_path):
    def run(model: str = "exact", text: Path = place / "text.txt", **options: object) -> None:
        octavo.evaluate(place / model, text, **options)

    for options in ({"context": 1}, {"context": 1.5}, {"context": True}, {"tokens": 1}, {"tokens": 0}):
        with pytest.raises(OptionError):
            run(**options)
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(OptionError, match="UTF-8"):
        run(text=tmp_path / "latin")
    (tmp_path / "empty").write_text("")
    with pytest.raises(OptionError, match="nothing to predict"):
        run(text=tmp_path / "empty")
    with pytest.raises(CapacityError):
        run(context=4096)
    for name in ("model.onnx", "model.onnx.data"):
        (tmp_path / name).write_bytes((place / name).read_bytes())
    with pytest.raises(RequestError, match=r"tokenizer\.json"):
        octavo.evaluate(tmp_path / "model.onnx", place / "text.txt")
    with pytest.raises(ModelError, match="can't be compared"):
        evaluate_runners(Fixed(1, 2), Fixed(1, 2, 3), [np.array([0, 1])])
