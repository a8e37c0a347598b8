"""What the pipeline hands to emit: a graph, and what it has become."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from ..models.interface import GraphInterface
from ..models.spec import Kind, ModelSpec


@dataclass(frozen=True)
class Rewritten:
    """`spec` is None where the kind has no cache of ours; `quantized` tells whether the source stores weights quantized, `rounded` whether
    some are stored rounded here, and are no longer what the source means."""

    model: ir.Model
    kind: Kind
    interface: GraphInterface
    spec: ModelSpec | None
    quantized: bool
    rounded: bool = False
