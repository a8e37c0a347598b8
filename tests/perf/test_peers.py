"""What is compared side by side: the arithmetic of the table, and a random model that both engines read."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import octavo
import pytest

PEERS = Path(__file__).parent / "peers"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, PEERS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module      # where its dataclasses look for their annotations
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def compare() -> ModuleType:
    return script("compare")


def row(engine: str, turn: int, **figures: float) -> dict:
    return {"engine": engine, "workload": "w", "round": turn, **figures}


def test_ratios_are_of_medians_to_the_best_peer_and_above_one_is_better(compare):
    rows = [row("octavo", turn, decode_tok_s=speed, load_s=0.1) for turn, speed in enumerate((300, 10, 310))]
    rows += [row("llama.cpp", turn, decode_tok_s=100, load_s=0.5) for turn in range(3)]
    rows += [row("openvino", turn, decode_tok_s=speed, load_s=0.2) for turn, speed in enumerate((90, 150, 160))]
    found = compare.medians(rows)
    assert found["w", "decode_tok_s"]["octavo"] == [300, 10, 310]
    assert compare.ratio("decode_tok_s", found["w", "decode_tok_s"], "octavo") == ("openvino", 2.0)
    assert compare.ratio("load_s", found["w", "load_s"], "octavo") == ("openvino", pytest.approx(2.0))
    assert compare.ratio("load_s", {"octavo": [1, 1, 1]}, "octavo") is None, "there is no peer"
    assert "2.00 (openvino)" in compare.table(rows, markdown=True) and "2.00 (openvino)" in compare.table(rows, markdown=False)


def test_a_workload_that_octavo_skipped_has_no_ratio(compare):
    rows = [row("octavo", 0, skipped="too long"), row("llama.cpp", 0, decode_tok_s=100)]
    assert "–" in compare.table(rows, markdown=True).splitlines()[-1]
    assert compare.limits(rows) == []


def test_a_random_model_is_kept_to_the_bit_and_stays_sane(tmp_path):
    random_gguf = script("random_gguf")
    size = random_gguf.SIZES["tiny"]
    random_gguf.write(size, tmp_path / "a.gguf")
    random_gguf.write(size, tmp_path / "b.gguf", seed=1)
    random_gguf.write(size, tmp_path / "again.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "again.gguf").read_bytes() != (tmp_path / "b.gguf").read_bytes()
    graph = octavo.import_model(tmp_path / "a.gguf", tmp_path / "plain")
    exact = octavo.CompileOptions(weights="stored", activations="fp32", kv_cache="fp32")
    assert octavo.compile(graph, tmp_path / "art", options=exact).kind == "paged"
    with octavo.load(tmp_path / "art") as ours, octavo.load(graph, options=octavo.RuntimeOptions(optimize_graph=False)) as source:
        ids = np.arange(1, 60)
        logits = ours.predict(ids)
        assert np.allclose(logits, source.predict(ids), rtol=1e-4, atol=1e-4)
    assert 0.3 < logits.std() < 3 and len(set(logits.argmax(axis=1))) > 10
