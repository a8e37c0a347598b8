"""The gaps between a stream's tokens while another's long prompt is read, and how fast that prompt is read beside them.

    python tests/perf/gaps.py art/ [--policies auto,latency,throughput] [--streams 4,16] [--prompt 2048] [--rounds 3] [--json]

Streams of 256 random tokens decode, first alone (*quiet*), then while a prompt of 2,048 arrives, and again; greedy, one thread that reads all, no
text, no prefix cache. A gap is the time between two tokens of one stream. *Stretch* is the p99 of the gaps beside the prompt ÷ the p99 of the
quiet ones of the same run; *prompt* is the prompt's time to its first token alone ÷ beside the streams. *Bound* is what the longest gap may be:
the time of a step that is full (`max_step_tokens`) at that prompt's end, alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from time import perf_counter

import numpy as np
import octavo
from octavo.runtime.stream import PieceStream

GOALS = {"auto": "≤ 2.5, ≥ 60 %", "latency": "≤ 1.5, ≥ 30 %", "throughput": "none"}
QUIET_STEPS, CONTEXT = 80, 256


class Streams:
    """Streams that decode, and the times between their tokens."""

    def __init__(self, model: octavo.Model, count: int, rng: np.random.Generator) -> None:
        self._engine = model.engine
        params = octavo.SamplingParams(max_tokens=1700, temperature=0, ignore_eos=True)
        V = model.engine.executor.vocab_size
        self._streams = [model.stream(rng.integers(100, V, CONTEXT), params) for _ in range(count)]
        self._last = [0.0] * count
        while not all(stream.ready for stream in self._streams):
            self.step()
        self.gaps()

    def step(self) -> None:
        self._engine.step_unless(lambda: False)

    def gaps(self) -> list[float]:
        """Seconds since the token before, of each stream that has new ones."""
        now, found = perf_counter(), []
        for at, stream in enumerate(self._streams):
            if stream.ready:
                while stream.ready:
                    next(stream)
                found.append(now - self._last[at])
                self._last[at] = now
        return found

    def alone(self, steps: int) -> list[float]:
        found = []
        for _ in range(steps):
            self.step()
            found += self.gaps()
        return found

    def beside(self, stream: PieceStream) -> tuple[list[float], float]:
        """Gaps until `stream` has its first token, and the seconds that took."""
        start, found = perf_counter(), []
        while not stream.ready:
            self.step()
            found += self.gaps()
        return found, perf_counter() - start

    def close(self) -> None:
        for stream in self._streams:
            stream.close()


def prompt_stream(model: octavo.Model, length: int, rng: np.random.Generator) -> PieceStream:
    return model.stream(rng.integers(100, model.engine.executor.vocab_size, length), octavo.SamplingParams(max_tokens=1, temperature=0, ignore_eos=True))


def alone(model: octavo.Model, length: int, rng: np.random.Generator) -> tuple[float, float]:
    """Seconds of a prompt that is read alone, and of its longest step."""
    stream, start, longest = prompt_stream(model, length, rng), perf_counter(), 0.0
    while not stream.ready:
        before = perf_counter()
        model.engine.step_unless(lambda: False)
        longest = max(longest, perf_counter() - before)
    seconds = perf_counter() - start
    stream.close()
    return seconds, longest


def percentile(values: Sequence[float], share: float) -> float:
    return float(np.percentile(values, 100 * share))


def measure(model: octavo.Model, count: int, length: int, rounds: int) -> dict[str, float]:
    rng = np.random.default_rng(count)
    quiet: list[float] = []
    beside: list[float] = []
    together: list[float] = []
    single: list[float] = []
    bound = 0.0
    for turn in range(rounds + 1):
        seconds, longest = alone(model, length, rng)
        streams = Streams(model, count, rng)
        calm = streams.alone(QUIET_STEPS)
        prompt = prompt_stream(model, length, rng)
        gaps, taken = streams.beside(prompt)
        calm += streams.alone(QUIET_STEPS)
        prompt.close()
        streams.close()
        if turn:    # the first warms up
            quiet, beside, bound = quiet + calm, beside + gaps, max(bound, longest)
            together.append(taken)
            single.append(seconds)
    speed = float(np.median(single) / np.median(together))
    return {
        "quiet_p50_ms": 1e3 * percentile(quiet, 0.5), "quiet_p99_ms": 1e3 * percentile(quiet, 0.99), "p50_ms": 1e3 * percentile(beside, 0.5),
        "p99_ms": 1e3 * percentile(beside, 0.99), "longest_ms": 1e3 * max(beside), "bound_ms": 1e3 * bound,
        "stretch": percentile(beside, 0.99) / percentile(quiet, 0.99), "stretch_p50": percentile(beside, 0.5) / percentile(quiet, 0.5), "prompt": speed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact")
    parser.add_argument("--policies", default="auto,latency,throughput")
    parser.add_argument("--streams", default="4,16")
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if not args.json:
        print(f"{'policy':11} {'streams':>7} {'quiet p50':>10} {'p99 ms':>8} {'beside p50':>11} {'p99 ms':>8} {'longest':>8} {'bound':>7} "
              f"{'stretch':>8} {'prompt':>7}  goals")
    for policy in args.policies.split(","):
        with octavo.load(args.artifact, options=octavo.RuntimeOptions(threads=args.threads, prefix_cache=False, policy=policy)) as model:
            model.tokenizer = None
            for count in map(int, args.streams.split(",")):
                found = measure(model, count, args.prompt, args.rounds)
                if args.json:
                    figures = {name: round(value, 4) for name, value in found.items()}
                    print(json.dumps({"bench": "gaps", "policy": policy, "streams": count, **figures}), flush=True)
                    continue
                print(
                    f"{policy:11} {count:7} {found['quiet_p50_ms']:10.2f} {found['quiet_p99_ms']:8.2f} {found['p50_ms']:11.2f} {found['p99_ms']:8.2f} "
                    f"{found['longest_ms']:8.1f} {found['bound_ms']:7.1f} {found['stretch']:8.2f} {found['prompt']:7.0%}  {GOALS[policy]}", flush=True,
                )


if __name__ == "__main__":
    main()
