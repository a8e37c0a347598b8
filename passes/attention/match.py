"""Finding every attention of a graph, in any spelling.

Anchors are the standard `Attention` op and every `Softmax` over the last axis. From there the walk goes back over chains that are proved by
running them (chain.py): the scores to one product q·kᵀ, its operands to this step's tokens, and the mask to what it means (masks.py).
What looks like attention and is not understood becomes a Refusal with the rule that came nearest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
import onnx_ir as ir

from ..observe import Observation, Probe
from ..outcome import Refusal
from .chain import MOVES, PROBABILITIES, SCORES, Chain, attribute
from .laboratory import BHSD, BSH, Array, Laboratory, fits_layout
from .masks import HIDDEN, MaskProver, MaskSource
from .operands import Canon, Operand, find_operand, grown_cache
from .rotary import Rotation
from .site import AttentionSite, Cache, Rotary

# Other domains' attention ops: known by name only, so that a graph that has them is refused and not passed over.
_FOREIGN = frozenset({
    "Attention", "MultiHeadAttention", "GroupQueryAttention", "DecoderMaskedMultiHeadAttention", "DecoderMaskedSelfAttention", "SparseAttention",
    "PackedAttention", "PackedMultiHeadAttention", "PagedAttention", "QAttention", "LongformerAttention", "DecoderAttention", "LinearAttention",
    "GatedDeltaNet", "FlashAttention",
})
_ATTENTION_ATTRIBUTES = frozenset({
    "is_causal", "kv_num_heads", "q_num_heads", "qk_matmul_output_mode", "scale", "softcap", "softmax_precision", "left_window_size", "right_window_size",
})


def match_attention(model: ir.Model, observation: Observation, *, max_context: int = 8192) -> tuple[AttentionSite | Refusal, ...]:
    """Every attention of `model` in the order of its graph, as a site or as the reason why not.

    `observation` is of this very model, which is not changed. Masks are probed up to `max_context` tokens.
    """
    assert observation.model is model, "the observation is of another model"
    matcher = _Matcher(Laboratory(observation), max_context)
    return matcher.match()


@dataclass(frozen=True)
class _Core:
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
    output_layout: str
    nodes: tuple[ir.Node, ...]
    cache: Cache | None = None
    in_op: bool = False


class _Matcher:
    def __init__(self, lab: Laboratory, max_context: int) -> None:
        self.lab = lab
        self.prover = MaskProver(lab, max_context)
        self.outputs = [value for value in lab.observation.model.graph.outputs]

    def match(self) -> tuple[AttentionSite | Refusal, ...]:
        found: list[AttentionSite | Refusal] = []
        numbers = count()
        for node in self.lab.observation.model.graph:
            if node.op_type == "Attention" and node.domain == "":
                core: _Core | Refusal | None = self._read_op(node, f"layers.{next(numbers)}.attention")
            elif node.op_type == "Softmax" and node.domain == "":
                core = self._read_softmax(node, numbers)
            elif node.op_type in _FOREIGN and node.domain != "":
                where = f"layers.{next(numbers)}.attention"
                core = Refusal(f"attention op {node.domain}::{node.op_type} is not read", where, f"ops: node {node.name}")
            else:
                continue
            if core is not None:
                found.append(self._site(core) if isinstance(core, _Core) else core)
        return tuple(found)

    # ---- from a core to a site

    def _site(self, core: _Core) -> AttentionSite | Refusal:
        operands: list[Operand] = []
        for role, value, canon, size in zip(
            ("query", "key", "value"), (core.query, core.key, core.value), core.canons, (core.sizes[0], core.sizes[0], core.sizes[1]),
        ):
            operand = find_operand(self.lab, role, value, canon, core.num_heads, size, core.where)
            if isinstance(operand, Refusal):
                return operand
            operands.append(operand)
        query, key, value = operands
        types = {operand.value.dtype for operand in operands} - {None}
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
            query_layout=ends[0][1], key_layout=ends[1][1], value_layout=value.layout, output_layout=core.output_layout,  # type: ignore[arg-type]
            turned_query=query.turned, turned_key=key.turned, turned_query_layout=query.turned_layout, turned_key_layout=key.turned_layout,
            num_heads=core.num_heads, kv_heads=key.heads, head_size=core.sizes[0], value_size=core.sizes[1],
            scale=core.scale * query.factor * key.factor, mask=mask, cache=cache, rotary=rotary, softcap=core.softcap, nodes=tuple(nodes),
        )

    def _disagreement(self, core: _Core, query: Operand, key: Operand, value: Operand) -> tuple[str, str, str] | None:
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

    def _cache(self, core: _Core, key: Operand, value: Operand) -> Cache | Refusal | None:
        if key.past is None or value.past is None:
            return None
        grown = [grown_cache(self.lab, o, size, self.outputs) for o, size in ((key, core.sizes[0]), (value, core.sizes[1]))]
        if grown[0] is None or grown[1] is None:
            return Refusal("no graph output carries the grown cache", core.where, f"cache: past {key.past.name}, {value.past.name}")
        return Cache(key.past, value.past, grown[0], grown[1])

    # ---- the standard Attention op

    def _read_op(self, node: ir.Node, where: str) -> _Core | Refusal:
        inputs: list[ir.Value | None] = [*node.inputs, *[None] * (7 - len(node.inputs))]
        query, key, value, mask, past_key, past_value, nonpad = inputs[:7]
        problem = _op_problem(node, nonpad)
        if problem:
            return Refusal(f"the Attention op asks for {problem}", where, f"Attention: node {node.name}")
        assert query is not None and key is not None and value is not None
        shapes = [self.lab.shape(v, self.lab.probes[0]) for v in (query, key, value)]
        if any(shape is None or len(shape) not in (3, 4) for shape in shapes):
            return Refusal("the sizes of the Attention op's operands follow no formula", where, f"Attention: node {node.name}")
        given = (attribute(node, "q_num_heads", 0), attribute(node, "kv_num_heads", 0), attribute(node, "kv_num_heads", 0))
        heads = [shape[1] if len(shape) == 4 else n for shape, n in zip(shapes, given)]  # type: ignore[arg-type,index]
        if not all(heads) or heads[0] % heads[1] or heads[1] != heads[2]:
            return Refusal("the Attention op's heads don't divide", where, f"Attention: {heads} heads of query, key and value")
        sizes = [shape[3] if len(shape) == 4 else shape[2] // n for shape, n in zip(shapes, heads)]  # type: ignore[arg-type,index]
        if sizes[0] != sizes[1]:
            return Refusal("query and key have different head sizes", where, f"Attention: {sizes[0]} and {sizes[1]}")
        cache: Cache | Refusal | None = None
        if past_key is not None or past_value is not None:
            cache = self._op_cache(node, past_key, past_value, where)
            if isinstance(cache, Refusal):
                return cache
        end = self._output(node.outputs[0], heads[0], sizes[2], BHSD if len(shapes[0]) == 4 else BSH)  # type: ignore[arg-type]
        if end is None:
            return Refusal("the attention's result is in no known layout", where, f"output: {node.outputs[0].name}")
        output, layout, behind = end
        scale = attribute(node, "scale", 0.0) or 1 / float(np.sqrt(sizes[0]))
        source = MaskSource(heads[0], operand=mask, is_causal=bool(attribute(node, "is_causal", 0)), cached_in_op=cache is not None)
        canons = tuple(_op_canon(len(shape) == 4, n, heads[0], size) for shape, n, size in zip(shapes, heads, sizes))  # type: ignore[arg-type]
        return _Core(
            where, query, key, value, canons, heads[0], (sizes[0], sizes[2]), scale, attribute(node, "softcap", 0.0), source,  # type: ignore[arg-type]
            output, layout, (node, *behind), cache, in_op=cache is not None,
        )

    def _op_cache(self, node: ir.Node, past_key: ir.Value | None, past_value: ir.Value | None, where: str) -> Cache | Refusal:
        present = node.outputs[1:3]
        graph = self.lab.observation.model.graph
        given = [value for value in (past_key, past_value) if value is not None and value in graph.inputs]
        if len(given) != 2 or len(present) != 2 or not all(value in self.outputs for value in present):
            return Refusal("the Attention op's cache is not a graph input and output", where, f"cache: node {node.name}")
        return Cache(given[0], given[1], present[0], present[1])

    # ---- Softmax between two products

    def _read_softmax(self, node: ir.Node, numbers: count[int]) -> _Core | Refusal | None:
        result, scores_in = node.outputs[0], node.inputs[0]
        assert scores_in is not None
        shape = self.lab.shape(scores_in, self.lab.probes[0]) if self.lab.graph.is_data(scores_in) else None
        if not self.lab.graph.is_data(scores_in):
            return None
        product, after = self._product_behind(result)
        scores = self._product_before(scores_in)
        if product is None and scores is None:
            return None  # a router, a classifier's head: no product of data on either side
        where = f"layers.{next(numbers)}.attention"
        axis = attribute(node, "axis", -1)
        if shape is None or axis not in (-1, len(shape) - 1):
            return Refusal("the softmax is not over the last axis of known sizes", where, f"softmax: node {node.name}, axis {axis}, shape {shape}")
        if product is None:
            return Refusal("the softmax's result goes into no product with values", where, f"softmax: node {node.name}, expected MatMul(P, V)")
        if scores is None:
            reason, nearest = self._nearest_scores(scores_in)
            return Refusal(reason, where, nearest)
        return self._read_products(node, scores, product, after, where)

    def _product_behind(self, result: ir.Value) -> tuple[ir.Node | None, Chain | None]:
        """The MatMul whose first operand is the softmax's result, moved or guarded."""
        frontier, seen = [result], {result}
        while frontier:
            value = frontier.pop()
            for use in value.uses():
                if use.node.op_type == "MatMul" and use.node.domain == "" and use.idx == 0 and self._is_data(use.node.inputs[1]):
                    operand = use.node.inputs[0]
                    assert operand is not None
                    for computed, chain in self.lab.graph.walk(operand, PROBABILITIES):
                        if computed == (result,) and chain.leaves == computed:
                            return use.node, chain
                elif use.node.op_type in PROBABILITIES:
                    fresh = [output for output in use.node.outputs if output not in seen]
                    seen.update(fresh)
                    frontier.extend(fresh)
        return None, None

    def _product_before(self, scores: ir.Value) -> Chain | None:
        """The chain from a product of two data values to the softmax."""
        for computed, chain in self.lab.graph.walk(scores, SCORES):
            if len(computed) == 1 and chain.leaves == computed:
                product = computed[0].producer()
                assert product is not None
                if product.op_type == "MatMul" and product.domain == "" and all(self._is_data(v) for v in product.inputs):
                    return chain
        return None

    def _nearest_scores(self, scores: ir.Value) -> tuple[str, str]:
        """What the walk back from the scores ran into: more than a product means that something else of the data has a part in them."""
        *_, (_, chain) = self.lab.graph.walk(scores, SCORES)
        ends = [f"{v.name} from {'the inputs' if (node := v.producer()) is None else node.op_type}" for v in chain.leaves]
        nearest = f"scores: expected one MatMul of data behind scale, softcap and mask, found {', '.join(ends)}"
        products = [v for v in chain.leaves if (node := v.producer()) is not None and node.op_type == "MatMul"]
        if products and len(chain.leaves) > 1:
            return "the mask depends on data", nearest
        return "the softmax's scores come from no single product of query and key", nearest

    def _is_data(self, value: ir.Value | None) -> bool:
        return value is not None and self.lab.graph.is_data(value)

    def _read_products(self, node: ir.Node, before: Chain, product: ir.Node, after: Chain | None, where: str) -> _Core | Refusal:
        first = before.leaves[0].producer()
        assert first is not None and after is not None
        query, key, value = first.inputs[0], first.inputs[1], product.inputs[1]
        assert query is not None and key is not None and value is not None
        probe = self.lab.probes[0]
        shapes = [self.lab.shape(v, probe) for v in (before.leaves[0], query, value)]
        if any(shape is None or len(shape) < 3 for shape in shapes):
            return Refusal("the sizes of the products follow no formula", where, f"products: {before.leaves[0].name} has shape {shapes[0]}")
        scores, q_shape, v_shape = (shape or () for shape in shapes)
        heads, rest = divmod(int(np.prod(scores[:-2])), probe.batch)
        if rest or scores[-2] != probe.length or scores[-1] != probe.past + probe.length:
            return Refusal("the scores are not of each query and all keys", where, f"products: expected [B·H, S, P+S] at {probe}, found {scores}")
        if not all(self._is_unchanged(after, p) for p in self.lab.probes):
            return Refusal("the softmax's result is changed before it meets the values", where, f"products: {product.inputs[0].name}")  # type: ignore[union-attr]
        score = self._score(before, heads)
        if isinstance(score, str):
            return Refusal("what happens to the scores is not understood", where, f"scores: {score}")
        size, value_size = q_shape[-1], v_shape[-1]

        def lead(array: Array, p: Probe) -> Array:
            shape = self.lab.shape(before.leaves[0], p)
            assert shape is not None
            return np.broadcast_to(array, (*shape[:-2], *array.shape[-2:])).reshape(p.batch, heads, *array.shape[-2:])

        canons: tuple[Canon, Canon, Canon] = (lead, lambda array, p: lead(array.swapaxes(-1, -2), p), lead)
        end = self._output(product.outputs[0], heads, value_size, BHSD)
        if end is None:
            return Refusal("the attention's result is in no known layout", where, f"output: {product.outputs[0].name}")
        output, layout, behind = end
        nodes = (first, *before.nodes, node, *after.nodes, product, *behind)
        source = MaskSource(heads, chain=before)
        return _Core(where, query, key, value, canons, heads, (size, value_size), score[0], score[1], source, output, layout, nodes)

    def _is_unchanged(self, after: Chain, probe: Probe) -> bool:
        shape = self.lab.shape(after.leaves[0], probe)
        if shape is None:
            return False
        probabilities = np.random.default_rng(1).random(shape)
        out = self.lab.run(after, [probabilities], probe)
        return out is not None and out.size == probabilities.size and np.array_equal(out.reshape(-1), probabilities.reshape(-1))

    def _score(self, chain: Chain, heads: int) -> tuple[float, float] | str:
        """Scale and softcap (0: none) of what lies between product and softmax, or what disagreed. The mask is judged elsewhere."""
        for probe in self.lab.probes:
            shape = self.lab.shape(chain.leaves[0], probe)
            assert shape is not None

            def at(scores: Array, probe: Probe = probe, shape: tuple[int, ...] = shape) -> Array | None:
                out = self.lab.run(chain, [np.broadcast_to(scores, shape).astype(np.float32)], probe)
                return None if out is None or out.size != int(np.prod(shape)) else out.reshape(-1)

            zero, one, huge = at(np.zeros(1)), at(np.ones(1)), at(np.full(1, 1e30))
            if zero is None or one is None or huge is None:
                return "can't be run"
            seen = np.flatnonzero(zero > HIDDEN)
            if seen.size == 0:
                return f"every key is hidden at {probe}"
            cap = float(huge[seen[0]] - zero[seen[0]])
            softcap = cap if cap < 1e20 else 0.0
            small = at(np.full(1, 1e-3)) if softcap else one
            assert small is not None
            scale = float(small[seen[0]] - zero[seen[0]]) / (1e-3 if softcap else 1.0)
            random = np.random.default_rng(2).standard_normal(shape).astype(np.float32) * 30
            out = at(random)
            scaled = random.reshape(-1) * scale
            expected = zero + (softcap * np.tanh(scaled / softcap) if softcap else scaled)
            if out is None or np.any(out[zero <= HIDDEN] > HIDDEN / 2):
                return f"a hidden key is seen at {probe}"
            if not np.allclose(out[seen], expected[seen], rtol=1e-4, atol=1e-4 * max(1.0, abs(scale))):
                return f"expected scale {scale:g} and softcap {softcap:g} at {probe}, found other scores"
        return scale, softcap

    def _output(self, value: ir.Value, heads: int, size: int, start: str) -> tuple[ir.Value, str, tuple[ir.Node, ...]] | None:
        """The last value behind the product that is only a movement of it, in a layout we know: what a lowering replaces.

        The product itself lies in the order of layout `start`.
        """
        product, best = value, None
        while True:
            chain = next((c for computed, c in self.lab.graph.walk(value, MOVES) if computed == (product,) and c.leaves == computed), None)
            for layout in (BSH, BHSD) if chain is not None else ():
                assert chain is not None
                if all(self._is_laid_out(chain, start, layout, heads, size, probe) for probe in self.lab.probes):
                    best = (value, layout, chain.nodes)
                    break
            following = self._only_user(value)
            if following is None or following.op_type not in MOVES or len(following.outputs) != 1:
                return best
            value = following.outputs[0]

    def _only_user(self, value: ir.Value) -> ir.Node | None:
        """The node that alone reads `value`; nodes that only ask for its shape, on behalf of that node, don't count."""
        if value in self.outputs:
            return None
        users = {use.node for use in value.uses()}
        readers = {node for node in users if not (node.op_type == "Shape" and not self._is_data(node.outputs[0]))}
        if len(readers) != 1:
            return None
        reader = next(iter(readers))
        pending, seen = [output for node in users - readers for output in node.outputs], set[ir.Value]()
        while pending:
            size = pending.pop()
            if size in self.outputs or len(seen) > 64:
                return None
            for use in size.uses():
                if use.node is not reader and self._is_data(use.node.outputs[0]):
                    return None
                fresh = [output for output in use.node.outputs if use.node is not reader and output not in seen]
                seen.update(fresh)
                pending.extend(fresh)
        return reader

    def _is_laid_out(self, chain: Chain, start: str, layout: str, heads: int, size: int, probe: Probe) -> bool:
        shape, end = self.lab.shape(chain.leaves[0], probe), self.lab.shape(chain.target, probe)
        if shape is None or int(np.prod(shape)) != probe.batch * heads * probe.length * size:
            return False
        if end is None or not fits_layout(end, layout, probe, heads, size):
            return False
        numbers = np.arange(int(np.prod(shape)))
        out = self.lab.run(chain, [numbers.reshape(shape)], probe)
        if out is None or out.size != numbers.size:
            return False
        first = (probe.batch, heads, probe.length, size) if start == BHSD else (probe.batch, probe.length, heads, size)
        moved = numbers.reshape(first) if start == layout else numbers.reshape(first).transpose(0, 2, 1, 3)
        return np.array_equal(out.reshape(-1), moved.reshape(-1))


def _op_problem(node: ir.Node, nonpad: ir.Value | None) -> str | None:
    """What an Attention node asks for that no lowering gives."""
    unknown = set(node.attributes) - _ATTENTION_ATTRIBUTES
    if unknown:
        return f"attributes {', '.join(sorted(unknown))}"
    if attribute(node, "softmax_precision", 0) not in (0, int(ir.DataType.FLOAT)):
        return f"softmax_precision {attribute(node, 'softmax_precision', 0)}"
    if attribute(node, "left_window_size", -1) != -1 or attribute(node, "right_window_size", -1) != -1:
        return "a window of its own"
    if nonpad is not None:
        return "nonpad_kv_seqlen"
    if len(node.outputs) > 3 and (node.outputs[3].uses() or node.outputs[3].is_graph_output()):
        return "the score matrix as an output"
    return None


def _op_canon(by_head: bool, heads: int, num_heads: int, size: int) -> Canon:
    def canon(array: Array, probe: Probe) -> Array:
        split = array if by_head else array.reshape(probe.batch, -1, heads, size).transpose(0, 2, 1, 3)
        return np.repeat(split, num_heads // heads, axis=1)

    return canon


def _rotary(query: Rotation | None, key: Rotation | None) -> Rotary | None:
    if query is None or key is None or (query.width, query.interleaved) != (key.width, key.interleaved):
        return None
    return Rotary(query, key, query.width, query.interleaved)


def sites_of(found: Sequence[AttentionSite | Refusal]) -> tuple[AttentionSite, ...]:
    """The sites among what was found."""
    return tuple(site for site in found if isinstance(site, AttentionSite))


def refusals_of(found: Sequence[AttentionSite | Refusal]) -> tuple[Refusal, ...]:
    """The refusals among what was found."""
    return tuple(refusal for refusal in found if isinstance(refusal, Refusal))


