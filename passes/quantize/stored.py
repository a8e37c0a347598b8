"""What a graph already stores quantized, read exactly: the same q, scales and zero points, not floats quantized again.

    DequantizeLinear(q, scale, zero point)                                blocked along K, per output, or per tensor; 2, 4 or 8 bits, signed or not
    Reshape(Add(Reshape(DequantizeLinear), minimum))                      as the GGUF import spells Q4_1
    com.microsoft::MatMulNBits(x, B, scales, zero points)                 2, 4 or 8 bits; groups of 16 are too small for the op

`find_stored` looks before constants are folded and keys what it finds by the name that the folded
value keeps. It reads the structure only; whether the numbers mean what the graph means is asked of the graph's own floats (`same_values`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast, get_args

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ...custom_ops.packing import QuantizedWeight
from ..normalize import is_standard
from ..outcome import Refusal
from .groups import Bits, GroupSize, scheme_of

Integers = NDArray[np.int16]
_WIDTHS = {"INT2": 2, "UINT2": 2, "INT4": 4, "UINT4": 4, "INT8": 8, "UINT8": 8}


@dataclass(frozen=True)
class Stored:
    """A matrix that a graph stores quantized, as it lies there. Constants are read when asked for.

    q           integers of `shape`, cut into blocks of `block` along `axis`
    scale       one number a block: `shape` with `axis` divided by `block`; or [size of `channel`]; or one number
    zero_point  integers like `scale`, or None for 0
    minimum     like `scale` in any shape of as many elements, or None
    """

    name: str
    q: ir.TensorProtocol
    scale: ir.TensorProtocol
    zero_point: ir.TensorProtocol | None = None
    minimum: ir.TensorProtocol | None = None
    negative: bool = False
    axis: int | None = None
    block: int = 0
    channel: int | None = None

    @property
    def bits(self) -> int:
        return _WIDTHS[self.q.dtype.name]

    def load(self, inner: int) -> QuantizedWeight | Refusal:
        """The matrix as [M, K], where K is dimension `inner` of it, or why it can't be had so."""
        M, K = (int(self.q.shape[1 - inner]), int(self.q.shape[inner]))
        if self.axis is not None and self.axis != inner:
            return Refusal("its blocks run over outputs", self.name, f"blocks along dimension {self.axis}, inputs are dimension {inner}")
        if self.channel == inner and K > 1:
            return Refusal("each input has a scale of its own", self.name)
        block = self.block or K

        def few(tensor: ir.TensorProtocol | None, dtype: Any) -> NDArray[Any] | None:
            if tensor is None:
                return None
            numbers = tensor.numpy().astype(dtype)
            if self.axis is None:  # per output, or one number for all
                return np.broadcast_to(numbers.reshape(-1, 1), (M, 1))
            return numbers.reshape(-1, M).T if inner == 0 else numbers.reshape(M, -1)

        q = self.q.numpy().astype(np.int16)
        scale, minimum = few(self.scale, np.float32), few(self.minimum, np.float32)
        assert scale is not None
        if minimum is not None and self.negative:
            minimum = -minimum
        signed = self.q.dtype.name.startswith("INT")
        zero = few(self.zero_point, np.int16)
        return matrix(q.T if inner == 0 else q, scale, np.zeros_like(scale, np.int16) if zero is None else zero, minimum, self.bits, block, signed, self.name)


def matrix(
    q: Integers, scale: NDArray[np.float32], zero: Integers, minimum: NDArray[np.float32] | None, bits: int, block: int, signed: bool, name: str,
) -> QuantizedWeight | Refusal:
    """Integers [M, K] in blocks, with scales and zero points [M, blocks], as a matrix of unsigned levels in 4 or 8 bits. Values are the same."""
    K = q.shape[1]
    wide = cast(Bits, 8 if bits == 8 else 4)
    size = next((size for size in sorted(get_args(GroupSize), reverse=True) if block % size == 0 and K % size == 0), None)
    if size is None:
        return Refusal(f"blocks of {block} over {K} inputs are not made of groups of 32", name)
    if not np.isfinite(scale).all() or (minimum is not None and not np.isfinite(minimum).all()):
        return Refusal("its scales are not finite", name)
    shift = 1 << (wide - 1) if signed else 0
    middle = None if minimum is not None else _one_value(zero)
    if middle is not None and int(q.min(initial=0)) + (1 << (wide - 1)) - middle >= 0 and int(q.max(initial=0)) + (1 << (wide - 1)) - middle < 1 << wide:
        shift = (1 << (wide - 1)) - middle  # one zero point for all is the middle of symmetric levels, if all levels fit
    zero_points = None if middle is not None and middle + shift == 1 << (wide - 1) else (zero + shift)
    if minimum is not None:
        if zero.any() or signed:
            return Refusal("a zero point and a minimum", name)
        zero_points = None
    blocks = -(-K // block)
    # Blocks are cut into groups first: the last block may be a part of one.
    times = np.repeat(np.arange(blocks), block // size)[: K // size]
    return QuantizedWeight(
        np.ascontiguousarray(q + shift).astype(np.uint8), scale[:, times], wide, size,
        None if zero_points is None else zero_points[:, times].astype(np.uint8), None if minimum is None else minimum[:, times],
    )  # fmt: skip


def _one_value(zero: Integers) -> int | None:
    first = int(zero.flat[0])
    return first if (zero == first).all() else None


def same_values(weight: QuantizedWeight, floats: NDArray[np.float32]) -> bool:
    """Whether a quantized matrix means these floats [M, K] bit for bit (0 may have either sign)."""
    return bool(np.array_equal(weight.dequantize(), floats))


# ---- reading the graph


def find_stored(model: ir.Model) -> dict[str, Stored]:
    """The quantized matrices behind the values of a normalized graph, by the value's name."""
    found: dict[str, Stored] = {}
    for node in model.graph:
        stored = _read(node.outputs[0]) if is_standard(node, "DequantizeLinear", "Reshape") else None
        if stored is not None:
            found[stored.name] = stored
    return found


def _read(value: ir.Value) -> Stored | None:
    node = value.producer()
    if node is None or not is_standard(node, "DequantizeLinear", "Reshape"):
        return None
    return _dequantized(node, value) if node.op_type == "DequantizeLinear" else _shifted(node, value)


def _dequantized(node: ir.Node, value: ir.Value) -> Stored | None:
    q, scale, zero = (_constant(_operand(node, i)) for i in range(3))
    if q is None or scale is None or len(q.shape) != 2 or q.dtype.name not in _WIDTHS or (_operand(node, 2) is not None and zero is None):
        return None
    axis, block, rank = node.attributes.get_int("axis", 1) % 2, node.attributes.get_int("block_size", 0), len(scale.shape)
    if block:
        return Stored(str(value.name), q, scale, zero, axis=axis, block=block) if rank == 2 else None
    return Stored(str(value.name), q, scale, zero, channel=axis if rank == 1 and scale.size > 1 else None)


def _shifted(node: ir.Node, value: ir.Value) -> Stored | None:
    """Reshape of blocks, to each of which a minimum was added, to the shape that they had before."""
    added = _producer(_operand(node, 0))
    if not _is(added, "Add", "Sub"):
        return None
    sides = [_operand(added, 0), _operand(added, 1)]
    if _is(added, "Add") and _constant(sides[0]) is not None:
        sides.reverse()
    minimum, apart = _constant(sides[1]), _producer(sides[0])
    target = _constant(_operand(node, 1))
    if minimum is None or target is None or not _is(apart, "Reshape"):
        return None
    blocks, inner = _constant(_operand(apart, 1)), _operand(apart, 0)
    stored = None if inner is None else _read(inner)
    if blocks is None or stored is None or stored.axis is None or stored.minimum is not None:
        return None
    shape, few = [int(size) for size in stored.q.shape], [int(size) for size in stored.scale.shape]
    cut = [*shape[: stored.axis], few[stored.axis], stored.block, *shape[stored.axis + 1 :]]
    one = [*shape[: stored.axis], few[stored.axis], 1, *shape[stored.axis + 1 :]]
    if target.numpy().tolist() != shape or blocks.numpy().tolist() != cut or [int(size) for size in minimum.shape] != one:
        return None
    return Stored(str(value.name), stored.q, stored.scale, stored.zero_point, minimum, _is(added, "Sub"), stored.axis, stored.block)


def read_nbits(node: ir.Node) -> QuantizedWeight | Refusal:
    """The weight of a com.microsoft::MatMulNBits, or why the op can't have it."""
    name = str(_name(node))
    K, N, bits, block = (node.attributes.get_int(key) for key in ("K", "N", "bits", "block_size"))
    packed, scales, zeros = (_constant(_operand(node, i)) for i in (1, 2, 3))
    if packed is None or scales is None or (_operand(node, 3) is not None and zeros is None):
        return Refusal("its weight is no constant", name)
    order = _constant(_operand(node, 4))
    if _operand(node, 4) is not None and (order is None or not np.array_equal(order.numpy().reshape(-1), np.arange(K) // block)):
        return Refusal("its inputs are reordered (g_idx)", name)
    if bits not in (2, 4, 8):
        return Refusal(f"{bits} bits", name, "2, 4 and 8 are known")
    blocks = -(-K // block)
    q = _unpacked(packed.numpy().reshape(N, blocks * block * bits // 8), bits)[:, :K].astype(np.int16)
    scale = scales.numpy().reshape(N, blocks).astype(np.float32)
    if zeros is None or zeros.dtype == ir.DataType.UINT8:
        zero = np.full((N, blocks), 1 << (bits - 1), np.int16)
        if zeros is not None:
            zero = _unpacked(zeros.numpy().reshape(N, -1), bits)[:, :blocks].astype(np.int16)
        return matrix(q, scale, zero, None, bits, block, False, name)
    return _float_zeros(q, scale, zeros.numpy().reshape(N, blocks).astype(np.float32), bits, block, name)


def _float_zeros(q: Integers, scale: NDArray[np.float32], zero: NDArray[np.float32], bits: int, block: int, name: str) -> QuantizedWeight | Refusal:
    """Zero points that are floats, onnxruntime's arithmetic being scale·q − scale·zero with each product and the difference rounded."""
    minimum = -(scale * zero)
    levels = zero.astype(np.int16)
    if ((levels == zero) & (levels >= 0) & (levels < 1 << bits)).all():
        found = matrix(q, scale, levels, None, bits, block, False, name)
    else:
        found = matrix(q, scale, np.zeros_like(levels), minimum, bits, block, False, name)
    if isinstance(found, Refusal):
        return found
    columns = np.arange(q.shape[1]) // block
    floats = q.astype(np.float32) * scale[:, columns] + minimum[:, columns]
    return found if same_values(found, floats) else Refusal("float zero points, and onnxruntime's arithmetic rounds otherwise", name, str(scheme_of(found)))


def _unpacked(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """The fields of each byte, lowest first."""
    if bits == 8:
        return packed
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return (packed[:, :, None] >> shifts & np.uint8((1 << bits) - 1)).reshape(len(packed), -1)


def _is(node: ir.Node | None, *op_types: str) -> bool:
    return node is not None and is_standard(node, *op_types)


def _operand(node: ir.Node | None, place: int) -> ir.Value | None:
    return node.inputs[place] if node is not None and place < len(node.inputs) else None


def _producer(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else value.producer()


def _constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    return None if value is None or value.is_graph_input() else value.const_value


def _name(node: ir.Node) -> str:
    weight = _operand(node, 1)
    return str(weight.name if weight is not None else node.name)
