"""What is left of a decoder between its attention sites, and how it is fed when the interface changes.

With the sites replaced, masks, caches and folded rotary embeddings are dead. What is still read must be token-local (locality.py), take its
positions from `position_ids` (positions.py) and know no other sizes than the number of tokens: then one row of tokens can be of any
sequences, over any past. Nothing here changes a graph; `rewire` makes the nodes that feed what is left.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from ..models.interface import Role
from .attention.site import AttentionSite
from .build import Builder
from .extract import cone, reads
from .locality import trace_tokens
from .observe import Dim, Observation
from .outcome import Refusal
from .positions import PositionSource, position_sources
from .token_axis import for_one_sequence


@dataclass(frozen=True)
class DecoderBody:
    """`positions` and `sizes` are what to replace (by position_ids, and by formulas in S); `output_dims[i]` the shape of site i's output."""

    ids: ir.Value
    logits: ir.Value
    positions: Mapping[ir.Value, PositionSource]
    sizes: Mapping[ir.Value, tuple[Dim, ...]]
    scalars: frozenset[ir.Value]
    output_dims: tuple[tuple[Dim, ...], ...]
    vocab_size: int

    def rewire(self, build: Builder, input_ids: ir.Value, position_ids: ir.Value) -> dict[ir.Value, ir.Value]:
        """New values for all that is replaced, computed from `input_ids` [1, S] and `position_ids` [1, S]."""
        new: dict[ir.Value, ir.Value] = {self.ids: build.cast(input_ids, self.ids.dtype)}
        for value, source in self.positions.items():
            shape = [-1 if axis == source.axis else 1 for axis in range(source.rank)]
            new[value] = build.reshape(build.cast(position_ids, source.dtype), shape)
        for value, dims in self.sizes.items():
            new[value] = build.sizes(input_ids, dims, scalar=value in self.scalars)
        return new


def decoder_body(
    observation: Observation, sites: Sequence[AttentionSite], *, folded: Sequence[AttentionSite], max_context: int,
) -> DecoderBody | Refusal:
    """The body of the observed graph outside `sites`, or what it reads that a row of tokens doesn't have.

    Of the sites in `folded` the rotary embedding goes with the site; the others' `query` and `key` must be the turned ones.
    """
    ids, logits = graph_value(observation, "input_ids"), graph_value(observation, "logits")
    if not sites or ids is None or logits is None:
        return Refusal("the graph is no decoder", str(observation.model.graph.name), "expected attention sites, token ids and logits")
    local = trace_tokens(observation, sites, folded=folded, max_context=max_context)
    if local.refusals:
        return local.refusals[0]
    sources = position_sources(observation, local.positional, max_context=max_context)
    if isinstance(sources, Refusal):
        return sources
    read = _Live(observation, sites).walk(logits, sources)
    if read.strangers:
        stranger = read.strangers[0]
        return Refusal(f"{stranger.name} is read outside attention", str(stranger.name), "expected token ids, positions and numbers of tokens alone")
    dims = observation.dims(logits)
    if dims is None or len(dims) != 3 or dims[2].letters or logits.dtype != ir.DataType.FLOAT:
        return Refusal("the logits are not float32 [B, S, V]", str(logits.name), f"found {logits.dtype} {dims}")
    return DecoderBody(
        ids, logits, {value: source for value, source in sources.items() if value in read.positions}, read.sizes,
        frozenset(value for value in read.sizes if observation.dims(value) == ()), tuple(_of_one(observation, site.output) for site in sites),
        dims[2].factor,
    )


def graph_value(observation: Observation, role: Role) -> ir.Value | None:
    """The graph input (for "logits": output) with this role."""
    graph, interface = observation.model.graph, observation.interface
    port = interface.output(role) if role == "logits" else interface.input(role)
    values = graph.outputs if role == "logits" else graph.inputs
    return next((value for value in values if port is not None and value.name == port.name), None)


def _of_one(observation: Observation, value: ir.Value) -> tuple[Dim, ...]:
    dims = observation.dims(value)
    assert dims is not None, f"{value.name} was traced and has no shape"
    return for_one_sequence(dims)


@dataclass
class _Reached:
    """Where the walk back from the logits ends: at positions, at sizes (with their formulas), and at what a row of tokens doesn't have."""

    positions: set[ir.Value]
    sizes: dict[ir.Value, tuple[Dim, ...]]
    strangers: list[ir.Value]


class _Live:
    """What of the graph is still read once the sites are replaced."""

    def __init__(self, observation: Observation, sites: Sequence[AttentionSite]) -> None:
        self._observation = observation
        self._sites = {site.output: (site.query, site.key, site.value) for site in sites}
        self._free: dict[ir.Value, bool] = {}

    def walk(self, root: ir.Value, sources: Collection[ir.Value]) -> _Reached:
        reached = _Reached(set(), {}, [])
        pending, seen = [root], {root}
        while pending:
            value = pending.pop()
            node = value.producer()
            if value in sources:
                reached.positions.add(value)
            elif node is None:
                if value.const_value is None and not self._is_ids(value):
                    reached.strangers.append(value)
            elif (sizes := self._sizes(value)) is not None:
                reached.sizes[value] = sizes
            elif self._observation.is_dims(value):
                reached.strangers.append(value)
            else:
                operands = self._sites.get(value) or tuple(reads(node))
                pending.extend(operand for operand in operands if operand not in seen)
                seen.update(operands)
        return reached

    def _is_ids(self, value: ir.Value) -> bool:
        port = self._observation.interface.input("input_ids")
        return port is not None and port.name == value.name

    def _sizes(self, value: ir.Value) -> tuple[Dim, ...] | None:
        """A few integers that follow from shapes alone and are fixed or multiples of the tokens, with one sequence a batch."""
        if self._observation.kind(value) != "structural" or value.dtype not in (None, ir.DataType.INT64) or not self._is_free(value):
            return None
        contents = self._observation.contents(value)
        if contents is None:
            return None
        dims = for_one_sequence(contents)
        return dims if all(dim.letters in ((), ("S",)) for dim in dims) else None

    def _is_free(self, value: ir.Value) -> bool:
        """Whether no mask's and no position's content is in it: with all ones they could pass for a number of tokens."""
        if value not in self._free:
            self._free[value] = content_free(value)
        return self._free[value]


def content_free(value: ir.Value) -> bool:
    """Whether `value` follows from shapes and constants alone."""
    leaves = cone([value], lambda v: (node := v.producer()) is not None and node.op_type in ("Shape", "Size")).leaves
    return all(leaf.const_value is not None or leaf.producer() is not None for leaf in leaves)
