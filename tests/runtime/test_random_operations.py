"""The engine driven at random over a pool too small: invariants after every operation, and the bits of one sequence alone.

Appends, forks, truncations, generations and streams of several priorities with several completions arrive at random, are cancelled, dropped, late,
preempted, saved, restored, and broken by faults; on a plain and on a hybrid windowed model, and on the kinds that compute one sequence a step.

500 operations each by default; OCTAVO_OPERATIONS=10000 for the long run.
"""

from __future__ import annotations

import gc
import itertools
import os
import random

import numpy as np
import octavo
import pytest
from octavo.errors import CapacityError, StepError
from octavo.runtime.named import NamedSessions

OPERATIONS = int(os.environ.get("OCTAVO_OPERATIONS", "500"))
V = 320


class Driver:
    """Random operations on a model; what each sequence should hold is kept beside it, and an oracle computes it alone."""

    def __init__(self, model, oracle, seed, folder, *, exact=True):
        self.model, self.oracle, self.folder = model, oracle, folder
        self.tolerance = 0.0 if exact else 2e-5
        self.random = random.Random(seed)
        self.session = model.begin_session()
        self.sequences: list[tuple[octavo.Sequence, list[int]]] = []
        self.streams: list[tuple[octavo.PieceStream, list[int], list[list[octavo.Piece]], octavo.SamplingParams]] = []
        self.prefixes = [[self.random.randrange(3, V) for _ in range(60)] for _ in range(3)]
        self.refused = self.failed = self.ended_late = 0

    def tokens(self, most):
        """New tokens, often the beginning of something seen before."""
        if self.random.random() < 0.5:
            start = self.random.choice(self.prefixes)[: self.random.randint(1, min(most, 60))]
            return start + [self.random.randrange(3, V) for _ in range(self.random.randint(0, 3))]
        return [self.random.randrange(3, V) for _ in range(self.random.randint(1, most))]

    def run(self, count):
        operations = {self.append: 6, self.new: 2, self.fork: 2, self.truncate: 3, self.close: 1, self.together: 2, self.stream: 2, self.read: 8,
                      self.cancel: 1, self.generate: 2, self.save: 1, self.fail: 1, self.named: 1, self.late: 1, self.refuse: 1}
        for _ in range(count):
            [operation] = self.random.choices(list(operations), operations.values())
            operation()
            with self.model.engine.turn:
                self.model.engine.collect_dropped()
                self.model.engine.check()
            for sequence, tokens in self.sequences:
                assert list(sequence.tokens) == tokens
        for stream, *expected in self.streams:
            self.drain(stream, *expected)

    def same(self, got, expected):
        np.testing.assert_allclose(got, expected, rtol=0, atol=self.tolerance)

    def close_all(self):
        self.session.close()
        self.sequences.clear()
        self.streams.clear()
        gc.collect()

    def pick(self):
        return self.random.choice(self.sequences) if self.sequences else None

    def new(self):
        if len(self.sequences) < 8:
            self.sequences.append((self.session.new_sequence(priority=self.random.choice([0, 0, 1]), salt=self.random.choice([None, None, "a"])), []))

    def append(self):
        if picked := self.pick():
            sequence, tokens = picked
            new = self.tokens(40)
            rows = self.random.choice(["last", "all"])
            try:
                got = sequence.append(new, rows=rows)
            except CapacityError:
                self.refused += 1
                return
            tokens += new
            expected = self.oracle.predict(tokens)
            self.same(got, expected[-1:] if rows == "last" else expected[-len(new) :])

    def together(self):
        picked = self.random.sample(self.sequences, min(len(self.sequences), 3))
        if not picked:
            return
        work = [self.tokens(12) for _ in picked]
        try:
            rows = self.session.append_batch([(sequence, new) for (sequence, _), new in zip(picked, work)])
        except CapacityError:
            self.refused += 1
            return
        for (_, tokens), new, row in zip(picked, work, rows):
            tokens += new
            self.same(row, self.oracle.predict(tokens)[-1:])

    def fork(self):
        if (picked := self.pick()) and len(self.sequences) < 8:
            self.sequences.append((picked[0].fork(), list(picked[1])))

    def truncate(self):
        if picked := self.pick():
            length = self.random.randint(0, len(picked[1]))
            picked[0].truncate(length)
            del picked[1][length:]

    def close(self):
        if picked := self.pick():
            self.sequences.remove(picked)
            if self.random.random() < 0.5:
                picked[0].close()       # else its last reference is dropped

    def generate(self):
        if (picked := self.pick()) and picked[1]:
            params = octavo.SamplingParams(max_tokens=self.random.randint(1, 6), temperature=0, ignore_eos=True)
            before = list(picked[1])
            try:
                result = picked[0].generate(params)
            except CapacityError:
                self.refused += 1
                return
            picked[1][:] = picked[0].tokens
            assert tuple(picked[1]) == (*before, *result.completions[0].token_ids)
            if result.completions[0].finish_reason == "error":
                self.refused += 1
            self.check_greedy(before, list(result.completions[0].token_ids))

    def check_greedy(self, prompt, tokens):
        rows = self.oracle.predict([*prompt, *tokens])[len(prompt) - 1 : -1]
        assert [int(row.argmax()) for row in rows] == tokens

    def stream(self):
        if len(self.streams) < 5:
            prompt = self.tokens(50)
            params = octavo.SamplingParams(
                max_tokens=self.random.randint(1, 20), temperature=self.random.choice([0, 0.8]), seed=self.random.randrange(100), top_p=0.9, ignore_eos=True,
                n=self.random.choice([1, 1, 3]), logprobs=self.random.choice([None, 1]), prompt_logprobs=self.random.choice([None, None, 1]),
            )
            try:
                stream = self.model.stream(prompt, params, priority=self.random.choice([-1, 0, 1]))
            except CapacityError:
                self.refused += 1
                return
            self.streams.append((stream, prompt, [[] for _ in range(params.n)], params))

    def read(self):
        if self.streams:
            at = self.random.randrange(len(self.streams))
            stream, prompt, seen, params = self.streams[at]
            piece = next(stream, None)
            if piece is None:
                del self.streams[at]
                self.compare(prompt, seen, params)
            else:
                seen[piece.index].append(piece)
                if piece.finish_reason == "error":
                    self.refused += 1
                    del self.streams[at]

    def drain(self, stream, prompt, seen, params):
        for piece in stream:
            seen[piece.index].append(piece)
            if piece.finish_reason == "error":
                return
        self.compare(prompt, seen, params)

    def compare(self, prompt, seen, params):
        for completion, pieces in zip(self.oracle.generate([prompt], params)[0].completions, seen, strict=True):
            assert tuple(token for piece in pieces for token in piece.token_ids) == completion.token_ids
            if params.logprobs is not None:
                logprobs = [logprob for piece in pieces for logprob in piece.logprobs]
                self.same([logprob.logprob for logprob in logprobs], [logprob.logprob for logprob in completion.logprobs])
                assert self.tolerance or tuple(logprobs) == completion.logprobs

    def cancel(self):
        if self.streams:
            stream, *_ = self.streams.pop(self.random.randrange(len(self.streams)))
            if self.random.random() < 0.5:
                stream.close()

    def save(self):
        if picked := self.pick():
            path = self.folder / "a.seq"
            picked[0].save(path)
            if len(self.sequences) < 8:
                try:
                    self.sequences.append((self.session.restore(path), list(picked[1])))
                except CapacityError:
                    self.refused += 1

    def fail(self):
        """A kernel or an allocation that breaks leaves everything as it was, those included that run at the same time."""
        if picked := self.pick():
            executor = self.model.engine.executor
            place, name = (executor._feed, "run") if hasattr(executor, "_feed") else (executor, "_forward")
            cause, luck = self.random.choice([RuntimeError("out of luck"), MemoryError()]), self.random.choice([1, 2])
            work, faults = getattr(place, name), [cause] * luck

            def faulty(*given):
                if faults:
                    raise faults.pop()
                return work(*given)

            setattr(place, name, faulty)
            try:
                picked[0].append([5])
                picked[1].append(5)     # done again one by one, the fault hit another
            except (StepError, CapacityError):
                self.failed += 1
            finally:
                delattr(place, name)

    def named(self):
        """The sequences go to disk together and come back from there."""
        folder = self.folder / "sessions"
        store = NamedSessions(folder, None)
        store.store("a/ä", [sequence._saved() for sequence, _ in self.sequences])
        assert [list(saved.tokens) for saved in store.load("a/ä", self.model.fingerprint)] == [tokens for _, tokens in self.sequences]

    def late(self):
        """A deadline that passes while the request runs."""
        engine = self.model.engine
        prompt, params = self.tokens(20), octavo.SamplingParams(max_tokens=8, seed=1, ignore_eos=True)
        try:
            stream = self.model.stream(prompt, params, deadline=1000.0)
        except CapacityError:
            self.refused += 1
            return
        tokens = [piece.token_ids for piece in itertools.islice(stream, 2)]
        clock, engine.clock = engine.clock, lambda: clock() + 2000
        try:
            last = next(stream, None)
        finally:
            engine.clock = clock
        if last is not None:        # else it has ended for want of room
            assert last.finish_reason == "error" and "deadline" in last.error
            self.ended_late += 1
            expected = self.oracle.generate([prompt], params)[0].completions[0].token_ids
            assert tuple(token for ids in tokens for token in ids) == expected[: len(tokens)]

    def refuse(self):
        """What is asked wrongly changes nothing."""
        if picked := self.pick():
            sequence, tokens = picked
            for use in (lambda: sequence.append([]), lambda: sequence.append([V]), lambda: sequence.append([-1]), lambda: sequence.truncate(len(tokens) + 1),
                        lambda: sequence.truncate(-1), lambda: self.session.append_batch([(sequence, [1]), (sequence, [2])]),
                        lambda: sequence.append([1] * 600), lambda: sequence.append([1.5]), lambda: self.model.stream([1] * 600)):
                with pytest.raises(octavo.OctavoError):
                    use()


@pytest.mark.parametrize(("name", "blocks", "swap"), [("paged", 16, None), ("paged_hybrid", 14, "40 kB"), ("paged_int8", 12, "1 MiB")])
def test_random_operations(tools, paths, op_library, tmp_path, name, blocks, swap):
    with (
        tools.small_paged(paths, 40, name=name, prefix_cache=False) as oracle,
        tools.small_paged(paths, blocks, name=name, max_sequences=4, max_step_tokens=48, policy="latency", swap_memory=swap) as model,
    ):
        driver = Driver(model, oracle, len(name), tmp_path)
        driver.run(OPERATIONS)
        stats = model.stats()
        # Every way out of a full pool was taken, or the run has shown nothing.
        assert all(stats[key] for key in ("prefix_hits", "prefix_evictions", "forks", "block_copies", "idle_drops", "failed_steps")), stats
        if OPERATIONS >= 500:
            assert stats["preemptions"] and driver.ended_late and driver.refused and driver.failed, stats
            assert (stats["swaps_in"] > 0) == (swap is not None)
        driver.close_all()
        tools.check_idle(model)
        assert model.stats()["sequences"] == 0


@pytest.mark.parametrize("name", ["contiguous", "stateless", "baseline"])
def test_random_operations_one_sequence_a_step(tools, paths, op_library, tmp_path, name):
    """The oracle starts from nothing each time; these kinds round as their graph does, so close is what can be asked of logits."""
    with octavo.load(getattr(paths, name), options=octavo.RuntimeOptions(threads=1)) as model:
        driver = Driver(model, model, len(name), tmp_path, exact=False)
        driver.run(OPERATIONS // 2)
        assert driver.failed and driver.ended_late
        driver.close_all()
        tools.check_idle(model)
        assert model.stats()["sequences"] == 0
