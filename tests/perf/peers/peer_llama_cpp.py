"""llama.cpp through its C interface, on a GGUF file. Its flash attention and cache (fp16) are left at their defaults.

Prompts go in one sequence at a time; then every step decodes one token of each. The tokens are given, not sampled, which costs it nothing.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

import llama_cpp
import numpy as np
from peer import Run, clock, main

# Room for the largest workload: 16 sequences of 576 tokens. A prompt is read in batches of 2,048 tokens, computed 512 at a time.
CONTEXT, BATCH, MICRO_BATCH, SEQUENCES = 16_384, 2_048, 512, 32
_quiet = llama_cpp.llama_log_callback(lambda *_: None)


def open_context(path: str, threads: int) -> tuple[ctypes.c_void_p, ctypes.c_void_p]:
    llama_cpp.llama_log_set(_quiet, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = CONTEXT, BATCH, MICRO_BATCH
    params.n_threads = params.n_threads_batch = threads
    params.n_seq_max, params.kv_unified = SEQUENCES, True
    return model, llama_cpp.llama_init_from_model(model, params)


def decode(context: ctypes.c_void_p, tokens: Iterable[tuple[int, int, int, bool]]) -> float:
    """Seconds of one batch of (token, position, sequence, are its logits wanted)."""
    rows = list(tokens)
    batch = llama_cpp.llama_batch_init(len(rows), 0, 1)
    batch.n_tokens = len(rows)
    for at, (token, position, sequence, wanted) in enumerate(rows):
        batch.token[at], batch.pos[at], batch.logits[at] = int(token), int(position), int(wanted)
        batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
    start = clock()
    if llama_cpp.llama_decode(context, batch):
        raise RuntimeError("llama_decode failed")
    llama_cpp.llama_synchronize(context)
    seconds = clock() - start
    llama_cpp.llama_batch_free(batch)
    return seconds


def open_model(path: str, threads: int) -> Run:
    _, context = open_context(path, threads)
    memory = llama_cpp.llama_get_memory(context)

    def run(prompts: np.ndarray, generate: int) -> tuple[float, float]:
        llama_cpp.llama_memory_clear(memory, True)
        count, length = prompts.shape
        prefill_s = decode_s = 0.0
        for sequence, ids in enumerate(prompts):
            for first in range(0, length, BATCH):
                part = range(first, min(first + BATCH, length))
                prefill_s += decode(context, ((ids[at], at, sequence, at == length - 1) for at in part))
        for step in range(generate):
            decode_s += decode(context, ((prompts[s, step % length], length + step, s, True) for s in range(count)))
        return prefill_s, decode_s

    return run


if __name__ == "__main__":
    main("llama.cpp", open_model)
