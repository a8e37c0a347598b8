"""The token-flat interface: all tokens of a step in one row, caches as inputs that attention updates in place.

`plan_token_flat` reads the graph as the exporter wrote it and decides, without changing anything, whether it can run so. The passes then
only carry the plan out: `LowerPaged` (attention/lower_paged.py), `LogitRows` (logits.py) and `CacheInterface` here, in that order, on the
model that was planned for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import onnx_ir as ir

from ..custom_ops.contract import CACHE_FORMATS
from ..models.interface import GraphInterface, GraphPort, Role
from ..models.spec import CacheGroup, CacheLayer, CacheName, ModelSpec
from .attention.laboratory import Laboratory
from .attention.rotary import RotaryTables, read_tables
from .attention.sharing import readers_of, widest
from .attention.site import AttentionSite
from .build import Builder
from .decoder_body import DecoderBody, decoder_body
from .extract import reads
from .logits import RowsAt, find_rows
from .normalize import graph_size
from .observe import Observation
from .outcome import Outcome, PassResult, Refusal

Port = tuple[ir.Value, Role, int | None]


@dataclass(frozen=True)
class TokenFlatInputs:
    """The graph inputs of a paged decoder, and what its caches are. Tuples are indexed by KV group or by cache layer; site i has cache
    `layer_of[i]`.
    """

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
    layer_of: tuple[int, ...]

    @staticmethod
    def of(sites: Sequence[AttentionSite], caches: Sequence[CacheName]) -> TokenFlatInputs:
        """Inputs for these sites: a cache layer for each that owns one, in `caches[i]` format, which keeps what the widest window of its
        readers sees. Layers of one window, size and format make a group.
        """
        assert len(caches) == len(sites)
        shared = readers_of(sites)
        layer_of = {index: layer for layer, places in enumerate(shared) for index in places}
        kinds = [
            (widest([sites[i].mask.window for i in places]), site.kv_heads, site.head_size, site.value_size, caches[places[0]])
            for places in shared for site in (sites[places[0]],)
        ]
        groups = list(dict.fromkeys(kinds))
        layers = tuple(CacheLayer(groups.index(kind), *kind[1:]) for kind in kinds)
        i32, i64 = ir.DataType.INT32, ir.DataType.INT64
        formats = [CACHE_FORMATS[layer.cache] for layer in layers]
        stored = [ir.DataType.from_numpy(np.dtype(cache.dtype)) for cache in formats]
        key_shapes: list[list[int | str]] = [["N", layer.kv_heads, cache.key_width(layer.head_size), "P"] for layer, cache in zip(layers, formats)]
        value_shapes: list[list[int | str]] = [["N", layer.kv_heads, "P", cache.value_width(layer.value_size)] for layer, cache in zip(layers, formats)]
        return TokenFlatInputs(
            graph_input("input_ids", i64, [1, "T"]), graph_input("position_ids", i64, [1, "T"]),
            graph_input("cumulative_sequence_length", i32, ["B+1"]), graph_input("past_seqlens", i32, ["B"]),
            graph_input("logit_rows", i64, ["R"]), graph_input("parent", i32, ["T"]),
            tuple(graph_input(f"block_table.{g}", i32, ["B", "M"]) for g in range(len(groups))),
            tuple(graph_input(f"slot_mapping.{g}", i32, ["T"]) for g in range(len(groups))),
            tuple(graph_input(f"kv.{i}.key", dtype, shape) for i, (dtype, shape) in enumerate(zip(stored, key_shapes))),
            tuple(graph_input(f"kv.{i}.value", dtype, shape) for i, (dtype, shape) in enumerate(zip(stored, value_shapes))),
            layers, tuple(CacheGroup(kind[0]) for kind in groups), tuple(layer_of[index] for index in range(len(sites))),
        )

    def ports(self) -> tuple[Port, ...]:
        """All inputs in the order of the graph's signature, with their roles."""
        ports: list[Port] = [
            (self.input_ids, "input_ids", None), (self.position_ids, "position_ids", None),
            (self.cumulative_sequence_length, "cumulative_sequence_length", None), (self.past_seqlens, "past_seqlens", None),
            (self.logit_rows, "logit_rows", None), (self.parent, "parent", None),
        ]
        for group, (table, slots) in enumerate(zip(self.block_tables, self.slot_mappings)):
            ports += [(table, "block_table", group), (slots, "slot_mapping", group)]
        for layer, (key, value) in enumerate(zip(self.keys, self.values)):
            ports += [(key, "cache_key", layer), (value, "cache_value", layer)]
        return tuple(ports)


def graph_input(name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
    """A new graph input."""
    return ir.val(name, dtype, shape)


def graph_port(value: ir.Value, role: Role, layer: int | None) -> GraphPort:
    """The interface's word for a graph input or output of known type and rank."""
    assert value.dtype is not None and value.shape is not None
    shape = tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape)
    return GraphPort(str(value.name), str(np.dtype(value.dtype.numpy())), shape, role, layer)


@dataclass(frozen=True)
class TokenFlatPlan:
    """How a graph becomes token-flat. `tables[i]` are site i's rotary tables (None: its rotary, if any, stays in the graph)."""

    sites: tuple[AttentionSite, ...]
    tables: tuple[RotaryTables | None, ...]
    inputs: TokenFlatInputs
    body: DecoderBody
    rows: RowsAt
    spec: ModelSpec
    notes: tuple[str, ...]

    @property
    def frozen(self) -> str:
        """What the rotary tables leave out, if anything: see RotaryTables."""
        return next((tables.frozen for tables in self.tables if tables is not None and tables.frozen), "")

    @property
    def interface(self) -> GraphInterface:
        """The interface of the token-flat graph."""
        return GraphInterface(
            tuple(graph_port(*port) for port in self.inputs.ports()), (GraphPort("logits", "float32", ("R", self.spec.vocab_size), "logits"),)
        )


def plan_token_flat(
    observation: Observation, sites: Sequence[AttentionSite], *, max_context: int, caches: Sequence[CacheName] | None = None,
) -> TokenFlatPlan | Refusal:
    """The plan by which the observed graph runs many sequences at once, or the first thing that keeps it from that.

    `sites` are all of the graph's attentions; `caches[i]` is the cache format of site i (default: all fp32). Nothing is changed.
    """
    for site in sites:
        if site.mask.kind not in ("causal", "window", "chunked"):
            return Refusal(f"a {site.mask.kind} mask does not page", site.name, f"masks: expected causal, window or chunked, found {site.mask}")
    tables, notes = _tables(observation, sites, max_context)
    sites = tuple(site if table is not None else site.with_rotary_in_graph() for site, table in zip(sites, tables))
    folded = [site for site, table in zip(sites, tables) if table is not None]
    body = decoder_body(observation, sites, folded=folded, max_context=max_context)
    if isinstance(body, Refusal):
        return _by_rotary(body, notes)
    rows = find_rows(observation, body.logits, {site.output for site in sites})
    if isinstance(rows, Refusal):
        return rows
    dropped = [port.name for port in observation.interface.outputs if port.role not in ("logits", "present_key", "present_value")]
    if dropped:
        notes = (*notes, f"outputs that a token-flat decoder does not have: {', '.join(dropped)}")
    formats = caches or ["fp32"] * len(sites)
    for places in readers_of(sites):
        notes += tuple(f"{sites[i].name} reads the cache of {sites[places[0]].name}, which is {formats[places[0]]}" for i in places[1:])
    inputs = TokenFlatInputs.of(sites, formats)
    spec = ModelSpec(body.vocab_size, max_context, inputs.layers, inputs.groups)
    return TokenFlatPlan(sites, tables, inputs, body, rows, spec, notes)


def _by_rotary(refusal: Refusal, notes: tuple[str, ...]) -> Refusal:
    """Where a rotary embedding had to stay in the graph and the body does not follow from positions, the rotary is what stands in the way."""
    if not notes or "position" not in refusal.reason:
        return refusal
    return Refusal("rotary angles that follow from more than the position (dynamic NTK, longrope)", refusal.where, f"{refusal.reason}; {notes[0]}")


def _tables(observation: Observation, sites: Sequence[AttentionSite], max_context: int) -> tuple[tuple[RotaryTables | None, ...], tuple[str, ...]]:
    """The rotary tables of every site; where query's and key's differ or can't be read, the rotary stays in the graph and a note says why."""
    lab, notes, tables = Laboratory(observation), list[str](), list[RotaryTables | None]()
    known: dict[str, RotaryTables | Refusal] = {}
    for site in sites:
        if site.rotary is None:
            tables.append(None)
            continue
        read: list[RotaryTables | Refusal] = []
        for rotation in (site.rotary.query, site.rotary.key):
            key = lab.fingerprints.chain(rotation.chain)
            if key not in known:
                known[key] = read_tables(lab, rotation, max_context, site.name)
            read.append(known[key])
        first, second = read
        if isinstance(first, Refusal) or isinstance(second, Refusal):
            notes.append(f"rotary left in the graph: {first if isinstance(first, Refusal) else second}")
            tables.append(None)
        elif not _equal(first, second):
            notes.append(f"rotary left in the graph: {site.name}: query and key are turned by different angles")
            tables.append(None)
        else:
            tables.append(first)
    for places in readers_of(sites):  # whoever appends to a shared cache, the same bits go there
        if not all(_equal(tables[i], tables[places[0]]) for i in places):
            notes += [f"rotary left in the graph: {sites[i].name}: its keys are shared, and the query is turned otherwise" for i in places if tables[i]]
            for i in places:
                tables[i] = None
    return tuple(tables), tuple(dict.fromkeys(notes))


def _equal(first: RotaryTables | None, second: RotaryTables | None) -> bool:
    if first is None or second is None:
        return first is second
    return np.array_equal(first.cos, second.cos) and np.array_equal(first.sin, second.sin)


class CacheInterface(ir.passes.InPlacePass):
    """The last of the three: 1. positions come from `position_ids`, sizes from the number of tokens; 2. the inputs are the plan's, all of them,
    and the only output is `logits`; 3. what fed the old attention is removed.
    """

    def __init__(self, plan: TokenFlatPlan) -> None:
        super().__init__()
        self._plan = plan

    def requires(self, model: ir.Model) -> None:
        if not any(node.op_type == "PagedAttention" for node in model.graph):
            raise ir.passes.PreconditionError("LowerPaged runs before CacheInterface")

    def call(self, model: ir.Model) -> PassResult:
        start, (before, size), plan = perf_counter(), graph_size(model), self._plan
        count = change_inputs(model, plan.body, plan.inputs.input_ids, plan.inputs.position_ids, [port[0] for port in plan.inputs.ports()])
        after = graph_size(model)
        outcome = Outcome(
            "cache_interface", "positions and sizes", count, count, (), plan.notes, before, after[0], size, after[1], perf_counter() - start,
        )
        return PassResult(model, True, outcome)

    def ensures(self, model: ir.Model) -> None:
        declared = [port[0] for port in self._plan.inputs.ports()]
        if list(model.graph.inputs) != declared or [value.name for value in model.graph.outputs] != ["logits"]:
            raise ir.passes.PostconditionError("the signature is not token-flat")
        check_inputs(model.graph)


def change_inputs(model: ir.Model, body: DecoderBody, ids: ir.Value, positions: ir.Value, inputs: Sequence[ir.Value]) -> int:
    """Feeds what is left of a decoder from `ids` and `positions`, makes `inputs` the graph's, and removes what is dead. Returns replacements."""
    graph, build = model.graph, Builder(model.graph)
    with build.before(next(iter(graph))):
        replacements = body.rewire(build, ids, positions)
    for old, new in replacements.items():
        old.replace_all_uses_with(new)
    forget_sizes(graph)
    graph.inputs.clear()
    graph.inputs.extend(inputs)
    ir.passes.common.RemoveUnusedNodesPass()(model)
    return len(replacements)


def forget_sizes(graph: ir.Graph) -> None:
    """Of values inside a graph whose inputs have changed: the exporter's sizes are of other inputs, and onnxruntime plans buffers by them."""
    outputs = set(graph.outputs)
    for node in graph:
        for value in node.outputs:
            if value not in outputs:
                value.shape = None


def check_inputs(graph: ir.Graph) -> None:
    """Raises where a node reads an input that is gone."""
    known = set(graph.inputs) | set(graph.initializers.values())
    for node in graph:
        for value in reads(node):
            if value.producer() is None and value not in known:
                raise ir.passes.PostconditionError(f"{node.name} reads {value.name}, which is no input any more")
