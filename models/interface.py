"""What a graph's inputs and outputs are for. Names differ from exporter to exporter; roles don't.

The compiler writes roles into the manifest; for a plain `.onnx` they are guessed by `roles.guess_interface`, and a
graph with an input of unknown role can be `run`, never driven as a decoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal[
    # a decoder in its exporter's form
    "input_ids",       # int [B, S]
    "position_ids",    # int [B, S]
    "attention_mask",  # int or bool [B, past + S], 1 = real token
    "past_key",        # float [B, G, past, D], `layer` tells which
    "past_value",
    "present_key",     # float [B, G, past + S, D]
    "present_value",
    # of a cache with a fixed number of places, which the graph writes by index
    "cache_position",  # int [S]: where each token's keys go, past … past + S − 1
    "write_indices",   # int [B]: where the first one's go, past
    "logits",          # float [B, S, V], or [R, V] when token-flat
    "hidden",          # float [B, S, K], an encoder's last states
    # the token-flat form of a paged decoder (names equal roles; docs/reference/graph-interface.md)
    "cumulative_sequence_length",
    "past_seqlens",
    "logit_rows",
    "parent",
    "block_table",     # `layer` is the KV group
    "slot_mapping",    # `layer` is the KV group
    "cache_key",       # `layer` is the cache layer
    "cache_value",
    "other",           # anything else: fed and read by name through `run` only
]


@dataclass(frozen=True)
class GraphPort:
    """A graph input or output.

    `shape` holds ints and symbol names (None: unknown); `dtype` is a NumPy name ("float32", "int64", "bool").
    """

    name: str
    dtype: str
    shape: tuple[int | str | None, ...] | None
    role: Role
    layer: int | None = None


@dataclass(frozen=True)
class GraphInterface:
    """A graph's inputs and outputs with their roles."""

    inputs: tuple[GraphPort, ...]
    outputs: tuple[GraphPort, ...]

    def input(self, role: Role, layer: int | None = None) -> GraphPort | None:
        """The input with this role (and layer), or None."""
        return next((port for port in self.inputs if port.role == role and port.layer == layer), None)

    def output(self, role: Role, layer: int | None = None) -> GraphPort | None:
        """The output with this role (and layer), or None."""
        return next((port for port in self.outputs if port.role == role and port.layer == layer), None)
