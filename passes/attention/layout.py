"""Operands and results of a site as [B, S, heads·size], the form that batched attention ops take."""

from __future__ import annotations

import onnx_ir as ir

from ..build import Builder
from ..observe import Observation
from .site import AttentionSite


def tokens_last(build: Builder, value: ir.Value, layout: str, width: int) -> ir.Value:
    """A site's operand as [B, S, width]."""
    if layout == "BHSD":
        value = build.transpose(value, (0, 2, 1, 3))
    return build.reshape(value, [0, 0, width])


def output_tail(observation: Observation, site: AttentionSite) -> tuple[int, ...]:
    """The sizes behind [B, S] of the site's output once heads come last: (H, E) where it is BHSD."""
    if site.output_layout == "BHSD":
        return (site.num_heads, site.value_size)
    dims = observation.dims(site.output)
    assert dims is not None and not any(dim.letters for dim in dims[2:]), "a site's output has a known layout"
    return tuple(dim.factor for dim in dims[2:])


def replacement(build: Builder, attention: ir.Value, site: AttentionSite, tail: tuple[int, ...]) -> ir.Value:
    """[B, S, H·E] as the value that the graph goes on with."""
    split = attention if len(tail) == 1 else build.reshape(attention, [0, 0, *tail])
    return build.transpose(split, (0, 2, 1, 3)) if site.output_layout == "BHSD" else split
