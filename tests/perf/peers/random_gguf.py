"""A Llama of random weights as GGUF, every matrix in Q4_0, so that llama.cpp and octavo run the very same file: for sizes that no package ships.

    python tests/perf/peers/random_gguf.py 1b random-1b.gguf        # 0.5b: the sizes of Qwen2.5-0.5B; 1b: those of Llama-3.2-1B
    octavo import random-1b.gguf -o plain/ && octavo compile plain/model.onnx -o art/ --weights stored --kv-cache int8
    python tests/perf/peers/compare.py --octavo art/ --engines llama.cpp --llama random-1b.gguf --only decode-512

Seeded. A block's scale makes a row of K weights about 1/√K wide, with a random sign, since 4-bit values are not centred on 0; sums then stay near 1
through all layers. The vocabulary is the 256 bytes and fillers.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

BLOCK, BLOCK_BYTES = 32, 18
# Of the values −8 … 7, all as likely: their root mean square.
SPREAD = float(np.sqrt(np.mean(np.arange(-8, 8) ** 2)))


@dataclass(frozen=True)
class Size:
    """Letters as everywhere: K hidden, M inner, L layers, H query heads, G KV heads, D head size, V vocabulary."""

    K: int
    M: int
    L: int
    H: int
    G: int
    D: int
    V: int
    rope_base: float


SIZES = {
    "tiny": Size(K=64, M=96, L=2, H=4, G=2, D=16, V=320, rope_base=1e4),
    "0.5b": Size(K=896, M=4864, L=24, H=14, G=2, D=64, V=151_936, rope_base=1e6),
    "1b": Size(K=2048, M=8192, L=16, H=32, G=8, D=64, V=128_256, rope_base=5e5),
}
CONTEXT = 8192


def blocks(rng: np.random.Generator, outer: int, inner: int) -> np.ndarray:
    """A matrix in Q4_0 as the file holds it: uint8 [outer, inner / 32 · 18], a float16 scale and 16 bytes of nibbles a block."""
    count = outer * inner // BLOCK
    data = rng.integers(0, 256, (count, BLOCK_BYTES), dtype=np.uint8)
    scales = rng.uniform(0.5, 1.5, count) * rng.choice((-1.0, 1.0), count) / (SPREAD * np.sqrt(inner))
    data[:, :2] = scales.astype(np.float16).view(np.uint8).reshape(count, 2)
    return data.reshape(outer, -1)


def byte_letters() -> list[str]:
    """The 256 characters that stand for bytes in a byte-level vocabulary: printable ones for themselves, the others from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def write(size: Size, path: Path, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(size.L)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(size.K)
    writer.add_feed_forward_length(size.M)
    writer.add_head_count(size.H)
    writer.add_head_count_kv(size.G)
    writer.add_key_length(size.D)
    writer.add_value_length(size.D)
    writer.add_rope_dimension_count(size.D)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(size.rope_base)
    # One merge, since a list of none can't be written.
    words = ["<end>", *byte_letters(), "ab"]
    words += [f"<filler {i}>" for i in range(size.V - len(words))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(words)
    writer.add_token_types([3, *[1] * (size.V - 1)])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)

    def matrix(name: str, outer: int, inner: int) -> None:
        writer.add_tensor(name, blocks(rng, outer, inner), raw_dtype=Type.Q4_0)

    def norm(name: str) -> None:
        writer.add_tensor(name, rng.normal(1, 0.1, size.K).astype(np.float32))

    matrix("token_embd.weight", size.V, size.K)
    norm("output_norm.weight")
    for layer in range(size.L):
        norm(f"blk.{layer}.attn_norm.weight")
        norm(f"blk.{layer}.ffn_norm.weight")
        for name, outer, inner in (
            ("attn_q", size.H * size.D, size.K), ("attn_k", size.G * size.D, size.K), ("attn_v", size.G * size.D, size.K),
            ("attn_output", size.K, size.H * size.D), ("ffn_gate", size.M, size.K), ("ffn_up", size.M, size.K), ("ffn_down", size.K, size.M),
        ):
            matrix(f"blk.{layer}.{name}.weight", outer, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("path", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write(SIZES[args.size], args.path, args.seed)


if __name__ == "__main__":
    main()
