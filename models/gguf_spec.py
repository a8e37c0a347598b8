"""The sizes and conventions that a GGUF file gives its decoder. What it says and the graph could not honour is refused."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import ModelError
from .gguf_file import GgufFile

_CONVERT = "import a model of one of these architectures, or export this one to ONNX from its own framework"

# architecture → (transformers' class, its model_type, q and k rows stored permuted for interleaved rotation)
ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "llama", True),
    "qwen2": ("Qwen2ForCausalLM", "qwen2", False),
    "qwen3": ("Qwen3ForCausalLM", "qwen3", False),
}

# Every `{architecture}.*` key that is used or checked below; another one could change the arithmetic, so it is refused.
_KNOWN = {
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size",
    "attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon", "attention.key_length", "attention.value_length",
    "attention.causal", "rope.freq_base", "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor", "rope.scaling.finetuned",
    "rope.scaling.original_context_length", "expert_count", "expert_used_count",
}


@dataclass(frozen=True)
class GgufSpec:
    """A llama-family decoder. Letters as in custom_ops/contract.py: L layers, H query heads, G KV heads, D head size, V vocabulary."""

    architecture: str
    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_size: int
    vocab: int
    max_context: int
    epsilon: float
    rope_base: float
    rope_factor: float
    permuted: bool


def read_spec(file: GgufFile) -> GgufSpec:
    """The spec of the decoder in `file`; ModelError, by name, for an architecture or a convention that is not supported."""
    name = file.get("general.architecture", str)
    if name not in ARCHITECTURES:
        raise ModelError(f"{file.path} holds the architecture {name!r}; {', '.join(ARCHITECTURES)} are supported", hint=_CONVERT)
    for key in file.metadata:
        if key.startswith(f"{name}.") and key.removeprefix(f"{name}.") not in _KNOWN:
            raise ModelError(f"{file.path} sets {key} = {file.metadata[key]!r:.60}, which the import does not know", hint=_CONVERT)
    if file.get(f"{name}.expert_count", int, 0):
        raise ModelError(f"{file.path} is a mixture of experts, which the import does not support", hint=_CONVERT)
    if not file.get(f"{name}.attention.causal", bool, True):
        raise ModelError(f"{file.path} is an encoder (attention.causal is false); decoders are supported", hint=_CONVERT)
    scaling = file.get(f"{name}.rope.scaling.type", str, "none")
    if scaling not in ("none", "linear"):
        raise ModelError(f"{file.path} scales its rotary embedding by {scaling!r}; none and linear are supported", hint=_CONVERT)

    def size(key: str, default: int | None = None) -> int:
        value = file.get(f"{name}.{key}", int, default)
        if not 0 < value < 1 << 31:
            raise ModelError(f"{file.path}: {name}.{key} is {value}", hint="the file is corrupt: download or convert it again")
        return value

    heads, hidden = size("attention.head_count"), size("embedding_length")
    head_size = size("attention.key_length", max(hidden // heads, 1))
    kv_heads = size("attention.head_count_kv", heads)
    if size("attention.value_length", head_size) != head_size or size("rope.dimension_count", head_size) != head_size or head_size % 2:
        raise ModelError(f"{file.path}: keys, values and rotary width must have one even size, {head_size}", hint=_CONVERT)
    if heads % kv_heads:
        raise ModelError(f"{file.path}: {heads} heads can't share {kv_heads} KV heads", hint="the file is corrupt: convert it again")
    return GgufSpec(
        architecture=name,
        layers=size("block_count"),
        hidden=hidden,
        inner=size("feed_forward_length"),
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        vocab=len(file.get("tokenizer.ggml.tokens", list)),
        max_context=size("context_length"),
        epsilon=file.get(f"{name}.attention.layer_norm_rms_epsilon", float),
        rope_base=file.get(f"{name}.rope.freq_base", float, 10000.0),
        rope_factor=file.get(f"{name}.rope.scaling.factor", float, 1.0) if scaling == "linear" else 1.0,
        permuted=ARCHITECTURES[name][2],
    )


def rotary_tables(spec: GgufSpec, factors: NDArray[np.float32] | None) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """cos and sin, float32 [max_context, D / 2], in the steps in which transformers computes them.

    Each step (frequency, angle, cosine) is rounded to float32. The functions are taken in float64 and rounded once, which comes closer to
    torch's than NumPy's own float32 functions. `factors` [D / 2] are llama 3's divisors of the frequencies (tensor rope_freqs.weight).
    """
    exponents = np.arange(0, spec.head_size, 2, dtype=np.float32) / np.float32(spec.head_size)
    frequencies = np.float32(1) / np.power(spec.rope_base, exponents.astype(np.float64)).astype(np.float32)
    frequencies = frequencies / (np.float32(spec.rope_factor) if factors is None else factors * np.float32(spec.rope_factor))
    angles = np.arange(spec.max_context, dtype=np.float32)[:, None] * frequencies[None, :]
    return np.cos(angles, dtype=np.float64).astype(np.float32), np.sin(angles, dtype=np.float64).astype(np.float32)
