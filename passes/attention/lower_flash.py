"""Sites on `ai.octavo::FlashAttention`: stateless, on the graph's own inputs and outputs.

Encoders, and decoders that keep no cache. A graph that takes a cache loses it: every site must then be known, and sizes that the graph
asks of its past are written as those of an empty one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import onnx_ir as ir

from ...custom_ops.contract import DOMAIN, FLASH_ATTENTION, OPSET
from ...models.interface import GraphInterface
from ..build import Builder
from ..cache_interface import check_inputs, forget_sizes
from ..decoder_body import graph_value
from ..extract import reads
from ..normalize import graph_size
from ..observe import Dim, Observation
from ..outcome import Outcome, PassResult, Refusal
from .direct import DirectSite, take_over
from .layout import output_tail, replacement, tokens_last
from .site import AttentionSite

_CACHE_ROLES = ("past_key", "past_value", "present_key", "present_value")


@dataclass(frozen=True)
class FlashPlan:
    """`sizes` are values to write as formulas in B and S, because what they were asked of goes; `tails` are the outputs' inner sizes.

    `direct` are the attentions whose masks go along as they are.
    """

    sites: tuple[AttentionSite, ...]
    tails: tuple[tuple[int, ...], ...]
    padding: ir.Value | None
    ids: ir.Value | None
    sizes: Mapping[ir.Value, tuple[Dim, ...]]
    interface: GraphInterface
    refusals: tuple[Refusal, ...]
    direct: tuple[DirectSite, ...] = ()


def inexpressible(site: AttentionSite) -> Refusal | None:
    """Why FlashAttention can't be this site by what was proved of it."""
    if site.mask.kind not in ("chunked", "prefix") and not site.mask.positional:
        return None
    found = "a mask that follows position_ids" if site.mask.positional else f"a {site.mask.kind} mask"
    return Refusal(f"FlashAttention can't express {found}", site.name, f"lower_flash: {site.mask}")


def plan_flash(
    observation: Observation, sites: Sequence[AttentionSite], *, refused: int = 0, direct: Sequence[DirectSite] = (),
) -> FlashPlan | Refusal:
    """The plan for a stateless graph. `refused` counts the attentions that are no sites: in a graph without a cache they stay as they are.

    With `direct` sites in it a graph that has a cache keeps it, as inputs and outputs of its own.
    """
    if not sites and not direct:
        return Refusal("the graph has no attention site", str(observation.model.graph.name))
    declined = next((refusal for site in sites if (refusal := inexpressible(site)) is not None), None)
    if declined is not None:
        return declined
    sites = tuple(site.with_rotary_in_graph() for site in sites)
    tails = tuple(output_tail(observation, site) for site in sites)
    padding, ids = graph_value(observation, "attention_mask"), graph_value(observation, "input_ids")
    if not observation.cached or direct:
        return FlashPlan(sites, tails, padding, ids, {}, observation.interface, (), tuple(direct))
    if refused:
        return Refusal("the cache can't go while an attention that is not understood reads it", str(observation.model.graph.name))
    sizes = _without_past(observation, sites)
    if isinstance(sizes, Refusal):
        return sizes
    ports = observation.interface
    interface = GraphInterface(
        tuple(port for port in ports.inputs if port.role not in _CACHE_ROLES), tuple(port for port in ports.outputs if port.role not in _CACHE_ROLES)
    )
    return FlashPlan(sites, tails, padding, ids, sizes, interface, ())


def _without_past(observation: Observation, sites: Sequence[AttentionSite]) -> dict[ir.Value, tuple[Dim, ...]] | Refusal:
    """Every live size of data as a formula for P = 0; refused where the past itself is read outside the sites."""
    kept = {port.name for port in observation.interface.outputs if port.role not in _CACHE_ROLES}
    past = {port.name for port in observation.interface.inputs if port.role in _CACHE_ROLES}
    behind = {site.output: (site.query, site.key, site.value) for site in sites}
    pending = [value for value in observation.model.graph.outputs if value.name in kept]
    seen, sizes = set(pending), dict[ir.Value, tuple[Dim, ...]]()
    while pending:
        value = pending.pop()
        node = value.producer()
        if node is None:
            if value.name in past:
                return Refusal("the cache is read outside attention", str(value.name), "lower_flash: expected sites alone")
            continue
        if observation.is_dims(value):
            contents = observation.contents(value)
            if contents is None:
                return Refusal("a size follows no formula", str(value.name), "lower_flash: expected formulas in B, S, P and T")
            sizes[value] = tuple(_no_past(dim) for dim in contents)
            continue
        for operand in behind.get(value) or reads(node):
            if operand not in seen:
                seen.add(operand)
                pending.append(operand)
    return sizes


def _no_past(dim: Dim) -> Dim:
    letters = tuple(sorted("S" if letter == "T" else letter for letter in dim.letters))
    return Dim(0) if "P" in letters else Dim(dim.factor, letters)


class LowerFlash(ir.passes.InPlacePass):
    """Carries a `FlashPlan` out on the model that was planned for."""

    def __init__(self, plan: FlashPlan) -> None:
        super().__init__()
        self._plan = plan

    def call(self, model: ir.Model) -> PassResult:
        start, (before, size), plan = perf_counter(), graph_size(model), self._plan
        graph, build = model.graph, Builder(model.graph)
        with build.before(next(iter(graph))):
            key_mask = None
            if plan.padding is not None and any(site.mask.key_padding for site in plan.sites):
                key_mask = build.cast(plan.padding, ir.DataType.BOOL)
            written = {value: build.sizes(self._ids(), dims, scalar=_is_scalar(value)) for value, dims in plan.sizes.items()}
        for site, tail in zip(plan.sites, plan.tails):
            self._replace(graph, build, site, tail, key_mask)
        for direct in plan.direct:
            direct.write(build, graph)
        for old, new in written.items():
            old.replace_all_uses_with(new)
        model.opset_imports[DOMAIN] = OPSET
        self._drop_cache(graph)
        ir.passes.common.RemoveUnusedNodesPass()(model)
        after, count = graph_size(model), len(plan.sites) + len(plan.direct)
        outcome = Outcome("lower_flash", "sites", count, count, plan.refusals, (), before, after[0], size, after[1], perf_counter() - start)
        return PassResult(model, True, outcome)

    def _ids(self) -> ir.Value:
        assert self._plan.ids is not None, "a graph with a cache has token ids"
        return self._plan.ids

    def _replace(self, graph: ir.Graph, build: Builder, site: AttentionSite, tail: tuple[int, ...], key_mask: ir.Value | None) -> None:
        producer = site.output.producer()
        assert producer is not None
        with build.before(producer):
            given: dict[str, ir.Value] = {
                "query": tokens_last(build, site.query, site.query_layout, site.num_heads * site.head_size),
                "key": tokens_last(build, site.key, site.key_layout, site.kv_heads * site.head_size),
                "value": tokens_last(build, site.value, site.value_layout, site.kv_heads * site.value_size),
            }
            if site.mask.key_padding:
                assert key_mask is not None, "padding was proved on the graph's attention_mask"
                given["key_mask"] = key_mask
            if site.sinks:
                given["head_sink"] = build.constant(np.array(site.sinks, np.float32), "head_sink")
            if site.mask.slopes:
                given["alibi_slopes"] = build.constant(np.array(site.mask.slopes, np.float32), "alibi_slopes")
            attributes = {
                "num_heads": site.num_heads, "kv_num_heads": site.kv_heads, "scale": float(site.scale), "softcap": float(site.softcap),
                "local_window_size": site.mask.window or -1, "is_causal": int(site.mask.kind != "bidirectional"),
            }
            last = max(FLASH_ATTENTION.input_index(name) for name in given)
            inputs = [given.get(port.name) for port in FLASH_ATTENTION.inputs[: last + 1]]
            output = build.op("FlashAttention", inputs, attributes, domain=DOMAIN, name=site.name)[0]
            new = replacement(build, output, site, tail)
        take_over(graph, site.output, new)

    def _drop_cache(self, graph: ir.Graph) -> None:
        inputs = {port.name for port in self._plan.interface.inputs}
        outputs = {port.name for port in self._plan.interface.outputs}
        kept_inputs, kept_outputs = [v for v in graph.inputs if v.name in inputs], [v for v in graph.outputs if v.name in outputs]
        if len(kept_inputs) < len(graph.inputs):
            forget_sizes(graph)
        graph.inputs.clear()
        graph.inputs.extend(kept_inputs)
        graph.outputs.clear()
        graph.outputs.extend(kept_outputs)

    def ensures(self, model: ir.Model) -> None:
        check_inputs(model.graph)
        names = [str(node.name) for node in model.graph if node.op_type == "FlashAttention" and node.domain == DOMAIN]
        if sorted(names) != sorted([*(site.name for site in self._plan.sites), *(site.name for site in self._plan.direct)]):
            raise ir.passes.PostconditionError(f"expected one FlashAttention a site, found {names}")


def _is_scalar(value: ir.Value) -> bool:
    node = value.producer()
    return node is not None and node.op_type == "Size"
