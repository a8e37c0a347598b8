"""The token-flat interface: all tokens of a step in one row, caches as inputs that attention updates in place.

`plan_token_flat` reads the graph as the exporter wrote it and decides, without changing anything, whether its sites page and whether what is
left between them can be fed so: positions from `position_ids`, sizes from the number of tokens. The passes then only carry the plan out:
`LowerPaged` (attention/lower_paged.py), `LogitRows` (logits.py) and `CacheInterface` here, in that order, on the model that was planned for.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ..custom_ops.contract import CACHE_FORMATS
from ..models.interface import GraphInterface, GraphPort, Role
from ..models.spec import CacheGroup, CacheLayer, CacheName, ModelSpec
from .attention.laboratory import Laboratory
from .attention.rotary import read_tables
from .attention.site import AttentionSite
from .build import Builder
from .extract import cone, reads
from .locality import trace_tokens
from .logits import RowsAt, find_rows
from .observe import Dim, Observation
from .outcome import Outcome, PassResult, Refusal
from .positions import PositionSource, position_sources
from .token_axis import for_one_sequence

Tables = tuple[NDArray[np.float32], NDArray[np.float32]]


@dataclass(frozen=True)
class TokenFlatInputs:
    """The graph inputs of a paged decoder, and what its caches are. Lists are indexed by KV group or by cache layer."""

    input_ids: ir.Value
    position_ids: ir.Value
    cumulative_sequence_length: ir.Value
    past_seqlens: ir.Value
    logit_rows: ir.Value
    parent: ir.Value
    block_tables: tuple[ir.Value, ...]
    slot_mappings: tuple[ir.Value, ...]
    keys: tuple[ir.Value, ...]
    values: tuple[ir.Value, ...]
    layers: tuple[CacheLayer, ...]
    groups: tuple[CacheGroup, ...]

    @staticmethod
    def of(sites: Sequence[AttentionSite], caches: Sequence[CacheName]) -> TokenFlatInputs:
        """Inputs for these sites, one cache layer each in `caches[i]` format; layers of one window, size and format make a group."""
        kinds = [(site.mask.window, site.kv_heads, site.head_size, site.value_size, cache) for site, cache in zip(sites, caches, strict=True)]
        groups = list(dict.fromkeys(kinds))
        layers = tuple(CacheLayer(groups.index(kind), *kind[1:]) for kind in kinds)
        i32, i64 = ir.DataType.INT32, ir.DataType.INT64
        keys, values = [], []
        for index, layer in enumerate(layers):
            dtype = ir.DataType.from_numpy(np.dtype(CACHE_FORMATS[layer.cache].dtype))
            keys.append(_input(f"kv.{index}.key", dtype, ["N", layer.kv_heads, layer.head_size, "P"]))
            values.append(_input(f"kv.{index}.value", dtype, ["N", layer.kv_heads, "P", layer.value_size]))
        return TokenFlatInputs(
            _input("input_ids", i64, [1, "T"]), _input("position_ids", i64, [1, "T"]), _input("cumulative_sequence_length", i32, ["B+1"]),
            _input("past_seqlens", i32, ["B"]), _input("logit_rows", i64, ["R"]), _input("parent", i32, ["T"]),
            tuple(_input(f"block_table.{g}", i32, ["B", "M"]) for g in range(len(groups))),
            tuple(_input(f"slot_mapping.{g}", i32, ["T"]) for g in range(len(groups))),
            tuple(keys), tuple(values), layers, tuple(CacheGroup(kind[0]) for kind in groups),
        )

    def ports(self) -> list[tuple[ir.Value, Role, int | None]]:
        """All inputs in the order of the graph's signature, with their roles."""
        single: list[tuple[ir.Value, Role, int | None]] = [
            (self.input_ids, "input_ids", None), (self.position_ids, "position_ids", None),
            (self.cumulative_sequence_length, "cumulative_sequence_length", None), (self.past_seqlens, "past_seqlens", None),
            (self.logit_rows, "logit_rows", None), (self.parent, "parent", None),
        ]
        grouped: list[tuple[ir.Value, Role, int | None]] = [
            port for g, pair in enumerate(zip(self.block_tables, self.slot_mappings)) for port in (
                (pair[0], "block_table", g), (pair[1], "slot_mapping", g))
        ]
        cached: list[tuple[ir.Value, Role, int | None]] = [
            port for i, pair in enumerate(zip(self.keys, self.values)) for port in ((pair[0], "cache_key", i), (pair[1], "cache_value", i))
        ]
        return single + grouped + cached


def _input(name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
    return ir.Input(name, ir.Shape(shape), ir.TensorType(dtype))


@dataclass(frozen=True)
class TokenFlatPlan:
    """How a graph becomes token-flat. `tables[i]` are site i's rotary tables (None: its rotary, if any, stays in the graph)."""

    sites: tuple[AttentionSite, ...]
    inputs: TokenFlatInputs
    tables: tuple[Tables | None, ...]
    output_dims: tuple[tuple[Dim, ...], ...]
    ids: ir.Value
    logits: ir.Value
    positions: Mapping[ir.Value, PositionSource]
    sizes: Mapping[ir.Value, tuple[Dim, ...]]
    scalars: frozenset[ir.Value]
    rows: RowsAt
    spec: ModelSpec
    notes: tuple[str, ...]

    def interface(self) -> GraphInterface:
        """The interface of the token-flat graph."""
        inputs = tuple(
            GraphPort(str(value.name), str(np.dtype(value.dtype.numpy())), tuple(_plain(value.shape)), role, layer)  # type: ignore[union-attr,arg-type]
            for value, role, layer in self.inputs.ports()
        )
        return GraphInterface(inputs, (GraphPort("logits", "float32", ("R", self.spec.vocab_size), "logits"),))


def _plain(shape: ir.Shape) -> list[int | str | None]:
    return [dim if isinstance(dim, int) else dim.value for dim in shape]


def plan_token_flat(
    observation: Observation, sites: Sequence[AttentionSite], *, max_context: int, caches: Sequence[CacheName] | None = None,
) -> TokenFlatPlan | Refusal:
    """The plan by which the observed graph runs many sequences at once, or the first thing that keeps it from that.

    `caches[i]` is the cache format of site i (default: all fp32). Nothing is changed.
    """
    for site in sites:
        if site.mask.kind not in ("causal", "window"):
            return Refusal(f"a {site.mask.kind} mask does not page", site.name, f"masks: expected causal or window, found {site.mask}")
    ids, logits = _value(observation, "input_ids"), _value(observation, "logits")
    if not sites or ids is None or logits is None:
        return Refusal("the graph is no decoder", str(observation.model.graph.name), "expected attention sites, token ids and logits")
    tables, notes = _tables(observation, sites, max_context)
    sites = tuple(site if table is not None else site.with_rotary_in_graph() for site, table in zip(sites, tables))
    local = trace_tokens(observation, sites, folded=[site for site, table in zip(sites, tables) if table is not None])
    if local.refusals:
        return local.refusals[0]
    sources = position_sources(observation, local.positional, max_context=max_context)
    if isinstance(sources, Refusal):
        return sources
    read = _Live(observation, sites).walk(logits, sources)
    if read.strangers:
        stranger = read.strangers[0]
        return Refusal(f"{stranger.name} is read outside attention", str(stranger.name), "expected token ids, positions and numbers of tokens alone")
    rows = find_rows(observation, logits, {site.output for site in sites})
    if isinstance(rows, Refusal):
        return rows
    dims = observation.dims(logits)
    if dims is None or len(dims) != 3 or dims[2].letters or logits.dtype != ir.DataType.FLOAT:
        return Refusal("the logits are not float32 [B, S, V]", str(logits.name), f"found {logits.dtype} {dims}")
    inputs = TokenFlatInputs.of(sites, caches or ["fp32"] * len(sites))
    spec = ModelSpec(dims[2].factor, max_context, inputs.layers, inputs.groups)
    used = {value: source for value, source in sources.items() if value in read.positions}
    scalars = frozenset(value for value in read.sizes if observation.dims(value) == ())
    return TokenFlatPlan(sites, inputs, tables, tuple(_of_one(observation, site.output) for site in sites), ids, logits, used, read.sizes, scalars, rows, spec, notes)


def _of_one(observation: Observation, value: ir.Value) -> tuple[Dim, ...]:
    dims = observation.dims(value)
    assert dims is not None, f"{value.name} was traced and has no shape"
    return for_one_sequence(dims)


def _value(observation: Observation, role: Role) -> ir.Value | None:
    graph, interface = observation.model.graph, observation.interface
    port = interface.output(role) if role == "logits" else interface.input(role)
    values = graph.outputs if role == "logits" else graph.inputs
    return next((value for value in values if port is not None and value.name == port.name), None)


def _tables(observation: Observation, sites: Sequence[AttentionSite], max_context: int) -> tuple[tuple[Tables | None, ...], tuple[str, ...]]:
    """The rotary tables of every site; where query's and key's differ or can't be read, the rotary stays in the graph and a note says why."""
    lab, notes, tables = Laboratory(observation), list[str](), list[Tables | None]()
    known: dict[str, Tables | Refusal] = {}
    for site in sites:
        if site.rotary is None:
            tables.append(None)
            continue
        read = []
        for rotation in (site.rotary.query, site.rotary.key):
            key = lab.fingerprints.chain(rotation.chain)
            if key not in known:
                known[key] = read_tables(lab, rotation, max_context, site.name)
            read.append(known[key])
        first, second = read
        if isinstance(first, Refusal) or isinstance(second, Refusal):
            notes.append(f"rotary left in the graph: {first if isinstance(first, Refusal) else second}")
            tables.append(None)
        elif any(not np.array_equal(a, b) for a, b in zip(first, second)):
            notes.append(f"rotary left in the graph: {site.name}: query and key are turned by different angles")
            tables.append(None)
        else:
            tables.append(first)
    return tuple(tables), tuple(dict.fromkeys(notes))


@dataclass
class _Reached:
    """Where the walk back from the logits ends: at positions, at sizes (with their formulas), and at what a step doesn't have."""

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
                continue
            if node is None:
                if value.const_value is None and not self._is_ids(value):
                    reached.strangers.append(value)
                continue
            sizes = self._sizes(value)
            if sizes is not None:
                reached.sizes[value] = sizes
                continue
            if self._observation.is_dims(value):
                reached.strangers.append(value)
                continue
            for operand in self._sites.get(value) or reads(node):
                if operand not in seen:
                    seen.add(operand)
                    pending.append(operand)
        return reached

    def _is_ids(self, value: ir.Value) -> bool:
        port = self._observation.interface.input("input_ids")
        return port is not None and port.name == value.name

    def _sizes(self, value: ir.Value) -> tuple[Dim, ...] | None:
        """A few integers that follow from shapes alone and are fixed or multiples of the tokens, at one sequence a batch."""
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
            leaves = cone([value], lambda v: (n := v.producer()) is not None and n.op_type in ("Shape", "Size")).leaves
            self._free[value] = all(leaf.const_value is not None or leaf.producer() is not None for leaf in leaves)
        return self._free[value]


class CacheInterface(ir.passes.InPlacePass):
    """The last of the three: 1. positions come from `position_ids`, sizes from the number of tokens; 2. the inputs are the plan's and the only
    output is `logits`; 3. what fed the old attention is removed.
    """

    def __init__(self, plan: TokenFlatPlan) -> None:
        super().__init__()
        self._plan = plan

    def requires(self, model: ir.Model) -> None:
        if not any(node.op_type == "PagedAttention" for node in model.graph):
            raise ir.passes.PreconditionError("LowerPaged runs before CacheInterface")

    def call(self, model: ir.Model) -> PassResult:
        start, graph, plan = perf_counter(), model.graph, self._plan
        before = len(graph)
        build = Builder(graph)
        first = next(iter(graph))
        with build.before(first):
            replacements = self._replacements(build)
        for old, new in replacements.items():
            old.replace_all_uses_with(new)
        for node in graph:  # the exporter's sizes are of other inputs
            for value in node.outputs:
                value.shape = value.shape if value in graph.outputs else None
        graph.inputs.clear()
        graph.inputs.extend(value for value, _, _ in plan.inputs.ports())
        ir.passes.common.RemoveUnusedNodesPass()(model)
        outcome = Outcome(
            "cache_interface", "positions and sizes", len(replacements), len(replacements), notes=plan.notes, nodes_before=before,
            nodes_after=len(graph), seconds=perf_counter() - start,
        )
        return PassResult(model, True, outcome)

    def _replacements(self, build: Builder) -> dict[ir.Value, ir.Value]:
        plan = self._plan
        new: dict[ir.Value, ir.Value] = {plan.ids: build.cast(plan.inputs.input_ids, plan.ids.dtype)}
        for value, source in plan.positions.items():
            shape = [-1 if axis == source.axis else 1 for axis in range(source.rank)]
            new[value] = build.reshape(build.cast(plan.inputs.position_ids, source.dtype), shape)
        for value, dims in plan.sizes.items():
            new[value] = build.sizes(plan.inputs.input_ids, dims, scalar=value in plan.scalars)
        return new

    def ensures(self, model: ir.Model) -> None:
        declared = {value for value, _, _ in self._plan.inputs.ports()}
        if set(model.graph.inputs) != declared or [value.name for value in model.graph.outputs] != ["logits"]:
            raise ir.passes.PostconditionError("the signature is not token-flat")
        known = declared | set(model.graph.initializers.values())
        for node in model.graph:
            for value in reads(node):
                if value.producer() is None and value not in known:
                    raise ir.passes.PostconditionError(f"{node.name} reads {value.name}, which is no input any more")
