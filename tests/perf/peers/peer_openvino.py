"""OpenVINO GenAI's continuous batching, on the folder that optimum-cli writes: greedy, prefix caching off, its int8 cache by default."""

from __future__ import annotations

import numpy as np
import openvino
import openvino_genai as genai
from peer import Run, clock, main

# Gigabytes of cache; tokens of a step, enough for a whole prompt of the workloads; sequences at once.
CACHE_GB, STEP_TOKENS, SEQUENCES = 2, 2_048, 64


def open_model(path: str, threads: int) -> Run:
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size, scheduler.max_num_batched_tokens, scheduler.max_num_seqs = CACHE_GB, STEP_TOKENS, SEQUENCES
    scheduler.enable_prefix_caching = False
    pipeline = genai.ContinuousBatchingPipeline(path, scheduler, "CPU", {"INFERENCE_NUM_THREADS": threads})

    def run(prompts: np.ndarray, generate: int) -> tuple[float, float]:
        params = genai.GenerationConfig()
        params.min_new_tokens = params.max_new_tokens = generate + 1
        params.do_sample, params.ignore_eos = False, True
        requests = [pipeline.add_request(at, openvino.Tensor(ids[None].astype(np.int64)), params) for at, ids in enumerate(prompts)]
        waiting = set(range(len(requests)))
        start, first = clock(), 0.0
        while pipeline.has_non_finished_requests():
            pipeline.step()
            answered = {at for at, request in enumerate(requests) if request.can_read() and request.read()}
            if waiting and not (waiting := waiting - answered):
                first = clock()
        return first - start, clock() - first

    return run


if __name__ == "__main__":
    main("openvino", open_model)
