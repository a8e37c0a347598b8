"""The part of a runner that does not depend on the engine: arguments, prompts, the clock, and one line of JSON for each workload.

    python peer_ENGINE.py MODEL [--workloads FILE] [--threads N] [--only NAME]

A runner hands `main` a function that opens the model. What it returns takes prompts [sequences, tokens] and a number of tokens to go on with, and
gives the seconds until every sequence has its first token, and the seconds of the rest. Runs in the engine's own environment, without octavo.
"""

from __future__ import annotations

import argparse
import json
import re
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Run = Callable[[np.ndarray, int], tuple[float, float]]
clock = time.perf_counter
WARM_UP = {"name": "warm-up", "prompt": 16, "generate": 4, "sequences": 1}


def prompts_of(load: dict[str, Any]) -> np.ndarray:
    """The ids that `octavo.runtime.workloads` draws for a vocabulary of 40,000 or more; a test holds the two together."""
    return np.random.default_rng(zlib.crc32(load["name"].encode())).integers(100, 40_000, (load["sequences"], load["prompt"]))


def peak_mib() -> int:
    return round(int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024)


def main(engine: str, open_model: Callable[[str, int], Run]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--workloads", default=Path(__file__).with_name("workloads.json"), type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", action="append")
    args = parser.parse_args()
    loads = [load for load in json.loads(args.workloads.read_text()) if not args.only or load["name"] in args.only]
    start = clock()
    run = open_model(args.model, args.threads)
    load_s = clock() - start
    run(prompts_of(WARM_UP), WARM_UP["generate"])
    for load in loads:
        prefill_s, decode_s = run(prompts_of(load), load["generate"])
        tokens = load["sequences"] * load["prompt"], load["sequences"] * load["generate"]
        line = {
            "engine": engine, "workload": load["name"], "prefill_tok_s": round(tokens[0] / prefill_s, 1),
            "decode_tok_s": round(tokens[1] / decode_s, 1), "load_s": round(load_s, 3), "peak_rss_mb": peak_mib(),
        }
        print(json.dumps(line), flush=True)
