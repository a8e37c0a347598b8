"""Attentions taken at their word, for graphs without a cache: their masks go to FlashAttention as they are, whatever they mean.

Nothing is proved of such a site and nothing needs to be: softmax(softcap(scale · q·kᵀ) + bias) · v is computed in tiles in place of all at
once. A DirectSite is read off one op (direct_op.py) or off two products around a softmax (direct_softmax.py); here it is written.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from ...custom_ops.contract import DOMAIN, FLASH_ATTENTION
from ..build import Builder
from ..observe import Observation

# BHSD and BSH as everywhere, BSHD between them; BHDS is a transposed key; NSD and NDS are one head each, whatever was folded into N.
DirectLayout = Literal["BHSD", "BSH", "BSHD", "BHDS", "NSD", "NDS"]

_TOKENS_FIRST: dict[str, tuple[int, ...]] = {"BHSD": (0, 2, 1, 3), "BSHD": (0, 1, 2, 3), "BHDS": (0, 3, 1, 2), "NSD": (0, 1, 2), "NDS": (0, 2, 1)}

_TOKENS_AT = {"BHSD": 2, "BSH": 1, "BSHD": 1, "BHDS": 3, "NSD": 1, "NDS": 2}

Size = int | str | None
"""A dimension: fixed, named (equal names are equal sizes), or unknown."""


@dataclass(frozen=True)
class Visibility:
    """What a mask becomes: the inputs and attributes of FlashAttention that say what each query sees."""

    attention_bias: ir.Value | None = None
    key_mask: ir.Value | None = None
    is_causal: bool = False
    window: int = -1


class GivenMask(ABC):
    """A mask that is handed on. `text` is what reports call it."""

    text: str

    @abstractmethod
    def write(self, build: Builder, S: ir.Value, T: ir.Value) -> Visibility:
        """`S` and `T` are how many queries and keys there are, int64 [1]."""


@dataclass(frozen=True)
class Operand:
    """One of query, key and value, with its `heads` of `size`."""

    value: ir.Value
    layout: DirectLayout
    heads: int
    size: int


@dataclass(frozen=True)
class DirectSite:
    """An attention and where it goes. `past` is put before key and value, and the grown ones replace `present`; both [B, G, T, D]."""

    name: str
    query: Operand
    key: Operand
    value: Operand
    scale: float
    softcap: float
    mask: GivenMask
    output: ir.Value
    output_layout: Literal["BHSD", "BSH", "BSHD", "NSD"]
    past: tuple[ir.Value, ir.Value] | None = None
    present: tuple[ir.Value | None, ir.Value | None] = (None, None)

    def write(self, build: Builder, graph: ir.Graph) -> None:
        """Puts FlashAttention in the site's place."""
        place = self.output.producer()
        assert place is not None
        with build.before(place):
            key, value = self._grown(build, 0), self._grown(build, 1)
            rows = [_rows(build, operand) for operand in (self.query, key, value)]
            # Sizes are asked of the graph's own values, not of what was written for the op.
            visible = self.mask.write(build, *(build.size(operand.value, _TOKENS_AT[operand.layout]) for operand in (self.query, key)))
            given = {"query": rows[0], "key": rows[1], "value": rows[2], "attention_bias": visible.attention_bias, "key_mask": visible.key_mask}
            last = max(FLASH_ATTENTION.input_index(name) for name, operand in given.items() if operand is not None)
            attributes = {
                "num_heads": self.query.heads, "kv_num_heads": self.key.heads, "scale": float(self.scale), "softcap": float(self.softcap),
                "local_window_size": visible.window, "is_causal": int(visible.is_causal),
            }
            inputs = [given.get(port.name) for port in FLASH_ATTENTION.inputs[: last + 1]]
            attention = build.op("FlashAttention", inputs, attributes, domain=DOMAIN, name=self.name)[0]
            new = build.cast(self._laid_out(build, attention), self.output.dtype)
            presents = [
                (old, build.op("Identity", [operand.value])[0])
                for old, operand in zip(self.present, (key, value)) if old is not None and (old.uses() or old.is_graph_output())
            ]
        take_over(graph, self.output, new)
        for old, grown in presents:
            take_over(graph, old, grown)

    def _grown(self, build: Builder, index: int) -> Operand:
        operand = (self.key, self.value)[index]
        if self.past is None and not (self.present[index] is not None and operand.layout == "BSH"):
            return operand
        heads_first = operand.value
        if operand.layout == "BSH":
            heads_first = build.transpose(build.reshape(operand.value, [0, 0, operand.heads, operand.size]), (0, 2, 1, 3))
        if self.past is not None:
            heads_first = build.op("Concat", [self.past[index], heads_first], {"axis": 2})[0]
        return Operand(heads_first, "BHSD", operand.heads, operand.size)

    def _laid_out(self, build: Builder, attention: ir.Value) -> ir.Value:
        if self.output_layout in ("BSH", "NSD"):
            return attention
        split = build.reshape(attention, [0, 0, self.query.heads, self.value.size])
        return split if self.output_layout == "BSHD" else build.transpose(split, (0, 2, 1, 3))


def take_over(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """`new` in `old`'s place; where that is a graph output, under its name, type and shape."""
    if old.is_graph_output():
        new.type, new.shape = old.type, old.shape
        name, old.name = old.name, f"{old.name}:replaced"
        new.name = name
        for index, output in enumerate(graph.outputs):
            if output is old:
                graph.outputs[index] = new
    old.replace_all_uses_with(new)


def _rows(build: Builder, operand: Operand) -> ir.Value:
    """[B, T, heads·size] float32. A transpose that the graph has made already is undone and not made twice."""
    value, layout = operand.value, operand.layout
    if layout != "BSH":
        order = _TOKENS_FIRST[layout]
        producer = value.producer()
        if producer is not None and producer.op_type == "Transpose" and producer.domain == "" and "perm" in producer.attributes:
            before = producer.attributes["perm"].as_ints()
            assert producer.inputs[0] is not None
            value, order = producer.inputs[0], tuple(before[axis] for axis in order)
        if order != tuple(range(len(order))):
            value = build.transpose(value, order)
        if layout in ("BHSD", "BSHD", "BHDS"):
            value = build.reshape(value, [0, 0, operand.heads * operand.size])
    return build.cast(value, ir.DataType.FLOAT)


def sizes_of(value: ir.Value, observation: Observation) -> list[Size] | None:
    """A value's dimensions as observed, else as the graph declares them; None where neither knows the rank."""
    dims = observation.dims(value)
    if dims is not None:
        return [dim.factor if not dim.letters else str(dim) for dim in dims]
    if value.shape is None:
        return None
    return [size if isinstance(size, int) else size.value for size in value.shape]


def same(*sizes: Size) -> bool:
    """Whether the sizes are known to be equal."""
    return None not in sizes and len(set(sizes)) == 1


def four_dimensions(build: Builder, value: ir.Value, rank: int) -> ir.Value:
    """`value` with ones in front."""
    return value if rank == 4 else build.op("Unsqueeze", [value, build.integers(list(range(4 - rank)))])[0]


def scalar(build: Builder, number: float, dtype: type) -> ir.Value:
    return build.constant(np.array(number, dtype), f"octavo.scalar.{np.dtype(dtype).name}")
