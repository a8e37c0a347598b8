"""The ONNX project's own backend tests of `Attention`, compiled and run: every result is theirs, and what FlashAttention leaves alone has a reason."""

from __future__ import annotations

import warnings
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import octavo
import onnx
import pytest


@cache
def cases() -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other operators' cases overflow on purpose
        from onnx.backend.test.case.node import collect_testcases

        found = collect_testcases(None)
    return {case.name: case for case in found if case.name.startswith("test_attention_") and not case.name.endswith("_expanded")}


def op_of(name: str) -> onnx.NodeProto:
    return cases()[name].model.graph.node[0]


def wants_scores(name: str) -> bool:
    return len(op_of(name).output) > 3


@pytest.mark.parametrize("name", sorted(cases()))
def test_the_result_is_theirs(name: str, tmp_path: Path) -> None:
    case = cases()[name]
    report = octavo.compile(case.model, tmp_path / "out")
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    ops = [node.op_type for node in graph.node]
    if wants_scores(name):
        assert report.kind == "baseline" and "Attention" in ops
        assert any("the score matrix as an output" in refusal.reason for refusal in report.refusals)
    else:
        assert report.kind == "stateless" and ops.count("FlashAttention") == 1 and "Attention" not in ops
        assert not report.refusals and [site.target for site in report.sites] == ["FlashAttention"]
    with octavo.load(tmp_path / "out", options=octavo.RuntimeOptions(threads=1)) as model:
        for inputs, outputs in case.data_sets:
            got = model.run(dict(zip([value.name for value in case.model.graph.input], inputs)))
            for value, want in zip(case.model.graph.output, outputs):
                assert got[value.name].dtype == want.dtype
                if wants_scores(name):  # onnxruntime's kernel writes the lowest number where theirs has −inf
                    want = np.maximum(want, np.finfo(want.dtype).min)
                exact = [array.astype(np.float64) for array in (got[value.name], want)]
                rtol = 2**-6 if name.endswith("bf16") else case.rtol  # theirs is rounded to 8 bits after each step, ours once
                np.testing.assert_allclose(*exact, rtol=rtol, atol=max(case.atol, 1e-6))


def test_what_they_ask_for() -> None:
    """93 cases in onnx 1.23: a release that adds some is looked at, and this line with it."""
    assert Counter(wants_scores(name) for name in cases()) == {False: 75, True: 18}
