"""The longest sequence that a model's config.json states: what its graph was trained for, where the graph itself does not say."""

from __future__ import annotations

import json
from pathlib import Path

# The names under which model families give the length of their position table.
_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "seq_length")


def configured_context(folder: Path) -> int | None:
    """Tokens: the smallest that the config.json in `folder`, or a section of it, gives. None where it gives none or can't be read."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(config, dict):
        return None
    sections = [config, *(section for section in config.values() if isinstance(section, dict))]
    # type() and not isinstance: True is an int, and no length.
    return min((section[key] for section in sections for key in _KEYS if type(section.get(key)) is int and section[key] > 0), default=None)
