"""Sites on stock `com.microsoft::GroupQueryAttention`: one sequence a run, caches as the graph's own inputs and outputs, no custom op.

Where every site can be expressed the decoder gets the plain interface: input_ids and position_ids [1, S], a past and a present for each
layer, logits [1, S, V]. Where some can't and the graph has a cache, those keep the graph's own attention, and with it its other inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import perf_counter

import onnx_ir as ir

from ...models.interface import GraphInterface, GraphPort, Role
from ...models.spec import CacheGroup, CacheLayer, ModelSpec
from ..build import Builder
from ..cache_interface import change_inputs, check_inputs, forget_sizes, graph_input, graph_port
from ..decoder_body import DecoderBody, decoder_body, graph_value
from ..normalize import graph_size
from ..observe import Observation
from ..outcome import Outcome, PassResult, Refusal
from .layout import output_tail, replacement, tokens_last
from .sharing import readers_of, widest
from .site import AttentionSite

DOMAIN = "com.microsoft"


@dataclass(frozen=True)
class ContiguousLayer:
    """A site with the graph inputs and outputs of its cache: names are the exporter's where it has some. One that only reads another's cache
    (`site.owner`) has that one's, and hands nothing on.
    """

    site: AttentionSite
    past_key: ir.Value
    past_value: ir.Value
    present_key: str
    present_value: str
    tail: tuple[int, ...]


@dataclass(frozen=True)
class ContiguousPlan:
    """`layers` go to GroupQueryAttention. With all sites among them `body` is there and the interface is ours, else the exporter's stays."""

    layers: tuple[ContiguousLayer, ...]
    ids: ir.Value
    body: DecoderBody | None
    inputs: tuple[tuple[ir.Value, Role, int | None], ...]
    interface: GraphInterface
    spec: ModelSpec | None
    refusals: tuple[Refusal, ...]


Grown = Sequence[tuple[ContiguousLayer, Sequence[ir.Value]]]
"""The layers that own a cache, with the values that carry it on."""


def inexpressible(site: AttentionSite) -> Refusal | None:
    """Why GroupQueryAttention can't be this site."""
    found = ""
    if site.mask.kind not in ("causal", "window"):
        found = f"a {site.mask.kind} mask"
    elif site.mask.slopes:
        found = "ALiBi slopes"
    elif site.sinks:
        found = "sinks"
    elif site.head_size % 8:
        found = f"head size {site.head_size}, which is no multiple of 8"
    elif site.head_size != site.value_size:
        found = f"head size {site.head_size} and value size {site.value_size}"
    return Refusal(f"GroupQueryAttention can't express {found}", site.name, "lower_contiguous") if found else None


def plan_contiguous(
    observation: Observation, sites: Sequence[AttentionSite], *, max_context: int, refused: int = 0,
) -> ContiguousPlan | Refusal:
    """The plan for one sequence a run. `refused` counts the attentions of the graph that are no sites."""
    declined = tuple(refusal for site in sites if (refusal := inexpressible(site)) is not None)
    pasts = [site.cache.past_key for site in sites if site.cache is not None and site.owner is None]
    if len(set(pasts)) != len(pasts):
        return Refusal("two attentions share one cache", str(observation.model.graph.name), "lower_contiguous: expected a past for each site")
    whole = [site.with_rotary_in_graph() for site in sites if inexpressible(site) is None]
    if not whole:
        return declined[0] if declined else Refusal("the graph has no attention site", str(observation.model.graph.name))
    if not declined and not refused:
        body = decoder_body(observation, whole, folded=(), max_context=max_context)
        if isinstance(body, DecoderBody):
            return _whole(observation, whole, body, max_context)
        declined = (body,)
    if observation.capacity is not None:
        return declined[0] if declined else Refusal("a cache that is written by index needs all its sites", str(observation.model.graph.name))
    if not observation.cached:
        return declined[0] if declined else Refusal("a graph without a cache needs all its sites", str(observation.model.graph.name))
    return _partly(observation, whole, declined)


def _whole(observation: Observation, sites: Sequence[AttentionSite], body: DecoderBody, max_context: int) -> ContiguousPlan:
    ids = graph_input("input_ids", ir.DataType.INT64, [1, "S"])
    positions = graph_input("position_ids", ir.DataType.INT64, [1, "S"])
    owned = [_layer(observation, index, site) for index, site in enumerate(site for site in sites if site.owner is None)]
    by_name = {layer.site.name: layer for layer in owned}
    layers = tuple(replace(by_name[site.owner or site.name], site=site, tail=output_tail(observation, site)) for site in sites)
    inputs: list[tuple[ir.Value, Role, int | None]] = [(ids, "input_ids", None), (positions, "position_ids", None)]
    outputs = [GraphPort("logits", "float32", (1, "S", body.vocab_size), "logits")]
    for index, layer in enumerate(owned):
        inputs += [(layer.past_key, "past_key", index), (layer.past_value, "past_value", index)]
        shape = (1, layer.site.kv_heads, "T", layer.site.head_size)
        outputs += [
            GraphPort(layer.present_key, "float32", shape, "present_key", index),
            GraphPort(layer.present_value, "float32", shape, "present_value", index),
        ]
    kept = [(sites[places[0]], widest([sites[i].mask.window for i in places])) for places in readers_of(sites)]
    windows = list(dict.fromkeys(window for _, window in kept))
    cache = tuple(CacheLayer(windows.index(window), s.kv_heads, s.head_size, s.value_size, "fp32") for s, window in kept)
    spec = ModelSpec(body.vocab_size, max_context, cache, tuple(CacheGroup(window) for window in windows))
    interface = GraphInterface(tuple(graph_port(*port) for port in inputs), tuple(outputs))
    return ContiguousPlan(layers, ids, body, tuple(inputs), interface, spec, ())


def _layer(observation: Observation, index: int, site: AttentionSite) -> ContiguousLayer:
    cache = site.cache
    shape: list[int | str] = [1, site.kv_heads, "P", site.head_size]
    names = [f"{side}.{index}.{kind}" for side in ("past_key_values", "present") for kind in ("key", "value")]
    if cache is not None:
        names = [str(value.name) for value in (cache.past_key, cache.past_value, cache.present_key, cache.present_value)]
    past = [graph_input(name, ir.DataType.FLOAT, shape) for name in names[:2]]
    return ContiguousLayer(site, past[0], past[1], names[2], names[3], output_tail(observation, site))


def _partly(observation: Observation, sites: Sequence[AttentionSite], declined: tuple[Refusal, ...]) -> ContiguousPlan:
    layers = []
    for site in sites:
        assert site.cache is not None, "a site of a cached graph reads its cache"
        c = site.cache
        layers.append(ContiguousLayer(
            site, c.past_key, c.past_value, str(c.present_key.name), str(c.present_value.name), output_tail(observation, site)
        ))
    ids = graph_value(observation, "input_ids")
    assert ids is not None, "a graph with a cache has token ids"
    return ContiguousPlan(tuple(layers), ids, None, (), observation.interface, None, declined)


class LowerContiguous(ir.passes.InPlacePass):
    """Carries a `ContiguousPlan` out on the model that was planned for."""

    def __init__(self, plan: ContiguousPlan) -> None:
        super().__init__()
        self._plan = plan

    def call(self, model: ir.Model) -> PassResult:
        start, (before, size), plan = perf_counter(), graph_size(model), self._plan
        graph, build = model.graph, Builder(model.graph)
        with build.before(next(iter(graph))):
            lengths = self._lengths(build)
        presents = {layer.site.name: self._replace(build, layer, lengths) for layer in plan.layers}
        grown = [(layer, presents[layer.site.name]) for layer in plan.layers if layer.site.owner is None]
        model.opset_imports.setdefault(DOMAIN, 1)
        if plan.body is not None:
            self._own_signature(model, plan.body, grown)
        else:
            self._same_signature(graph, grown)
        ir.passes.common.RemoveUnusedNodesPass()(model)
        after, count = graph_size(model), len(plan.layers)
        outcome = Outcome(
            "lower_contiguous", "sites", count + len(plan.refusals), count, plan.refusals, (), before, after[0], size, after[1],
            perf_counter() - start,
        )
        return PassResult(model, True, outcome)

    def _lengths(self, build: Builder) -> tuple[ir.Value, ir.Value]:
        """seqlens_k [1] (the last key's index) and total_sequence_length, int32, out of the first past's and the ids' shapes."""
        past = build.size(self._plan.layers[0].past_key, 2)
        new = build.size(self._plan.ids, 1)
        total = build.op("Add", [past, new])[0]
        last = build.op("Cast", [build.op("Sub", [total, build.integers([1])])[0]], {"to": int(ir.DataType.INT32)})[0]
        scalar = build.op("Squeeze", [build.op("Cast", [total], {"to": int(ir.DataType.INT32)})[0], build.integers([0])])[0]
        return last, scalar

    def _replace(self, build: Builder, layer: ContiguousLayer, lengths: tuple[ir.Value, ir.Value]) -> list[ir.Value]:
        site = layer.site
        producer = site.output.producer()
        assert producer is not None
        with build.before(producer):
            inputs = [
                tokens_last(build, site.query, site.query_layout, site.num_heads * site.head_size),
                tokens_last(build, site.key, site.key_layout, site.kv_heads * site.head_size),
                tokens_last(build, site.value, site.value_layout, site.kv_heads * site.value_size), layer.past_key, layer.past_value, *lengths,
            ]
            attributes = {
                "num_heads": site.num_heads, "kv_num_heads": site.kv_heads, "scale": float(site.scale), "softcap": float(site.softcap),
                "local_window_size": site.mask.window or -1, "do_rotary": 0,
            }
            output, *presents = build.op("GroupQueryAttention", inputs, attributes, domain=DOMAIN, name=site.name, outputs=3)
            new = replacement(build, output, site, layer.tail)
        site.output.replace_all_uses_with(new)
        for value in presents:
            value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([1, site.kv_heads, "T", site.head_size])
        return presents

    def _own_signature(self, model: ir.Model, body: DecoderBody, grown: Grown) -> None:
        graph, logits = model.graph, body.logits
        if logits.name != "logits":
            logits.name = "logits"
        logits.shape = ir.Shape([1, "S", body.vocab_size])
        old = {value: f"{value.name}.old" for value in graph.outputs if value is not logits}
        for value, name in old.items():
            value.name = name
        for layer, values in grown:
            values[0].name, values[1].name = layer.present_key, layer.present_value
        graph.outputs.clear()
        graph.outputs.extend([logits, *(value for _, pair in grown for value in pair)])
        inputs = [port[0] for port in self._plan.inputs]
        change_inputs(model, body, inputs[0], inputs[1], inputs)

    def _same_signature(self, graph: ir.Graph, grown: Grown) -> None:
        for layer, values in grown:
            for name, value in zip((layer.present_key, layer.present_value), values):
                index = next(i for i, output in enumerate(graph.outputs) if output.name == name)
                graph.outputs[index].name = f"{name}.old"
                graph.outputs[index], value.name = value, name
        for value in graph.inputs:  # one sequence a run
            if value.shape is not None and len(value.shape) and not isinstance(value.shape[0], int):
                value.shape = ir.Shape([1, *list(value.shape)[1:]])
        forget_sizes(graph)

    def ensures(self, model: ir.Model) -> None:
        check_inputs(model.graph)
        names = {port.name for port in self._plan.interface.outputs}
        if {value.name for value in model.graph.outputs} != names:
            raise ir.passes.PostconditionError(f"expected outputs {sorted(names)}")
