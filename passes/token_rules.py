"""How each operator moves the token axis: one rule per kind of operator. An operator without a rule counts as looking sideways.

A rule gets a node's `View` and returns the token axis of its outputs, or raises `Sideways` with what stands against it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .observe import Dim
from .token_axis import Sideways, TokenAxis, View, relaid

Rule = Callable[[View], TokenAxis]


def _elementwise(view: View) -> TokenAxis:
    return view.aligned()


def _first_only(view: View) -> TokenAxis:
    """Elementwise on input 0; the rest are parameters, the same for all tokens."""
    return view.only(0)


def _same_layout(view: View) -> TokenAxis:
    """Elements stay in row-major order and only the shape changes."""
    shape = view.shapes[0]
    assert shape is not None
    return relaid(shape, view.only(0), view.results[0])


def _repeat(view: View) -> TokenAxis:
    """Expand: the token dimension must come out as it went in. Tile may repeat it whole, which is one more dimension outside of it."""
    axis, shape = view.only(0), view.shapes[0]
    assert shape is not None
    place = axis.axis + len(view.results[0]) - len(shape)
    before, after = shape[axis.axis], view.results[0][place]
    many, rest = divmod(after.factor, before.factor)
    if after.letters != before.letters or rest or (many != 1 and view.node.op_type != "Tile"):
        raise Sideways("tokens are repeated", f"{before} becomes {after} along {axis}")
    return TokenAxis(place, axis.outer * many, axis.inner)


def _transpose(view: View) -> TokenAxis:
    axis = view.only(0)
    order = view.node.attributes.get_ints("perm", None)
    order = list(order) if order is not None else list(reversed(range(view.rank(0))))
    return axis.moved(order.index(axis.axis))


def _other_axis(default: int) -> Rule:
    """Works along attribute `axis` of input 0; it must be another than the tokens'."""

    def rule(view: View) -> TokenAxis:
        return _apart(view.only(0), view.axis_attribute(default, view.rank(0)))

    return rule


def _apart(axis: TokenAxis, worked: int) -> TokenAxis:
    if axis.axis == worked:
        raise Sideways("it works along the tokens", f"axis {worked}")
    return axis


def _concat(view: View) -> TokenAxis:
    return _apart(view.aligned(), view.axis_attribute(None, view.rank(0)))


def _elements(view: View) -> TokenAxis:
    """GatherElements, ScatterElements: a row's indices point into that row. An input without tokens would single out the first rows."""
    if any(axis is None for axis in view.axes):
        raise Sideways("its indices or updates are not one row per token", ", ".join(map(str, view.axes)))
    return _apart(view.aligned(), view.axis_attribute(0, view.rank(0)))


def _dropout(view: View) -> TokenAxis:
    if view.has(2) and view.constant(2).any():
        raise Sideways("it is in training mode")
    return view.only(0)


def _softmax(view: View) -> TokenAxis:
    axis = view.only(0)
    worked = view.axis_attribute(-1 if view.opset >= 13 else 1, view.rank(0))
    if axis.axis == worked or (view.opset < 13 and axis.axis > worked):
        raise Sideways("it normalizes over tokens", f"axis {worked}")
    return axis


def _parameter_axis(view: View) -> int:
    """The single axis that CumSum takes as its second input."""
    return int(view.constant(1).reshape(-1)[0]) % view.rank(0)


def _cumsum(view: View) -> TokenAxis:
    axis = view.only(0)
    if _parameter_axis(view) == axis.axis:
        raise Sideways("it sums over tokens", f"{axis}")
    return axis


def _reduce(view: View) -> TokenAxis:
    axis, rank, attributes = view.only(0), view.rank(0), view.node.attributes
    axes = view.constant(1).reshape(-1).tolist() if view.has(1) else list(attributes.get_ints("axes", None) or ())
    if not axes and attributes.get_int("noop_with_empty_axes", 0):
        return axis
    reduced = {int(a) % rank for a in axes} if axes else set(range(rank))
    return _without(axis, reduced, bool(attributes.get_int("keepdims", 1)))


def _arg_reduce(view: View) -> TokenAxis:
    return _without(view.only(0), {view.axis_attribute(0, view.rank(0))}, bool(view.node.attributes.get_int("keepdims", 1)))


def _without(axis: TokenAxis, reduced: set[int], keepdims: bool) -> TokenAxis:
    if axis.axis in reduced:
        raise Sideways("it reduces over tokens", f"axes {sorted(reduced)}, tokens along {axis}")
    return axis if keepdims else axis.moved(axis.axis - sum(a < axis.axis for a in reduced))


def _norm(default: int) -> Rule:
    """Normalizes over all dimensions from `axis` on."""

    def rule(view: View) -> TokenAxis:
        axis = view.only(0)
        first = view.axis_attribute(default, view.rank(0))
        if axis.axis >= first:
            raise Sideways("it normalizes over tokens", f"axes {first} to {view.rank(0) - 1}")
        return axis

    return rule


def _skip_norm(view: View) -> TokenAxis:
    """Input and skip are added, then normalized over the last dimension; the other outputs are the sum, or absent."""
    axis = view.aligned(rank=view.rank(0))
    if axis.axis == view.rank(0) - 1:
        raise Sideways("it normalizes over tokens", f"axis {axis.axis}")
    return axis


def _matmul(view: View) -> TokenAxis:
    ranks, out_rank = (view.rank(0), view.rank(1)), len(view.results[0])
    for index, contracted in ((0, ranks[0] - 1), (1, max(0, ranks[1] - 2))):
        axis = view.axes[index]
        if axis is not None and axis.axis == contracted:
            raise Sideways("it sums over tokens", f"input {index} is contracted along {axis}")
    left, right = view.axes[0], view.axes[1]
    if left is not None and left.axis == ranks[0] - 2:  # rows of the left matrix
        if right is not None:
            raise Sideways("tokens meet tokens along different axes", f"{left} against {right}")
        return left.moved(out_rank - 2 if ranks[1] > 1 else out_rank - 1)
    if right is not None and right.axis == ranks[1] - 1:  # columns of the right matrix
        if left is not None:
            raise Sideways("tokens meet tokens along different axes", f"{left} against {right}")
        return right.moved(out_rank - 1)
    return view.aligned((0, 1), rank=max(ranks))  # a batch dimension: each token multiplies its own matrices


def _fused_matmul(view: View) -> TokenAxis:
    """com.microsoft: a product times a factor. Transposed, it is read as another product."""
    flags = view.node.attributes
    if any(flags.get_int(name, 0) for name in ("transA", "transBatchA", "transBatchB")) or (flags.get_int("transB", 0) and view.axes[1] is not None):
        raise Sideways("tokens are transposed in a product", f"{view.axes[0]}, {view.axes[1]}")
    return _matmul(view)


def _gemm(view: View) -> TokenAxis:
    flags = view.node.attributes
    contracted = (0 if flags.get_int("transA", 0) else 1, 1 if flags.get_int("transB", 0) else 0)
    found = [(index, axis) for index, axis in enumerate(view.axes[:2]) if axis is not None]
    if len(found) != 1:
        raise Sideways("tokens meet tokens in a product", f"{len(found)} inputs with tokens")
    index, axis = found[0]
    if axis.axis == contracted[index]:
        raise Sideways("it sums over tokens", f"input {index} is contracted along {axis}")
    result = axis.moved(index)
    if view.has(2):
        added, shape = view.axes[2], view.shapes[2]
        assert shape is not None
        if added is not None and added.moved(added.axis + 2 - len(shape)) != result:
            raise Sideways("tokens meet tokens along different axes", f"{added} against {result}")
        place = result.axis - 2 + len(shape)
        if added is None and place >= 0 and shape[place] != Dim(1):
            raise Sideways("input 2 has its own values along the tokens", f"{shape[place]} of them")
    return result


def _rows_times_weights(view: View) -> TokenAxis:
    """MatMulNBits and its like: the last dimension of input 0 is contracted with weights."""
    axis = view.only(0)
    if axis.axis == view.rank(0) - 1:
        raise Sideways("it sums over tokens", f"{axis}")
    return axis


def _einsum(view: View) -> TokenAxis:
    equation = "".join(view.node.attributes.get_string("equation").split())
    if "..." in equation or "->" not in equation:
        raise Sideways("its equation is not explicit", equation)
    terms, out = equation.split("->")[0].split(","), equation.split("->")[1]
    found = {(term[axis.axis], axis.outer, axis.inner) for term, axis in zip(terms, view.axes) if axis is not None}
    if len(found) != 1:
        raise Sideways("tokens meet tokens along different axes", equation)
    letter, outer, inner = found.pop()
    repeated = any(term.count(letter) > 1 for term in terms)
    if letter not in out or repeated or any(letter in term and axis is None for term, axis in zip(terms, view.axes)):
        raise Sideways("it sums over tokens", f"{letter} of {equation}")
    return TokenAxis(out.index(letter), outer, inner)


def _gather(view: View) -> TokenAxis:
    data, indices = view.axes[0], view.axes[1]
    worked = view.axis_attribute(0, view.rank(0))
    if data is None and indices is not None:  # rows of a table, by id or position
        return indices.moved(worked + indices.axis)
    axis = view.only(0)
    if axis.axis == worked:
        raise Sideways("it picks among tokens", f"axis {worked}")
    return axis if axis.axis < worked else axis.moved(axis.axis + view.rank(1) - 1)


def _gather_quantized(view: View) -> TokenAxis:
    """Rows of a table that is stored in blocks with a scale each: what _gather is for plain ones."""
    indices = view.only(1)
    return indices.moved(view.node.attributes.get_int("gather_axis", 0) + indices.axis)


def _gather_nd(view: View) -> TokenAxis:
    """Entries of a table, by ids: the last dimension of the indices says which."""
    data, indices, shape = view.axes[0], view.axes[1], view.shapes[1]
    assert shape is not None
    batched = view.node.attributes.get_int("batch_dims", 0)
    if indices is None and data is not None and not batched and data.axis >= shape[-1].factor:  # dimensions before the tokens are picked from
        return data.moved(data.axis - shape[-1].factor + len(shape) - 1)
    if data is not None or indices is None or batched:
        raise Sideways("it picks among tokens", f"data {data}, indices {indices}")
    if indices.axis == view.rank(1) - 1:
        raise Sideways("the places of tokens are its indices", f"{indices}")
    return indices


def _scatter_nd(view: View) -> TokenAxis:
    """Fixed places along dimensions before the tokens' are written, with rows of their own; by anything else rows are written by index."""
    data, indices, updates, shape = *view.axes, view.shapes[1]
    assert shape is not None
    picked = shape[-1].factor
    if data is None or indices is not None or data.axis < picked or updates != data.moved(data.axis - picked + len(shape) - 1):
        raise Sideways("rows are picked or written by index, across tokens", f"data {data}, indices {indices}, updates {updates}")
    view.constant(1)
    return data


def _one_scale(view: View) -> TokenAxis:
    raise Sideways("one scale over all tokens (per-tensor dynamic quantization)", "quantize weights alone, or let octavo do it")


def _slice(view: View) -> TokenAxis:
    axis, rank, shape, result = view.only(0), view.rank(0), view.shapes[0], view.results[0]
    assert shape is not None
    if not view.has(1):
        raise Sideways("its bounds are attributes, as before opset 10")
    given = view.constant(3).reshape(-1) if view.has(3) else range(view.constant(1).size)
    axes = [int(a) % rank for a in given]
    if axes != [axis.axis]:
        view.constant(1), view.constant(2)  # along other dimensions the same for every length; along the tokens all is what counts
    if axis.axis in axes:
        step = int(view.constant(4).reshape(-1)[axes.index(axis.axis)]) if view.has(4) else 1
        if step != 1 or result[axis.axis] != shape[axis.axis]:
            raise Sideways("it picks among tokens", f"{result[axis.axis]} of {shape[axis.axis]} along {axis}, step {step}")
    return axis


def _pad(view: View) -> TokenAxis:
    axis, rank = view.only(0), view.rank(0)
    pads = view.constant(1).reshape(-1)
    axes = [int(a) % rank for a in view.constant(3).reshape(-1)] if view.has(3) else list(range(rank))
    if axis.axis in axes and np.any(pads[[axes.index(axis.axis), axes.index(axis.axis) + len(axes)]]):
        raise Sideways("rows are put before or after the tokens", f"{axis}")
    return axis


def _one_hot(view: View) -> TokenAxis:
    axis, rank = view.only(0), view.rank(0) + 1
    inserted = view.axis_attribute(-1, rank)
    return axis.moved(axis.axis + (axis.axis >= inserted))


def _trilu(view: View) -> TokenAxis:
    axis = view.only(0)
    if axis.axis >= view.rank(0) - 2:
        raise Sideways("it cuts a triangle over tokens", f"{axis}")
    return axis


def _rotary(view: View) -> TokenAxis:
    """RotaryEmbedding-23: x [B, H, S, D] or [B, S, H·D]; cos and sin [B, S, r/2], or tables [C, r/2] with position_ids [B, S]."""
    expected = TokenAxis(2 if view.rank(0) == 4 else 1)
    if view.axes[0] != expected:
        raise Sideways("tokens are not where a rotary embedding has them", f"{view.axes[0]}, expected {expected}")
    by_position = view.has(3)
    if by_position and view.axes[3] != TokenAxis(1):
        raise Sideways("its positions are not one per token", f"{view.axes[3]}")
    if any(view.axes[i] != (None if by_position else TokenAxis(1)) for i in (1, 2)):
        raise Sideways("its tables are not one row per token", f"{view.axes[1]}, {view.axes[2]}")
    return expected


def _microsoft_rotary(view: View) -> TokenAxis:
    """com.microsoft: x [B, S, H·D] or [B, H, S, D], position_ids [B, S], tables [C, r/2]."""
    expected = TokenAxis(2 if view.rank(0) == 4 else 1)
    if view.axes[0] != expected or view.axes[1] != TokenAxis(1) or view.axes[2] is not None or view.axes[3] is not None:
        raise Sideways("tokens or positions are not where a rotary embedding has them", f"{view.axes[0]}, positions {view.axes[1]}")
    return expected


ELEMENTWISE = """
    Abs Acos Acosh Add And Asin Asinh Atan Atanh BitwiseAnd BitwiseNot BitwiseOr BitwiseXor BitShift Cast CastLike Ceil Celu Clip Cos Cosh
    Div Elu Equal Erf Exp Floor Gelu Greater GreaterOrEqual HardSigmoid HardSwish Identity IsInf IsNaN LeakyRelu Less LessOrEqual Log Max
    Mean Min Mish Mod Mul Neg Not Or PRelu Pow Reciprocal Relu Round Selu Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Sub Sum Swish Tan
    Tanh ThresholdedRelu Where Xor
""".split()  # noqa: SIM905
_REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")

RULES: dict[tuple[str, str], Rule] = {
    **{("", op): _elementwise for op in ELEMENTWISE},
    **{("", f"Reduce{name}"): _reduce for name in _REDUCTIONS},
    **{("", op): _same_layout for op in ("Reshape", "Squeeze", "Unsqueeze", "Flatten")},
    **{("", op): _repeat for op in ("Expand", "Tile")},
    **{("", op): _softmax for op in ("Softmax", "LogSoftmax", "Hardmax")},
    **{("", op): _arg_reduce for op in ("ArgMax", "ArgMin")},
    **{("", op): _first_only for op in ("QuantizeLinear", "DequantizeLinear")},
    **{("", op): _norm(-1) for op in ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")},
    ("", "LpNormalization"): _other_axis(-1),
    ("", "TopK"): _other_axis(-1),
    ("", "Split"): _other_axis(0),
    ("", "Concat"): _concat,
    ("", "Dropout"): _dropout,
    **{("", op): _elements for op in ("GatherElements", "ScatterElements")},
    ("", "CumSum"): _cumsum,
    ("", "Transpose"): _transpose,
    ("", "MatMul"): _matmul,
    ("", "Gemm"): _gemm,
    ("", "Einsum"): _einsum,
    ("", "Gather"): _gather,
    ("", "GatherND"): _gather_nd,
    ("", "ScatterND"): _scatter_nd,
    ("", "DynamicQuantizeLinear"): _one_scale,
    ("", "Slice"): _slice,
    ("", "Pad"): _pad,
    ("", "OneHot"): _one_hot,
    ("", "Trilu"): _trilu,
    ("", "RotaryEmbedding"): _rotary,
    **{("com.microsoft", op): _elementwise for op in ("Gelu", "FastGelu", "BiasGelu", "QuickGelu")},
    **{("com.microsoft", op): _skip_norm for op in ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")},
    ("com.microsoft", "SimplifiedLayerNormalization"): _norm(-1),
    ("com.microsoft", "FusedMatMul"): _fused_matmul,
    ("com.microsoft", "GatherBlockQuantized"): _gather_quantized,
    ("com.microsoft", "MatMulNBits"): _rows_times_weights,
    ("com.microsoft", "RotaryEmbedding"): _microsoft_rotary,
}
