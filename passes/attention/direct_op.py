"""The standard `Attention` op (opsets 23 to 25) as a DirectSite: all of its inputs and attributes, whatever its mask means.

    causal    query i sees keys j ≤ i + offset, the offset being the past's length, or nonpad_kv_seqlen − S, or 0
    windows   i + offset − left ≤ j ≤ i + offset + right
    masks     bool (False hides) or added; shorter than the keys they are filled up with what hides
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import numpy as np
import onnx_ir as ir

from ..build import Builder
from ..observe import Observation
from ..outcome import Refusal
from .chain import attribute
from .direct import DirectSite, GivenMask, Operand, Size, Visibility, four_dimensions, same, scalar, sizes_of
from .direct_operand import traced_operands
from .laboratory import Laboratory

_ATTRIBUTES = frozenset({
    "is_causal", "kv_num_heads", "q_num_heads", "qk_matmul_output_mode", "scale", "softcap", "softmax_precision", "left_window_size", "right_window_size",
})
_COMPUTED = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def read_direct_op(node: ir.Node, lab: Laboratory, name: str) -> DirectSite | Refusal:
    """The site, or what it asks for that FlashAttention does not give."""
    observation = lab.observation
    inputs: list[ir.Value | None] = [*node.inputs, *[None] * (7 - len(node.inputs))]
    query, key, value, mask, past_key, past_value, nonpad = inputs[:7]
    reason = _problem(node)
    if reason:
        return Refusal(f"the Attention op asks for {reason}", name, f"Attention: node {node.name}")
    assert query is not None and key is not None and value is not None
    operands = [_operand(v, observation, attribute(node, given, 0)) for v, given in (
        (query, "q_num_heads"), (key, "kv_num_heads"), (value, "kv_num_heads"))]
    if None in operands:
        return Refusal("the heads of the Attention op's operands are not known", name, f"Attention: node {node.name}, expected fixed heads and head sizes")
    q, k, v = (operand for operand in operands if operand is not None)
    if q.heads % k.heads or k.heads != v.heads or q.size != k.size:
        nearest = f"Attention: {q.heads} of {q.size} over {k.heads} of {k.size} and {v.heads} of {v.size}"
        return Refusal("the Attention op's heads don't divide", name, nearest)
    if (past_key is None) != (past_value is None):
        return Refusal("the Attention op has only one of past_key and past_value", name, f"Attention: node {node.name}")
    past = None if past_key is None or past_value is None else (past_key, past_value)
    rank = 0
    if mask is not None:
        sizes = sizes_of(mask, observation)
        if sizes is None or not 1 <= len(sizes) <= 4:
            return Refusal("the rank of the mask is not known", name, f"Attention: expected 1 to 4 dimensions of {mask.name}")
        rank = len(sizes)
    lengths = [_length(v, observation) for v in (query, key)]
    given = OpMask(
        mask, rank, bool(attribute(node, "is_causal", 0)), attribute(node, "left_window_size", -1), attribute(node, "right_window_size", -1),
        None if past is None else past[0], nonpad, aligned=nonpad is None and same(*lengths),
    )
    present = [*node.outputs[1:3], None, None][:2]
    scale = attribute(node, "scale", 0.0) or float(q.size) ** -0.5
    by_head = q.layout == "BHSD"
    if past is None and len(node.outputs) == 1:
        scale, q, k, v = traced_operands(lab, scale, q, k, v)
    return DirectSite(
        name, q, k, v, scale, attribute(node, "softcap", 0.0), given, node.outputs[0],
        "BHSD" if by_head else "BSH", past, (present[0], present[1]),
    )


def _problem(node: ir.Node) -> str | None:
    unknown = set(node.attributes) - _ATTRIBUTES
    if unknown:
        return f"attributes {', '.join(sorted(unknown))}"
    if len(node.outputs) > 3 and (node.outputs[3].uses() or node.outputs[3].is_graph_output()):
        return "the score matrix as an output, which a tiled attention never holds"
    if attribute(node, "softmax_precision", 0) not in (0, *map(int, _COMPUTED)):
        return f"softmax_precision {ir.DataType(attribute(node, 'softmax_precision', 0)).name}; it is computed in FLOAT"
    types = {value.dtype for value in node.inputs[:3] if value is not None}
    if len(types) != 1 or not types <= set(_COMPUTED):
        return f"operands of type {', '.join(sorted(str(dtype) for dtype in types))}"
    return None


def _operand(value: ir.Value, observation: Observation, heads: int) -> Operand | None:
    sizes = sizes_of(value, observation)
    if sizes is None or len(sizes) not in (3, 4):
        return None
    if len(sizes) == 4:
        return Operand(value, "BHSD", sizes[1], sizes[3]) if isinstance(sizes[1], int) and isinstance(sizes[3], int) else None
    width = sizes[2]
    return Operand(value, "BSH", heads, width // heads) if isinstance(width, int) and heads and width % heads == 0 else None


def _length(value: ir.Value, observation: Observation) -> Size:
    sizes = sizes_of(value, observation)
    return None if sizes is None else sizes[-2]


@dataclass(frozen=True)
class OpMask(GivenMask):
    """`aligned`: the last query and the last key are known to be of one position, as FlashAttention's own causal mask has them."""

    mask: ir.Value | None
    rank: int
    is_causal: bool
    left: int
    right: int
    past: ir.Value | None
    nonpad: ir.Value | None
    aligned: bool

    @property
    def text(self) -> str:  # type: ignore[override]
        parts = ["causal"] if self.is_causal else []
        parts += [f"window {self.left}, {self.right}"] if max(self.left, self.right) >= 0 else []
        parts += ["mask as given"] if self.mask is not None else []
        return ", ".join([*parts, *(["key lengths"] if self.nonpad is not None else [])]) or "bidirectional"

    def write(self, build: Builder, S: ir.Value, T: ir.Value) -> Visibility:
        native = self.is_causal and self.aligned
        parts = self._bands(build, S, T, native)
        added = None
        if self.mask is not None:
            whole = self._filled(build, T)
            if self.mask.dtype == ir.DataType.BOOL:
                parts.append(whole)
            else:
                added = build.cast(whole, ir.DataType.FLOAT)
        seen = reduce(lambda a, b: _bool(build, "And", [a, b]), parts) if parts else None
        if seen is not None and added is not None:
            added = build.op("Where", [seen, added, scalar(build, -np.inf, np.float32)])[0]
            added.type = ir.TensorType(ir.DataType.FLOAT)
        return Visibility(
            added if added is not None else seen, self._key_mask(build, T), native, self.left + 1 if native and self.left >= 0 else -1,
        )

    def _bands(self, build: Builder, S: ir.Value, T: ir.Value, native: bool) -> list[ir.Value]:
        """Bool [B|1, 1, S, T] of the triangle and of each side of the window, where no attribute says it."""
        wanted = [(name, far) for name, far, asked in (
            ("LessOrEqual", 0, self.is_causal), ("LessOrEqual", self.right, self.right >= 0 and not self.is_causal),
            ("GreaterOrEqual", -self.left, self.left >= 0),
        ) if asked and not native]
        if not wanted:
            return []
        rows = build.op("Unsqueeze", [counted(build, S), build.integers([1])])[0]
        if self.past is not None:
            rows = build.op("Add", [rows, build.size(self.past, 2)])[0]
        elif self.nonpad is not None:
            offset = build.op("Sub", [build.cast(self.nonpad, ir.DataType.INT64), S])[0]
            rows = build.op("Add", [rows, build.reshape(offset, [-1, 1, 1, 1])])[0]
        keys = counted(build, T)
        bands = []
        for op, far in wanted:
            bound = rows if far == 0 else build.op("Add", [rows, build.integers([far])])[0]
            band = _bool(build, op, [keys, bound])
            bands.append(band if self.nonpad is not None and self.past is None else four_dimensions(build, band, 2))
        return bands

    def _filled(self, build: Builder, T: ir.Value) -> ir.Value:
        """The mask in four dimensions, its last one T."""
        assert self.mask is not None
        mask = four_dimensions(build, self.mask, self.rank)
        missing = build.op("Sub", [T, build.size(self.mask, self.rank - 1)])[0]
        pads = build.op("Concat", [build.integers([0] * 7), missing], {"axis": 0})[0]
        fill = scalar(build, False, np.bool_) if mask.dtype == ir.DataType.BOOL else build.cast(scalar(build, -np.inf, np.float32), mask.dtype)
        return build.op("Pad", [mask, pads, fill])[0]

    def _key_mask(self, build: Builder, T: ir.Value) -> ir.Value | None:
        if self.nonpad is None:
            return None
        lengths = build.op("Unsqueeze", [build.cast(self.nonpad, ir.DataType.INT64), build.integers([1])])[0]
        return _bool(build, "Less", [counted(build, T), lengths])


def counted(build: Builder, size: ir.Value) -> ir.Value:
    """0 … size − 1, for a size of shape [1]."""
    zero = scalar(build, 0, np.int64)
    return build.op("Range", [zero, build.op("Squeeze", [size, build.integers([0])])[0], scalar(build, 1, np.int64)])[0]


def _bool(build: Builder, op: str, inputs: list[ir.Value | None]) -> ir.Value:
    result = build.op(op, inputs)[0]
    result.type = ir.TensorType(ir.DataType.BOOL)
    return result
