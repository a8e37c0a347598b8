"""The attentions of a graph that are taken at their word, where no proof was had and none is needed."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from ..observe import Observation
from ..outcome import Refusal
from .direct import DirectSite
from .direct_op import read_direct_op
from .direct_softmax import read_direct_softmax
from .laboratory import Laboratory
from .site import AttentionSite

Anchors = Sequence[tuple[ir.Node, AttentionSite | Refusal]]


def match_direct(observation: Observation, anchors: Anchors) -> tuple[DirectSite | Refusal, ...]:
    """For each anchor that was refused as a proved site: a site as the graph spells it, or why that can't be had either."""
    found: list[DirectSite | Refusal] = []
    lab = Laboratory(observation)
    for node, refusal in anchors:
        if isinstance(refusal, AttentionSite):
            continue
        read: DirectSite | Refusal | None = None
        if (node.domain, node.op_type) == ("", "Attention"):
            read = read_direct_op(node, lab, refusal.where)
        elif (node.domain, node.op_type) == ("", "Softmax"):
            read = read_direct_softmax(node, lab, refusal.where)
        found.append(refusal if read is None else read)
    return tuple(found)
