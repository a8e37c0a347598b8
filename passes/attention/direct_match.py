"""The attentions of a graph that are taken at their word, where no proof was had and none is needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir

from ..observe import Observation
from ..outcome import Refusal
from .direct import DirectSite
from .direct_op import read_direct_op
from .direct_softmax import read_direct_softmax
from .laboratory import Laboratory
from .site import AttentionSite

Anchors = Sequence[tuple[ir.Node, AttentionSite | Refusal]]


def match_direct(observation: Observation, anchors: Anchors, wanted: Callable[[AttentionSite], bool]) -> dict[str, DirectSite | Refusal]:
    """For each anchor that was refused as a proved site, or is `wanted`: a site as the graph spells it, or why that can't be had; by name."""
    found: dict[str, DirectSite | Refusal] = {}
    lab = Laboratory(observation)
    for node, proved in anchors:
        if isinstance(proved, AttentionSite) and not wanted(proved):
            continue
        name = proved.name if isinstance(proved, AttentionSite) else proved.where
        read: DirectSite | Refusal | None = None
        if (node.domain, node.op_type) == ("", "Attention"):
            read = read_direct_op(node, lab, name)
        elif (node.domain, node.op_type) == ("", "Softmax"):
            read = read_direct_softmax(node, lab, name)
        if read is not None or isinstance(proved, Refusal):
            found[name] = read or proved  # type: ignore[assignment]
    return found
