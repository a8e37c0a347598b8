"""`AttentionSite`: the one description of an attention, whatever an exporter wrote. Matchers make it, lowerings read it.

Everything about a site is named here, used by every lowering, or a reason to refuse: there are no open attributes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

MaskKind = Literal["causal", "window", "bidirectional"]


@dataclass(frozen=True)
class Mask:
    """What a mask was proved to mean. `window` w ≥ 1 only with kind "window": position p sees p−w+1 … p.

    `key_padding` says that the graph's attention_mask input hides keys as well.
    """

    kind: MaskKind
    window: int | None = None
    key_padding: bool = False


@dataclass(frozen=True)
class Rotary:
    """A rotary embedding recognised on q and k. `cos`/`sin` are the graph's own values (per token, r/2 wide), whose cone is later read into a table."""

    cos: ir.Value
    sin: ir.Value
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

    query, key, value   this step's tokens, before the cache and before any repetition of KV heads; [B, heads, S, D] or [B, S, heads·D]
                        as `layout` says. With `rotary` they are the values before it was applied.
    output              the value to replace: [B, H, S, E] (BHSD) or [B, S, H·E] (BSH) as `output_layout` says.
    nodes               what computes the site (for reports and for removal by dead-code elimination).
    """

    name: str
    query: ir.Value
    key: ir.Value
    value: ir.Value
    output: ir.Value
    layout: Literal["BHSD", "BSH"]
    output_layout: Literal["BHSD", "BSH"]
    num_heads: int
    kv_heads: int
    head_size: int
    value_size: int
    scale: float
    mask: Mask
    cache: Cache | None = None
    rotary: Rotary | None = None
    softcap: float = 0.0
    nodes: tuple[ir.Node, ...] = ()
