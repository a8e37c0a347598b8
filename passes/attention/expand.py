"""The attention ops of `com.microsoft`, written out in standard operators, so that one reader understands all spellings.

What an op means stands here once; the matcher then proves masks, rotary embeddings and caches of what is written as it does for any export.
GroupQueryAttention takes its lengths from inputs; they must be those of the past and of this step's tokens, which `unequal_lengths` holds
against the observed graph. What is not written out stays as it is and is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import onnx_ir as ir

from ..build import Builder
from ..normalize import graph_size
from ..observe import Observation, ObservationError, Probe
from ..outcome import Outcome, PassResult, Refusal
from .chain import attribute
from .direct import scalar, take_over
from .direct_op import counted

DOMAIN = "com.microsoft"

# Ops are written as opset 13 has them: sizes and axes as inputs.
MIN_OPSET = 13


class CanNotExpand(Exception):
    """What an op asks for that is not written out."""


@dataclass(frozen=True)
class Lengths:
    """The length inputs of a GroupQueryAttention that was written out: the last key's index of each sequence, and the longest length."""

    where: str
    last_key: ir.Value
    total: ir.Value | None


class ExpandAttentionOps(ir.passes.InPlacePass):
    """Replaces what it can. `lengths` are the inputs that were taken to say what the graph's shapes say."""

    def __init__(self) -> None:
        super().__init__()
        self.lengths: list[Lengths] = []

    def call(self, model: ir.Model) -> PassResult:
        start, (before, size) = perf_counter(), graph_size(model)
        sizes = set[int]()
        nodes = [node for node in model.graph if node.domain == DOMAIN and node.op_type in _EXPANSIONS]
        build, notes, done = Builder(model.graph), list[str](), 0
        for node in nodes if model.opset_imports.get("", 0) >= MIN_OPSET else ():
            writer = _Writer(build, node)
            try:
                with build.before(node):
                    results, lengths = _EXPANSIONS[node.op_type](writer)
            except CanNotExpand as found:
                notes.append(f"{node.op_type} {node.name} stays: {found}")
                continue
            for old, new in zip(node.outputs, results):
                if new is not None:
                    take_over(model.graph, old, new)
            model.graph.remove(node, safe=True)
            self.lengths += lengths
            sizes.add(writer.head_size)
            done += 1
        if len(sizes) == 1:
            _close_caches(model.graph, sizes.pop())
        after = graph_size(model)
        outcome = Outcome(
            "expand_attention", "com.microsoft ops", len(nodes), done, (), tuple(dict.fromkeys(notes)), before, after[0], size, after[1],
            perf_counter() - start,
        )
        return PassResult(model, bool(done), outcome)


def unequal_lengths(observation: Observation, lengths: Sequence[Lengths], max_context: int) -> Refusal | None:
    """Where a length input is not P + S − 1 (or P + S) for whole sequences of some length."""
    if lengths and observation.static:
        return Refusal("every size in the graph is fixed", lengths[0].where, "expand: lengths can't be held against any other")
    batch = 2 if observation.batched else 1
    pasts = (0, 1, 7, max_context - 2) if observation.cached else (0,)
    probes = [Probe(batch, length, past) for past in pasts if past >= 0 for length in (1, 2, 5, 19) if past + length <= max(max_context, 19)]
    checked = set[tuple[ir.Value | None, ...]]()
    for item in lengths:
        if (item.last_key, item.total) in checked:
            continue
        checked.add((item.last_key, item.total))
        values = [value for value in (item.last_key, item.total) if value is not None]
        for probe in probes:
            try:
                found = observation.evaluate(values, probe)
            except ObservationError as error:
                return Refusal("the lengths that GroupQueryAttention is given can't be evaluated", item.where, error.message)
            whole = probe.past + probe.length
            for array, expected, name in zip(found, (whole - 1, whole), ("seqlens_k", "total_sequence_length")):
                if not np.all(array == expected):
                    nearest = f"expand: {name} at {probe}: expected {expected}, found {array.reshape(-1)[:4].tolist()}"
                    return Refusal("GroupQueryAttention is given other lengths than those of past and tokens", item.where, nearest)
    return None


@dataclass
class _Writer:
    """Writes one op out. Values are [B, heads, S, D] unless their names say otherwise."""

    build: Builder
    node: ir.Node
    head_size: int = 0

    def input(self, index: int) -> ir.Value | None:
        return self.node.inputs[index] if index < len(self.node.inputs) else None

    def needed(self, index: int) -> ir.Value:
        value = self.input(index)
        if value is None:
            raise CanNotExpand(f"its input {index} is absent")
        return value

    def only(self, inputs: int, attributes: frozenset[str], outputs: int) -> None:
        """Raises for anything else than the first `inputs` and `outputs` and these attributes."""
        for index, value in enumerate(self.node.inputs):
            if index >= inputs and value is not None:
                raise CanNotExpand(f"input {index} is given")
        for index, value in enumerate(self.node.outputs):
            if index >= outputs and (value.uses() or value.is_graph_output()):
                raise CanNotExpand(f"output {index} is read")
        unknown = set(self.node.attributes) - attributes
        if unknown:
            raise CanNotExpand(f"attributes {', '.join(sorted(unknown))}")

    def number(self, value: float) -> ir.Value:
        """A scalar of the operands' type."""
        return scalar(self.build, value, np.float16 if self.typed.dtype == ir.DataType.FLOAT16 else np.float32)

    @property
    def typed(self) -> ir.Value:
        """An operand of the type that is computed in: a weight where there is one, since embeddings are mistyped by shape inference."""
        return self.needed(1 if self.node.op_type == "Attention" else 0)

    def heads(self, rows: ir.Value, heads: int, size: int) -> ir.Value:
        self.head_size = size
        return self.build.transpose(self.build.reshape(rows, [0, 0, heads, size]), (0, 2, 1, 3))

    def split(self, value: ir.Value, sizes: Sequence[int], axis: int) -> list[ir.Value]:
        parts = self.build.op("Split", [value, self.build.integers(sizes)], {"axis": axis}, outputs=len(sizes))
        for part in parts:
            part.type = value.type
        return parts

    def attend(
        self, q: ir.Value, k: ir.Value, v: ir.Value, *, scale: float, groups: tuple[int, int], softcap: float = 0.0,
        added: Sequence[ir.Value | None] = (), sink: ir.Value | None = None, causal: bool = False, window: int = -1, past: ir.Value | None = None,
    ) -> ir.Value:
        """softmax(softcap(scale · q·kᵀ) + mask) · v as [B, S, H·E]; `past` is how many keys lie before the first query's, int64 [1]."""
        build, (heads, kv_heads) = self.build, groups
        if heads != kv_heads:
            k, v = (self._repeated(x, heads, kv_heads) for x in (k, v))
        scores = build.op("MatMul", [q, build.transpose(k, (0, 1, 3, 2))])[0]
        scores = build.op("Mul", [scores, self.number(scale)])[0]
        if softcap:
            scores = build.op("Mul", [build.op("Tanh", [build.op("Div", [scores, self.number(softcap)])[0]])[0], self.number(softcap)])[0]
        for bias in (*added, self._band(q, k, past, causal, window)):
            if bias is not None:
                scores = build.op("Add", [scores, bias])[0]
        if sink is not None:
            last = build.op("Concat", [*(build.size(q, axis) for axis in (0, 1, 2)), build.integers([1])], {"axis": 0})[0]
            column = build.op("Expand", [build.reshape(sink, [1, -1, 1, 1]), last])[0]
            weights = build.op("Softmax", [build.op("Concat", [scores, column], {"axis": 3})[0]], {"axis": -1})[0]
            weights = build.op("Slice", [weights, build.integers([0]), build.integers([-1]), build.integers([3])])[0]
        else:
            weights = build.op("Softmax", [scores], {"axis": -1})[0]
        attended = build.op("MatMul", [weights, v])[0]
        return build.reshape(build.transpose(attended, (0, 2, 1, 3)), [0, 0, -1])

    def _repeated(self, x: ir.Value, heads: int, kv_heads: int) -> ir.Value:
        build = self.build
        several = build.op("Unsqueeze", [x, build.integers([2])])[0]
        spread = build.op("Expand", [several, build.integers([1, 1, heads // kv_heads, 1, 1])])[0]
        shape = build.op("Concat", [build.size(x, 0), build.integers([heads]), build.size(x, 2), build.size(x, 3)], {"axis": 0})[0]
        return build.op("Reshape", [spread, shape])[0]

    def _band(self, q: ir.Value, k: ir.Value, past: ir.Value | None, causal: bool, window: int) -> ir.Value | None:
        """0 where query i over a past of P sees key j, −inf elsewhere: j ≤ P + i, and with a window w also j > P + i − w. [S, T]."""
        if not causal and window < 0:
            return None
        build = self.build
        rows = build.op("Unsqueeze", [counted(build, build.size(q, 2)), build.integers([1])])[0]
        if past is not None:
            rows = build.op("Add", [rows, past])[0]
        keys = build.op("Unsqueeze", [counted(build, build.size(k, 2)), build.integers([0])])[0]
        parts = [("LessOrEqual", rows)] if causal else []
        parts += [("Greater", build.op("Sub", [rows, build.integers([window])])[0])] if window >= 0 else []
        bands = [self._truth(op, [keys, bound]) for op, bound in parts]
        seen = bands[0] if len(bands) == 1 else self._truth("And", bands)
        return self.choose(seen, 0.0, -np.inf)

    def _truth(self, op: str, inputs: Sequence[ir.Value]) -> ir.Value:
        result = self.build.op(op, inputs)[0]
        result.type = ir.TensorType(ir.DataType.BOOL)
        return result

    def choose(self, condition: ir.Value, yes: float, no: float) -> ir.Value:
        result = self.build.op("Where", [condition, self.number(yes), self.number(no)])[0]
        result.type = self.typed.type
        return result

    def positive(self, value: ir.Value) -> ir.Value:
        return self._truth("Greater", [self.build.cast(value, ir.DataType.INT64), scalar(self.build, 0, np.int64)])

    def shorter(self, keys: ir.Value, lengths: ir.Value) -> ir.Value:
        """Which of 0 … T − 1 lie below each sequence's length: [B, T]."""
        column = self.build.op("Unsqueeze", [self.build.cast(lengths, ir.DataType.INT64), self.build.integers([1])])[0]
        return self._truth("Less", [counted(self.build, self.build.size(keys, 2)), column])

    def grown(self, past: ir.Value | None, new: ir.Value) -> ir.Value:
        """Keys or values after their past; an op's present is a value of its own even where it is what came in."""
        return new if past is None else self.build.op("Concat", [past, new], {"axis": 2})[0]

    def present(self, grown: ir.Value, index: int) -> ir.Value | None:
        """`grown` as output `index`, where somebody reads that."""
        if index >= len(self.node.outputs):
            return None
        old = self.node.outputs[index]
        return grown if old.uses() or old.is_graph_output() else None


_Result = tuple[list[ir.Value | None], list[Lengths]]

_GQA = frozenset({
    "num_heads", "kv_num_heads", "scale", "softcap", "local_window_size", "do_rotary", "rotary_interleaved", "smooth_softmax", "qk_output",
    "k_quant_type", "v_quant_type", "kv_cache_bit_width", "causal", "sliding_window_cache", "qk_norm_epsilon", "q_norm_epsilon", "k_norm_epsilon",
})


def _group_query(w: _Writer) -> _Result:
    """GroupQueryAttention. With a sliding cache the past holds the window only; the tokens are the same."""
    w.only(12, _GQA, 3)
    node, build = w.node, w.build
    if any(attribute(node, f"{x}_quant_type", "NONE") != "NONE" for x in "kv"):
        raise CanNotExpand("its cache is quantized")
    heads, groups = attribute(node, "num_heads", 0), attribute(node, "kv_num_heads", 0)
    query, key, value = w.needed(0), w.input(1), w.input(2)
    packed = key is None
    size, rest = divmod(_width(query), heads + 2 * groups if packed else heads)
    if rest:
        raise CanNotExpand(f"its width of {_width(query)} is not of {heads} and {groups} heads")
    if packed:
        query, key, value = w.split(query, [heads * size, groups * size, groups * size], -1)
    assert key is not None
    if value is None:
        raise CanNotExpand("it has a key and no value")
    past = (w.input(3), w.input(4))
    for cache in (*past, *node.outputs[1:3]):
        _fix_size(cache, groups, size)
    before = None if past[0] is None else build.size(past[0], 2)
    if attribute(node, "do_rotary", 0):
        position = w.input(9) or _positions(w, query, before)
        query, key = (_turned(w, x, n, size, position) for x, n in ((query, heads), (key, groups)))
    q, k, v = w.heads(query, heads, size), w.heads(key, groups, size), w.heads(value, groups, size)
    k, v = w.grown(past[0], k), w.grown(past[1], v)
    sink = w.input(11)
    if sink is None and attribute(node, "smooth_softmax", 0) == 1:
        sink = build.constant(np.zeros(heads, np.float16 if query.dtype == ir.DataType.FLOAT16 else np.float32), "octavo.no_sink")
    output = w.attend(
        q, k, v, scale=attribute(node, "scale", 0.0) or size**-0.5, groups=(heads, groups), softcap=attribute(node, "softcap", 0.0),
        added=[w.input(10)], sink=sink, causal=bool(attribute(node, "causal", 1)), window=attribute(node, "local_window_size", -1), past=before,
    )
    return [output, w.present(k, 1), w.present(v, 2)], [Lengths(str(node.name), w.needed(5), w.input(6))]


def _width(value: ir.Value) -> int:
    """The last dimension of a projection, by its shape or by the op that makes it."""
    size = None if value.shape is None or not len(value.shape) else value.shape[-1]
    node = value.producer()
    if not isinstance(size, int) and node is not None and node.op_type == "MatMulNBits":
        size = attribute(node, "N", None)
    if not isinstance(size, int):
        raise CanNotExpand(f"the width of {value.name} is not known")
    return size


def _fix_size(cache: ir.Value | None, heads: int, size: int) -> None:
    """Writes heads and head size into a cache's declared shape: builders leave them open."""
    if cache is not None and cache.shape is not None and len(cache.shape) == 4:
        cache.shape = ir.Shape([cache.shape[0], heads, cache.shape[2], size])


def _close_caches(graph: ir.Graph, size: int) -> None:
    """As above for caches that go to no op of ours by themselves: the last dimension of a [B, G, P, ·] input can only be the head size."""
    for value in (*graph.inputs, *graph.outputs):
        shape = value.shape
        if shape is not None and len(shape) == 4 and isinstance(shape[1], int) and not isinstance(shape[2], int) and not isinstance(shape[3], int):
            value.shape = ir.Shape([*list(shape)[:3], size])


def _positions(w: _Writer, rows: ir.Value, before: ir.Value | None) -> ir.Value:
    """P … P + S − 1 for each sequence, [B, S]."""
    build = w.build
    counted_rows = counted(build, build.size(rows, 1))
    if before is not None:
        counted_rows = build.op("Add", [counted_rows, before])[0]
    shape = build.op("Concat", [build.size(rows, 0), build.size(rows, 1)], {"axis": 0})[0]
    return build.op("Expand", [counted_rows, shape])[0]


def _turned(w: _Writer, rows: ir.Value, heads: int, size: int, position: ir.Value) -> ir.Value:
    cos, sin = w.needed(7), w.needed(8)
    width = 2 * _width(cos)
    attributes = {"num_heads": heads, "interleaved": attribute(w.node, "rotary_interleaved", 0)}
    if width < size:
        attributes["rotary_embedding_dim"] = width
    return w.build.op("RotaryEmbedding", [rows, position, cos, sin], attributes, domain=DOMAIN)[0]


_MULTI_HEAD = frozenset({"num_heads", "scale", "mask_filter_value", "unidirectional"})


def _multi_head(w: _Writer) -> _Result:
    """MultiHeadAttention: operands separate, packed, or a key and value of another sequence that have their heads already."""
    w.only(8, _MULTI_HEAD, 3)
    heads = attribute(w.node, "num_heads", 0)
    query, key, value = w.needed(0), w.input(1), w.input(2)
    rank = None if query.shape is None else len(query.shape)
    if key is None:
        if rank != 5:
            raise CanNotExpand("its key is absent and its query is not packed in five dimensions")
        query, key, value = _unpacked(w, query, 3)
    elif value is None:
        query, (key, value) = w.heads(query, heads, _width(query) // heads), _unpacked(w, key, 2)
    else:
        size, key_rank = _width(query) // heads, None if key.shape is None else len(key.shape)
        if key_rank not in (3, 4):
            raise CanNotExpand("the rank of its key is not known")
        value_size = _width(value) // heads if key_rank == 3 else 0
        if w.input(3) is not None:
            query, key, value = _biased(w, query, key, value, w.needed(3))
        query = w.heads(query, heads, size)
        if key_rank == 3:
            key, value = w.heads(key, heads, size), w.heads(value, heads, value_size)
    if w.input(3) is not None and (w.input(1) is None or w.input(2) is None):
        raise CanNotExpand("a bias on packed operands")
    return _attended(w, query, key, value, heads, mask=w.input(4), bias=w.input(5), past=(w.input(6), w.input(7)))


def _unpacked(w: _Writer, value: ir.Value, count: int) -> list[ir.Value]:
    """[B, S, H, count, D] as `count` times [B, H, S, D]."""
    parts = w.split(value, [1] * count, 3)
    return [w.build.transpose(w.build.op("Squeeze", [part, w.build.integers([3])])[0], (0, 2, 1, 3)) for part in parts]


def _biased(w: _Writer, query: ir.Value, key: ir.Value, value: ir.Value, bias: ir.Value) -> list[ir.Value]:
    if key.shape is None or len(key.shape) != 3:
        raise CanNotExpand("a bias on a key that has its heads already")
    parts = w.split(bias, [_width(query), _width(key), _width(value)], 0)
    return [w.build.op("Add", [rows, part])[0] for rows, part in zip((query, key, value), parts)]


def _attended(
    w: _Writer, q: ir.Value, k: ir.Value, v: ir.Value, heads: int, *, mask: ir.Value | None, bias: ir.Value | None,
    past: tuple[ir.Value | None, ir.Value | None],
) -> _Result:
    size = w.build.size(past[0], 2) if past[0] is not None else None
    k, v = w.grown(past[0], k), w.grown(past[1], v)
    node = w.node
    width = _head_size(w, heads)
    scores_mask = None if mask is None else _padding(w, mask, k, attribute(node, "mask_filter_value", -10000.0))
    output = w.attend(
        q, k, v, scale=attribute(node, "scale", 0.0) or width**-0.5, groups=(heads, heads), added=[scores_mask, bias],
        causal=bool(attribute(node, "unidirectional", 0)), past=size,
    )
    return [output, w.present(k, 1), w.present(v, 2)], []


def _head_size(w: _Writer, heads: int) -> int:
    query = w.needed(0)
    if w.node.op_type == "Attention":
        sizes = attribute(w.node, "qkv_hidden_sizes", None)
        return (sizes[0] if sizes else _width(w.needed(1)) // 3) // heads
    return _width(query) if query.shape is not None and len(query.shape) == 5 else _width(query) // heads


def _padding(w: _Writer, mask: ir.Value, keys: ir.Value, hidden: float) -> ir.Value:
    """A key mask as what is added to the scores, spread over them."""
    build, rank = w.build, None if mask.shape is None else len(mask.shape)
    if _counts_tokens(mask):
        seen, rank = w.shorter(keys, mask), 1
    elif rank == 1:
        raise CanNotExpand("its one-dimensional mask is not known to be one length per sequence")
    elif rank in (2, 3):
        seen = w.positive(mask)
    else:
        raise CanNotExpand(f"its mask has {rank} dimensions")
    axes = [1] if rank == 3 else [1, 2]
    return build.op("Unsqueeze", [w.choose(seen, 0.0, hidden), build.integers(axes)])[0]


def _counts_tokens(mask: ir.Value) -> bool:
    """Whether a mask is one length per sequence, by what makes it."""
    node = mask.producer()
    if node is not None and node.op_type == "Cast" and node.inputs[0] is not None:
        return _counts_tokens(node.inputs[0])
    if node is None:
        return False
    return node.op_type == "ReduceSum" or (node.op_type == "EmbedLayerNormalization" and len(node.outputs) > 1 and node.outputs[1] is mask)


_ATTENTION = frozenset({"num_heads", "unidirectional", "qkv_hidden_sizes", "mask_filter_value", "scale", "do_rotary", "past_present_share_buffer"})


def _attention(w: _Writer) -> _Result:
    """Attention: one weight for query, key and value; its past and present are [2, B, H, P, D]."""
    w.only(6, _ATTENTION, 2)
    node, build = w.node, w.build
    if attribute(node, "do_rotary", 0) or attribute(node, "past_present_share_buffer", 0):
        raise CanNotExpand("a rotary embedding or a shared cache of its own")
    heads, total = attribute(node, "num_heads", 0), _width(w.needed(1))
    sizes = list(attribute(node, "qkv_hidden_sizes", None) or [total // 3] * 3)
    if w.needed(0).producer() is not None:  # of EmbedLayerNormalization onnx infers its first input's type and shape
        w.needed(0).type, w.needed(0).shape = w.typed.type, None
    rows = build.op("MatMul", [w.needed(0), w.needed(1)])[0]
    if w.input(2) is not None:
        rows = build.op("Add", [rows, w.needed(2)])[0]
    q, k, v = (w.heads(part, heads, size // heads) for part, size in zip(w.split(rows, sizes, -1), sizes))
    before = w.input(4)
    past: tuple[ir.Value | None, ir.Value | None] = (None, None)
    if before is not None:
        halves = w.split(before, [1, 1], 0)
        past = (build.op("Squeeze", [halves[0], build.integers([0])])[0], build.op("Squeeze", [halves[1], build.integers([0])])[0])
    (output, _, _), _ = _attended(w, q, k, v, heads, mask=w.input(3), bias=w.input(5), past=past)
    present = None
    if len(node.outputs) > 1 and (node.outputs[1].uses() or node.outputs[1].is_graph_output()):
        grown = [w.grown(p, x) for p, x in zip(past, (k, v))]
        present = build.op("Concat", [build.op("Unsqueeze", [x, build.integers([0])])[0] for x in grown], {"axis": 0})[0]
    return [output, present], []


_DECODER = _MULTI_HEAD | {"past_present_share_buffer", "output_qk"}


def _decoder_masked(w: _Writer) -> _Result:
    """DecoderMaskedMultiHeadAttention with a cache that grows; one that is shared, or indexed by beams, is a machine of its own."""
    for index, what in ((7, "past_sequence_length"), (8, "beam_width"), (9, "cache_indirection")):
        if w.input(index) is not None:
            raise CanNotExpand(f"it is given {what}")
    w.only(11, _DECODER, 3)
    if attribute(w.node, "past_present_share_buffer", 0):
        raise CanNotExpand("its cache is one shared buffer")
    heads, (query, key, value) = attribute(w.node, "num_heads", 0), (w.needed(0), w.needed(1), w.needed(2))
    size, value_size = _width(query) // heads, _width(value) // heads
    if w.input(10) is not None:
        query, key, value = _biased(w, query, key, value, w.needed(10))
    q, k, v = w.heads(query, heads, size), w.heads(key, heads, size), w.heads(value, heads, value_size)
    return _attended(w, q, k, v, heads, mask=w.input(3), bias=w.input(4), past=(w.input(5), w.input(6)))


_EXPANSIONS: dict[str, Callable[[_Writer], _Result]] = {
    "GroupQueryAttention": _group_query, "MultiHeadAttention": _multi_head, "Attention": _attention,
    "DecoderMaskedMultiHeadAttention": _decoder_masked,
}
