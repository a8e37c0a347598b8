"""The engine driven at random over a pool too small: invariants after every operation, and the bits of one sequence alone.

500 operations each by default; OCTAVO_OPERATIONS=10000 for the long run.
"""

from __future__ import annotations

import os
import random

import numpy as np
import octavo
import pytest
from octavo.errors import CapacityError, StepError

OPERATIONS = int(os.environ.get("OCTAVO_OPERATIONS", "500"))
V = 320


class Driver:
    """Random operations on a model; what each sequence should hold is kept beside it, and an oracle computes it alone."""

    def __init__(self, model, oracle, seed, folder):
        self.model, self.oracle, self.folder = model, oracle, folder
        self.random = random.Random(seed)
        self.session = model.begin_session()
        self.sequences: list[tuple[octavo.Sequence, list[int]]] = []
        self.streams: list[tuple[object, list[int], list[int], octavo.SamplingParams]] = []
        self.prefixes = [[self.random.randrange(3, V) for _ in range(60)] for _ in range(3)]
        self.refused = self.failed = 0

    def tokens(self, most):
        """New tokens, often the beginning of something seen before."""
        if self.random.random() < 0.5:
            start = self.random.choice(self.prefixes)[: self.random.randint(1, min(most, 60))]
            return start + [self.random.randrange(3, V) for _ in range(self.random.randint(0, 3))]
        return [self.random.randrange(3, V) for _ in range(self.random.randint(1, most))]

    def run(self, count):
        operations = {self.append: 6, self.new: 2, self.fork: 2, self.truncate: 3, self.close: 1, self.together: 2, self.stream: 2, self.read: 8,
                      self.cancel: 1, self.generate: 2, self.save: 1, self.fail: 1}
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

    def pick(self):
        return self.random.choice(self.sequences) if self.sequences else None

    def new(self):
        if len(self.sequences) < 8:
            self.sequences.append((self.session.new_sequence(priority=self.random.choice([0, 0, 1])), []))

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
            np.testing.assert_array_equal(got, expected[-1:] if rows == "last" else expected[-len(new) :])

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
            np.testing.assert_array_equal(row, self.oracle.predict(tokens)[-1:])

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
            )
            try:
                stream = self.model.stream(prompt, params, priority=self.random.choice([-1, 0, 1]))
            except CapacityError:
                self.refused += 1
                return
            self.streams.append((stream, prompt, [], params))

    def read(self):
        if self.streams:
            at = self.random.randrange(len(self.streams))
            stream, prompt, seen, params = self.streams[at]
            piece = next(stream, None)
            if piece is None:
                del self.streams[at]
                assert self.oracle.generate([prompt], params)[0].completions[0].token_ids == tuple(seen)
            else:
                seen += piece.token_ids
                if piece.finish_reason == "error":
                    self.refused += 1
                    del self.streams[at]

    def drain(self, stream, prompt, seen, params):
        for piece in stream:
            seen += piece.token_ids
            if piece.finish_reason == "error":
                return
        assert self.oracle.generate([prompt], params)[0].completions[0].token_ids == tuple(seen)

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
        """A step that breaks leaves everything as it was."""
        if picked := self.pick():
            feed = self.model.engine.executor._feed
            run, feed.run = feed.run, lambda plan: (_ for _ in ()).throw(RuntimeError("out of luck"))
            try:
                picked[0].append([5])
            except (StepError, CapacityError):
                self.failed += 1
            finally:
                feed.run = run


@pytest.mark.parametrize(("name", "blocks"), [("paged", 16), ("paged_hybrid", 14), ("paged_int8", 12)])
def test_random_operations(tools, paths, op_library, tmp_path, name, blocks):
    with (
        tools.small_paged(paths, 40, name=name, prefix_cache=False) as oracle,
        tools.small_paged(paths, blocks, name=name, max_sequences=4, max_step_tokens=48, policy="latency") as model,
    ):
        driver = Driver(model, oracle, len(name), tmp_path)
        driver.run(OPERATIONS)
        stats = model.stats()
        # Every way out of a full pool was taken, or the run has shown nothing.
        assert all(stats[key] for key in ("prefix_hits", "prefix_evictions", "forks", "block_copies", "idle_drops", "failed_steps")), stats
        if OPERATIONS >= 500:
            assert stats["preemptions"], stats
        driver.session.close()
        driver.sequences.clear()
        driver.streams.clear()
        tools.check_idle(model)
