"""GGUF tensors as ONNX values: the blocks that ONNX can spell stay quantized, bit for bit; the rest becomes float32.

    Q4_0   DequantizeLinear(INT4 q, d)                 d·q
    Q4_1   DequantizeLinear(UINT4 q, d) + m            d·q + m, m broadcast over its block through a Reshape
    Q8_0   DequantizeLinear(INT8 q, d)                 d·q

with d and m the file's float16 values in float32, 32 values a block. Each operation rounds as gguf.quants.dequantize does, in its order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import ModelError
from .gguf_file import GgufTensor

BLOCK = 32
# ggml type → ONNX element type of the quantized values
QUANTIZED = {"Q4_0": "INT4", "Q4_1": "UINT4", "Q8_0": "INT8"}


@dataclass(frozen=True)
class Blocks:
    """A quantized matrix. `values` [M, K] (one a byte), `scales` and `minimums` float32 [M, K / 32]; no minimums but with Q4_1."""

    values: NDArray[np.int8] | NDArray[np.uint8]
    scales: NDArray[np.float32]
    minimums: NDArray[np.float32] | None


def split_blocks(tensor: GgufTensor) -> Blocks:
    """The parts of a tensor whose type is in QUANTIZED."""
    rows = tensor.data.shape[0]
    header = 4 if tensor.type == "Q4_1" else 2
    blocks = tensor.data.reshape(rows, tensor.shape[-1] // BLOCK, -1)
    halves = np.ascontiguousarray(blocks[..., :header]).view(np.float16).astype(np.float32)
    stored = blocks[..., header:]
    values: NDArray[np.int8] | NDArray[np.uint8]
    if tensor.type == "Q8_0":
        values = stored.view(np.int8)
    else:
        # The low nibbles of a block's 16 bytes are its first 16 values, the high nibbles its last.
        nibbles = np.concatenate([stored & 0x0F, stored >> 4], axis=-1)
        values = nibbles if tensor.type == "Q4_1" else nibbles.astype(np.int8) - np.int8(8)
    return Blocks(values.reshape(rows, -1), halves[..., 0], halves[..., 1] if tensor.type == "Q4_1" else None)


def pack_nibbles(values: NDArray[np.int8] | NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Four-bit values, one a byte, in ONNX's packing: the even elements in the low nibbles."""
    flat = values.reshape(-1).view(np.uint8) & np.uint8(0x0F)
    if flat.size % 2:
        flat = np.append(flat, np.uint8(0))
    return np.asarray(flat[0::2] | flat[1::2] << 4, dtype=np.uint8)


def check_type(tensor: GgufTensor) -> None:
    """Raises ModelError for a type that gguf.quants can't dequantize; tries it on one row."""
    try:
        dequantize(GgufTensor(tensor.name, tensor.type, (1, tensor.shape[-1]), tensor.data[:1]))
    except NotImplementedError:
        message = f"tensor {tensor.name!r} has type {tensor.type}, which can't be dequantized"
        raise ModelError(message, hint="convert the model to F16, Q8_0, Q4_0, Q4_1 or a K-quant") from None


def dequantize(tensor: GgufTensor) -> NDArray[np.float32]:
    """The tensor as float32 in its shape, as gguf.quants.dequantize has it."""
    from gguf import quants
    from gguf.constants import GGMLQuantizationType

    floats = quants.dequantize(np.ascontiguousarray(tensor.data), GGMLQuantizationType[tensor.type])
    return np.asarray(floats, dtype=np.float32).reshape(tensor.shape)


def half_split_rows(heads: int, size: int) -> NDArray[np.intp]:
    """Row order that undoes the converter's permutation of q and k: it stores rotary pairs (i, i + D/2) of a head side by side."""
    return np.arange(heads * size).reshape(heads, size // 2, 2).swapaxes(1, 2).reshape(-1)
