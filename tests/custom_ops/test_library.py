"""The library's Python side: where it is, what happens when it is not there, and that asking costs no heavy import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnxruntime as ort
import pytest
from octavo import custom_ops
from octavo.errors import LibraryError


def test_library_path_is_a_file() -> None:
    assert custom_ops.library_path().is_file()


def test_a_missing_library_is_a_library_error_with_a_hint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(custom_ops, "files", lambda package: tmp_path)
    with pytest.raises(LibraryError, match="does not exist") as caught:
        custom_ops.library_path()
    assert "pip install" in caught.value.hint


def test_a_file_that_is_no_library_is_a_library_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "liboctavo_ops.so").write_bytes(b"not a library")
    monkeypatch.setattr(custom_ops, "files", lambda package: tmp_path)
    with pytest.raises(LibraryError, match="does not load"):
        custom_ops.register(ort.SessionOptions())


def test_registering_twice_and_in_many_options_is_fine() -> None:
    for _ in range(3):
        custom_ops.register(ort.SessionOptions())


def test_importing_is_light() -> None:
    heavy = "('onnx', 'onnxruntime', 'onnxscript', 'numpy')"
    code = f"import sys, octavo.custom_ops, octavo.custom_ops.contract; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout.strip() == "[]"
