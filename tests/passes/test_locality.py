"""locality: what may stand between attentions, and what may not, one graph a rule.

Each body turns `h`, the embedded tokens [B, S, 8], into `y` [B, S, 8]. The oracle for both sides is the graph itself, run in onnxruntime:
what is accepted must not move a row when another one changes, what is refused must have a reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from octavo.models.onnx_reader import graph_interface, read_onnx
from octavo.passes.attention.match import match_attention, sites_of
from octavo.passes.attention.site import AttentionSite
from octavo.passes.locality import trace_tokens
from octavo.passes.normalize import Normalize
from octavo.passes.observe import Observation, observe
from octavo.passes.outcome import Refusal
from octavo.passes.positions import position_sources

MAX_CONTEXT = 64
SIZES = {"W": (8, 8), "up": (8, 24), "down": (24, 8), "bias": (8,), "gain": (8,), "table": (16, 8), "places": (64, 8), "steps": (16, 1), "kernel": (8, 8, 3)}
INTS = {
    "zero": [0], "one": [1], "two": [2], "three": [3], "four": [4], "eight": [8], "nine": [9], "sixteen": [16], "forty": [40], "last": [-1],
    "ones": [1, 1, 1], "heads": [0, 0, 2, 4], "rows": [-1, 8], "unrows": [1, -1, 8], "back": [0, 0, 8], "mixed": [0, -1, 4],
    "thrice": [1, 1, 3], "tiles": [3, 1], "tiled": [3, -1, 8], "by_four": [4, 4], "no_pads": [0, 0, 1, 0, 0, 1], "late_pads": [0, 1, 0, 0, -1, 0],
    "far": [-9223372036854775808], "big": [9223372036854775807],
}


def graph(body: str, *, inputs: str = "", opset: int = 21) -> ir.Model:
    """A decoder without attention: `body` computes z from h."""
    floats = [f"float[{','.join(map(str, shape))}] {name} = {{{_numbers(name, shape)}}}" for name, shape in SIZES.items()]
    ints = [f"int64[{len(values)}] {name} = {{{', '.join(map(str, values))}}}" for name, values in INTS.items()]
    constants = [*floats, *ints, "float eps = {0.00001}", "int64 axis0 = {0}", "int64 axis1 = {1}", "int64 axis2 = {2}"]
    constants += [f"uint8[16,4] packed = {{{', '.join(str(37 * i % 256) for i in range(64))}}}"]
    model = ir.from_onnx_text(f"""
<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1]>
g (int64[B,S] input_ids{inputs}) => (float[B,S,8] logits) <{', '.join(constants)}>
{{ h = Gather(table, input_ids) {body} logits = MatMul(z, W) }}
""")
    Normalize()(model)
    return model


def _numbers(name: str, shape: tuple[int, ...]) -> str:
    draw = np.random.default_rng(len(name))
    return ", ".join(f"{x:.4f}" for x in draw.standard_normal(int(np.prod(shape))))


def prove_local(observation: Observation, sites: Sequence[AttentionSite], *, folded: Sequence[AttentionSite] = ()) -> tuple[Refusal, ...]:
    """Why the graph is not token-local outside `sites`, with rows of structural values that follow from the position alone."""
    traced = trace_tokens(observation, sites, folded=folded, max_context=MAX_CONTEXT)
    sources = position_sources(observation, traced.positional, max_context=MAX_CONTEXT)
    return (*traced.refusals, sources) if isinstance(sources, Refusal) else traced.refusals


def refusals(model: ir.Model) -> tuple[Refusal, ...]:
    return prove_local(observe(model, graph_interface(model)), ())


def looks_sideways(model: ir.Model) -> bool:
    """Whether a row of the logits moves when another token changes, when rows are taken away, or when they are in another order."""
    session = ort.InferenceSession(ir.serde.serialize_model(model).SerializeToString(), providers=["CPUExecutionProvider"])
    extra = {feed.name for feed in session.get_inputs()} - {"input_ids"}

    def logits(ids: np.ndarray, places: np.ndarray) -> np.ndarray:
        return session.run(None, {"input_ids": ids[None], **dict.fromkeys(extra, places[None])})[0][0]

    ids, places = np.array([3, 14, 1, 5, 9, 2, 6]), np.arange(7)
    base = logits(ids, places)
    for row in range(len(ids)):
        changed = ids.copy()
        changed[row] = (ids[row] + 1) % 16
        if not np.allclose(np.delete(logits(changed, places), row, 0), np.delete(base, row, 0), atol=1e-5):
            return True
    fewer, turned = logits(ids[:4], places[:4]), logits(ids[::-1].copy(), places[::-1].copy())
    return any(one.shape != two.shape or not np.allclose(one, two, atol=1e-5) for one, two in ((fewer, base[:4]), (turned, base[::-1])))


LOCAL = {
    "elementwise": "a = Add(h, bias) b = Mul(a, h) c = Sigmoid(b) null = CastLike(eps, h) positive = Greater(a, null) "
                   "z = Where(positive, c, h)",
    "matmul": "a = MatMul(h, up) b = Relu(a) z = MatMul(b, down)",
    "matmul from the left": "t = Transpose<perm = [0, 2, 1]>(h) a = MatMul(W, t) z = Transpose<perm = [0, 2, 1]>(a)",
    "matmul of each token": "a = Unsqueeze(h, two) b = Unsqueeze(h, last) c = MatMul(b, a) d = MatMul(a, c) z = Squeeze(d, two)",
    "gemm": "f = Reshape(h, rows) a = Gemm(f, W, bias) z = Reshape(a, unrows)",
    "gemm transposed": "f = Reshape(h, rows) t = Transpose<perm = [1, 0]>(f) a = Gemm<transA = 1>(t, W) z = Reshape(a, unrows)",
    "einsum": 'a = Einsum<equation = "bsh,hk->bks">(h, W) z = Transpose<perm = [0, 2, 1]>(a)',
    "softmax": "z = Softmax<axis = -1>(h)",
    "softmax of features before tokens": "t = Transpose<perm = [0, 2, 1]>(h) a = Softmax<axis = 1>(t) z = Transpose<perm = [0, 2, 1]>(a)",
    "reduce": "m = ReduceMean(h, last) z = Sub(h, m)",
    "reduce away": "m = ReduceMax<keepdims = 0>(h, last) u = Unsqueeze(m, two) z = Sub(h, u)",
    "layer norm": "z = LayerNormalization<axis = -1>(h, gain, bias)",
    "rms norm by hand": "s = Mul(h, h) m = ReduceMean(s, last) e = Add(m, eps) r = Sqrt(e) n = Div(h, r) z = Mul(n, gain)",
    "skip norm": "z = com.microsoft.SkipLayerNormalization<epsilon = 0.00001>(h, h, gain, bias)",
    "heads and back": "a = Reshape(h, heads) t = Transpose<perm = [0, 2, 1, 3]>(a) s = Softmax(t) u = Transpose<perm = [0, 2, 1, 3]>(s) "
                      "z = Reshape(u, back)",
    "merged into rows of heads": "a = Reshape(h, mixed) s = Softmax(a) z = Reshape(s, unrows)",
    "split and concat": "a, b = Split<axis = 2>(h, by_four) n = Neg(b) z = Concat<axis = 2>(n, a)",
    "slice of features": "a = Slice(h, zero, four, two) b = Slice(h, four, big, two) z = Concat<axis = 2>(b, a)",
    "slice of all tokens": "z = Slice(h, zero, big, one)",
    "gather of features": "a = Gather<axis = 2>(h, axis0) u = Unsqueeze(a, last) z = Mul(h, u)",
    "expand": "a = Unsqueeze(h, two) b = Shape<start = 0, end = 2>(h) c = Concat<axis = 0>(b, three, eight) e = Expand(a, c) "
              "z = ReduceSum<keepdims = 0>(e, two)",
    "tile": "a = Tile(h, thrice) z = MatMul(a, down)",
    "tile of all tokens, for each expert": "f = Reshape(h, rows) a = Tile(f, tiles) b = Reshape(a, tiled) e = ReduceSum<keepdims = 0>(b, zero) "
                                           "z = Reshape(e, unrows)",
    "entries of a table by id": "i = ArgMax<axis = 2, keepdims = 1>(h) z = GatherND(table, i)",
    "rows of a quantized table": (
        "i = ArgMax<axis = 2, keepdims = 0>(h) "
        "z = com.microsoft.GatherBlockQuantized<bits = 4, block_size = 16, gather_axis = 0, quantize_axis = 1>(packed, i, steps)"),
    "features by index": "t = Transpose<perm = [2, 0, 1]>(h) a = GatherND(t, three) u = Unsqueeze(a, last) z = Mul(h, u)",
    "features written by fixed index": "t = Transpose<perm = [2, 0, 1]>(h) i = Unsqueeze(three, last) u = Gather<axis = 0>(t, three) n = Neg(u) "
                                       "a = ScatterND(t, i, n) z = Transpose<perm = [1, 2, 0]>(a)",
    "fused product": "a = com.microsoft.FusedMatMul<alpha = 0.5>(h, up) z = com.microsoft.FusedMatMul<transB = 1>(a, up)",
    "top k and its rows": "v, i = TopK(h, four) a = GatherElements<axis = 2>(h, i) n = Neg(a) z = ScatterElements<axis = 2>(h, i, n)",
    "arg max": "i = ArgMax<axis = 2, keepdims = 0>(h) z = Gather(table, i)",
    "one hot": "i = ArgMax<axis = 2, keepdims = 0>(h) on_off = Slice(gain, zero, two) o = OneHot(i, eight, on_off) z = Mul(h, o)",
    "cumsum of features": "z = CumSum(h, axis2)",
    "pad features": "a = Pad(h, no_pads) z = Slice(a, one, nine, two)",
    "quantized by constants": "a = QuantizeLinear(h, eps) z = DequantizeLinear(a, eps)",
    "dropout at rest": "z = Dropout(h)",
    "triangle within each token": "a = Unsqueeze(h, two) b = Unsqueeze(h, last) c = MatMul(b, a) t = Trilu(c) d = MatMul(a, t) "
                                  "z = Squeeze(d, two)",
}

SIDEWAYS = {
    "convolution over tokens": (
        "t = Transpose<perm = [0, 2, 1]>(h) a = Conv<pads = [2, 0]>(t, kernel) z = Transpose<perm = [0, 2, 1]>(a)", "Conv has no rule"),
    "running sum over tokens": ("z = CumSum(h, axis1)", "sums over tokens"),
    "mean over tokens": ("m = ReduceMean(h, one) z = Sub(h, m)", "reduces over tokens"),
    "mean over everything": ("m = ReduceMean(h) z = Sub(h, m)", "reduces over tokens"),
    "largest token": ("i = ArgMax<axis = 1>(h) f = Cast<to = 1>(i) z = Sub(h, f)", "reduces over tokens"),
    "softmax over tokens": ("z = Softmax<axis = 1>(h)", "normalizes over tokens"),
    "norm over tokens and features": (
        "t = Transpose<perm = [0, 2, 1]>(h) a = LpNormalization<axis = 2, p = 2>(t) z = Transpose<perm = [0, 2, 1]>(a)",
        "along the tokens"),
    "one scale for all tokens": ("a, s, p = DynamicQuantizeLinear(h) z = DequantizeLinear(a, s, p)", "one scale over all tokens"),
    "gather among tokens": ("a = Gather<axis = 1>(h, zero) z = Add(h, a)", "picks among tokens"),
    "gather of a sequence's tokens": ("f = Reshape(h, rows) a = GatherND(f, zero) z = Add(h, a)", "picks among tokens"),
    "rows written by index": ("i = Shape<start = 1, end = 2>(h) j = Sub(i, one) f = Reshape(h, rows) u = ReduceMax<keepdims = 0>(f, last) "
                              "v = Gather(table, zero) s = ScatterND(f, j, gain) z = Reshape(s, unrows)", "across tokens"),
    "first token": ("a = Slice(h, zero, one, one) z = Add(h, a)", "picks among tokens"),
    "tokens reversed": ("z = Slice(h, last, far, one, last)", "picks among tokens"),
    "tokens rolled": ("a = Slice(h, last, big, one) b = Slice(h, zero, last, one) z = Concat<axis = 1>(a, b)", "picks among tokens"),
    "tokens shifted by padding": ("z = Pad(h, late_pads)", "put before or after"),
    "tokens multiplied with tokens": ("t = Transpose<perm = [0, 2, 1]>(h) a = MatMul(h, t) z = MatMul(a, h)", "against"),
    "tokens summed by a product": ("t = Transpose<perm = [0, 2, 1]>(h) c = MatMul(t, h) z = MatMul(h, c)", "sums over tokens"),
    "tokens summed by a gemm": (
        "f = Reshape(h, rows) c = Gemm<transA = 1>(f, f) a = MatMul(f, c) z = Reshape(a, unrows)", "tokens meet tokens in a product"),
    "tokens summed by einsum": ('c = Einsum<equation = "bsh,bsk->bhk">(h, h) z = MatMul(h, c)', "sums over tokens"),
    "tokens against tokens by broadcast": (
        "a = Unsqueeze(h, one) b = Unsqueeze(h, two) c = Mul(a, b) z = ReduceSum<keepdims = 0>(c, one)", "along different axes"),
    "tokens against tokens in the wrong axis": (
        "t = Transpose<perm = [1, 0, 2]>(h) c = Mul(h, t) z = ReduceMean<keepdims = 1>(c, zero)", "along different axes"),
    "features laid across tokens": (
        "t = Transpose<perm = [0, 2, 1]>(h) shape = Shape(h) z = Reshape(t, shape)", "tokens are laid across other dimensions"),
    "triangle over tokens": ("t = Trilu(h) z = Mul(t, h)", "triangle over tokens"),
    "scale by the number of tokens": (
        "s = Shape<start = 1, end = 2>(h) f = Cast<to = 1>(s) r = Sqrt(f) z = Div(h, r)", "follows from lengths"),
    "a scale from the fortieth token on": (
        "s = Shape<start = 1, end = 2>(h) over = Greater(s, forty) f = Cast<to = 1>(over) z = Mul(h, f)", "follows from lengths"),
    "an update of the first rows only": (
        "i = Reshape(zero, ones) u = Reshape(eps, ones) z = ScatterElements<axis = 2>(h, i, u)", "not one row per token"),
    "only the last token's logits": ("a = Slice(h, last, big, one) z = Identity(a)", "picks among tokens"),
}


@pytest.mark.parametrize("name", LOCAL)
def test_local(name: str) -> None:
    model = graph(LOCAL[name])
    assert refusals(model) == ()
    assert not looks_sideways(model)


@pytest.mark.parametrize("name", SIDEWAYS)
def test_sideways(name: str) -> None:
    body, reason = SIDEWAYS[name]
    model = graph(body)
    found = refusals(model)
    assert found and reason in str(found[0]), found
    assert found[0].where


@pytest.mark.parametrize("name", [name for name in SIDEWAYS if name not in (
    "only the last token's logits",  # there are no other rows to compare
    "a scale from the fortieth token on",  # seven tokens don't show it
)])
def test_what_is_refused_is_wrong(name: str) -> None:
    """The refused graphs really look sideways: none of them is refused for a rule that is merely missing."""
    assert looks_sideways(graph(SIDEWAYS[name][0]))


def test_each_cause_is_told_once() -> None:
    """What follows from a refused value is not refused again."""
    found = refusals(graph("m = ReduceMean(h, one) a = Sub(h, m) b = Softmax<axis = 1>(a) z = Add(b, h)"))
    assert len(found) == 1


@pytest.mark.parametrize("chosen, reason", [
    ("v, i = TopK<axis = 2>(h, one) e = Equal(i, zero)", "experts dispatched across tokens"),
    ("null = CastLike(eps, h) m = ReduceMax(h, last) e = Greater(m, null)", "rows are picked or written by what the tokens are, across tokens"),
])
def test_rows_of_a_router_are_told_from_others(chosen: str, reason: str) -> None:
    """Both take the rows that hold something and put them back; a router's choice makes them experts' rows."""
    body = f"{chosen} n = NonZero(e) t = Transpose<perm = [1, 0]>(n) w = Slice(t, zero, two, one) r = GatherND(h, w) z = ScatterND(h, w, r)"
    found = refusals(graph(body))
    assert len(found) == 1 and found[0].reason == f"NonZero: {reason}", found


def test_softmax_before_opset_13_covers_all_trailing_dimensions() -> None:
    """There, axis 1 of [B, 8, S] means over features and tokens together."""
    body = "t = Transpose<perm = [0, 2, 1]>(h) a = Softmax<axis = 1>(t) z = Transpose<perm = [0, 2, 1]>(a)"
    assert refusals(graph(body, opset=11)) and not refusals(graph(body))
    assert not refusals(graph("z = Softmax<axis = 2>(h)", opset=11))


POSITIONS = ", int64[B,S] position_ids"


def test_learned_positions() -> None:
    model = graph("p = Gather(places, position_ids) z = Add(h, p)", inputs=POSITIONS)
    assert refusals(model) == () and not looks_sideways(model)


@pytest.mark.parametrize("body", [
    "m = ReduceMax(position_ids) p = Gather(places, m) z = Add(h, p)",  # longrope looks at the longest
    "r = CumSum(position_ids, axis1) m = Mod(r, sixteen) p = Gather(places, m) z = Add(h, p)",
    "m = ReduceMin(position_ids, one) q = Sub(position_ids, m) p = Gather(places, q) z = Add(h, p)",  # position within this step
])
def test_positions_that_look_at_other_positions(body: str) -> None:
    found = refusals(graph(body, inputs=POSITIONS))
    assert found and any("position alone" in str(r) or "follows from lengths" in str(r) for r in found), found


def test_a_mask_that_enters_the_data() -> None:
    """Multiplying padding away outside attention has no meaning once there is no mask."""
    model = graph("u = Unsqueeze(attention_mask, last) f = Cast<to = 1>(u) z = Mul(h, f)", inputs=", int64[B,S] attention_mask")
    assert "position alone" in str(refusals(model)[0])


def test_attention_is_sideways_unless_it_is_a_site(tiny_onnx: Path) -> None:
    model = read_onnx(tiny_onnx / "model.onnx")
    Normalize()(model)
    observation = observe(model, graph_interface(model))
    sites = sites_of(match_attention(model, observation))
    assert len(sites) == 2 and prove_local(observation, sites) == ()
    for left_out in sites:
        found = prove_local(observation, [site for site in sites if site is not left_out])
        assert found and all("cache outside of attention" in r.reason for r in found)


SPELLINGS = [
    ("dynamo", 18, True), ("dynamo", 18, False), ("dynamo", 20, True), ("dynamo", 23, True), ("dynamo", 24, True),
    ("torchscript", 17, True), ("torchscript", 17, False),
]


@pytest.mark.parametrize(("exporter", "opset", "past"), SPELLINGS)
def test_exported_decoders(exported: Callable[..., Path], exporter: str, opset: int, past: bool) -> None:
    """Local with all sites known, whether the rotary belongs to the site or to the graph; refused with any of them unknown."""
    model = read_onnx(exported("llama", exporter=exporter, opset=opset, with_past=past) / "model.onnx")
    Normalize()(model)
    observation = observe(model, graph_interface(model))
    sites = sites_of(match_attention(model, observation))
    assert len(sites) == 2
    assert prove_local(observation, sites) == prove_local(observation, sites, folded=sites) == ()
    assert prove_local(observation, sites[:1]) and prove_local(observation, sites[1:])
    traced = trace_tokens(observation, sites, max_context=MAX_CONTEXT)
    assert traced.positional and all(observation.kind(value) == "structural" for value in traced.positional)
    assert not trace_tokens(observation, sites, folded=sites, max_context=MAX_CONTEXT).positional
