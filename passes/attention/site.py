"""`AttentionSite`: the one description of an attention, whatever an exporter wrote. Matchers make it, lowerings read it.

Everything about a site is named here, used by every lowering, or a reason to refuse: there are no open attributes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import onnx_ir as ir

if TYPE_CHECKING:
    from .rotary import Rotation

MaskKind = Literal["causal", "window", "chunked", "prefix", "bidirectional"]


@dataclass(frozen=True)
class Mask:
    """What a mask was proved to mean.

    window       w ≥ 1 with kind "window" alone: position p sees p−w+1 … p.
    key_padding  the graph's attention_mask input hides keys as well.
    chunk        c ≥ 1 with kind "chunked" alone: position p sees floor(p / c)·c … p.
    prefix       n with kind "prefix" alone: position p sees 0 … p and all of the first n.
    slopes       ALiBi: slopes[h]·(key − query position) is added to the scores of head h; empty: nothing is.
    positional   proved where positions count up by one in a sequence; others than that change the mask (several sequences packed in a row).
    """

    kind: MaskKind
    window: int | None = None
    key_padding: bool = False
    chunk: int | None = None
    prefix: int | None = None
    slopes: tuple[float, ...] = ()
    positional: bool = False


@dataclass(frozen=True)
class Rotary:
    """A rotary embedding recognised on q and k: how each is turned, and the values that come out (`read_tables` gives the angles)."""

    query: Rotation
    key: Rotation
    width: int
    interleaved: bool


@dataclass(frozen=True)
class Cache:
    """The graph's own key/value cache of a site: its graph inputs, and the graph outputs that carry the grown cache. BNSH."""

    past_key: ir.Value
    past_value: ir.Value
    present_key: ir.Value
    present_value: ir.Value


@dataclass(frozen=True)
class AttentionSite:
    """One attention: softmax(softcap(scale · q·kᵀ) + mask) · v.

    query, key, value   this step's tokens, before the cache and before any repetition of KV heads, each in its own layout: "BHSD" is
                        [B, heads, S, D], "BSH" is [B, S, …] with heads·D elements in that order behind. With `rotary`, query and key
                        are the values before it was applied.
    turned_query/_key   the same two after `rotary`; equal to query and key without one.
    output              the value to replace, [B, H, S, E] or [B, S, …H·E] as `output_layout` says.
    scale               the factor on q·k, always explicit.
    sinks               a logit for each head that joins the softmax and carries no value; empty: none.
    owner               the earlier site whose keys and values (and cache) these are, value for value; None: its own.
    nodes               what computes the site (for reports; dead-code elimination removes them).
    """

    name: str
    query: ir.Value
    key: ir.Value
    value: ir.Value
    output: ir.Value
    query_layout: Literal["BHSD", "BSH"]
    key_layout: Literal["BHSD", "BSH"]
    value_layout: Literal["BHSD", "BSH"]
    output_layout: Literal["BHSD", "BSH"]
    turned_query: ir.Value
    turned_key: ir.Value
    turned_query_layout: Literal["BHSD", "BSH"]
    turned_key_layout: Literal["BHSD", "BSH"]
    num_heads: int
    kv_heads: int
    head_size: int
    value_size: int
    scale: float
    mask: Mask
    cache: Cache | None = None
    rotary: Rotary | None = None
    softcap: float = 0.0
    sinks: tuple[float, ...] = ()
    owner: str | None = None
    nodes: tuple[ir.Node, ...] = ()

    def with_rotary_in_graph(self) -> AttentionSite:
        """The same site for a lowering that leaves the rotary embedding where it is: its query and key are the turned ones."""
        return replace(
            self, query=self.turned_query, key=self.turned_key, query_layout=self.turned_query_layout, key_layout=self.turned_key_layout, rotary=None,
        )
