"""What each op takes and gives: the one place where the compiler, the runtime, the reference and the kernels meet.

Dimension letters, the same in Python, C++ and tests:

    B sequences            T tokens of a step        S tokens of one sequence (query side of a stateless op)
    H query heads          G KV heads                D head size (V-side: E)
    L layers               N blocks of the pool      P block_size (slots of a block)
    M block-table columns  R logit rows              V vocabulary        C rotary table rows (positions)
    K, M inner and outer size of a linear (of its weight's outputs, M are seen)

New to this? A *block* is P token slots of one sequence's keys and values. A *block table* lists a sequence's blocks in order, so
position p of sequence b lives in slot `p % P` of block `block_table[b, p // P]`. *Paged* attention reads keys and values
through that table, so sequences grow, fork and share memory without copying.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np

DOMAIN = "ai.octavo"
OPSET = 1

# Keys are visited in chunks of this many positions, aligned to absolute position 0, with one ordered softmax merge. A constant of
# the op and not of a kernel: the bits of a row depend on it, and on nothing else that a batch, a block size or a thread count could change.
CHUNK = 256

# Names the layout inside a cache block; an artifact records it and `load` refuses another.
CACHE_LAYOUT = "k-dp-v-pd.1"

# Names the layout of packed weights (src/kernels/quant.h draws it, packing.py writes it); an artifact records it and `load` refuses another.
WEIGHT_LAYOUT = "o16-k8.1"
TILE_OUTPUTS = 16

DType = Literal["float32", "float16", "uint8", "int32", "int64", "bool"]


@dataclass(frozen=True)
class CacheFormat:
    """How keys and values are stored. `key_shape`/`value_shape` give one layer's cache tensors.

    fp32 and fp16 blocks hold plain elements. int8 blocks are bytes, scales included (int8_cache.py): each token's key and value of a head is
    rounded to int8 by its own largest magnitude.
    """

    name: Literal["fp32", "fp16", "int8"]
    dtype: DType
    itemsize: int

    def key_width(self, D: int) -> int:
        """Elements of one key of one head: D; for int8, D rounded up to a multiple of 4, and the scales."""
        scales = 1 if D & (D - 1) == 0 else -(-D // 32)
        return -(-D // 4) * 4 + 4 * scales if self.name == "int8" else D

    def value_width(self, E: int) -> int:
        """Elements of one value of one head: E; for int8, E rounded up to a multiple of 4, and the scale."""
        return -(-E // 4) * 4 + 4 if self.name == "int8" else E

    def key_shape(self, N: int, G: int, D: int, P: int) -> tuple[int, int, int, int]:
        """(N, G, D, P): transposed inside the block, so that vector lanes run over P keys and the reduction over D stays in order."""
        return (N, G, self.key_width(D), P)

    def value_shape(self, N: int, G: int, E: int, P: int) -> tuple[int, int, int, int]:
        """(N, G, P, E): lanes run over E outputs, the reduction over keys stays in order."""
        return (N, G, P, self.value_width(E))

    def bytes_per_token(self, G: int, D: int, E: int) -> int:
        """Bytes of one token's keys and values in one layer."""
        return G * (self.key_width(D) + self.value_width(E)) * self.itemsize


CACHE_FORMATS = {f.name: f for f in (CacheFormat("fp32", "float32", 4), CacheFormat("fp16", "float16", 2), CacheFormat("int8", "uint8", 1))}


def pack_key(tokens: np.ndarray) -> np.ndarray:
    """Keys of one block, token by token (P, G, D), as a view in the cache's layout (G, D, P)."""
    return tokens.transpose(1, 2, 0)


def unpack_key(block: np.ndarray) -> np.ndarray:
    """One block of a key cache (G, D, P), as a view token by token (P, G, D)."""
    return block.transpose(2, 0, 1)


def pack_value(tokens: np.ndarray) -> np.ndarray:
    """Values of one block, token by token (P, G, E), as a view in the cache's layout (G, P, E)."""
    return tokens.transpose(1, 0, 2)


def unpack_value(block: np.ndarray) -> np.ndarray:
    """One block of a value cache (G, P, E), as a view token by token (P, G, E)."""
    return block.transpose(1, 0, 2)


# A block lies inside one chunk (so CHUNK % P == 0) and fills whole vectors of 16 lanes.
BLOCK_SIZES = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Port:
    """One input or output of an op: its name, element types it takes, shape in dimension letters, and what it means."""

    name: str
    dtypes: tuple[DType, ...]
    shape: str
    meaning: str
    optional: bool = False


@dataclass(frozen=True)
class Attribute:
    """One attribute of an op. `default` is None where it must be given."""

    name: str
    type: Literal["int", "float"]
    default: int | float | None
    meaning: str


@dataclass(frozen=True)
class OpContract:
    """The whole interface of one op. Inputs, outputs and attributes not named here do not exist: kernels and lowerings refuse them."""

    name: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    attributes: tuple[Attribute, ...]
    domain: str = DOMAIN

    def input_index(self, name: str) -> int:
        return next(i for i, port in enumerate(self.inputs) if port.name == name)


_F32: tuple[DType, ...] = ("float32",)
_CACHE: tuple[DType, ...] = ("float32", "float16", "uint8")
_I32: tuple[DType, ...] = ("int32",)

_HEADS = (
    Attribute("num_heads", "int", None, "H"),
    Attribute("kv_num_heads", "int", None, "G; H % G == 0, query head h reads KV head h // (H // G)"),
    Attribute("scale", "float", 0.0, "factor on q·k; 0 means 1/√D"),
    Attribute("softcap", "float", 0.0, "c·tanh(scores/c) before masking; 0 means none"),
    Attribute("local_window_size", "int", -1, "w ≥ 1: position p sees keys p−w+1 … p; −1 means all of the past"),
)

# Inputs 0 to 16 keep the names and places of com.microsoft::PagedAttention, so that a graph can move to its CUDA kernel; the ones listed as
# RESERVED have no meaning here yet and must be absent. Octavo's own start at 17.
PAGED_ATTENTION = OpContract(
    name="PagedAttention",
    inputs=(
        Port("query", _F32, "(T, H·D)", "queries of this step's tokens, sequence after sequence; (T, (H+2·G)·D): query, key and value of each"),
        Port("key", _F32, "(T, G·D)", "keys of this step's tokens; absent where query holds them", optional=True),
        Port("value", _F32, "(T, G·E)", "values of this step's tokens; absent where query holds them (E = D)", optional=True),
        Port("key_cache", _CACHE, "(N, G, D, P)", "updated in place; of an int8 cache (uint8) the widths are those of CacheFormat"),
        Port("value_cache", _CACHE, "(N, G, P, E)", "updated in place, same type as key_cache"),
        Port("cumulative_sequence_length", _I32, "(B+1)", "sequence b owns rows [c[b], c[b+1]); c[0] = 0, c[B] = T; empty ranges are fine"),
        Port("past_seqlens", _I32, "(B)", "tokens of each sequence cached before this step"),
        Port("block_table", _I32, "(B, M)", "block of each P positions, −1 where unmapped; a visible unmapped position is an error"),
        Port("cos_cache", _F32, "(C, r/2)", "cosines by position; r ≤ D is the rotated width, the first r of each head", optional=True),
        Port("sin_cache", _F32, "(C, r/2)", "sines by position", optional=True),
        Port("slot_mapping", _I32, "(T)", "block·P + slot where each token's K and V go; −1 does not write"),
        Port("head_sink", _F32, "(H)", "a logit per head that joins the softmax and carries no value", optional=True),
        Port("q_norm_weight", _F32, "(D)", "RMSNorm of every query head before rotation: x/√(mean(x²) + qk_norm_epsilon)·weight", optional=True),
        Port("k_norm_weight", _F32, "(D)", "the same for key heads; both or none", optional=True),
        Port("k_scale", _F32, "RESERVED", "absent", optional=True),
        Port("v_scale", _F32, "RESERVED", "absent", optional=True),
        Port("attention_metadata", _I32, "RESERVED", "absent", optional=True),
        Port(
            "parent",
            _I32,
            "(T)",
            "step-wide row of a token's parent, −1 = the last cached token; a prompt is the chain t−1, a draft tree any forest",
        ),
        Port("alibi_slopes", _F32, "(H)", "adds slope·(key position − query position) to the scaled score", optional=True),
    ),
    outputs=(Port("output", _F32, "(T, H·E)", "attention of every row, in the query's leading dimensions"),),
    attributes=(
        *_HEADS,
        Attribute("rotary_interleaved", "int", 0, "1: pairs (2i, 2i+1); 0: pairs (i, i + r/2)"),
        Attribute("chunk_size", "int", -1, "c ≥ 1: position p sees floor(p / c)·c … p; −1 means no chunks"),
        Attribute("qk_norm_epsilon", "float", 1e-6, "of the RMSNorm of queries and keys"),
    ),
)
"""Append this step's keys and values to the paged cache, then attend.

In the place of T of query, key and value may stand several dimensions (four in all), whose product is T: (1, T, H·D). The output has the query's.
A row's position is `past_seqlens[b] + depth`, depth 0 for a row whose parent is −1, else its parent's depth + 1. It sees the cached
positions [0, past), its ancestors in this step, and itself, less what a window or the start of its chunk hides. Where `cos_cache` is given,
q and k are rotated by position first; keys are cached rotated. Keys and values are always read as stored (rounded to the cache's type), this step's own too.
Rows whose slot is −1 are not written: their key and value are read from the slot of their position, which must hold them already.
All keys of a row are reduced in order of position, in chunks of CHUNK, as if each ancestor lay in the slot of its position.

An int8 cache has its own arithmetic, the same in prefill and decode. After rotation, and where D is a power of two, q and k are multiplied by
a Hadamard matrix (which cancels in q·k); both are rounded to int8, with one scale a head, or one for each 32 elements where D is no power of
two. Products of q and k are exact integers. In each chunk, probability·value scale is rounded to 255 steps of the largest one that the row
sees there, products with the int8 values are exact integers again, and the sum of the probabilities is not rounded.
"""

FLASH_ATTENTION = OpContract(
    name="FlashAttention",
    inputs=(
        Port("query", _F32, "(B, S, H·D)", ""),
        Port("key", _F32, "(B, T, G·D)", "T keys"),
        Port("value", _F32, "(B, T, G·E)", ""),
        Port("attention_bias", ("float32", "bool"), "(B|1, H|1, S|1, T)", "added to the scores, or (bool) False hides", optional=True),
        Port("key_mask", ("bool",), "(B, T)", "False hides a key from every row (padding)", optional=True),
        Port("head_sink", _F32, "(H)", "a logit per head that joins the softmax and carries no value", optional=True),
        Port("alibi_slopes", _F32, "(H)", "adds slope·(key index − query index), indices aligned as for is_causal", optional=True),
    ),
    outputs=(Port("output", _F32, "(B, S, H·E)", "a row that sees no key is 0"),),
    attributes=(
        *_HEADS,
        Attribute("is_causal", "int", 0, "1: row i sees keys j ≤ i + (T − S), aligned at the bottom right"),
    ),
)
"""Stateless tiled attention: softmax(softcap(scale·q·kᵀ) + slopes + bias) · v, in the same chunks and merge order as PagedAttention.

A key whose score is −inf is hidden, as one that a mask hides. A window needs is_causal = 1: exporters do not agree on its meaning without.
"""

# Values of the attributes `zero_point` and `gate` are places in these; `scale_type` is the ONNX element type.
ZERO_POINTS = ("none", "uint8", "float")
GATES = ("none", "silu", "gelu", "gelu_tanh")
SCALE_TYPES = {"float32": 1, "float16": 10}

ZeroPoint = Literal["none", "uint8", "float"]
ScaleType = Literal["float32", "float16"]


@dataclass(frozen=True)
class WeightFormat:
    """How a weight of M outputs (2·M with a gate) over K inputs is packed. Its value is, each rounded once to float32,

        zero_point "none"   scale·(q − 2^(bits − 1))
        zero_point "uint8"  scale·(q − zero point)
        zero_point "float"  scale·q + minimum        (fused)

    with one scale (and zero point or minimum) per output and group of `group_size` inputs. Minimums have the scales' type.
    """

    K: int
    M: int
    bits: Literal[4, 8] = 4
    group_size: Literal[32, 64, 128] = 32
    zero_point: ZeroPoint = "none"
    scale_type: ScaleType = "float16"
    gated: bool = False

    def refusal(self) -> str | None:
        """Why no weight can be packed so, or None."""
        if self.bits not in (4, 8) or self.group_size not in (32, 64, 128):
            return f"{self.bits} bits in groups of {self.group_size}: 4 or 8 bits in groups of 32, 64 or 128 are known"
        if self.K < 1 or self.K % self.group_size:
            return f"{self.K} inputs are not a multiple of the group size {self.group_size}"
        return None if self.M >= 1 else "no outputs"

    @property
    def groups(self) -> int:
        return self.K // self.group_size

    @property
    def outputs(self) -> int:
        """Outputs of the weight itself."""
        return 2 * self.M if self.gated else self.M

    @property
    def tiles(self) -> int:
        """Tiles of TILE_OUTPUTS outputs. Gate and values fill tiles of their own, which alternate."""
        return -(-self.M // TILE_OUTPUTS) * (2 if self.gated else 1)

    @property
    def head_bytes(self) -> int:
        """Scales and zero points or minimums of a tile, padded to 64 bytes."""
        number = 2 if self.scale_type == "float16" else 4
        zero = {"none": 0, "uint8": 1, "float": number}[self.zero_point]
        return -(-self.groups * TILE_OUTPUTS * (number + zero) // 64) * 64

    @property
    def tile_bytes(self) -> int:
        return self.head_bytes + self.K * self.bits // 8 * TILE_OUTPUTS

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight: the length of the op's `weight` input."""
        return self.tiles * self.tile_bytes

    def attributes(self) -> dict[str, int]:
        """The attributes of a node that reads this weight."""
        return {
            "K": self.K,
            "M": self.M,
            "bits": self.bits,
            "group_size": self.group_size,
            "zero_point": ZERO_POINTS.index(self.zero_point),
            "scale_type": SCALE_TYPES[self.scale_type],
        }


_U8: tuple[DType, ...] = ("uint8",)
_WEIGHT = (
    Attribute("K", "int", None, "inner size, a multiple of group_size"),
    Attribute("M", "int", None, "outputs"),
    Attribute("bits", "int", 4, "4 or 8"),
    Attribute("group_size", "int", 32, "32, 64 or 128 inputs share a scale"),
    Attribute("zero_point", "int", 0, "0 none, 1 uint8, 2 float: see WeightFormat"),
    Attribute("scale_type", "int", 10, "1 float32, 10 float16"),
)

# A LoRA group will be added behind `residual`: its deltas join the product before the bias.
QUANT_LINEAR = OpContract(
    name="QuantLinear",
    inputs=(
        Port("input", _F32, "(..., K)", "one row per token"),
        Port("weight", _U8, "(bytes)", "a constant packed as WeightFormat says, read in place"),
        Port("norm_weight", _F32, "(K)", "RMSNorm of the row first: x/√(mean(x²) + norm_epsilon)·norm_weight", optional=True),
        Port("skip", _F32, "(..., K)", "added to the input before the norm", optional=True),
        Port("bias", _F32, "(M)", "added to the product; (2·M) with a gate: the gate's, then the values'", optional=True),
        Port("residual", _F32, "(..., M)", "added at the end", optional=True),
        Port("activation_scale", _F32, "(K / group_size)", "what int8 activations are rounded with, instead of scales of each row's own", optional=True),
    ),
    outputs=(
        Port("output", _F32, "(..., M)", "the product, finished"),
        Port("sum", _F32, "(..., K)", "input + skip", optional=True),
    ),
    attributes=(
        *_WEIGHT,
        Attribute("activation_bits", "int", 8, "8: rows are rounded to int8 by groups; 32: float32"),
        Attribute("gate", "int", 0, "0 none; 1 silu, 2 gelu, 3 gelu_tanh: the weight has 2·M outputs and y = act(gate)·values"),
        Attribute("norm_epsilon", "float", 1e-5, "of the RMSNorm"),
    ),
)
"""y = epilogue(prologue(input) · W).

With int8 activations a row's group of x has the scale s = max|x|/127 and q = round to nearest even of x·(127/max|x|); below 2^-120 the
group is zero, and with an infinity or a NaN in it every output of the row is NaN. With `activation_scale` (finite, at least 2^-120) s is the
group's scale given there, and q = round to nearest even of x·(1/s), no less than −127 and no more than 127. Per group one exact integer sum
n = Σ(w − zero point)·q, then f = fma(float(n)·s, scale, f); with minimums n = Σw·q, and f = fma(float(Σq)·s, minimum, f) follows; groups
ascend from f = 0. With float activations f = fma(x, w, f), inputs ascending. The sum of squares runs in 16 lanes joined by one tree. So a
row's bits depend on nothing but the row: not on others, nor on how work is cut, nor on the instruction set.
"""

QUANT_EMBEDDING = OpContract(
    name="QuantEmbedding",
    inputs=(
        Port("ids", ("int64",), "(...)", "rows of the table, 0 to M − 1"),
        Port("weight", _U8, "(bytes)", "the packed weight, which a QuantLinear may share"),
    ),
    outputs=(Port("output", _F32, "(..., K)", "the values of WeightFormat, exactly"),),
    attributes=_WEIGHT,
)
"""Rows out of a packed weight: a tied embedding needs no table of its own."""

OPS = {op.name: op for op in (PAGED_ATTENTION, FLASH_ATTENTION, QUANT_LINEAR, QUANT_EMBEDDING)}
