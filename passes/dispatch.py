"""Rows that go where all tokens together say: mixtures of experts whose experts each take some of the tokens are written so."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from .extract import cone
from .normalize import is_standard

# How many rows go where follows from all tokens.
DISPATCHING = frozenset({"NonZero", "Compress", "Unique"})


def dispatch_reason(node: ir.Node, is_data: Callable[[ir.Value], bool]) -> str:
    """What to say of `node`, whose rows or lengths follow from what the tokens are: that experts are dispatched, where a TopK over data chose them."""
    if any(is_standard(before, "TopK") and is_data(before.outputs[0]) for before in cone(list(node.outputs)).nodes):
        return "experts dispatched across tokens"
    return "rows are picked or written by what the tokens are, across tokens"
