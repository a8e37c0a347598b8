"""How long a sequence may become: the smallest bound that the graph or its config states, or what the user asks for."""

from __future__ import annotations

from pathlib import Path

from ..errors import OptionError
from ..models.context import configured_context
from ..passes.attention.rotary import context_bound
from ..passes.observe import Observation
from .options import CompileOptions

# Taken where neither the graph nor a config.json says anything. Recorded, and easy to change with max_context.
UNSTATED_CONTEXT = 4096


def max_context_of(observation: Observation, folder: Path | None, options: CompileOptions) -> tuple[int, str]:
    """Tokens, and where the number comes from. OptionError where more is asked for than a table in the graph has rows."""
    table = context_bound(observation)
    if options.max_context is not None:
        if table is not None and options.max_context > table[0]:
            raise OptionError(
                f"max_context={options.max_context} is more than the {table[0]} rows of {table[1]}", hint=f"ask for {table[0]} or less",
            )
        return options.max_context, "max_context was given"
    configured = None if folder is None else configured_context(folder)
    if table is not None:
        # A table may be longer than what the model was trained for; the config then says less.
        return (configured, "config.json beside the source") if configured is not None and configured < table[0] else (table[0], f"rows of {table[1]}")
    if configured is not None:
        return configured, "config.json beside the source"
    return UNSTATED_CONTEXT, "nothing beside or in the graph states a bound; give max_context for another"
