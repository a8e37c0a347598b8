"""The int8 cache in NumPy: what a key, a value and a query become, and where their bytes lie in a block. For the reference and for tests.

One block of P slots, one KV head, is bytes (src/kv/int8_layout.h draws the same):

    key    [D/4][P][4]  uint8 = 128 + rounded key    then  float32 scale[groups][P]
    value  [P/4][E][4]  int8, slot·E + e at place (slot // 4, e, slot % 4)    then  float32 scale[P]

with D and E padded to multiples of 4. A key has one scale where D is a power of two, else one for each 32 of its elements.
"""

from __future__ import annotations

import numpy as np

Array = np.ndarray

GROUP = 32


def padded(size: int) -> int:
    return -(-size // 4) * 4


def rotates(D: int) -> bool:
    """Whether keys and queries are multiplied by a Hadamard matrix, which spreads outliers over the head."""
    return D & (D - 1) == 0


def groups(D: int) -> int:
    """Scales of one key."""
    return 1 if rotates(D) else -(-D // GROUP)


def hadamard(x: Array) -> Array:
    """x·H over the last axis for the ±1 matrix in Sylvester's order, in the input's type: stages of sums and differences, 1, 2, 4, … apart."""
    y = x.copy()
    step = 1
    while step < x.shape[-1]:
        pairs = y.reshape(*x.shape[:-1], -1, 2, step)
        a, b = pairs[..., 0, :].copy(), pairs[..., 1, :].copy()
        pairs[..., 0, :], pairs[..., 1, :] = a + b, a - b
        step *= 2
    return y


def quantize(x: Array) -> tuple[Array, Array]:
    """Rows of float32 as int8 and one scale each: largest magnitude/127, round to nearest even. Zero below 2^-120, scale NaN where not finite."""
    largest = np.abs(x).max(axis=-1, keepdims=True)
    finite, kept = np.isfinite(largest), np.isfinite(largest) & (largest >= np.float32(2.0**-120))
    safe = np.where(kept, largest, np.float32(1))
    q = np.where(kept, np.rint(np.where(kept, x, np.float32(0)) * (np.float32(127) / safe)), 0).astype(np.int8)
    scale = np.where(finite, np.where(kept, safe / np.float32(127), np.float32(0)), np.float32(np.nan))
    return q, scale[..., 0].astype(np.float32)


def quantize_key(k: Array, *, query: bool = False) -> tuple[Array, Array]:
    """Keys (…, D), or queries, as int8 (…, D) and scales (…, groups). The rotation of queries is divided by D."""
    D = k.shape[-1]
    if rotates(D):
        k = hadamard(k.astype(np.float32)) * np.float32(1 / D if query else 1)
        q, scale = quantize(k)
        return q, scale[..., None]
    parts = [quantize(k[..., d : d + GROUP].astype(np.float32)) for d in range(0, D, GROUP)]
    return np.concatenate([q for q, _ in parts], -1), np.stack([scale for _, scale in parts], -1)


def scores(q: Array, q_scale: Array, k: Array, k_scale: Array) -> Array:
    """What the products of a query (D) with keys (n, D) come to: exact integer sums by group, times both scales. Float64 (n)."""
    size = q.shape[-1] if q_scale.shape[-1] == 1 else GROUP
    starts = range(0, q.shape[-1], size)
    exact = np.stack([k[:, d : d + size].astype(np.int64) @ q[d : d + size].astype(np.int64) for d in starts], -1)
    return (exact * q_scale.astype(np.float64) * k_scale).sum(-1)


def _scale_view(block: Array, count: int) -> Array:
    return block.view(np.float32)[-count:]


def put_key(block: Array, slot: int, k: Array) -> None:
    """Writes one key (D) into a block's bytes (width, P) of one KV head."""
    D, P = k.shape[-1], block.shape[-1]
    q, scale = quantize_key(k)
    flat = block.reshape(-1)
    full = np.zeros(padded(D), np.int8)
    full[:D] = q
    flat[: padded(D) * P].reshape(-1, P, 4)[:, slot] = full.reshape(-1, 4).view(np.uint8) ^ 128
    _scale_view(flat, groups(D) * P).reshape(-1, P)[:, slot] = scale


def put_value(block: Array, slot: int, v: Array) -> None:
    """Writes one value (E) into a block's bytes (P, width) of one KV head."""
    E, P = v.shape[-1], block.shape[0]
    q, scale = quantize(v.astype(np.float32))
    flat = block.reshape(-1)
    full = np.zeros(padded(E), np.int8)
    full[:E] = q
    flat[: padded(E) * P].reshape(P // 4, -1, 4)[slot // 4, :, slot % 4] = full.view(np.uint8)
    _scale_view(flat, P)[slot] = scale


def unpack_keys(cache: Array, D: int) -> tuple[Array, Array]:
    """A whole key cache (N, G, width, P) as int8 (N, G, P, D) and scales (N, G, P, groups)."""
    N, G, _, P = cache.shape
    flat = cache.reshape(N, G, -1)
    quads = flat[..., : padded(D) * P].reshape(N, G, -1, P, 4) ^ 128
    scale = flat[..., padded(D) * P :].copy().view(np.float32).reshape(N, G, -1, P)
    return quads.view(np.int8).transpose(0, 1, 3, 2, 4).reshape(N, G, P, -1)[..., :D], scale.transpose(0, 1, 3, 2)


def unpack_values(cache: Array, E: int) -> tuple[Array, Array]:
    """A whole value cache (N, G, P, width) as int8 (N, G, P, E) and scales (N, G, P)."""
    N, G, P, _ = cache.shape
    flat = cache.reshape(N, G, -1)
    quads = flat[..., : padded(E) * P].reshape(N, G, P // 4, -1, 4)
    scale = flat[..., padded(E) * P :].copy().view(np.float32)
    return quads.view(np.int8).transpose(0, 1, 2, 4, 3).reshape(N, G, P, -1)[..., :E], scale
