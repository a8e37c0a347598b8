"""FlashAttention out of standard ONNX ops, as an onnxscript function: a second meaning, independent of NumPy and of the kernels.

An ONNX function can't ask whether an optional input is there, so all of them are inputs here and `flash_attention_neutral` gives each
absent one the value that changes nothing. There is no such function for PagedAttention: it would run without writing the cache.
"""

# mypy: ignore-errors
# The bodies below are onnxscript, a language of its own that looks like Python.

from __future__ import annotations

import numpy as np
from onnxscript import BOOL, FLOAT, script, values
from onnxscript import opset18 as op

octavo_functions = values.Opset("ai.octavo.functions", 1)


@script(octavo_functions)
def FlashAttention(
    query: FLOAT[...],
    key: FLOAT[...],
    value: FLOAT[...],
    attention_bias: FLOAT[...],
    key_mask: BOOL[...],
    head_sink: FLOAT[...],
    alibi_slopes: FLOAT[...],
    num_heads: int,
    kv_num_heads: int,
    scale: float,
    softcap: float,
    local_window_size: int,
    is_causal: int,
):
    """softmax(softcap(scale·q·kᵀ) + slopes + bias) · v with a sink per head; a row that sees no key is 0."""
    H = op.Reshape(op.Constant(value_int=num_heads), op.Constant(value_ints=[1]))
    G = op.Reshape(op.Constant(value_int=kv_num_heads), op.Constant(value_ints=[1]))
    zero = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    rest = op.Constant(value_ints=[-1])
    B = op.Shape(query, start=0, end=1)
    S = op.Shape(query, start=1, end=2)
    T = op.Shape(key, start=1, end=2)

    # (B, G, H/G, S, D) · (B, G, 1, D, T)
    q = op.Transpose(op.Reshape(query, op.Concat(B, S, G, op.Div(H, G), rest, axis=0)), perm=[0, 2, 3, 1, 4])
    two = op.Constant(value_ints=[2])
    k = op.Unsqueeze(op.Transpose(op.Reshape(key, op.Concat(B, T, G, rest, axis=0)), perm=[0, 2, 3, 1]), two)
    v = op.Unsqueeze(op.Transpose(op.Reshape(value, op.Concat(B, T, G, rest, axis=0)), perm=[0, 2, 1, 3]), two)
    D = op.Cast(op.Shape(k, start=3, end=4), to=1)
    asked = op.Constant(value_float=scale)
    factor = op.Where(op.Equal(asked, 0.0), op.Reciprocal(op.Sqrt(D)), asked)
    scores = op.Reshape(op.MatMul(op.Mul(q, factor), k), op.Concat(B, H, S, T, axis=0))

    cap = op.Constant(value_float=softcap)
    capped = op.Mul(cap, op.Tanh(op.Div(scores, op.Where(op.Equal(cap, 0.0), 1.0, cap))))
    scores = op.Where(op.Equal(cap, 0.0), scores, capped)

    position = op.Add(op.Unsqueeze(op.Range(0, op.Squeeze(S), 1), one), op.Sub(T, S))  # (S, 1)
    keys = op.Unsqueeze(op.Range(0, op.Squeeze(T), 1), zero)  # (1, T)
    slopes = op.Unsqueeze(alibi_slopes, op.Constant(value_ints=[1, 2]))
    scores = op.Add(scores, op.Mul(slopes, op.Cast(op.Sub(keys, position), to=1)))
    scores = op.Add(scores, attention_bias)

    window = op.Constant(value_int=local_window_size)
    future = op.And(op.Equal(op.Constant(value_int=is_causal), 1), op.Greater(keys, position))
    left = op.And(op.Greater(window, 0), op.LessOrEqual(keys, op.Sub(position, window)))
    hidden = op.Or(op.Or(future, left), op.Not(op.Unsqueeze(key_mask, op.Constant(value_ints=[1, 2]))))
    nothing = op.Constant(value_float=float("-inf"))
    scores = op.Where(hidden, nothing, scores)

    sink = op.Unsqueeze(head_sink, op.Constant(value_ints=[1, 2]))  # (H, 1, 1)
    highest = op.Max(op.ReduceMax(scores, rest, keepdims=1), sink)
    highest = op.Where(op.IsInf(highest), 0.0, highest)
    weights = op.Exp(op.Sub(scores, highest))
    total = op.Add(op.ReduceSum(weights, rest, keepdims=1), op.Exp(op.Sub(sink, highest)))
    weights = op.Div(weights, op.Where(op.Equal(total, 0.0), 1.0, total))
    grouped = op.Reshape(weights, op.Concat(B, G, op.Div(H, G), S, T, axis=0))
    out = op.Transpose(op.MatMul(grouped, v), perm=[0, 3, 1, 2, 4])
    return op.Reshape(out, op.Concat(B, S, rest, axis=0))


def flash_attention_neutral(B: int, T: int, H: int) -> dict[str, np.ndarray]:
    """Values of the optional inputs that change nothing."""
    return {
        "attention_bias": np.zeros((1, 1, 1, T), np.float32),
        "key_mask": np.ones((B, T), bool),
        "head_sink": np.full(H, -np.inf, np.float32),
        "alibi_slopes": np.zeros(H, np.float32),
    }
