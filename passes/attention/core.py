"""What an anchor is read as: the operands of its products, how they are read, and the value that its result goes on as."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ..observe import Probe
from .chain import MOVES, Chain
from .laboratory import BHSD, BSH, Laboratory, Layout, fits_layout
from .mask_source import MaskSource
from .operands import Canon
from .site import Cache


@dataclass(frozen=True)
class Core:
    """One anchor as read: the products' operands and how they are read, and what lies between."""

    where: str
    query: ir.Value
    key: ir.Value
    value: ir.Value
    canons: tuple[Canon, Canon, Canon]
    num_heads: int
    sizes: tuple[int, int]
    scale: float
    softcap: float
    mask: MaskSource
    output: ir.Value
    output_layout: Layout
    nodes: tuple[ir.Node, ...]
    cache: Cache | None = None
    in_op: bool = False
    sinks: tuple[float, ...] = ()


End = tuple[ir.Value, Layout, tuple[ir.Node, ...], tuple[ir.Value, ...]]
"""The value that a site's result goes on as, its layout, the nodes up to it, and the conditions by which some of them replace rows by 0."""

_BEHIND = MOVES | {"Where"}


def moved_output(lab: Laboratory, value: ir.Value, heads: int, size: int, start: Layout) -> End | None:
    """The last value behind the product that is only a movement of it, in a layout we know: what a lowering replaces.

    The product itself lies in the order of layout `start`. Rows may be replaced on conditions that don't hold at the probes: they are for
    the mask's proof to judge.
    """
    product, passed, path = value, list[ir.Value](), set[ir.Node]()
    best: End | None = None
    while True:
        chain = next((c for computed, c in lab.graph.walk(value, _BEHIND) if computed == (product,) and c.leaves == computed), None)
        layouts: tuple[Layout, ...] = (BSH, BHSD) if chain is not None and _sizes_stay(lab, passed, path) else ()
        for layout in layouts:
            assert chain is not None
            if all(_is_laid_out(lab, chain, start, layout, heads, size, probe) for probe in lab.probes):
                best = (value, layout, chain.nodes, tuple(v for n in chain.nodes if n.op_type == "Where" and (v := n.inputs[0]) is not None))
                break
        following = _only_reader(lab, value)
        if following is None or following.op_type not in _BEHIND or len(following.outputs) != 1 or not _may_guard(lab, following):
            return best
        passed.append(value)
        path.add(following)
        value = following.outputs[0]


def _may_guard(lab: Laboratory, node: ir.Node) -> bool:
    """Whether a Where chooses by one condition a row."""
    if node.op_type != "Where" or node.inputs[0] is None:
        return True
    dims = lab.observation.dims(node.inputs[0])
    letters = [letter for dim in dims or () for letter in dim.letters]
    return dims is not None and all(dim.factor == 1 for dim in dims) and letters in (["S"], ["B", "S"])


def _only_reader(lab: Laboratory, value: ir.Value) -> ir.Node | None:
    """The node that alone reads `value`; nodes that only ask for its sizes don't count."""
    if value.is_graph_output():
        return None
    readers = {use.node for use in value.uses() if not _asks_size(lab, use.node)}
    return next(iter(readers)) if len(readers) == 1 else None


def _asks_size(lab: Laboratory, node: ir.Node) -> bool:
    return node.op_type == "Shape" and not lab.graph.is_data(node.outputs[0])


def _sizes_stay(lab: Laboratory, passed: list[ir.Value], path: set[ir.Node]) -> bool:
    """Whether what asks for sizes of `passed`, the values that go with the site, does it for the nodes of `path` alone."""
    pending = [node.outputs[0] for value in passed for node in (use.node for use in value.uses()) if _asks_size(lab, node)]
    seen = set(pending)
    while pending:
        size = pending.pop()
        if size.is_graph_output():
            return False
        for node in (use.node for use in size.uses()):
            if node in path:
                continue
            if any(lab.graph.is_data(output) for output in node.outputs):
                return False
            fresh = [output for output in node.outputs if output not in seen]
            seen.update(fresh)
            pending.extend(fresh)
    return True


def _is_laid_out(lab: Laboratory, chain: Chain, start: str, layout: str, heads: int, size: int, probe: Probe) -> bool:
    shape, end = lab.shape(chain.leaves[0], probe), lab.shape(chain.target, probe)
    if shape is None or int(np.prod(shape)) != probe.batch * heads * probe.length * size:
        return False
    if end is None or not fits_layout(end, layout, probe, heads, size):
        return False
    numbers = np.arange(int(np.prod(shape)))
    out = lab.run(chain, [numbers.reshape(shape)], probe)
    if out is None or out.size != numbers.size:
        return False
    first = (probe.batch, heads, probe.length, size) if start == BHSD else (probe.batch, probe.length, heads, size)
    moved = numbers.reshape(first) if start == layout else numbers.reshape(first).transpose(0, 2, 1, 3)
    return np.array_equal(out.reshape(-1), moved.reshape(-1))
