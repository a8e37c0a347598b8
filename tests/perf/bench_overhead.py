"""What a step takes beside the graph's own run: scheduling, inputs, sampling, handing out tokens.

    python tests/perf/bench_overhead.py art/ [--batches 1,16] [--context 128] [--steps 60] [--rounds 3] [--json]

Streams of as many random prompts, read by one thread, no text made. A step ends where the next begins; its parts are the session's run, the call
of the sampler, and all else. Medians over the steps of all rounds, in which the settings take turns. *Share* is what is not the run ÷ the step.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import octavo

SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "plain draw": {},
    "top-k": {"top_k": 50},
    "top-p": {"top_p": 0.9},
    "all": {"top_p": 0.9, "temperature": 0.8, "repetition_penalty": 1.1, "frequency_penalty": 0.2, "logprobs": 5},
}


class Clock:
    """Seconds spent in one function, call by call."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call
        self.seconds = 0.0

    def __call__(self, *args: Any) -> Any:
        start = perf_counter()
        try:
            return self._call(*args)
        finally:
            self.seconds += perf_counter() - start


class TimedSession:
    def __init__(self, session: Any) -> None:
        self.run_with_iobinding = Clock(session.run_with_iobinding)


def steps(model: octavo.Model, batch: int, context: int, count: int, params: octavo.SamplingParams) -> list[tuple[float, float, float]]:
    """Seconds of each step, of its run and of its sampling."""
    engine = model.engine
    feed, sampler = engine.executor._feed, engine._sampler
    session, choose = feed._session, sampler.choose
    run, sample = TimedSession(session), Clock(choose)
    rng = np.random.default_rng(batch)
    streams = [model.stream(rng.integers(100, engine.executor.vocab_size, context), params) for _ in range(batch)]
    times = []
    try:
        for stream in streams:
            next(stream)
        feed._session, sampler.choose = run, sample
        last = perf_counter()
        for _ in range(count):
            before = run.run_with_iobinding.seconds, sample.seconds
            for stream in streams:
                next(stream)
            now = perf_counter()
            times.append((now - last, run.run_with_iobinding.seconds - before[0], sample.seconds - before[1]))
            last = now
    finally:
        feed._session = session
        del sampler.choose
        for stream in streams:
            stream.close()
    return times[2:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact")
    parser.add_argument("--batches", default="1,16")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    cases = [(int(batch), name) for batch in args.batches.split(",") for name in SETTINGS]
    times: dict[tuple[int, str], list[tuple[float, float, float]]] = {case: [] for case in cases}
    with octavo.load(args.artifact, options=octavo.RuntimeOptions(threads=args.threads, prefix_cache=False, policy="throughput")) as model:
        model.tokenizer = None
        for turn in range(args.rounds + 1):
            for batch, name in cases:
                params = octavo.SamplingParams(max_tokens=args.steps + 100, ignore_eos=True, seed=turn, **SETTINGS[name])
                found = steps(model, batch, args.context, args.steps if turn else 5, params)
                if turn:    # the first warms up
                    times[batch, name] += found
    if not args.json:
        print(f"{'batch':>5} {'setting':12} {'step ms':>8} {'run ms':>8} {'sampling µs':>12} {'all else µs':>12} {'share':>7}")
    for (batch, name), found in times.items():
        step, run, sample = (1e6 * median(column) for column in zip(*found))
        if args.json:
            figures = {"step_us": round(step), "run_us": round(run), "sampling_us": round(sample, 1), "share": round(1 - run / step, 4)}
            print(json.dumps({"bench": "overhead", "batch": batch, "context": args.context, "setting": name, **figures}))
        else:
            print(f"{batch:5} {name:12} {step / 1e3:8.2f} {run / 1e3:8.2f} {sample:12.0f} {step - run - sample:12.0f} {1 - run / step:7.1%}")


if __name__ == "__main__":
    main()
