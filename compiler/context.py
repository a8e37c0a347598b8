"""How long a sequence may become: the smallest bound that the graph or its config states, or what the user asks for."""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import OptionError
from ..passes.attention.rotary import context_bound
from ..passes.observe import Observation
from .options import CompileOptions

# Taken where neither the graph nor a config.json says anything. Recorded, and easy to change with max_context.
UNSTATED_CONTEXT = 4096

_CONFIG_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "seq_length")


def max_context_of(observation: Observation, folder: Path | None, options: CompileOptions) -> tuple[int, str]:
    """Tokens, and where the number comes from. OptionError where more is asked for than a table in the graph has rows."""
    table = context_bound(observation)
    if options.max_context is not None:
        if table is not None and options.max_context > table[0]:
            raise OptionError(
                f"max_context={options.max_context} is more than the {table[0]} rows of {table[1]}", hint=f"ask for {table[0]} or less",
            )
        return options.max_context, "max_context was given"
    configured = _configured(folder)
    if table is not None:
        # A table may be longer than what the model was trained for; the config then says less.
        return (configured, "config.json beside the source") if configured is not None and configured < table[0] else (table[0], f"rows of {table[1]}")
    if configured is not None:
        return configured, "config.json beside the source"
    return UNSTATED_CONTEXT, "nothing beside or in the graph states a bound; give max_context for another"


def _configured(folder: Path | None) -> int | None:
    """The context length in config.json, if there is one that can be read."""
    if folder is None:
        return None
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(config, dict):
        return None
    sections = [config, *(section for section in config.values() if isinstance(section, dict))]
    found = [section[key] for section in sections for key in _CONFIG_KEYS if isinstance(section.get(key), int) and section[key] > 0]
    return min(found, default=None)
