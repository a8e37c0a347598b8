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
FAMILIES = "llama-mqa,mistral,qwen3,gemma3,granite,opt"
EXPORTERS = "torchscript17,torchscript17-nocache"

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("torch", "transformers")), reason="needs torch and transformers"
)


def _run(cache: Path, out: Path, *more: str) -> list[dict[str, Any]]:
    command = [sys.executable, str(RUN), "--cache", str(cache), "--out", str(out), "--families", FAMILIES, "--exporters", EXPORTERS, *more]
    subprocess.run(command, check=True, timeout=600, stdout=subprocess.DEVNULL)
    return json.loads((out / "coverage.json").read_text())["cells"]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("matrix")


def test_every_cell_of_the_fixed_part_is_paged(cache: Path, tmp_path: Path) -> None:
    cells = _run(cache, tmp_path)
    assert len(cells) == len(FAMILIES.split(",")) * len(EXPORTERS.split(","))
    assert {(cell["family"], cell["exporter"]): cell for cell in cells if cell["verdict"] != "paged"} == {}
    table = (tmp_path / "coverage.md").read_text()
    assert table.count("| paged") == len(cells)


def test_logits_that_are_off_by_more_than_the_limit_are_wrong(cache: Path, tmp_path: Path) -> None:
    """The negative control: the same graphs against an oracle in which one decoded row is the next one's."""
    _run(cache, tmp_path)
    for path in cache.glob("*/oracle.npz"):
        oracle = dict(np.load(path))
        oracle["decode.1"] = np.roll(oracle["decode.1"], 1, axis=0)
        np.savez(path, **oracle)
    cells = _run(cache, tmp_path, "--only", "check", "--fresh")
    assert {cell["verdict"] for cell in cells} == {"WRONG"}
    assert all("decode" in cell["reason"] for cell in cells)
