"""What a decoder is, as far as running it needs: sizes, layers of cache, groups of layers that share a window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["paged", "contiguous", "stateless", "baseline"]
CacheName = Literal["fp32", "fp16", "int8"]


@dataclass(frozen=True)
class CacheLayer:
    """Keys and values of one attention: G heads of D (keys) and E (values) in format `cache`. `group` is its KV group's index.

    Layers that share one cache (a later layer that reads an earlier layer's keys) have one CacheLayer between them.
    """

    group: int
    kv_heads: int
    head_size: int
    value_size: int
    cache: CacheName


@dataclass(frozen=True)
class CacheGroup:
    """Layers whose blocks live and die together: same window (None: all of the past), head sizes and bytes per token."""

    window: int | None


@dataclass(frozen=True)
class ModelSpec:
    """A decoder's sizes. `vocab_size` is the width of its logits, `max_context` the longest sequence its graph can express.

    `cache_layers[i]` describes the caches `kv.{i}.key` and `kv.{i}.value`.
    """

    vocab_size: int
    max_context: int
    cache_layers: tuple[CacheLayer, ...]
    cache_groups: tuple[CacheGroup, ...]
