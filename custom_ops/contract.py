"""What each op takes and gives: the one place where the compiler, the runtime, the reference and the kernels meet.

Dimension letters, the same in Python, C++ and tests:

    B sequences            T tokens of a step        S tokens of one sequence (query side of a stateless op)
    H query heads          G KV heads                D head size (V-side: E)
    L layers               N blocks of the pool      P block_size (slots of a block)
    M block-table columns  R logit rows              V vocabulary        C rotary table rows (positions)

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

DType = Literal["float32", "float16", "int32", "int64", "bool"]


@dataclass(frozen=True)
class CacheFormat:
    """How keys and values are stored. `key_shape`/`value_shape` give one layer's cache tensors."""

    name: Literal["fp32", "fp16"]
    dtype: DType
    itemsize: int

    @staticmethod
    def key_shape(N: int, G: int, D: int, P: int) -> tuple[int, int, int, int]:
        """(N, G, D, P): transposed inside the block, so that vector lanes run over P keys and the reduction over D stays in order."""
        return (N, G, D, P)

    @staticmethod
    def value_shape(N: int, G: int, E: int, P: int) -> tuple[int, int, int, int]:
        """(N, G, P, E): lanes run over E outputs, the reduction over keys stays in order."""
        return (N, G, P, E)

    def bytes_per_token(self, G: int, D: int, E: int) -> int:
        """Bytes of one token's keys and values in one layer."""
        return G * (D + E) * self.itemsize


CACHE_FORMATS = {f.name: f for f in (CacheFormat("fp32", "float32", 4), CacheFormat("fp16", "float16", 2))}


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
_CACHE: tuple[DType, ...] = ("float32", "float16")
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
        Port("query", _F32, "(T, H·D)", "queries of this step's tokens, sequence after sequence"),
        Port("key", _F32, "(T, G·D)", "keys of this step's tokens"),
        Port("value", _F32, "(T, G·E)", "values of this step's tokens"),
        Port("key_cache", _CACHE, "(N, G, D, P)", "updated in place"),
        Port("value_cache", _CACHE, "(N, G, P, E)", "updated in place, same type as key_cache"),
        Port("cumulative_sequence_length", _I32, "(B+1)", "sequence b owns rows [c[b], c[b+1]); c[0] = 0, c[B] = T; empty ranges are fine"),
        Port("past_seqlens", _I32, "(B)", "tokens of each sequence cached before this step"),
        Port("block_table", _I32, "(B, M)", "block of each P positions, −1 where unmapped; a visible unmapped position is an error"),
        Port("cos_cache", _F32, "(C, r/2)", "cosines by position; r ≤ D is the rotated width, the first r of each head", optional=True),
        Port("sin_cache", _F32, "(C, r/2)", "sines by position", optional=True),
        Port("slot_mapping", _I32, "(T)", "block·P + slot where each token's K and V go; −1 does not write"),
        Port("head_sink", _F32, "(H)", "a logit per head that joins the softmax and carries no value", optional=True),
        Port("q_norm_weight", _F32, "RESERVED", "absent", optional=True),
        Port("k_norm_weight", _F32, "RESERVED", "absent", optional=True),
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
    outputs=(Port("output", _F32, "(T, H·E)", "attention of every row"),),
    attributes=(
        *_HEADS,
        Attribute("rotary_interleaved", "int", 0, "1: pairs (2i, 2i+1); 0: pairs (i, i + r/2)"),
    ),
)
"""Append this step's keys and values to the paged cache, then attend.

A row's position is `past_seqlens[b] + depth`, depth 0 for a row whose parent is −1, else its parent's depth + 1. It sees the cached
positions [0, past), its ancestors in this step, and itself, less what a window hides. Where `cos_cache` is given, q and k are rotated by
position first; keys are cached rotated. Keys and values are always read as stored (rounded to the cache's type), this step's own too. Rows
whose slot is −1 are not written: their key and value are read from the slot of their position, which must hold them already.
All keys of a row are reduced in order of position, in chunks of CHUNK, as if each ancestor lay in the slot of its position.
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

OPS = {op.name: op for op in (PAGED_ATTENTION, FLASH_ATTENTION)}
