"""What the ops mean, in NumPy, written for reading.

All arithmetic is float64, except what the contract makes visible: keys and values are rounded to the cache's format when they are appended
and read back as stored, and with an int8 cache queries and probabilities are rounded too. The result is rounded to float32 once. Scores are, in this order,

    s = scale · q·k,  s = softcap · tanh(s / softcap),  s = s + slope · (key position − query position),  s = s + bias

and a key whose score is −inf, or that a mask hides, takes no part at all: its memory may hold anything.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import int8_cache
from .contract import CHUNK

Array = np.ndarray


@dataclass(frozen=True)
class Heads:
    """The attributes that both ops share, with the contract's defaults."""

    num_heads: int
    kv_num_heads: int
    scale: float = 0.0
    softcap: float = 0.0
    local_window_size: int = -1

    def factor(self, D: int) -> float:
        return self.scale if self.scale != 0.0 else 1.0 / np.sqrt(D)

    def capped(self, scores: Array) -> Array:
        return self.softcap * np.tanh(scores / self.softcap) if self.softcap else scores


def _split(x: Array, heads: int) -> Array:
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)


def attend_row(q: Array, k: Array, v: Array, *, extra: Array, heads: Heads, sink: float | None) -> Array:
    """One query head over the keys that it sees: q (D), k (n, D), v (n, E), `extra` (n) added to the scores. Returns (E)."""
    scores = heads.capped(heads.factor(q.shape[0]) * (k.astype(np.float64) @ q.astype(np.float64))) + extra
    seen = ~np.isneginf(scores)
    scores, v = scores[seen], v[seen].astype(np.float64)
    if scores.size == 0:
        return np.zeros(v.shape[1])
    highest = scores.max() if sink is None else max(scores.max(), sink)
    weights = np.exp(scores - highest)
    total = weights.sum() + (0.0 if sink is None else np.exp(sink - highest))
    return weights @ v / total


def attend_row_int8(q: Array, k: Array, k_scale: Array, v: Array, v_scale: Array, *, position: Array, extra: Array, heads: Heads, sink: float | None) -> Array:
    """As attend_row, over an int8 cache: q (D) float32, k (n, D) and v (n, E) int8 with scales (n, groups) and (n) at `position` (n)."""
    scaled = (q * np.float32(heads.factor(q.shape[0]))).astype(np.float32)
    scores = heads.capped(int8_cache.scores(*int8_cache.quantize_key(scaled, query=True), k, k_scale)) + extra
    highest = scores.max() if sink is None else max(scores.max(), sink)
    total, out = 0.0 if sink is None else np.exp(sink - highest), np.zeros(v.shape[1])
    for chunk in np.unique(position // CHUNK):
        at = position // CHUNK == chunk
        weights = np.exp(scores[at] - scores[at].max())
        rounded = weights * v_scale[at]
        unit = rounded.max() / 255
        bytes_ = np.rint(rounded / unit) if unit >= 2.0**-120 / 255 else np.zeros_like(rounded)
        keep = np.exp(scores[at].max() - highest)
        total += keep * weights.sum()
        out += keep * unit * (bytes_ @ v[at].astype(np.float64))
    return out / total


def normalize(x: Array, weight: Array, epsilon: float) -> Array:
    """RMSNorm of every head (…, D) in float32, as the kernels add up: sixteen lanes, then halves."""
    D = x.shape[-1]
    squares = np.zeros((*x.shape[:-1], 16), np.float32)
    for d in range(0, D, 16):
        part = x[..., d : d + 16].astype(np.float64)
        squares[..., : part.shape[-1]] = part * part + squares[..., : part.shape[-1]]  # fused: float64 holds the product, rounded once
    for width in (8, 4, 2, 1):
        squares[..., :width] += squares[..., width : 2 * width]
    inverse = np.float32(1) / np.sqrt(squares[..., :1] / np.float32(D) + np.float32(epsilon))
    return x * inverse * weight


def rotate(x: Array, cos: Array, sin: Array, interleaved: bool) -> Array:
    """Rotary embedding of the first r elements of every head: x (heads, D), cos and sin (r/2) of the token's position. Float32.

    Rotated keys are seen in the cache, so their rounding is part of the meaning: the product with the sine is rounded to float32, the one
    with the cosine is exact and fused with the sum (float64 holds it, and rounds the sum where float32 does but for one case in 2^29).
    """
    r = 2 * cos.shape[0]
    near = np.arange(0, r, 2) if interleaved else np.arange(r // 2)
    far = near + 1 if interleaved else near + r // 2
    y, a, b = x.copy(), x[:, near], x[:, far]
    y[:, near] = a.astype(np.float64) * cos - b * sin
    y[:, far] = b.astype(np.float64) * cos + a * sin
    return y


@dataclass(frozen=True)
class PagedResult:
    """`output` (…, H·E) and the caches after the append."""

    output: Array
    key_cache: Array
    value_cache: Array


class Pages:
    """Cache tensors of fp32 or fp16 elements."""

    def __init__(self, key_cache: Array, value_cache: Array) -> None:
        self.key_cache, self.value_cache = key_cache, value_cache

    def append(self, block: int, slot: int, k: Array, v: Array) -> None:
        """One token's keys (G, D) and values (G, E)."""
        self.key_cache[block, :, :, slot] = k.astype(self.key_cache.dtype)
        self.value_cache[block, :, slot, :] = v.astype(self.value_cache.dtype)

    def attend(self, q: Array, g: int, blocks: Array, slots: Array, position: Array, extra: Array, heads: Heads, sink: float | None) -> Array:
        """One query head over the keys in these slots, which stand at `position`."""
        return attend_row(q, self.key_cache[blocks, g, :, slots], self.value_cache[blocks, g, slots, :], extra=extra, heads=heads, sink=sink)


class Int8Pages(Pages):
    """Cache tensors of bytes."""

    def __init__(self, key_cache: Array, value_cache: Array, D: int, E: int) -> None:
        super().__init__(key_cache, value_cache)
        self.D, self.E = D, E
        self.unpacked: tuple[Array, ...] | None = None

    def append(self, block: int, slot: int, k: Array, v: Array) -> None:
        self.unpacked = None
        for g in range(k.shape[0]):
            int8_cache.put_key(self.key_cache[block, g], slot, k[g])
            int8_cache.put_value(self.value_cache[block, g], slot, v[g])

    def attend(self, q: Array, g: int, blocks: Array, slots: Array, position: Array, extra: Array, heads: Heads, sink: float | None) -> Array:
        if self.unpacked is None:
            self.unpacked = (*int8_cache.unpack_keys(self.key_cache, self.D), *int8_cache.unpack_values(self.value_cache, self.E))
        k, k_scale, v, v_scale = (array[blocks, g, slots] for array in self.unpacked)
        return attend_row_int8(q, k, k_scale, v, v_scale, position=position, extra=extra, heads=heads, sink=sink)


def paged_attention(
    heads: Heads,
    *,
    query: Array,
    key: Array | None = None,
    value: Array | None = None,
    key_cache: Array,
    value_cache: Array,
    cumulative_sequence_length: Array,
    past_seqlens: Array,
    block_table: Array,
    slot_mapping: Array,
    parent: Array,
    cos_cache: Array | None = None,
    sin_cache: Array | None = None,
    head_sink: Array | None = None,
    q_norm_weight: Array | None = None,
    k_norm_weight: Array | None = None,
    alibi_slopes: Array | None = None,
    rotary_interleaved: int = 0,
    chunk_size: int = -1,
    qk_norm_epsilon: float = 1e-6,
) -> PagedResult:
    """contract.PAGED_ATTENTION. The caches given are left alone."""
    H, G = heads.num_heads, heads.kv_num_heads
    leading, P = query.shape[:-1], key_cache.shape[3]
    key_cache, value_cache = key_cache.copy(), value_cache.copy()
    if key is None or value is None:
        D = query.shape[-1] // (H + 2 * G)
        query, key, value = np.split(query, [H * D, (H + G) * D], axis=-1)
    query, key, value = (x.reshape(-1, x.shape[-1]) for x in (query, key, value))
    T = len(query)
    q, k, v = _split(query, H).copy(), _split(key, G).copy(), _split(value, G)
    if q_norm_weight is not None and k_norm_weight is not None:
        q, k = normalize(q, q_norm_weight, qk_norm_epsilon), normalize(k, k_norm_weight, qk_norm_epsilon)
    cache = Int8Pages(key_cache, value_cache, q.shape[2], v.shape[2]) if key_cache.dtype == np.uint8 else Pages(key_cache, value_cache)
    sequence = np.repeat(np.arange(len(past_seqlens)), np.diff(cumulative_sequence_length))

    position = np.zeros(T, np.int64)
    for t in range(T):
        position[t] = past_seqlens[sequence[t]] if parent[t] < 0 else position[parent[t]] + 1

    slot_of_row = np.zeros(T, np.int64)  # where the row's key and value lie once the step is appended
    for t in range(T):
        if cos_cache is not None and sin_cache is not None:
            q[t] = rotate(q[t], cos_cache[position[t]], sin_cache[position[t]], bool(rotary_interleaved))
            k[t] = rotate(k[t], cos_cache[position[t]], sin_cache[position[t]], bool(rotary_interleaved))
        slot_of_row[t] = slot_mapping[t]
        if slot_mapping[t] < 0:
            slot_of_row[t] = _slot(block_table[sequence[t]], position[t], P)
            continue
        block, slot = divmod(int(slot_mapping[t]), P)
        cache.append(block, slot, k[t], v[t])

    output = np.zeros((T, H, v.shape[2]), np.float32)
    for t in range(T):
        p = int(position[t])
        ancestor: dict[int, int] = {}
        at = t
        while at >= 0:
            ancestor[int(position[at])] = at
            at = int(parent[at])
        first = 0 if heads.local_window_size < 0 else max(0, p - heads.local_window_size + 1)
        first = max(first, p // chunk_size * chunk_size if chunk_size > 0 else 0)
        seen = np.arange(first, p + 1)
        slots = [int(slot_of_row[ancestor[j]]) if j in ancestor else _slot(block_table[sequence[t]], j, P) for j in range(first, p + 1)]
        blocks, offsets = np.divmod(np.array(slots), P)
        for h in range(H):
            g = h // (H // G)
            extra = np.zeros(len(seen)) if alibi_slopes is None else float(alibi_slopes[h]) * (seen - p)
            sink = None if head_sink is None else float(head_sink[h])
            output[t, h] = cache.attend(q[t, h], g, blocks, offsets, seen, extra, heads, sink)
    return PagedResult(output.reshape(*leading, H * v.shape[2]), key_cache, value_cache)


def _slot(table: Array, position: int, P: int) -> int:
    block = int(table[position // P])
    assert block >= 0, f"position {position} is visible but unmapped"
    return block * P + int(position % P)


def flash_attention(
    heads: Heads,
    *,
    query: Array,
    key: Array,
    value: Array,
    attention_bias: Array | None = None,
    key_mask: Array | None = None,
    head_sink: Array | None = None,
    alibi_slopes: Array | None = None,
    is_causal: int = 0,
) -> Array:
    """contract.FLASH_ATTENTION. Returns (B, S, H·E)."""
    H, G = heads.num_heads, heads.kv_num_heads
    (B, S), T = query.shape[:2], key.shape[1]
    q, k, v = _split(query, H), _split(key, G), _split(value, G)
    output = np.zeros((B, S, H, v.shape[3]), np.float32)
    bias = None if attention_bias is None else np.broadcast_to(attention_bias, (B, H, S, T))
    keys = np.arange(T)
    for b, i, h in np.ndindex(B, S, H):
        position = i + T - S
        extra = np.zeros(T) if alibi_slopes is None else float(alibi_slopes[h]) * (keys - position)
        if bias is not None:
            extra = np.where(bias[b, h, i], extra, -np.inf) if bias.dtype == bool else extra + bias[b, h, i]
        if is_causal:
            extra = np.where(keys <= position, extra, -np.inf)
        if heads.local_window_size > 0:
            extra = np.where(keys > position - heads.local_window_size, extra, -np.inf)
        if key_mask is not None:
            extra = np.where(key_mask[b], extra, -np.inf)
        seen = ~np.isneginf(extra)
        sink = None if head_sink is None else float(head_sink[h])
        g = h // (H // G)
        output[b, i, h] = attend_row(q[b, i, h], k[b, seen, g], v[b, seen, g], extra=extra[seen], heads=heads, sink=sink)
    return output.reshape(B, S, H * v.shape[3])
