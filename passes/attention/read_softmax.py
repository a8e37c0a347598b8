"""A `Softmax` between two products of data as a core: softmax(f(q·kᵀ)) · v, f being found by running it on numbers of our choice."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from ..dispatch import dispatch_reason
from ..extract import cone
from ..observe import Probe
from ..outcome import Refusal
from .chain import PROBABILITIES, SCORES, Chain, attribute
from .core import Core, moved_output
from .laboratory import BHSD, Array, Laboratory
from .mask_source import HIDDEN, MaskSource
from .operands import Canon
from .sinks import sink_logits, split_sink


def read_softmax(lab: Laboratory, node: ir.Node, names: Iterator[str]) -> Core | Refusal | None:
    result, given = node.outputs[0], node.inputs[0]
    assert given is not None
    scores_in, sink = split_sink(lab, given) if lab.graph.is_data(given) else (given, None)
    shape = lab.shape(scores_in, lab.probes[0]) if lab.graph.is_data(scores_in) else None
    if not lab.graph.is_data(scores_in):
        return None
    product, after = _product_behind(lab, result)
    scores = _product_before(lab, scores_in)
    if product is None and scores is None:
        return None  # a router, a classifier's head: no product of data on either side
    where = next(names)
    axis = attribute(node, "axis", -1 if lab.observation.model.opset_imports.get("", 1) >= 13 else 1)
    if shape is None and (culprit := _sized_by_content(lab, scores_in)) is not None:
        reason = dispatch_reason(culprit, lab.graph.is_data)
        return Refusal(f"{reason} ({culprit.op_type})", where, f"softmax: node {node.name} has sizes that follow from {culprit.name}")
    if shape is None or axis not in (-1, len(shape) - 1):
        return Refusal("the softmax is not over the last axis of known sizes", where, f"softmax: node {node.name}, axis {axis}, shape {shape}")
    if product is None:
        return Refusal("the softmax's result goes into no product with values", where, f"softmax: node {node.name}, expected MatMul(P, V)")
    if scores is None:
        reason, nearest = _nearest_scores(lab, scores_in)
        return Refusal(reason, where, nearest)
    return _read_products(lab, node, scores, product, after, sink, where)


def _sized_by_content(lab: Laboratory, value: ir.Value) -> ir.Node | None:
    """The first operator before `value` that makes results of a length that no formula tells, where the data do."""
    return next((n for n in cone([value]).nodes if lab.graph.is_data(n.outputs[0]) and lab.observation.dims(n.outputs[0]) is None), None)


def _product_behind(lab: Laboratory, result: ir.Value) -> tuple[ir.Node | None, Chain | None]:
    """The MatMul whose first operand is the softmax's result, moved or guarded."""
    frontier, seen = [result], {result}
    while frontier:
        value = frontier.pop()
        for use in value.uses():
            if use.node.op_type == "MatMul" and use.node.domain == "" and use.idx == 0 and _is_data(lab, use.node.inputs[1]):
                operand = use.node.inputs[0]
                assert operand is not None
                for computed, chain in lab.graph.walk(operand, PROBABILITIES):
                    if computed == (result,) and chain.leaves == computed:
                        return use.node, chain
            elif use.node.op_type in PROBABILITIES:
                fresh = [output for output in use.node.outputs if output not in seen]
                seen.update(fresh)
                frontier.extend(fresh)
    return None, None


def _product_before(lab: Laboratory, scores: ir.Value) -> Chain | None:
    """The chain from a product of two data values to the softmax."""
    for computed, chain in lab.graph.walk(scores, SCORES):
        if len(computed) == 1 and chain.leaves == computed:
            product = computed[0].producer()
            assert product is not None
            if product.op_type == "MatMul" and product.domain == "" and all(_is_data(lab, v) for v in product.inputs):
                return chain
    return None


def _nearest_scores(lab: Laboratory, scores: ir.Value) -> tuple[str, str]:
    """What the walk back from the scores ran into: more than a product means that something else of the data has a part in them."""
    *_, (_, chain) = lab.graph.walk(scores, SCORES)
    ends = [f"{v.name} from {'the inputs' if (node := v.producer()) is None else node.op_type}" for v in chain.leaves]
    nearest = f"scores: expected one MatMul of data behind scale, softcap and mask, found {', '.join(ends)}"
    products = [v for v in chain.leaves if (node := v.producer()) is not None and node.op_type == "MatMul"]
    if products and len(chain.leaves) > 1:
        return "the mask depends on data", nearest
    return "the softmax's scores come from no single product of query and key", nearest


def _is_data(lab: Laboratory, value: ir.Value | None) -> bool:
    return value is not None and lab.graph.is_data(value)


def _read_products(lab: Laboratory, node: ir.Node, before: Chain, product: ir.Node, after: Chain | None, sink: ir.Value | None, where: str) -> Core | Refusal:
    first = before.leaves[0].producer()
    assert first is not None and after is not None
    query, key, value = first.inputs[0], first.inputs[1], product.inputs[1]
    assert query is not None and key is not None and value is not None
    probe = lab.probes[0]
    shapes = [lab.shape(v, probe) for v in (before.leaves[0], query, value)]
    if any(shape is None or len(shape) < 3 for shape in shapes):
        return Refusal("the sizes of the products follow no formula", where, f"products: {before.leaves[0].name} has shape {shapes[0]}")
    scores, q_shape, v_shape = (shape or () for shape in shapes)
    heads, rest = divmod(int(np.prod(scores[:-2])), probe.batch)
    if rest or scores[-2] != probe.length or scores[-1] != lab.observation.keys(probe):
        return Refusal("the scores are not of each query and all keys", where, f"products: expected [B·H, S, keys] at {probe}, found {scores}")
    sinks = () if sink is None else sink_logits(lab, sink, heads)
    if sinks is None:
        return Refusal("a column beside the scores is not one logit a head", where, f"sinks: {sink.name if sink else ''}")
    if not all(_is_unchanged(lab, before, after, p, bool(sinks)) for p in lab.probes):
        return Refusal("the softmax's result is changed before it meets the values", where, f"products: {after.target.name}")
    score = _score(lab, before)
    if isinstance(score, str):
        return Refusal("what happens to the scores is not understood", where, f"scores: {score}")
    size, value_size = q_shape[-1], v_shape[-1]

    def lead(array: Array, p: Probe, result: ir.Value = before.leaves[0]) -> Array:
        shape = lab.shape(result, p)
        assert shape is not None
        return np.broadcast_to(array, (*shape[:-2], *array.shape[-2:])).reshape(p.batch, heads, *array.shape[-2:])

    canons: tuple[Canon, Canon, Canon] = (
        lead, lambda array, p: lead(array.swapaxes(-1, -2), p), lambda array, p: lead(array, p, product.outputs[0])
    )
    end = moved_output(lab, product.outputs[0], heads, value_size, BHSD)
    if end is None:
        return Refusal("the attention's result is in no known layout", where, f"output: {product.outputs[0].name}")
    output, layout, behind, guards = end
    nodes = (first, *before.nodes, node, *after.nodes, product, *behind)
    source = MaskSource(heads, chain=before, sinks=bool(sinks), guards=guards)
    return Core(where, query, key, value, canons, heads, (size, value_size), score[0], score[1], source, output, layout, nodes, sinks=sinks)


def _is_unchanged(lab: Laboratory, before: Chain, after: Chain, probe: Probe, sinks: bool) -> bool:
    """Whether the product with the values reads the probabilities as the softmax gives them, less a sink's in the last column."""
    shape = lab.shape(before.target, probe)
    if shape is None:
        return False
    probabilities = np.random.default_rng(1).random((*shape[:-1], shape[-1] + 1) if sinks else shape)
    out, kept = lab.run(after, [probabilities], probe), probabilities[..., :-1] if sinks else probabilities
    return out is not None and out.size == kept.size and np.array_equal(out.reshape(-1), kept.reshape(-1))


def _score(lab: Laboratory, chain: Chain) -> tuple[float, float] | str:
    """Scale and softcap (0: none) of what lies between product and softmax, or what disagreed. The mask is judged elsewhere."""
    for probe in lab.probes:
        shape = lab.shape(chain.leaves[0], probe)
        assert shape is not None

        def at(scores: Array, probe: Probe = probe, shape: tuple[int, ...] = shape) -> Array | None:
            out = lab.run(chain, [np.broadcast_to(scores, shape).astype(np.float32)], probe)
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
