"""Where two graphs begin to differ: both run one prompt with the values of matched nodes as outputs, and these are compared in order.

The node that is told is the first whose output differs by far more than what it reads. Where two graphs have no matched nodes (an export
and what it was compiled to), the values that layers hand on are compared, and the first layer is told.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from ... import custom_ops
from ...models.interface import GraphInterface, GraphPort
from ..check_inputs import seeded_inputs
from .folding import Carried
from .graph import Graph, Produced, Snapshot
from .matching import Matching, match, paired
from .numbers import ABOVE_NOISE, FirstDivergent
from .write import names_of

# Outputs of one run: what they hold is in memory at once, on one side as arrays and on the other as they come.
_AT_ONCE = 128
# Below this, relative to the largest value, a difference is a sum in another order.
_SMALLEST = 1e-5
_BLOCK = 32
_LENGTH = 40
# Of nodes that were not compared, those that only move values are not told.
_SHAPING = ("Reshape", "Transpose", "Shape", "Cast", "Squeeze", "Unsqueeze", "Concat", "Slice", "Identity", "Expand", "Range")
_MOST_TOLD = 3

Pair = tuple[Produced, Produced]


Tokens = NDArray[np.int64] | None
"""One prompt; None for a graph that is no decoder, which gets seeded inputs."""


class Runnable(Protocol):
    """A graph that can be run with any of its values as outputs."""

    @property
    def snapshot(self) -> Snapshot: ...
    def values(self, names: Sequence[str], tokens: Tokens) -> list[NDArray[Any]]:
        """The values of these names, of one run without fusions."""
        ...


@dataclass(frozen=True)
class Located:
    """The first divergent node, or why there is none to tell."""

    divergence: FirstDivergent | None
    notes: tuple[str, ...] = ()


def locate(before: Runnable, after: Runnable, tokens: Tokens) -> Located:
    """Runs both graphs on one prompt and compares them value by value. Never raises over a graph that can't be run so: a note says why."""
    matching = match(before.snapshot.graph, after.snapshot.graph)
    pairs = list(dict.fromkeys(_pairs(matching)))
    try:
        errors = dict(_errors(before, after, pairs, tokens))
    except Exception as error:  # onnxruntime raises a dozen unrelated classes
        return Located(None, (f"The first node that differs was not found: {str(error).strip().splitlines()[0][:200]}",))
    names = names_of(matching.before), names_of(matching.after)
    known: dict[int, float] = {}
    for (_, y), value in errors.items():
        known[y.node] = max(known.get(y.node, 0.0), value)

    def named(index: int) -> str:
        node = matching.after.nodes[index]
        return names[1][index] + (f" ({node.name})" if node.name else "")

    def divergence(pair: Pair, inputs: float, between: Sequence[int]) -> FirstDivergent:
        nodes = matching.after.nodes
        told = [f"{nodes[index].op} at {named(index)}" for index in between if nodes[index].op not in _SHAPING]
        op = nodes[pair[1].node].op
        return FirstDivergent(names[0][pair[0].node], named(pair[1].node), op, errors[pair], inputs, tuple(told[:_MOST_TOLD]))

    found = [(pair, *_read(matching.after, pair[1].node, known)) for pair in sorted(errors, key=lambda pair: pair[1].node)]
    for pair, inputs, between in found:
        # Written so that a NaN counts.
        if not errors[pair] <= max(_SMALLEST, ABOVE_NOISE * inputs):
            return Located(divergence(pair, inputs, between))
    worst = max(found, key=lambda item: errors[item[0]], default=None)
    if worst is None or not errors[worst[0]]:
        return Located(None, ("No value of one prompt differs: the difference lies in what comes after it, or in an unmatched part.",))
    return Located(divergence(*worst), ("The difference grows over many nodes: the one told differs most.",))


def _pairs(matching: Matching) -> Iterator[Pair]:
    """Outputs to compare: of matched nodes, what matched nodes read in one slot, and what layers hand on where they don't match themselves."""
    for x, y in matching.pairs.items():
        for output in range(min(len(matching.before.nodes[x].values), len(matching.after.nodes[y].values))):
            if matching.before.nodes[x].values[output] and matching.after.nodes[y].values[output]:
                yield Produced(x, output), Produced(y, output)
        for one, other in zip(matching.before.nodes[x].inputs, matching.after.nodes[y].inputs):
            if isinstance(one, Produced) and isinstance(other, Produced) and one.node not in matching.pairs and other.node not in matching.back:
                yield one, other
    for left, right in paired(*matching.folds):
        carried = [next((s for slots in repeat.sources for s in slots if isinstance(s, Carried)), None) for repeat in (left, right)]
        if carried[0] is None or carried[1] is None:
            continue
        for row_a, row_b in zip(left.rows, right.rows):
            x, y = row_a[carried[0].offset], row_b[carried[1].offset]
            if x not in matching.pairs and y not in matching.back:
                yield Produced(x, carried[0].output), Produced(y, carried[1].output)


def _read(graph: Graph, index: int, known: dict[int, float]) -> tuple[float, list[int]]:
    """The largest difference of what a node reads, through nodes that were not compared, and those."""
    seen, stack, worst, between = {index}, [index], 0.0, []
    while stack:
        for ref in graph.nodes[stack.pop()].inputs:
            if isinstance(ref, Produced) and ref.node not in seen:
                seen.add(ref.node)
                if ref.node in known:
                    worst = max(worst, known[ref.node])
                else:
                    between.append(ref.node)
                    stack.append(ref.node)
    return worst, between


def _errors(before: Runnable, after: Runnable, pairs: Sequence[Pair], tokens: Tokens) -> Iterator[tuple[Pair, float]]:
    pairs = sorted(pairs, key=lambda pair: pair[1].node)
    for start in range(0, len(pairs), _AT_ONCE):
        part = pairs[start : start + _AT_ONCE]
        values = []
        for k, side in enumerate((before, after)):
            nodes = side.snapshot.graph.nodes
            values.append(side.values([nodes[pair[k].node].values[pair[k].output] for pair in part], tokens))
        for pair, one, other in zip(part, *values):
            if one.size == other.size and one.dtype.kind == other.dtype.kind:
                yield pair, difference(one.ravel(), other.ravel())


def difference(one: NDArray[Any], other: NDArray[Any]) -> float:
    """Relative to the largest value; 1 where text, integers or truth values differ at all."""
    if one.dtype.kind != "f":
        return float(not np.array_equal(one, other))
    finite = np.isfinite(one) & np.isfinite(other)
    if not np.array_equal(one[~finite], other[~finite]):
        return float("inf")
    x, y = one[finite].astype(np.float64), other[finite].astype(np.float64)
    largest = float(np.max(np.abs(x), initial=0.0))
    return float(np.max(np.abs(x - y), initial=0.0)) / (largest or 1.0)


def values_of(path: Path, given: dict[str, NDArray[Any]], names: Sequence[str], *, ops: bool) -> list[NDArray[Any]]:
    """The named values of one run of a model file, without fusions. Weights stay in their files. `ops`: it has nodes of ours."""
    model = onnx.load_model(path, format="protobuf", load_external_data=False)
    there = {value.name for value in model.graph.output}
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in dict.fromkeys(names) if name not in there)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent.resolve()))
    if ops:
        custom_ops.register(options)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    wanted = list(dict.fromkeys(names))
    found = dict(zip(wanted, session.run(wanted, {port.name: given[port.name] for port in session.get_inputs()})))
    return [np.asarray(found[name]) for name in names]


def feeds(interface: GraphInterface, tokens: Tokens) -> dict[str, NDArray[Any]]:
    """One prompt of one sequence, as a graph in its exporter's form or a token-flat one takes it; seeded inputs for any other graph."""
    if tokens is None:
        return seeded_inputs(interface, _LENGTH, 0)
    return {port.name: _array(port, tokens) for port in interface.inputs}


def _array(port: GraphPort, tokens: NDArray[np.int64]) -> NDArray[Any]:
    size, dtype = len(tokens), np.dtype(port.dtype)
    flat = np.arange(size)
    blocks = -(-size // _BLOCK)
    if port.role in ("cache_key", "cache_value"):
        # [N, G, D, P] and [N, G, P, D]: the axes without a number are the number of blocks and their size.
        free = iter((blocks, _BLOCK))
        return np.zeros([axis if isinstance(axis, int) else next(free) for axis in port.shape or ()], dtype)
    if port.role in ("past_key", "past_value"):
        shape = port.shape or ()
        return np.zeros([axis if isinstance(axis, int) else 1 if k == 0 else 0 for k, axis in enumerate(shape)], dtype)
    made = {
        "input_ids": tokens[None], "position_ids": flat[None], "attention_mask": np.ones((1, size)), "cumulative_sequence_length": np.array([0, size]),
        "past_seqlens": np.zeros(1), "logit_rows": flat, "parent": flat - 1, "block_table": np.arange(blocks)[None], "slot_mapping": flat,
    }
    if port.role in made:
        return made[port.role].astype(dtype)
    return seeded_inputs(GraphInterface((port,), ()), size, 0)[port.name]


