"""A site becomes `ai.octavo::PagedAttention` on token rows: the exporter's transposes, masks, caches and (where read) rotary are left to die."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from ...custom_ops.contract import DOMAIN, OPSET, PAGED_ATTENTION
from ..build import Builder
from ..observe import Dim
from ..outcome import Outcome, PassResult
from .site import AttentionSite

if TYPE_CHECKING:
    from ..cache_interface import TokenFlatPlan
    from .rotary import RotaryTables


class LowerPaged(ir.passes.InPlacePass):
    """Replaces every site of the plan. All or nothing: a plan has all of a graph's sites."""

    def __init__(self, plan: TokenFlatPlan) -> None:
        super().__init__()
        self._plan = plan

    def call(self, model: ir.Model) -> PassResult:
        start, graph = perf_counter(), model.graph
        before, build = len(graph), Builder(graph)
        for index, (site, tables) in enumerate(zip(self._plan.sites, self._plan.tables)):
            producer = site.output.producer()
            assert producer is not None
            with build.before(producer):
                output = self._attention(build, index, site, tables)
                replacement = unflatten(build, output, site, self._plan.body.output_dims[index])
            site.output.replace_all_uses_with(replacement)
        model.opset_imports[DOMAIN] = OPSET
        count = len(self._plan.sites)
        outcome = Outcome("lower_paged", "sites", count, count, nodes_before=before, nodes_after=len(graph), seconds=perf_counter() - start)
        return PassResult(model, True, outcome)

    def _attention(self, build: Builder, index: int, site: AttentionSite, tables: RotaryTables | None) -> ir.Value:
        inputs, place = self._plan.inputs, self._plan.inputs.layer_of[index]
        group = inputs.layers[place].group
        given: dict[str, ir.Value] = {
            "query": token_rows(build, site.query, site.query_layout, site.num_heads, site.head_size),
            "key": token_rows(build, site.key, site.key_layout, site.kv_heads, site.head_size),
            "value": token_rows(build, site.value, site.value_layout, site.kv_heads, site.value_size),
            "key_cache": inputs.keys[place], "value_cache": inputs.values[place],
            "cumulative_sequence_length": inputs.cumulative_sequence_length, "past_seqlens": inputs.past_seqlens,
            "block_table": inputs.block_tables[group], "slot_mapping": inputs.slot_mappings[group], "parent": inputs.parent,
        }
        attributes: dict[str, int | float] = {
            "num_heads": site.num_heads, "kv_num_heads": site.kv_heads, "scale": float(site.scale), "softcap": float(site.softcap),
            "local_window_size": site.mask.window or -1, "rotary_interleaved": 0,
        }
        if site.mask.chunk:
            attributes["chunk_size"] = site.mask.chunk
        if site.sinks:
            given["head_sink"] = build.constant(np.array(site.sinks, np.float32), "head_sink")
        if site.mask.slopes:
            given["alibi_slopes"] = build.constant(np.array(site.mask.slopes, np.float32), "alibi_slopes")
        if tables is not None:
            assert site.rotary is not None
            given["cos_cache"] = build.constant(tables.cos, "rotary.cos")
            given["sin_cache"] = build.constant(tables.sin, "rotary.sin")
            attributes["rotary_interleaved"] = int(site.rotary.interleaved)
        last = max(PAGED_ATTENTION.input_index(name) for name in given)
        ordered = [given.get(port.name) for port in PAGED_ATTENTION.inputs[: last + 1]]
        output = build.op("PagedAttention", ordered, attributes, domain=DOMAIN, name=site.name)[0]
        output.shape = ir.Shape([None, site.num_heads * site.value_size])
        return output

    def ensures(self, model: ir.Model) -> None:
        names = [str(node.name) for node in model.graph if node.op_type == "PagedAttention" and node.domain == DOMAIN]
        if sorted(names) != sorted(site.name for site in self._plan.sites):
            raise ir.passes.PostconditionError(f"expected one PagedAttention a site, found {names}")


def token_rows(build: Builder, value: ir.Value, layout: str, heads: int, size: int) -> ir.Value:
    """A site's operand of one sequence as [tokens, heads·size]."""
    if layout == "BHSD":
        value = build.transpose(value, (0, 2, 1, 3))
    return build.reshape(value, [-1, heads * size])


def unflatten(build: Builder, rows: ir.Value, site: AttentionSite, dims: tuple[Dim, ...]) -> ir.Value:
    """[tokens, H·E] as the value that the graph goes on with, whose sizes at one sequence are `dims`."""
    if site.output_layout == "BHSD":
        split = build.reshape(rows, [1, -1, site.num_heads, site.value_size])
        rows = build.transpose(split, (0, 2, 1, 3))
        if [dim.factor for dim in dims] == [1, site.num_heads, 1, site.value_size]:
            return rows
    return build.reshape(rows, [-1 if dim.letters else dim.factor for dim in dims])
