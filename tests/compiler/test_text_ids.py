"""Whole texts are read whole, whatever a tokenizer.json says of cutting and padding."""

from __future__ import annotations

from pathlib import Path

import pytest
from octavo.compiler.text_ids import text_ids
from octavo.errors import ModelError
from octavo.models.tiny import write_tiny_tokenizer
from tokenizers import Tokenizer


def test_a_tokenizer_that_cuts_and_pads_does_not_here(tmp_path: Path) -> None:
    write_tiny_tokenizer(tmp_path)
    file = tmp_path / "tokenizer.json"
    whole = text_ids(file, "once upon a time " * 20)
    cutting = Tokenizer.from_file(str(file))
    cutting.enable_truncation(4)
    cutting.save(str(file))
    assert len(Tokenizer.from_file(str(file)).encode("once upon a time " * 20).ids) == 4
    assert text_ids(file, "once upon a time " * 20) == whole and len(whole) > 4


def test_a_broken_file_is_a_models_fault(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="can't be read"):
        text_ids(tmp_path / "tokenizer.json", "x")
