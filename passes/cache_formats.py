"""Which layer's keys and values are stored how: a map of layer ranges to cache formats, read in order."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import get_args

from ..errors import OptionError
from ..models.spec import CacheName

_RANGE = re.compile(r"(\d+)(?:-(\d+))?")
_EXAMPLE = 'for example {"0-1": "fp16", "*": "int8"}'


def layer_range(key: object) -> range | None:
    """The layers that a key means: `3`, `0-1` (both ends), or `*` (None). OptionError, naming it, for anything else."""
    if key == "*":
        return None
    found = _RANGE.fullmatch(key) if isinstance(key, str) else None
    if found is None or int(found[2] or found[1]) < int(found[1]):
        raise OptionError(f'kv_cache: {key!r} is no layer, range of layers or "*"', hint=_EXAMPLE)
    return range(int(found[1]), int(found[2] or found[1]) + 1)


def check_formats(formats: Mapping[str, CacheName]) -> None:
    """OptionError, naming the key, for one that is no range, or whose format is not known."""
    if not formats:
        raise OptionError("kv_cache: the map is empty", hint=_EXAMPLE)
    for key, cache in formats.items():
        layer_range(key)
        if cache not in get_args(CacheName):
            raise OptionError(f"kv_cache: {cache!r} for {key!r} is not one of {', '.join(map(repr, get_args(CacheName)))}")


def cache_formats(formats: Mapping[str, CacheName], num_layers: int) -> list[CacheName]:
    """The format of each of `num_layers` attentions, counted in execution order: of the first range that holds it, else fp16.

    Raises OptionError, naming the key, for what is no range, for a layer that isn't there, and for a range that earlier ones take whole.
    """
    found: dict[int, CacheName] = {}
    for key, cache in formats.items():
        layers = layer_range(key) or range(num_layers)
        if layers.stop > num_layers:
            raise OptionError(f"kv_cache: {key!r} names layer {layers.stop - 1}, and the model has {num_layers}", hint=f"layers are 0 to {num_layers - 1}")
        if all(layer in found for layer in layers):
            raise OptionError(f"kv_cache: {key!r} decides nothing, earlier ranges come first", hint="ranges are read in order: put the general one last")
        for layer in layers:
            found.setdefault(layer, cache)
    return [found.get(layer, "fp16") for layer in range(num_layers)]
