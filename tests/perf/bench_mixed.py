"""Throughput of requests of mixed lengths beside the same tokens in a perfectly packed batch.

    python tests/perf/bench_mixed.py art/ [--sequences 32] [--prompt 128] [--generate 64] [--batch 16] [--rounds 3] [--json]

*Packed*: as many sequences, all of `--prompt` tokens and `--generate` more, in whole batches. *Mixed*: the same sums, of prompts and of
completions, in lengths from a quarter to seven quarters of those. Both are handed in at once with `policy="throughput"`, greedy, without text and
prefix cache, at most `--batch` in a step; rounds take turns. *Share* is tokens per second of mixed ÷ packed, from medians; the goal is 90 %.
"""

from __future__ import annotations

import argparse
import json
from statistics import median
from time import perf_counter

import numpy as np
import octavo


def spread(mean: int, count: int, rng: np.random.Generator) -> list[int]:
    """`count` lengths from mean/4 to 7·mean/4 whose sum is count·mean, in random order."""
    lengths = [mean + round(mean * 0.75 * (2 * i - count + 1) / (count - 1)) for i in range(count)]
    lengths[count // 2] += count * mean - sum(lengths)
    return [int(length) for length in rng.permutation(lengths)]


def seconds(model: octavo.Model, prompts: list[int], outputs: list[int], rng: np.random.Generator) -> float:
    V = model.engine.executor.vocab_size
    given = [rng.integers(100, V, length) for length in prompts]
    start = perf_counter()
    streams = [
        model.stream(ids, octavo.SamplingParams(max_tokens=count, temperature=0, ignore_eos=True)) for ids, count in zip(given, outputs)
    ]
    for stream in streams:
        for _ in stream:
            pass
    return perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact")
    for name, default in (("sequences", 32), ("prompt", 128), ("generate", 64), ("batch", 16), ("rounds", 3), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    options = octavo.RuntimeOptions(threads=args.threads, max_sequences=args.batch, prefix_cache=False, policy="throughput")
    total = args.sequences * (args.prompt + args.generate)
    times: dict[str, list[float]] = {"packed": [], "mixed": []}
    with octavo.load(args.artifact, options=options) as model:
        model.tokenizer = None
        rng = np.random.default_rng(1)
        for turn in range(args.rounds + 1):
            even = [args.prompt] * args.sequences, [args.generate] * args.sequences
            uneven = spread(args.prompt, args.sequences, rng), spread(args.generate, args.sequences, rng)
            assert all(sum(a) == sum(b) for a, b in zip(even, uneven))
            for name, (prompts, outputs) in (("packed", even), ("mixed", uneven)):
                taken = seconds(model, prompts, outputs, rng)
                if turn:    # the first warms up
                    times[name].append(taken)
    rates = {name: total / median(taken) for name, taken in times.items()}
    share = rates["mixed"] / rates["packed"]
    if args.json:
        figures = {f"{name}_tok_s": round(rate, 1) for name, rate in rates.items()}
        print(json.dumps({"bench": "mixed", "sequences": args.sequences, "batch": args.batch, **figures, "share": round(share, 3)}))
    else:
        print(f"{args.sequences} sequences, {total} tokens: packed {rates['packed']:,.0f} tokens/s, mixed {rates['mixed']:,.0f} = {share:.0%}")


if __name__ == "__main__":
    main()
