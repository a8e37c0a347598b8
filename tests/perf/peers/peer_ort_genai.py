"""onnxruntime-genai, on the folder that its builder writes: one generator over all sequences, greedy."""

from __future__ import annotations

import json

import numpy as np
import onnxruntime_genai as genai
from peer import Run, clock, main


def open_model(path: str, threads: int) -> Run:
    config = genai.Config(path)
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = genai.Model(config)

    def run(prompts: np.ndarray, generate: int) -> tuple[float, float]:
        count, length = prompts.shape
        params = genai.GeneratorParams(model)
        # One token comes with the prompt; min_length keeps an end token from ending it.
        params.set_search_options(batch_size=count, min_length=length + generate + 1, max_length=length + generate + 2, do_sample=False)
        generator = genai.Generator(model, params)
        start = clock()
        generator.append_tokens(prompts.astype(np.int32))
        generator.generate_next_token()
        first = clock()
        for _ in range(generate):
            generator.generate_next_token()
        return first - start, clock() - first

    return run


if __name__ == "__main__":
    main("ort-genai", open_model)
