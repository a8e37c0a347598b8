"""The longest sequence that a config.json states."""

from __future__ import annotations

from pathlib import Path

import pytest
from octavo.models.context import configured_context


@pytest.mark.parametrize(("text", "expected"), [
    ('{"max_position_embeddings": 2048}', 2048),
    ('{"n_ctx": 1024, "n_positions": 512}', 512),
    ('{"text_config": {"max_position_embeddings": 4096}, "vision_config": {"n_positions": 64.0}}', 4096),
    ('{"max_position_embeddings": true}', None),
    ('{"max_position_embeddings": 0, "n_ctx": -1}', None),
    ('{"max_position_embeddings": "2048"}', None),
    ("[2048]", None),
    ("{", None),
    ("[" * 100_000, None),
    (None, None),
])
def test_configured_context(tmp_path: Path, text: str | None, expected: int | None) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    assert configured_context(tmp_path) == expected
