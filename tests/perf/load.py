"""Serving under load: Poisson arrivals at 80 % of the capacity measured first, for minutes, with everything that must hold watched throughout.

    python tests/perf/load.py art/ [--minutes 10] [--policy auto] [--json]      (--minutes 2 while developing)

A thread for each request, at most 64 sequences in a step. Prompts of 16 to 1,024 random tokens (a quarter begin alike), completions of 8 to 192,
greedy or drawn; one in eight is cancelled on its way, by closing its stream, or by dropping it. Every ten seconds a prompt of 2,048 comes in.
*Capacity* is requests per second with 64 at a time, long prompts among them, over a sixth of the minutes. Printed: gaps between a stream's
tokens, beside a long prompt and not; the longest against the longest step and a step that is full; blocks (`free + cached + used == total` at
each look, ten a second, and all invariants once a second); resident memory over time, with what malloc holds though it was freed; cancels
in steps; sequences and tokens of the largest step; appends of 16 threads per step.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import threading
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter, sleep
from typing import Any

import numpy as np
import octavo
from numpy.typing import NDArray
from octavo.runtime.paged import PagedExecutor
from octavo.runtime.stream import PieceStream

MAX_SEQUENCES, LONG, LONG_EVERY = 64, 2048, 10.0


@dataclass
class Watch:
    """What was seen, by all threads: it only grows, and by little, for memory is one of the things watched."""

    gaps: array[float] = field(default_factory=lambda: array("d"))      # when, seconds, when, seconds …
    long: list[tuple[float, float]] = field(default_factory=list)       # from, to: a long prompt being read
    cancels: list[int] = field(default_factory=list)                    # steps from the wish to its end
    memory: array[float] = field(default_factory=lambda: array("d"))    # when, MB: resident, freed but held, these figures; when …
    steps: array[float] = field(default_factory=lambda: array("d"))     # sequences, tokens, seconds, sequences …
    finished: int = 0
    refused: int = 0
    looks: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def own_mb(self) -> float:
        return 8e-6 * (len(self.gaps) + len(self.steps) + len(self.memory))

    def over(self, execute: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """`execute`, watched."""
        def watched(plan: Any) -> Any:
            start = perf_counter()
            result = execute(plan)
            self.steps.extend((len(plan.slices), plan.num_tokens, perf_counter() - start))
            return result
        return watched


def resident_mb() -> float:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


class _MallInfo(ctypes.Structure):
    """glibc's `struct mallinfo2`, summed over its arenas; `fordblks` are the bytes of free chunks."""

    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
    )]


def held_mb() -> float:
    """MB that were freed and that malloc keeps for later: an arena for each of several threads has its own. NaN where the C library doesn't tell."""
    call = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if call is None:
        return float("nan")
    call.restype = _MallInfo
    return float(call().fordblks) / 1e6


def touch_pool(executor: Any) -> None:
    """Writes every page of the caches, which the system gives at the first write: what grows after that is something else."""
    if isinstance(executor, PagedExecutor):
        for cache in (*executor._store.keys, *executor._store.values):
            cache.fill(0)


def monitor(model: octavo.Model, watch: Watch, stop: threading.Event) -> None:
    while not stop.wait(0.1):
        stats = model.stats()
        watch.looks += 1
        if stats["blocks_free"] + stats["blocks_cached"] + stats["blocks_used"] != stats["blocks_total"]:
            watch.wrong.append(f"blocks: {stats}")
        if watch.looks % 10 == 0:
            watch.memory.extend((perf_counter(), resident_mb(), held_mb(), watch.own_mb))
            try:
                with model.engine.turn:
                    model.engine.check()
            except AssertionError as error:
                watch.wrong.append(str(error))


def one_request(model: octavo.Model, watch: Watch, seed: int, shared: list[int], *, long: bool = False) -> None:
    rng = random.Random(seed)
    vocab = model.engine.executor.vocab_size
    length = LONG if long else int(2 ** rng.uniform(4, 10))
    prompt = [rng.randrange(100, vocab) for _ in range(length)]
    if not long and rng.random() < 0.25:
        prompt = (shared + prompt)[: max(length, 64)]
    drawn: dict[str, Any] = rng.choice([{"temperature": 0}, {"top_p": 0.9}, {"top_k": 50, "repetition_penalty": 1.1}])
    count = rng.randint(8, 192)
    cancel_at = rng.randrange(count) if rng.random() < 0.125 and not long else -1
    began = perf_counter()
    try:
        stream = model.stream(prompt, octavo.SamplingParams(max_tokens=16 if long else count, ignore_eos=True, seed=seed, **drawn))
    except octavo.OctavoError:
        watch.refused += 1
        return
    last = 0.0
    for index, piece in enumerate(stream):
        now = perf_counter()
        if last:
            watch.gaps.extend((now, now - last))
        elif long:
            watch.long.append((began, now))
        last = now
        if piece.error:
            watch.wrong.append(piece.error)
        if index == cancel_at:
            cancel(model, watch, stream, wait=rng.random() < 0.5)
            break
    watch.finished += 1


def cancel(model: octavo.Model, watch: Watch, stream: PieceStream, *, wait: bool) -> None:
    engine = model.engine
    asked = engine.counters["steps"]
    if wait:
        stream.close()
        watch.cancels.append(engine.counters["steps"] - asked)
    else:
        stream.abandon()
        engine.drop(lambda: watch.cancels.append(engine.counters["steps"] - asked))     # runs after the cancel


def run(model: octavo.Model, watch: Watch, seconds: float, *, rate: float | None, seed: int) -> float:
    """Requests for `seconds`: Poisson at `rate` a second, or None: as many at a time as may run. Returns how many ended a second.

    Both have the long prompts in them. This thread sleeps where it can: what it takes of the interpreter is not the engine's.
    """
    rng, threads, start = random.Random(seed), list[threading.Thread](), perf_counter()
    shared = [rng.randrange(100, model.engine.executor.vocab_size) for _ in range(256)]
    before, due, next_long = watch.finished, start, start + LONG_EVERY / 2

    def begin(number: int, *, long: bool = False) -> None:
        thread = threading.Thread(target=one_request, args=(model, watch, seed * 1_000_000 + number, shared), kwargs={"long": long})
        thread.start()
        threads.append(thread)

    number = 0
    while (now := perf_counter()) < start + seconds:
        if rate is None or len(threads) > 4 * MAX_SEQUENCES:
            threads = [thread for thread in threads if thread.is_alive()]
        if now >= next_long:
            next_long += LONG_EVERY
            begin(number := number + 1, long=True)
        if (rate is None and len(threads) < MAX_SEQUENCES) or (rate is not None and now >= due):
            if rate is not None:
                due += rng.expovariate(rate)
            begin(number := number + 1)
            continue
        sleep(0.002 if rate is None else max(0.0, min(due, next_long) - perf_counter()))
    ended = (watch.finished - before) / (perf_counter() - start)
    for thread in threads:
        thread.join()
    return ended


def appends(model: octavo.Model, threads: int = 16, each: int = 40) -> float:
    """Appends per step, of many threads that append one token at a time to a sequence of their own."""
    session = model.begin_session()
    sequences = [session.new_sequence() for _ in range(threads)]
    for sequence in sequences:
        sequence.append(list(range(100, 132)))
    gate = threading.Barrier(threads)

    def work(sequence: octavo.Sequence) -> None:
        gate.wait()
        for token in range(each):
            sequence.append([200 + token])

    before = model.stats()["steps"]
    workers = [threading.Thread(target=work, args=(sequence,)) for sequence in sequences]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    session.close()
    return threads * each / (model.stats()["steps"] - before)


def report(watch: Watch, full_step: float, max_tokens: int) -> dict[str, Any]:
    ends, gaps = np.array(watch.gaps).reshape(-1, 2).T
    sequences, tokens, seconds = np.array(watch.steps).reshape(-1, 3).T
    near = np.zeros(len(gaps), bool)
    for begin, end in watch.long:
        near |= (begin <= ends) & (ends - gaps <= end)
    at, mb, held, own = np.array(watch.memory).reshape(-1, 4).T
    half = len(at) // 2

    def slope(series: NDArray[np.float64]) -> float:
        """MB a minute, over the second half."""
        return round(float(np.polyfit(at[half:] - at[half], series[half:], 1)[0]) * 60, 2) if half > 2 else float("nan")

    figures: dict[str, Any] = {"requests": watch.finished, "refused": watch.refused, "tokens_streamed": len(gaps), "wrong": watch.wrong[:3]}
    for name, found in (("other", gaps[~near]), ("beside_long", gaps[near])):
        if len(found):
            figures |= {f"gap_{name}_{label}_ms": round(1e3 * float(np.percentile(found, p)), 2) for label, p in (("p50", 50), ("p99", 99))}
    return figures | {
        "gap_longest_ms": round(1e3 * float(gaps.max()), 1), "step_longest_ms": round(1e3 * float(seconds.max()), 1),
        "step_full_ms": round(1e3 * full_step, 1), "long_prompt_s": round(median(b - a for a, b in watch.long), 2) if watch.long else None,
        "looks": watch.looks, "rss_mb": [round(float(mb[i]), 1) for i in (0, half, -1)], "rss_slope_mb_min": slope(mb),
        "held_mb": [round(float(held[i]), 1) for i in (0, half, -1)], "rss_less_held_and_own_slope_mb_min": slope(mb - held - own),
        "cancels": len(watch.cancels), "cancel_p99_steps": float(np.percentile(watch.cancels, 99)) if watch.cancels else None,
        "most_sequences": int(sequences.max()), "most_tokens": int(tokens.max()), "max_step_tokens": max_tokens,
        "steps": len(seconds), "sequences_per_step": round(float(sequences.mean()), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--policy", default="auto")
    parser.add_argument("--memory", default="800MB")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    options = octavo.RuntimeOptions(threads=args.threads, memory=args.memory, max_sequences=MAX_SEQUENCES, policy=args.policy)
    with octavo.load(args.artifact, options=options) as model:
        model.tokenizer = None
        watch = Watch()
        executor = model.engine.executor
        touch_pool(executor)
        executor.execute = watch.over(executor.execute)  # type: ignore[method-assign]
        one_request(model, Watch(), 1, [], long=True)
        _, tokens, seconds = np.array(watch.steps).reshape(-1, 3).T
        full = float(seconds[tokens == options.max_step_tokens].max())
        per_step = appends(model)
        capacity = run(model, watch, 10 * args.minutes, rate=None, seed=1)
        watch = Watch()
        executor.execute = watch.over(type(executor).execute.__get__(executor))  # type: ignore[method-assign]
        stop = threading.Event()
        watcher = threading.Thread(target=monitor, args=(model, watch, stop))
        watcher.start()
        run(model, watch, 60 * args.minutes, rate=0.8 * capacity, seed=2)
        stop.set()
        watcher.join()
        stats = model.stats()
        figures = {"bench": "load", "policy": args.policy, "minutes": args.minutes, "capacity_per_s": round(capacity, 2)}
        figures |= report(watch, full, options.max_step_tokens)
        figures |= {"appends_per_step": round(per_step, 1), "blocks_used_at_end": stats["blocks_used"], "preemptions": stats["preemptions"],
                    "prefix_hits": stats["prefix_hits"], "failed_steps": stats["failed_steps"]}
    if args.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name:34} {value}")


if __name__ == "__main__":
    main()
