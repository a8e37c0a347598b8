"""Sites that read the keys and values of an earlier one: one cache between them, which that earlier one *owns*."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .site import AttentionSite


def share_caches(sites: Sequence[AttentionSite]) -> tuple[AttentionSite, ...]:
    """The same sites, each that attends to the very keys (as they are after rotary and norm), values and cache of an earlier one naming it.

    Nothing is compared but the graph's own values: what is computed alike in two places, turned by another angle, or appended to a past of
    its own is not shared.
    """
    first = dict[tuple[object, ...], str]()
    marked = []
    for site in sites:
        read = (
            site.turned_key, site.turned_key_layout, site.value, site.value_layout, site.kv_heads, site.head_size, site.value_size,
            None if site.cache is None else (site.cache.past_key, site.cache.past_value),
        )
        owner = first.setdefault(read, site.name)
        marked.append(site if owner == site.name else replace(site, owner=owner))
    return tuple(marked)


def readers_of(sites: Sequence[AttentionSite]) -> tuple[tuple[int, ...], ...]:
    """Places of the sites of each cache, the owner's first, in the order of the owners."""
    places = {site.name: [index] for index, site in enumerate(sites) if site.owner is None}
    for index, site in enumerate(sites):
        if site.owner is not None:
            places[site.owner].append(index)
    return tuple(map(tuple, places.values()))


def widest(windows: Sequence[int | None]) -> int | None:
    """The window of a cache that all these read: None, all of the past, is wider than any number."""
    return None if None in windows else max(window for window in windows if window is not None)
