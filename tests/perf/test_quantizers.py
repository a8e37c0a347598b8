"""The rows of the table of quantizers are what a compile takes."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import octavo
import pytest


def test_rows_are_options_and_those_that_calibrate_are_given_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    bench = import_module("bench_quantizers")
    for name, given in bench.ROWS.items():
        text = {"calibration": "other.txt"} if bench.calibrated(given) else {}
        assert octavo.CompileOptions(**{"kv_cache": "int8", **given, **text}).calibrates == bool(text), name
