"""A graph as the diff sees it: no names but those of the interface, no bytes but their hashes, nodes in one canonical order.

Two graphs that compute the same in the same way are equal here, whatever their exporter called things and in whatever order it wrote
them. `canonical` makes that so, `write` and `parse` are its text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import TypeAlias

# Bits of an element, by type; strings have none.
BITS = {
    "float32": 32, "float64": 64, "float16": 16, "bfloat16": 16, "complex64": 64, "complex128": 128, "bool": 8,
    "int8": 8, "int16": 16, "int32": 32, "int64": 64, "uint8": 8, "uint16": 16, "uint32": 32, "uint64": 64,
    "float8e4m3fn": 8, "float8e4m3fnuz": 8, "float8e5m2": 8, "float8e5m2fnuz": 8, "float8e8m0": 8,
    "uint4": 4, "int4": 4, "float4e2m1": 4, "uint2": 2, "int2": 2,
}


@dataclass(frozen=True)
class Tensor:
    """A constant, wherever the model keeps it.

    `content` is `{1, 2}` where it is small, else `sha256:` and 32 hex digits, or `unread` where weights were not looked at.
    """

    dtype: str
    shape: tuple[int, ...]
    content: str

    @property
    def type(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return (self.size * BITS.get(self.dtype, 0) + 7) // 8

    @property
    def hashed(self) -> bool:
        return not self.content.startswith("{")


@dataclass(frozen=True)
class Produced:
    """Output `output` of node `node` of the same graph."""

    node: int
    output: int = 0


@dataclass(frozen=True)
class Given:
    """Input `port` of the same graph."""

    port: int


@dataclass(frozen=True)
class Outer:
    """In a subgraph: capture `index` of the node that holds it."""

    index: int


Ref: TypeAlias = Produced | Given | Outer | Tensor | None
"""What a node reads; None is an optional input that is not there."""


@dataclass(frozen=True)
class Port:
    """An input or output of a graph. `type` is text: `float32[s0, 64]`, symbols numbered in order of appearance; empty if unknown."""

    name: str
    type: str = ""


@dataclass(frozen=True)
class Node:
    """One operation. `op` has its domain unless that is ai.onnx. Attributes are text, sorted, without those that have their default.

    The last `captures` of the inputs are what its subgraphs read of the graph around them. `name` is a hint for people, and
    `values` are the model's own names of the outputs, which lead back from here to what can be run.
    """

    op: str
    inputs: tuple[Ref, ...]
    attributes: tuple[tuple[str, str], ...] = ()
    subgraphs: tuple[tuple[str, Graph], ...] = ()
    outputs: int = 1
    captures: int = 0
    name: str = field(default="", compare=False)
    values: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Graph:
    """Nodes stand before those that read them; `results` are what the outputs are."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    results: tuple[Ref, ...]
    nodes: tuple[Node, ...]

    def tensors(self) -> Iterator[Tensor]:
        """Every constant that is read, each time it is read, in subgraphs too."""
        for node in self.nodes:
            yield from (ref for ref in node.inputs if isinstance(ref, Tensor))
            for _, graph in node.subgraphs:
                yield from graph.tensors()
        yield from (ref for ref in self.results if isinstance(ref, Tensor))


@dataclass(frozen=True)
class Snapshot:
    """A whole model: its graph, the functions it calls by name, and the opset of each domain."""

    graph: Graph
    functions: tuple[tuple[str, Graph], ...] = ()
    opsets: tuple[tuple[str, int], ...] = ()
