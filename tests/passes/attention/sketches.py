"""One-layer decoders in any spelling of attention, made to order: every choice below is a way in which some exporter writes the same meaning,
or a near miss that means something else.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from octavo.models.interface import GraphInterface
from octavo.models.onnx_reader import graph_interface
from octavo.passes.scatter_cache import scatter_interface
from onnx import TensorProto, helper

VOCAB, HIDDEN, PLACES = 50, 32, 64


@dataclass(frozen=True)
class Sketch:
    """What to write. `window`, `hole` and `mask` say what the mask means, the rest how things are spelled."""

    H: int = 4
    G: int = 2
    D: int = 8
    past: bool = True
    padding: bool = True
    rotary: str = "half"          # half, interleaved, split, partial, op, op_interleaved, microsoft, none, ntk (by the longest), longrope (others over 32)
    heads: str = "expand"         # expand, tile, gather, broadcast, permuted (wrong: h reads h % G)
    scale: str = "scores"         # scores, divided, both_sides, runtime, folded_query
    factor: float = 0.3           # the scale itself
    key: str = "perm"             # perm, three_d
    mask: str = "where"           # where, additive, min, boolean_where, none, ids
    slopes: str = "none"          # none, keys (slope·key), last (slope·(key − last key)), curved (wrong: other slopes far away), shifted (a row's constant)
    window: int = 0
    near: float = 0.0             # hides what is 1/near or more tokens back, in floats
    chunk: int = 0                # only keys of the query's own chunk
    prefix: int = 0               # the first keys are seen by all
    sinks: str = "none"           # none, plain, shifted (less the row's largest, as gpt-oss has it), by_query (wrong: another logit for each query)
    empty: str = "none"           # none, rows (0 where a row sees nothing), wrong (0 where a query stands on an even place)
    packed: bool = False          # only keys of the same run of positions
    hole: bool = False            # one key hidden that a causal row sees
    softcap: float = 0.0
    guard: bool = False           # IsNaN → Where(0)
    fused: bool = False           # one QKV product, split
    op: bool = False              # the standard Attention op
    op_heads_first: bool = True
    op_cache: bool = False
    is_causal: bool = False
    conv: bool = False            # something sideways beside attention
    gate: str = "none"            # none, heads_first, tokens_first: a factor for each head on the result, before or behind its transpose
    shuffled: bool = False        # the heads of the probabilities change places (wrong)
    cache: str = "grown"          # grown, or 64 places written by scatter_nd, scatter_elements or tensor_scatter; the others are wrong
    second: str = "none"          # a second attention: none, shared (it reads the first one's keys and values), own_value, turned (keys by other angles)
    second_window: int = 0
    norm: str = "none"            # none, q: RMS of each head before rotary, with a weight
    opset: int = 23
    extra: dict[str, Any] = field(default_factory=dict, hash=False, compare=False)


class _Writer:
    def __init__(self, sketch: Sketch) -> None:
        self.s = sketch
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.rng = np.random.default_rng(7)

    def op(self, kind: str, *inputs: str, n: int = 1, domain: str = "", outputs: list[str] | None = None, **attributes: Any) -> Any:
        names = outputs or [f"{kind}_{len(self.nodes)}.{i}" for i in range(n)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, name=f"n{len(self.nodes)}", domain=domain, **attributes))
        return names[0] if len(names) == 1 else names

    def const(self, array: Any, dtype: Any = np.int64) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(onnx.numpy_helper.from_array(np.array(array, dtype), name))
        return name

    def f32(self, array: Any) -> str:
        return self.const(array, np.float32)

    def weight(self, *shape: int) -> str:
        return self.f32(self.rng.standard_normal(shape) * shape[0] ** -0.5)


def build(sketch: Sketch) -> tuple[ir.Model, GraphInterface]:
    """The decoder and its interface: input_ids, [attention_mask], position_ids, [past] → logits, [present]."""
    model = ir.from_proto(to_proto(sketch))
    return model, scatter_interface(model, graph_interface(model))


def to_proto(s: Sketch) -> onnx.ModelProto:
    w = _Writer(s)
    hidden = w.op("Gather", w.f32(w.rng.standard_normal((VOCAB, HIDDEN))), "input_ids", axis=0)
    batch, length = (w.op("Shape", "input_ids", start=i, end=i + 1) for i in (0, 1))
    total = w.op("Add", length, w.op("Shape", "past_key_values.0.key", start=2, end=3)) if s.past else length
    total = total if s.cache == "grown" else w.const([PLACES])
    x = hidden
    if s.conv:
        moved = w.op("Transpose", x, perm=[0, 2, 1])
        x = w.op("Transpose", w.op("Conv", moved, w.weight(HIDDEN, HIDDEN, 3), pads=[2, 0], kernel_shape=[3]), perm=[0, 2, 1])
    q, k, v = _projections(w, x, batch, length)
    raw = k
    q, k = _rotary(w, q, length), _rotary(w, k, length)
    presents = [f"present.0.{kind}" for kind in ("key", "value")]
    if s.op:
        attended = _attention_op(w, q, k, v, batch, length, total, presents)
    else:
        if s.past:
            k, v = (_append(w, f"past_key_values.0.{kind}", new, batch, length, name) for kind, new, name in zip(("key", "value"), (k, v), presents))
        attended = _attention(w, q, _repeat(w, k, batch, total), _repeat(w, v, batch, total), batch, length, total)
    out = w.op("Add", hidden, w.op("MatMul", attended, w.weight(s.H * s.D, HIDDEN)))
    if s.second != "none":
        out = w.op("Add", out, w.op("MatMul", _second(w, out, raw, k, v, batch, length, total), w.weight(s.H * s.D, HIDDEN)))
    mlp = w.op("MatMul", w.op("Tanh", w.op("MatMul", out, w.weight(HIDDEN, 24))), w.weight(24, HIDDEN))
    w.op("MatMul", w.op("Add", out, mlp), w.weight(HIDDEN, VOCAB), outputs=["logits"])
    return _model(w, s, presents if s.past else [])


def _append(w: _Writer, past: str, new: str, batch: str, length: str, name: str) -> str:
    """Keys or values with the past's, [B, G, T or PLACES, D], as the graph output `name`."""
    s = w.s
    if s.cache == "grown":
        return w.op("Concat", past, new, axis=2, outputs=[name])
    if s.cache in ("tensor_scatter", "circular"):
        return w.op("TensorScatter", past, new, "write_indices", axis=2, mode="circular" if s.cache == "circular" else "linear", outputs=[name])
    at = w.op("Add", "cache_position", w.const([1])) if s.cache == "late" else "cache_position"
    if s.cache == "wrapped":
        at = w.op("Mod", at, w.const([40]))
    elif s.cache == "stopped":
        at = w.op("Min", at, w.const([45]))
    elif s.cache == "shifted":  # behind a threshold that is written as no whole number
        far = w.op("Greater", w.op("Mul", w.op("Cast", at, to=1), w.f32(0.04)), w.f32(1.0))
        at = w.op("Where", far, w.op("Sub", at, w.const([1])), at)
    if s.cache == "scatter_elements":
        shape = w.op("Concat", batch, w.const([s.G]), length, w.const([s.D]), axis=0)
        return w.op("ScatterElements", past, w.op("Expand", w.op("Unsqueeze", at, w.const([1])), shape), new, axis=2, outputs=[name])
    first = w.op("Transpose", past, perm=[2, 0, 1, 3])
    written = w.op("ScatterND", first, w.op("Unsqueeze", at, w.const([1])), w.op("Transpose", new, perm=[2, 0, 1, 3]))
    return w.op("Transpose", written, perm=[1, 2, 0, 3], outputs=[name])


def _second(w: _Writer, x: str, raw: str, k: str, v: str, batch: str, length: str, total: str) -> str:
    """An attention behind the first, on its keys `k` (`raw` before they were turned) and values `v`, both after the past."""
    s, rate = w.s, 2.0 if w.s.second == "turned" else 1.0
    q, _, own = _projections(w, x, batch, length)
    q = _rotary(w, q, length, rate)
    if s.second == "own_value":
        v = own
    elif s.second == "turned":
        k = _rotary(w, raw, length, rate)
    w.s = replace(s, window=s.second_window)
    out = _attention(w, q, _repeat(w, k, batch, total), _repeat(w, v, batch, total), batch, length, total)
    w.s = s
    return out


def _model(w: _Writer, s: Sketch, presents: list[str]) -> onnx.ModelProto:
    info, i64, f32 = helper.make_tensor_value_info, TensorProto.INT64, TensorProto.FLOAT
    inputs = [info("input_ids", i64, ["batch", "sequence"])]
    fixed = s.cache != "grown"
    inputs += [info("attention_mask", i64, ["batch", PLACES if fixed else "total"])] if s.padding else []
    inputs += [info("position_ids", i64, ["batch", "sequence"])]
    if fixed:
        by_row = s.cache in ("tensor_scatter", "circular")
        inputs += [info("write_indices", i64, ["batch"]) if by_row else info("cache_position", i64, ["sequence"])]
    if s.past:
        inputs += [info(f"past_key_values.0.{kind}", f32, ["batch", s.G, PLACES if fixed else "past", s.D]) for kind in ("key", "value")]
    outputs = [info("logits", f32, ["batch", "sequence", VOCAB])] + [
        info(name, f32, ["batch", s.G, PLACES if fixed else "total", s.D]) for name in presents]
    graph = helper.make_graph(w.nodes, "sketch", inputs, outputs, w.constants)
    imports = [helper.make_opsetid("", s.opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def _projections(w: _Writer, x: str, batch: str, length: str) -> list[str]:
    """q, k, v as [B, heads, S, D]."""
    s, sizes = w.s, [w.s.H, w.s.G, w.s.G]
    if s.fused:
        flat = w.op("MatMul", x, w.weight(HIDDEN, sum(sizes) * s.D))
        parts = w.op("Split", flat, w.const([n * s.D for n in sizes]), axis=-1, n=3)
    else:
        parts = [w.op("Add", w.op("MatMul", x, w.weight(HIDDEN, n * s.D)), w.weight(n * s.D)) for n in sizes]
    out = []
    for index, (part, n) in enumerate(zip(parts, sizes)):
        split = w.op("Reshape", part, w.op("Concat", batch, length, w.const([n]), w.const([s.D]), axis=0))
        if s.norm == "q" and index == 0:
            split = w.op("RMSNormalization", split, w.f32(w.rng.uniform(0.5, 1.5, s.D)), axis=-1, epsilon=1e-5)
        if s.scale == "folded_query" and index == 0:
            split = w.op("Mul", split, w.f32(s.factor))
        out.append(w.op("Transpose", split, perm=[0, 2, 1, 3]))
    return out


def frequencies(s: Sketch) -> np.ndarray:
    width = s.D // 2 if s.rotary == "partial" else s.D
    return (10000.0 ** (-np.arange(0, width, 2) / width)).astype(np.float32)


def _rotary(w: _Writer, x: str, length: str, factor: float = 1.0) -> str:
    """x [B, heads, S, D] turned by position, `factor` times as fast."""
    s = w.s
    if s.rotary == "none":
        return x
    rate = w.f32(frequencies(s) * factor)
    if s.rotary == "ntk":  # the base grows with the longest position of the run
        longest = w.op("Cast", w.op("ReduceMax", "position_ids", keepdims=0), to=TensorProto.FLOAT)
        rate = w.op("Div", rate, w.op("Add", w.f32(1), w.op("Mul", longest, w.f32(0.01))))
    if s.rotary == "longrope":
        longest = w.op("Add", w.op("ReduceMax", "position_ids", keepdims=0), w.const(1))
        rate = w.op("Where", w.op("Greater", longest, w.const(32)), w.op("Div", rate, w.f32(3)), rate)
    angle = w.op("Mul", w.op("Unsqueeze", w.op("Cast", "position_ids", to=TensorProto.FLOAT), w.const([2])), rate)
    if s.rotary in ("op", "op_interleaved"):
        return w.op("RotaryEmbedding", x, w.op("Cos", angle), w.op("Sin", angle), interleaved=int(s.rotary == "op_interleaved"))
    if s.rotary == "microsoft":
        table = np.arange(64, dtype=np.float32)[:, None] * frequencies(s)
        cos, sin = w.f32(np.cos(table)), w.f32(np.sin(table))
        return w.op("RotaryEmbedding", x, "position_ids", cos, sin, domain="com.microsoft", interleaved=0)
    angle = w.op("Unsqueeze", angle, w.const([1]))
    if s.rotary == "interleaved":
        twice = w.op("Concat", *[w.op("Unsqueeze", angle, w.const([-1]))] * 2, axis=-1)
        pairs = w.op("Reshape", twice, w.const([0, 0, 0, -1]))
        even, odd = (w.op("Slice", x, w.const([i]), w.const([2**31]), w.const([3]), w.const([2])) for i in (0, 1))
        stacked = w.op("Concat", w.op("Unsqueeze", w.op("Neg", odd), w.const([-1])), w.op("Unsqueeze", even, w.const([-1])), axis=-1)
        turned = w.op("Reshape", stacked, w.const([0, 0, 0, -1]))
        return w.op("Add", w.op("Mul", x, w.op("Cos", pairs)), w.op("Mul", turned, w.op("Sin", pairs)))
    width = s.D // 2 if s.rotary == "partial" else s.D
    part, rest = (w.op("Split", x, w.const([width, s.D - width]), axis=-1, n=2)) if width < s.D else (x, "")
    first, second = w.op("Split", part, w.const([width // 2, width // 2]), axis=-1, n=2)
    if s.rotary == "split":
        cos, sin = w.op("Cos", angle), w.op("Sin", angle)
        left = w.op("Sub", w.op("Mul", first, cos), w.op("Mul", second, sin))
        right = w.op("Add", w.op("Mul", second, cos), w.op("Mul", first, sin))
        return w.op("Concat", left, right, axis=-1)
    both = w.op("Concat", angle, angle, axis=-1)
    half = w.op("Concat", w.op("Neg", second), first, axis=-1)
    turned = w.op("Add", w.op("Mul", part, w.op("Cos", both)), w.op("Mul", half, w.op("Sin", both)))
    return w.op("Concat", turned, rest, axis=-1) if rest else turned


def _repeat(w: _Writer, x: str, batch: str, total: str) -> str:
    """KV heads for the query heads, [B, G, T, D] → [B, H, T, D] (broadcast: [B, G, 1, T, D])."""
    s = w.s
    if s.H == s.G:
        return x
    many = s.H // s.G
    if s.heads == "broadcast":
        return w.op("Unsqueeze", x, w.const([2]))
    if s.heads == "permuted":
        return w.op("Concat", *[x] * many, axis=1)
    if s.heads == "gather":
        return w.op("Gather", x, w.const([h // many for h in range(s.H)]), axis=1)
    wide = w.op("Unsqueeze", x, w.const([2]))
    if s.heads == "tile":
        wide = w.op("Tile", wide, w.const([1, 1, many, 1, 1]))
    else:
        wide = w.op("Expand", wide, w.op("Concat", batch, w.const([s.G, many]), total, w.const([s.D]), axis=0))
    return w.op("Reshape", wide, w.op("Concat", batch, w.const([s.H]), total, w.const([s.D]), axis=0))


def _visible(w: _Writer, batch: str, length: str, total: str) -> str:
    """bool [B, 1, S, T]."""
    s = w.s
    zero, one = w.const(0), w.const(1)
    keys = w.op("Unsqueeze", w.op("Range", zero, w.op("Squeeze", total), one), w.const([0]))
    if s.cache == "grown":
        at = w.op("Range", w.op("Sub", w.op("Squeeze", total), w.op("Squeeze", length)), w.op("Squeeze", total), one)
    elif s.cache in ("tensor_scatter", "circular"):
        start = w.op("Squeeze", w.op("Slice", "write_indices", w.const([0]), w.const([1])))
        at = w.op("Range", start, w.op("Add", start, w.op("Squeeze", length)), one)
    else:
        at = "cache_position"
    queries = w.op("Unsqueeze", at, w.const([1]))
    seen = w.const(True, bool) if s.mask == "none" else w.op("LessOrEqual", keys, queries)
    if s.window:
        seen = w.op("And", seen, w.op("Greater", keys, w.op("Sub", queries, w.const(s.window))))
    if s.near:  # distance · near < 1
        distance = w.op("Cast", w.op("Sub", queries, keys), to=1)
        seen = w.op("And", seen, w.op("Less", w.op("Mul", distance, w.f32(s.near)), w.f32(1.0)))
    if s.chunk:
        size = w.const(s.chunk)
        seen = w.op("And", seen, w.op("Equal", w.op("Div", keys, size), w.op("Div", queries, size)))
    if s.prefix:
        seen = w.op("Or", seen, w.op("Less", keys, w.const(s.prefix)))
    if s.hole:
        seen = w.op("And", seen, w.op("Not", w.op("And", w.op("Equal", keys, w.const(2)), w.op("Equal", queries, w.const(5)))))
    seen = w.op("Unsqueeze", seen, w.const([0, 1])) if s.mask != "none" else seen
    if s.packed:  # without a past: positions less places say to which sequence a token belongs
        row = w.op("Sub", "position_ids", w.op("Squeeze", keys, w.const([0])))
        same = w.op("Equal", w.op("Unsqueeze", row, w.const([1])), w.op("Unsqueeze", row, w.const([2])))
        seen = w.op("And", seen, w.op("Unsqueeze", same, w.const([1])))
    if s.mask == "ids":
        even = w.op("Unsqueeze", w.op("Equal", w.op("Mod", "input_ids", w.const(2)), w.const(0)), w.const([1, 3]))
        first = w.op("And", w.op("Equal", keys, w.const(0)), w.op("Greater", queries, w.const(0)))
        seen = w.op("And", seen, w.op("Not", w.op("And", even, first)))
    if s.padding:
        real = w.op("Unsqueeze", w.op("Cast", "attention_mask", to=TensorProto.BOOL), w.const([1, 2]))
        seen = w.op("And", seen, real)
    return seen


def _attention(w: _Writer, q: str, k: str, v: str, batch: str, length: str, total: str) -> str:
    s = w.s
    if s.heads == "broadcast" and s.H != s.G:
        q = w.op("Reshape", q, w.op("Concat", batch, w.const([s.G, s.H // s.G]), length, w.const([s.D]), axis=0))
    factor = np.float32(s.factor)
    if s.scale == "both_sides":
        q, k = (w.op("Mul", value, w.f32(np.sqrt(factor))) for value in (q, k))
    rank = 5 if s.heads == "broadcast" and s.H != s.G else 4
    if s.key == "three_d" and rank == 4:
        flat = w.op("Reshape", k, w.op("Concat", w.const([-1]), total, w.const([s.D]), axis=0))
        kt = w.op("Reshape", w.op("Transpose", flat, perm=[0, 2, 1]), w.op("Concat", batch, w.const([s.H, s.D]), total, axis=0))
    else:
        kt = w.op("Transpose", k, perm=[*range(rank - 2), rank - 1, rank - 2])
    scores = w.op("MatMul", q, kt)
    if s.scale == "scores":
        scores = w.op("Mul", scores, w.f32(factor))
    elif s.scale == "divided":
        scores = w.op("Div", scores, w.f32(1 / factor))
    elif s.scale == "runtime":  # 1/√D from the shape of the query
        size = w.op("Cast", w.op("Shape", q, start=-1), to=TensorProto.FLOAT)
        scores = w.op("Div", scores, w.op("Sqrt", w.op("Squeeze", size)))
    if s.softcap:
        scores = w.op("Mul", w.op("Tanh", w.op("Div", scores, w.f32(s.softcap))), w.f32(s.softcap))
    if rank == 5:
        scores = w.op("Reshape", scores, w.op("Concat", batch, w.const([s.H]), length, total, axis=0))
    if s.slopes != "none":
        scores = w.op("Add", scores, _slopes(w, length, total))
    seen = _visible(w, batch, length, total)
    hidden = float(np.finfo(np.float32).min) if s.mask == "min" else -np.inf
    whole = s.mask == "boolean_where"
    scores = w.op("Where", seen, scores, w.f32(hidden)) if whole else w.op("Add", scores, w.op("Where", seen, w.f32(0), w.f32(hidden)))
    p = w.op("Softmax", _with_sinks(w, scores, batch, length), axis=-1)
    if s.sinks != "none":
        p = w.op("Slice", p, w.const([0]), w.const([-1]), w.const([-1]))
    if s.guard:
        p = w.op("Where", w.op("IsNaN", p), w.f32(0), p)
    if s.shuffled:
        p = w.op("Gather", p, w.const([*range(1, s.H), 0]), axis=1)
    if rank == 5:
        p = w.op("Reshape", p, w.op("Concat", batch, w.const([s.G, s.H // s.G]), length, total, axis=0))
        out = w.op("Reshape", w.op("MatMul", p, v), w.op("Concat", batch, w.const([s.H]), length, w.const([s.D]), axis=0))
    else:
        out = w.op("MatMul", p, v)
    if s.empty == "rows":
        count = w.op("ReduceSum", w.op("Cast", seen, to=TensorProto.INT64), w.const([3]), keepdims=1)
        out = w.op("Where", w.op("Less", count, w.const(1)), w.f32(0), out)
    elif s.empty == "wrong":
        place = w.op("Unsqueeze", "position_ids", w.const([1, 3]))
        out = w.op("Where", w.op("Equal", w.op("Mod", place, w.const(16)), w.const(15)), w.f32(0), out)
    return _merge(w, out, batch, length)


def alibi_slopes(s: Sketch) -> np.ndarray:
    return (0.7 ** np.arange(1, s.H + 1)).astype(np.float32)


def _slopes(w: _Writer, length: str, total: str) -> str:
    """[1, H, 1, T], or [1, H, S, T] where rows differ."""
    s, keys = w.s, w.op("Range", w.const(0), w.op("Squeeze", total), w.const(1))
    if s.slopes == "last":
        keys = w.op("Sub", keys, w.op("Sub", w.op("Squeeze", total), w.const(1)))
    far = w.op("Cast", keys, to=TensorProto.FLOAT)
    if s.slopes == "curved":
        far = w.op("Min", far, w.f32(20))
    bias = w.op("Mul", w.f32(alibi_slopes(s).reshape(1, s.H, 1, 1)), far)
    if s.slopes == "shifted":
        rows = w.op("Cast", w.op("Range", w.const(0), w.op("Squeeze", length), w.const(1)), to=TensorProto.FLOAT)
        bias = w.op("Add", bias, w.op("Unsqueeze", rows, w.const([0, 1, 3])))
    return bias


def _with_sinks(w: _Writer, scores: str, batch: str, length: str) -> str:
    s = w.s
    if s.sinks == "none":
        return scores
    sinks = w.op("Reshape", w.f32(np.linspace(-1, 2, s.H)), w.const([1, -1, 1, 1]))
    if s.sinks == "by_query":
        sinks = w.op("Add", sinks, w.op("Unsqueeze", w.op("Cast", "position_ids", to=TensorProto.FLOAT), w.const([1, 3])))
    column = w.op("Expand", sinks, w.op("Concat", batch, w.const([s.H]), length, w.const([1]), axis=0))
    scores = w.op("Concat", scores, column, axis=-1)
    if s.sinks == "shifted":
        scores = w.op("Sub", scores, w.op("ReduceMax", scores, w.const([-1]), keepdims=1))
    return scores


def _merge(w: _Writer, out: str, batch: str, length: str) -> str:
    """[B, H, S, D] → [B, S, H·D], through the gate."""
    gate = w.rng.uniform(0.5, 1.5, w.s.H)
    if w.s.gate == "heads_first":
        out = w.op("Mul", out, w.f32(gate.reshape(1, -1, 1, 1)))
    out = w.op("Transpose", out, perm=[0, 2, 1, 3])
    if w.s.gate == "tokens_first":
        out = w.op("Mul", out, w.f32(gate.reshape(1, 1, -1, 1)))
    return w.op("Reshape", out, w.op("Concat", batch, length, w.const([w.s.H * w.s.D]), axis=0))


def _attention_op(w: _Writer, q: str, k: str, v: str, batch: str, length: str, total: str, presents: list[str]) -> str:
    s, attributes = w.s, {"scale": s_factor(w.s), "softcap": w.s.softcap, "is_causal": int(w.s.is_causal)}
    seen = "" if s.is_causal else _visible(w, batch, length, total)
    attributes |= w.s.extra
    if s.op_heads_first:
        operands = [q, k, v]
    else:
        operands = [w.op("Reshape", w.op("Transpose", x, perm=[0, 2, 1, 3]), w.const([0, 0, n * s.D])) for x, n in zip((q, k, v), (s.H, s.G, s.G))]
        attributes |= {"q_num_heads": s.H, "kv_num_heads": s.G}
    if s.op_cache:
        past = [f"past_key_values.0.{kind}" for kind in ("key", "value")]
        out = w.op("Attention", *operands, seen, *past, outputs=["attention.out", *presents], **attributes)[0]
    else:
        if s.past:
            for index, name in enumerate(presents):
                operands[index + 1] = _append(w, f"past_key_values.0.{name.split('.')[-1]}", operands[index + 1], batch, length, name)
        out = w.op("Attention", *operands, *([seen] if seen else []), **attributes)
    return _merge(w, out, batch, length) if s.op_heads_first else out


def s_factor(s: Sketch) -> float:
    """The scale that the sketch means."""
    return s.D**-0.5 if s.scale == "runtime" else s.factor
