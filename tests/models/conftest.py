"""Small seeded GGUF files, written with the gguf package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as Type

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_SIZE, LAYERS, CONTEXT = 64, 96, 4, 2, 16, 2, 64

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = ("h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or", "Ġ Ġ", "i n", "Ġ t", "1 2", "Ċ Ċ", "Ġ h", "Ġh e")


def byte_alphabet() -> list[str]:
    """GPT-2's 256 printable stand-ins for bytes, by byte."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256))
    return [chr(b) if b in plain else chr(256 + next(others)) for b in range(256)]


def byte_level_vocabulary() -> dict[str, Any]:
    tokens = [*SPECIAL, "<think>", *byte_alphabet(), *(merge.replace(" ", "") for merge in MERGES)]
    kinds = [3, 3, 3, 4, *[1] * (len(tokens) - 4)]
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds, "tokenizer.ggml.merges": list(MERGES),
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2, "tokenizer.ggml.unknown_token_id": 0, "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}",
    }


def sentencepiece_vocabulary() -> dict[str, Any]:
    letters = list("▁helowrd12")
    pieces = [*letters, "he", "ll", "hell", "hello", "▁hello", "▁w", "or", "▁wor", "ld", "▁world", "12", "▁▁"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    return {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(pieces)],
        "tokenizer.ggml.scores": [0.0] * 259 + [float(-i) for i in range(len(pieces))],
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0,
    }


def tensors_of(architecture: str, vocab: int, tied: bool, bias: bool, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Random weights under GGUF's names, float32."""

    def matrix(outer: int, inner: int) -> np.ndarray:
        return rng.normal(0, inner**-0.5, (outer, inner)).astype(np.float32)

    def vector(size: int) -> np.ndarray:
        return rng.normal(1, 0.2, size).astype(np.float32)

    tensors = {"token_embd.weight": rng.normal(0, 1, (vocab, HIDDEN)).astype(np.float32), "output_norm.weight": vector(HIDDEN)}
    if not tied:
        tensors["output.weight"] = matrix(vocab, HIDDEN)
    queries, keys = HEADS * HEAD_SIZE, KV_HEADS * HEAD_SIZE
    for i in range(LAYERS):
        block = f"blk.{i}"
        shapes = {
            "attn_q": (queries, HIDDEN), "attn_k": (keys, HIDDEN), "attn_v": (keys, HIDDEN), "attn_output": (HIDDEN, queries),
            "ffn_gate": (INNER, HIDDEN), "ffn_up": (INNER, HIDDEN), "ffn_down": (HIDDEN, INNER),
        }
        tensors |= {f"{block}.{name}.weight": matrix(*shape) for name, shape in shapes.items()}
        tensors |= {f"{block}.{name}.weight": vector(HIDDEN) for name in ("attn_norm", "ffn_norm")}
        if bias:
            tensors |= {f"{block}.{name}.bias": vector(shapes[name][0]) for name in ("attn_q", "attn_k", "attn_v")}
        if architecture == "qwen3":
            tensors |= {f"{block}.{name}.weight": vector(HEAD_SIZE) for name in ("attn_q_norm", "attn_k_norm")}
    return tensors


def write_gguf(
    path: Path, *, architecture: str = "llama", types: str = "Q4_1", embedding: str = "Q8_0", tied: bool = True, bias: bool = False,
    vocabulary: dict[str, Any] | None = None, metadata: dict[str, Any] | None = None, tensors: dict[str, np.ndarray | None] | None = None,
    seed: int = 0,
) -> Path:
    """Writes a decoder with matrices of `types`; `metadata` and `tensors` override what it would hold (None: leave out)."""
    words = vocabulary or byte_level_vocabulary()
    pairs = {
        f"{architecture}.block_count": LAYERS, f"{architecture}.context_length": CONTEXT, f"{architecture}.embedding_length": HIDDEN,
        f"{architecture}.feed_forward_length": INNER, f"{architecture}.attention.head_count": HEADS,
        f"{architecture}.attention.head_count_kv": KV_HEADS, f"{architecture}.attention.key_length": HEAD_SIZE,
        f"{architecture}.attention.value_length": HEAD_SIZE, f"{architecture}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{architecture}.rope.freq_base": 10000.0, f"{architecture}.rope.dimension_count": HEAD_SIZE, **words, **(metadata or {}),
    }
    weights = tensors_of(architecture, len(words["tokenizer.ggml.tokens"]), tied, bias, np.random.default_rng(seed)) | (tensors or {})
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in pairs.items():
        if value is not None and key != "general.architecture":
            _add(writer, key, value)
    for name, values in weights.items():
        if values is None:
            continue
        kind = Type[embedding if name == "token_embd.weight" else types] if values.ndim == 2 else Type.F32
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
    add[type(value)](key, value)


@pytest.fixture(scope="session")
def gguf_writer() -> Callable[..., Path]:
    """`gguf_writer(path, **options)` is write_gguf, for fixtures that outlive a test."""
    return write_gguf


@pytest.fixture
def make_gguf(tmp_path: Path) -> Callable[..., Path]:
    """`make_gguf(**options of write_gguf)`: the path of a new file `model.gguf` in tmp_path."""
    return lambda **options: write_gguf(tmp_path / "model.gguf", **options)


@pytest.fixture(scope="session")
def sentencepiece_words() -> dict[str, Any]:
    return sentencepiece_vocabulary()
