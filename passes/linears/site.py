"""`LinearSite`: the one description of a product with a constant matrix, whatever an exporter wrote. Matchers make it, the lowering reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

Gate = Literal["silu", "gelu", "gelu_tanh"]


@dataclass(frozen=True)
class LinearSite:
    """y = x·W (+ bias).

    name        where it stands: `layers.3.attn.q`, `layers.3.mlp.down`, `head` (names.py has them all)
    node        the MatMul, Gemm or MatMulNBits
    input       [..., K]
    weight      the initializer: [K, M], or [M, K] where `transposed`; MatMulNBits' packed one
    bias        a constant of M elements, or None
    output      [..., M], behind the bias
    """

    name: str
    node: ir.Node
    input: ir.Value
    weight: ir.Value
    transposed: bool
    K: int
    M: int
    bias: ir.Value | None
    output: ir.Value

    @property
    def packed(self) -> bool:
        """Whether the weight is MatMulNBits'."""
        return self.node.op_type == "MatMulNBits"


@dataclass(frozen=True)
class EmbeddingSite:
    """Rows of a constant table [M, K] by token id. `name` is `embed`; a table that is a linear's weight too has that one's name and `weight`."""

    name: str
    node: ir.Node
    weight: ir.Value
    K: int
    M: int


@dataclass(frozen=True)
class Norm:
    """output = source/√(mean(source²) + epsilon)·weight, along the last axis. `weight` is a constant [K], or computed from constants."""

    source: ir.Value
    weight: ir.Value
    epsilon: float
    output: ir.Value


@dataclass(frozen=True)
class Rows:
    """Outputs [start, stop) of a linear: `value` in the graph."""

    site: LinearSite
    start: int
    stop: int
    value: ir.Value


@dataclass(frozen=True)
class GateSite:
    """output = act(gate)·up, both products of one input."""

    gate: Rows
    up: Rows
    activation: Gate
    output: ir.Value


@dataclass(frozen=True)
class Residual:
    """sum = product + other, of one shape."""

    other: ir.Value
    sum: ir.Value
