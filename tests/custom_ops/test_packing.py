"""Packing: exact both ways, what was quantized elsewhere keeps its values, and unsound weights are refused by name."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from attention_run import same_bits
from octavo.custom_ops.contract import WeightFormat
from octavo.custom_ops.packing import QuantizedWeight, fused_multiply_add, pack, unpack
from octavo.errors import ModelError
from quant_cases import QUANT_CASES, QuantCase

Array = np.ndarray


@pytest.mark.parametrize("case", QUANT_CASES, ids=lambda c: c.name)
def test_unpack_gives_back_what_was_packed(case: QuantCase) -> None:
    weight, gated = case.weight(), case.gate != "none"
    fmt = weight.format(gated=gated)
    packed = pack(weight, gated=gated)
    assert packed.nbytes == fmt.nbytes and fmt.nbytes % 64 == 0
    back = unpack(packed, fmt)
    assert same_bits(back.q, weight.q) and back.zero_point == weight.zero_point
    assert (back.scales == weight.scales).all()
    assert weight.zero_points is None or (back.zero_points == weight.zero_points).all()
    assert weight.minimums is None or (back.minimums == weight.minimums).all()
    assert same_bits(back.dequantize(), weight.dequantize())


def test_the_layout_is_the_drawn_one() -> None:
    """One element at a time, as src/kernels/quant.h says: tile, line, byte and nibble of w[o][k]; scales and zero points by group, then output."""
    weight = QuantCase("drawn", K=128, M=40, zero="uint8").weight()
    fmt = weight.format()
    tiles = pack(weight).reshape(fmt.tiles, fmt.tile_bytes)
    assert (fmt.tiles, fmt.head_bytes, fmt.tile_bytes) == (3, 4 * 16 * 3, 4 * 16 * 3 + 64 * 16)
    for o, k in ((0, 0), (5, 3), (15, 4), (16, 9), (39, 127), (20, 70)):
        byte = int(tiles[o // 16, fmt.head_bytes + k // 8 * 64 + 4 * (o % 16) + k % 4])
        assert (byte & 15 if k % 8 < 4 else byte >> 4) == weight.q[o, k]
        scales = tiles[o // 16, : 4 * 16 * 2].view(np.float16)
        assert scales[k // 32 * 16 + o % 16] == weight.scales[o, k // 32]
        assert tiles[o // 16, 4 * 16 * 2 + k // 32 * 16 + o % 16] == weight.zero_points[o, k // 32]  # type: ignore[index]
    assert not tiles[2, fmt.head_bytes :].reshape(-1, 16, 4)[:, 8:].any()  # outputs 40 to 47


def test_a_gate_and_its_values_alternate() -> None:
    case = QuantCase("alternate", M=40, gate="silu")
    weight = case.weight()
    tiles = pack(weight, gated=True).reshape(6, -1)
    for part, first in ((0, 0), (1, 40)):
        half = QuantizedWeight(weight.q[first : first + 40], weight.scales[first : first + 40], 4, 32)
        assert same_bits(np.ascontiguousarray(tiles[part::2]).reshape(-1), pack(half))


def test_scales_are_fp16_only_where_that_is_exact() -> None:
    weight = QuantCase("exact", scale="float16").weight()
    assert replace(weight, scales=weight.scales.astype(np.float32)).scale_type == "float16"
    assert replace(weight, scales=weight.scales.astype(np.float32) + np.float32(1e-6)).scale_type == "float32"
    assert replace(weight, scales=np.full_like(weight.scales, 70000, np.float32)).scale_type == "float32"
    assert replace(weight, minimums=np.full(weight.scales.shape, 0.1, np.float32)).scale_type == "float32"


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_gguf_blocks_keep_their_values(kind: str) -> None:
    """Random blocks read by the gguf package, and by us through pack and unpack: the same floats."""
    gguf = pytest.importorskip("gguf")
    rng = np.random.default_rng(0)
    N, K = 40, 192
    blocks = N * K // 32
    d, m = (rng.standard_normal((blocks, 1)).astype(np.float16) for _ in range(2))
    low, high = rng.integers(0, 16, (2, blocks, 16), dtype=np.uint8)
    signed = rng.integers(-128, 128, (blocks, 32), dtype=np.int8)
    parts = {"Q4_0": (d, low | high << 4), "Q4_1": (d, m, low | high << 4), "Q8_0": (d, signed)}[kind]
    raw = np.concatenate([part.view(np.uint8) for part in parts], axis=1).reshape(N, -1)
    expected = gguf.dequantize(raw, getattr(gguf.GGMLQuantizationType, kind))
    q = (signed.view(np.uint8) ^ 128) if kind == "Q8_0" else np.concatenate([low, high], axis=1)
    weight = QuantizedWeight(
        q.reshape(N, K), d.reshape(N, -1), 8 if kind == "Q8_0" else 4, 32, minimums=m.reshape(N, -1) if kind == "Q4_1" else None
    )
    assert same_bits(unpack(pack(weight), weight.format()).dequantize(), expected)


def test_matmul_nbits_values_are_scale_times_difference() -> None:
    weight = QuantCase("nbits", zero="uint8", scale="float32").weight()
    expected = (weight.q.astype(np.int32).reshape(40, 6, 32) - weight.zero_points[:, :, None]).astype(np.float32) * weight.scales[:, :, None]  # type: ignore[index]
    assert same_bits(unpack(pack(weight), weight.format()).dequantize(), expected.reshape(40, 192))


def test_fused_multiply_add_rounds_once() -> None:
    """Against exact rationals, on numbers whose float64 sum falls on ties of float32."""
    from fractions import Fraction

    rng = np.random.default_rng(2)
    a, b = ((rng.integers(1 << 23, 1 << 24, 400).astype(np.float32) * np.float32(2.0**-23)) for _ in range(2))
    c = (a.astype(np.float64) * b).astype(np.float32) * np.float32(2.0**20) * rng.choice(np.float32([1, -1, 2.0**12, -(2.0**-30)]), 400)
    tie = np.float32([1 + 2.0**-12]), np.float32([1 + 2.0**-12]), np.float32([2.0**-60])  # a·b = 1 + 2^-11 + 2^-24: a tie that c decides
    a, b, c = (np.concatenate([x, t]) for x, t in zip((a, b, c), tie, strict=True))
    got = fused_multiply_add(a, b, c)
    for x, y, z, f in zip(a, b, c, got, strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        error = abs(Fraction(float(f)) - exact)
        beside = [abs(Fraction(float(np.nextafter(f, np.float32(side)))) - exact) for side in (np.inf, -np.inf)]
        assert error <= min(beside)
    assert got[-1] == np.float32(1 + 2.0**-11 + 2.0**-23)


_BAD = {
    "NaN": lambda w: replace(w, scales=np.where(np.arange(6) == 3, np.float16(np.nan), w.scales)),
    "infinite": lambda w: replace(w, minimums=np.full(w.scales.shape, np.inf, np.float32)),
    "beyond 4 bits": lambda w: replace(w, q=w.q + np.uint8(16)),
    "zero points reach": lambda w: replace(w, zero_points=np.full(w.scales.shape, 16, np.uint8)),
    "zero points have shape": lambda w: replace(w, zero_points=np.zeros((40, 1), np.uint8)),
    "both": lambda w: replace(w, zero_points=np.zeros(w.scales.shape, np.uint8), minimums=w.scales),
    "multiple of the group size": lambda w: replace(w, q=w.q[:, :190], group_size=32),
    "groups of 48": lambda w: replace(w, group_size=48),
    "scales are": lambda w: replace(w, scales=w.scales[:, :2]),
    "float64": lambda w: replace(w, scales=w.scales.astype(np.float64)),
    "quantized values are": lambda w: replace(w, q=w.q.astype(np.int8)),
}


@pytest.mark.parametrize("words", _BAD)
def test_an_unsound_weight_is_refused_by_name(words: str) -> None:
    weight = QuantCase("sound").weight()
    pack(weight, name="model.layers.3.mlp.down_proj")
    with pytest.raises(ModelError, match=rf"model\.layers\.3\.mlp\.down_proj.*{words}"):
        pack(_BAD[words](weight), name="model.layers.3.mlp.down_proj")


def test_unpack_refuses_other_sizes() -> None:
    fmt = WeightFormat(64, 16)
    with pytest.raises(ModelError, match="bytes"):
        unpack(np.zeros(fmt.nbytes + 64, np.uint8), fmt)
