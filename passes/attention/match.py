"""Finding every attention of a graph, in any spelling.

Anchors are the standard `Attention` op and every `Softmax` over the last axis. From there the walk goes back over chains that are proved by
running them (chain.py): the scores to one product q·kᵀ, its operands to this step's tokens, and the mask to what it means (masks.py).
What looks like attention and is not understood becomes a Refusal with the rule that came nearest.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

import onnx_ir as ir

from ..observe import Observation
from ..outcome import Refusal
from .core import Core
from .laboratory import Laboratory
from .masks import MaskProver
from .operands import Operand, find_operand, grown_cache
from .read_op import read_attention_op
from .read_softmax import read_softmax
from .rotary import Rotation
from .sharing import share_caches
from .site import AttentionSite, Cache, Rotary

# Other domains' attention ops: known by name only, so that a graph that has them is refused and not passed over.
_FOREIGN = frozenset({
    "Attention", "MultiHeadAttention", "GroupQueryAttention", "DecoderMaskedMultiHeadAttention", "DecoderMaskedSelfAttention", "SparseAttention",
    "PackedAttention", "PackedMultiHeadAttention", "PagedAttention", "QAttention", "LongformerAttention", "DecoderAttention", "LinearAttention",
    "GatedDeltaNet", "FlashAttention",
})


def match_attention(model: ir.Model, observation: Observation, *, max_context: int = 8192) -> tuple[AttentionSite | Refusal, ...]:
    """Every attention of `model` in the order of its graph, as a site or as the reason why not.

    `observation` is of this very model, which is not changed. Masks are probed up to `max_context` tokens.
    """
    return tuple(found for _, found in match_anchors(model, observation, max_context=max_context))


def match_anchors(
    model: ir.Model, observation: Observation, *, max_context: int = 8192,
) -> tuple[tuple[ir.Node, AttentionSite | Refusal], ...]:
    """As `match_attention`, each with its anchor: the attention op, or the softmax."""
    assert observation.model is model, "the observation is of another model"
    if observation.static:
        return _static_anchors(observation)
    return _Matcher(Laboratory(observation), max_context).match()


def _static_anchors(observation: Observation) -> tuple[tuple[ir.Node, AttentionSite | Refusal], ...]:
    """In a graph whose sizes are all fixed nothing can be proved of other lengths. Softmaxes of data count as candidates."""
    nodes = [
        node for node in observation.model.graph
        if node.op_type in _FOREIGN or (node.op_type == "Softmax" and node.inputs[0] is not None and observation.kind(node.inputs[0]) == "data")
    ]
    return tuple(
        (node, Refusal("every size in the graph is fixed", f"layers.{number}.attention", "observe: expected a free number of tokens"))
        for number, node in enumerate(nodes)
    )


class _Matcher:
    def __init__(self, lab: Laboratory, max_context: int) -> None:
        self.lab = lab
        self.prover = MaskProver(lab, max_context)
        self.outputs = tuple(lab.observation.model.graph.outputs)

    def match(self) -> tuple[tuple[ir.Node, AttentionSite | Refusal], ...]:
        found: list[tuple[ir.Node, AttentionSite | Refusal]] = []
        names = (f"layers.{number}.attention" for number in count())
        for node in self.lab.observation.model.graph:
            if node.op_type == "Attention" and node.domain == "":
                core: Core | Refusal | None = read_attention_op(self.lab, node, next(names))
            elif node.op_type == "Softmax" and node.domain == "":
                core = read_softmax(self.lab, node, names)
            elif node.op_type in _FOREIGN and node.domain != "":
                core = Refusal(f"attention op {node.domain}::{node.op_type} is not read", next(names), f"ops: node {node.name}")
            else:
                continue
            if core is not None:
                found.append((node, self._site(core) if isinstance(core, Core) else core))
        shared = iter(share_caches([item for _, item in found if isinstance(item, AttentionSite)]))
        return tuple((node, next(shared) if isinstance(item, AttentionSite) else item) for node, item in found)

    def _site(self, core: Core) -> AttentionSite | Refusal:
        operands: list[Operand] = []
        for role, value, canon, size in zip(
            ("query", "key", "value"), (core.query, core.key, core.value), core.canons, (core.sizes[0], core.sizes[0], core.sizes[1]),
        ):
            operand = find_operand(self.lab, role, value, canon, core.num_heads, size, core.where)
            if isinstance(operand, Refusal):
                return operand
            operands.append(operand)
        query, key, value = operands
        if key.heads > value.heads and key.past is None:  # a rotary embedding keeps the keys behind their repetition
            again = find_operand(self.lab, "value", core.value, core.canons[2], core.num_heads, core.sizes[1], core.where, heads=key.heads)
            value = value if isinstance(again, Refusal) else again
        types = {operand.value.dtype for operand in (query, key, value)} - {None}
        if types != {ir.DataType.FLOAT}:
            found = ", ".join(sorted(str(dtype) for dtype in types)) or "no type"
            return Refusal("attention is not in float32", core.where, f"types: expected FLOAT, found {found}")
        problem = self._disagreement(core, query, key, value)
        if problem is not None:
            return Refusal(*problem)
        mask = self.prover.prove(core.mask, core.where)
        if isinstance(mask, Refusal):
            return mask
        cache = core.cache or self._cache(core, key, value)
        if isinstance(cache, Refusal):
            return cache
        rotary = _rotary(query.rotation, key.rotation)
        ends = [(query.value, query.layout), (key.value, key.layout)] if rotary else [(o.turned, o.turned_layout) for o in (query, key)]
        nodes = dict.fromkeys(n for group in (query.nodes, key.nodes, value.nodes, core.nodes) for n in group)
        return AttentionSite(
            name=core.where, query=ends[0][0], key=ends[1][0], value=value.value, output=core.output,
            query_layout=ends[0][1], key_layout=ends[1][1], value_layout=value.layout, output_layout=core.output_layout,
            turned_query=query.turned, turned_key=key.turned, turned_query_layout=query.turned_layout, turned_key_layout=key.turned_layout,
            num_heads=core.num_heads, kv_heads=key.heads, head_size=core.sizes[0], value_size=core.sizes[1],
            scale=core.scale * query.factor * key.factor, mask=mask, cache=cache, rotary=rotary, softcap=core.softcap, sinks=core.sinks, nodes=tuple(nodes),
        )

    def _disagreement(self, core: Core, query: Operand, key: Operand, value: Operand) -> tuple[str, str, str] | None:
        if query.heads != core.num_heads or query.past is not None:
            return "the query is not this step's tokens", core.where, f"operands: expected {core.num_heads} heads, found {query.heads}"
        if key.heads != value.heads:
            return "keys and values have different heads", core.where, f"operands: expected {key.heads} value heads, found {value.heads}"
        if value.factor != 1:
            return "the value is scaled", core.where, f"operands: expected factor 1, found {value.factor}"
        cached = key.past is not None
        if cached != (value.past is not None):
            return "only one of key and value is cached", core.where, "cache: expected a past on both"
        if self.lab.observation.cached and not cached and not core.in_op:
            return "the site reads no cache in a graph that has one", core.where, "cache: expected a past before this step's keys"
        return None

    def _cache(self, core: Core, key: Operand, value: Operand) -> Cache | Refusal | None:
        if key.past is None or value.past is None:
            return None
        grown = [grown_cache(self.lab, o, size, self.outputs) for o, size in ((key, core.sizes[0]), (value, core.sizes[1]))]
        if grown[0] is None or grown[1] is None:
            return Refusal("no graph output carries the grown cache", core.where, f"cache: past {key.past.name}, {value.past.name}")
        return Cache(key.past, value.past, grown[0], grown[1])


def _rotary(query: Rotation | None, key: Rotation | None) -> Rotary | None:
    if query is None or key is None or (query.width, query.interleaved) != (key.width, key.interleaved):
        return None
    return Rotary(query, key, query.width, query.interleaved)


def candidates(model: ir.Model) -> int:
    """How many attentions a graph seems to have, where it can't be run to find out: their ops, and softmaxes that go into a product."""
    return sum(node.op_type in _FOREIGN or (node.op_type == "Softmax" and _meets_values(node)) for node in model.graph)


def _meets_values(node: ir.Node) -> bool:
    """Whether a product reads the softmax's result, at most a few nodes on."""
    frontier = [node.outputs[0]]
    for _ in range(4):
        users = [use.node for value in frontier for use in value.uses()]
        if any(user.op_type == "MatMul" for user in users):
            return True
        frontier = [user.outputs[0] for user in users]
    return False


def sites_of(found: Sequence[AttentionSite | Refusal]) -> tuple[AttentionSite, ...]:
    """The sites among what was found."""
    return tuple(site for site in found if isinstance(site, AttentionSite))


def refusals_of(found: Sequence[AttentionSite | Refusal]) -> tuple[Refusal, ...]:
    """The refusals among what was found."""
    return tuple(refusal for refusal in found if isinstance(refusal, Refusal))


