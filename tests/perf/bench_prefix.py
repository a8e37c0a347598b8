"""Time to first token of requests that begin with the same 1,000 tokens: the first computes them, the others find them.

    python tests/perf/bench_prefix.py art/ [--shared 1000] [--own 1] [--requests 8] [--rounds 3] [--json]

Each request has `--own` tokens after the shared ones, and each round a salt of its own, so that it begins with nothing cached. The model is warm
and otherwise idle; no text. *Ratio* is the median first ÷ the median later; the goal is 20. The first with as few own tokens pays 1,000 rows, a later
one what is left of the last block of 32 and its own.
"""

from __future__ import annotations

import argparse
import json
from statistics import median
from time import perf_counter

import numpy as np
import octavo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact")
    for name, default in (("shared", 1000), ("own", 1), ("requests", 8), ("rounds", 3), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    params = octavo.SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
    first: list[float] = []
    later: list[float] = []
    with octavo.load(args.artifact, options=octavo.RuntimeOptions(threads=args.threads)) as model:
        model.tokenizer = None
        rng = np.random.default_rng(0)
        for turn in range(args.rounds + 1):
            shared = rng.integers(100, model.engine.executor.vocab_size, args.shared)
            for number in range(args.requests):
                prompt = np.concatenate([shared, rng.integers(100, 1000, args.own)])
                start = perf_counter()
                with model.stream(prompt, params, salt=str(turn)) as stream:
                    next(stream)
                if turn:    # the first round warms up
                    (later if number else first).append(perf_counter() - start)
        hits = model.stats()["prefix_hits"]
    ratio = median(first) / median(later)
    if args.json:
        print(json.dumps({"bench": "prefix", "first_ms": round(1e3 * median(first), 2), "later_ms": round(1e3 * median(later), 2), "ratio": round(ratio, 1),
                          "hits": hits}))
    else:
        print(f"{args.shared} shared tokens: first {1e3 * median(first):.1f} ms, later {1e3 * median(later):.2f} ms, {ratio:.0f} times less; {hits} hits")


if __name__ == "__main__":
    main()
