"""A fixed part of the coverage matrix, made by the script itself: every cell paged and right, and a wrong one told."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

RUN = Path(__file__).with_name("run.py")
FAMILIES = "llama-mqa,mistral,qwen3,gemma3,granite,opt,bloom,gptj,falcon-new,mixtral"
EXPORTERS = "torchscript17,torchscript17-nocache"
CONTROL = ("llama-mqa,opt", "torchscript17")

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("torch", "transformers")), reason="needs torch and transformers"
)


def _run(cache: Path, out: Path, families: str, exporters: str, *more: str) -> list[dict[str, Any]]:
    command = [sys.executable, str(RUN), "--cache", str(cache), "--out", str(out), "--families", families, "--exporters", exporters, *more]
    subprocess.run(command, check=True, timeout=600, stdout=subprocess.DEVNULL)
    return json.loads((out / "coverage.json").read_text())["cells"]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("matrix")


def test_every_cell_of_the_fixed_part_is_paged(cache: Path, tmp_path: Path) -> None:
    cells = _run(cache, tmp_path, FAMILIES, EXPORTERS)
    assert len(cells) == len(FAMILIES.split(",")) * len(EXPORTERS.split(","))
    assert {(cell["family"], cell["exporter"]): cell for cell in cells if cell["verdict"] != "paged"} == {}
    table = (tmp_path / "coverage.md").read_text()
    assert table.count("| paged") == len(cells)


def test_a_refusal_is_told_with_its_reason_and_a_missing_cell_shuts_the_gate(cache: Path, tmp_path: Path) -> None:
    """What is there is as it should be, and the matrix asks for more of the family."""
    with pytest.raises(subprocess.CalledProcessError, match="exit status 2"):
        _run(cache, tmp_path, "llama-mqa", "torchscript17,optimizer-torchscript17,int8-torchscript17", "--gate")
    *paged, refused = json.loads((tmp_path / "coverage.json").read_text())["cells"]
    assert [cell["verdict"] for cell in paged] == ["paged", "paged"]
    assert (refused["verdict"], refused["allowed"]) == ("refused", "per-tensor dynamic quantization")
    table = (tmp_path / "coverage.md").read_text()
    assert "one scale over all tokens" in table and "cells are missing" in table


def test_logits_that_are_off_by_more_than_the_limit_are_wrong(cache: Path, tmp_path: Path) -> None:
    """The negative control: the same graphs against an oracle in which one decoded row is the next one's."""
    _run(cache, tmp_path, *CONTROL)
    for path in cache.glob("*/oracle.npz"):
        oracle = dict(np.load(path))
        oracle["decode.1"] = np.roll(oracle["decode.1"], 1, axis=0)
        np.savez(path, **oracle)
    cells = _run(cache, tmp_path, *CONTROL, "--only", "check", "--fresh")
    assert {cell["verdict"] for cell in cells} == {"WRONG"}
    assert all("decode" in cell["reason"] for cell in cells)
