"""Logits of llama.cpp for `quality.py`: python peer_llama_cpp_logits.py MODEL.gguf. A line of token ids as JSON in, float32 [tokens, V] out, raw."""

from __future__ import annotations

import json
import sys

import llama_cpp
import numpy as np
from peer_llama_cpp import BATCH, decode, open_context


def main() -> None:
    model, context = open_context(sys.argv[1], 2)
    vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    for line in sys.stdin:
        ids = json.loads(line)
        assert len(ids) <= BATCH, f"windows of {BATCH} tokens at most"
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        decode(context, ((token, at, 0, True) for at, token in enumerate(ids)))
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), shape=(len(ids), vocab_size))
        sys.stdout.buffer.write(np.uint64(logits.nbytes).tobytes() + logits.astype(np.float32).tobytes())
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
