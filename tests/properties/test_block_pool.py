"""The block pool and the tables over it, driven at random against a model; their invariants after every operation."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from octavo.errors import CapacityError
from octavo.runtime.kv.blocks import BlockPool
from octavo.runtime.kv.tables import BlockTables

P = 4


class Tables(RuleBasedStateMachine):
    """The model: what each sequence's slots hold. Writing a slot must never change what another sequence reads."""

    @initialize(groups=st.integers(1, 2), blocks=st.integers(2, 12))
    def start(self, groups, blocks):
        self.tables = BlockTables(groups, blocks, P)
        self.memory = {}        # (group, block, slot) → token
        self.live = []          # (blocks, tokens)
        self.clock = 0

    def pick(self, choice):
        return self.live[choice % len(self.live)]

    @rule()
    def open(self):
        self.live.append((self.tables.open(), []))

    def grow(self, work, fail):
        """One step over several sequences: extend all, copy, write; then commit, or undo."""
        extensions, written = [], []
        snapshot = [([list(t) for t in blocks.tables], list(blocks.reserved)) for blocks, _ in self.live]
        free = [pool.num_free for pool in self.tables.pools]
        try:
            for (blocks, tokens), count in work:
                extensions.append(self.tables.extend(blocks, len(tokens), len(tokens) + count))
        except CapacityError:
            fail = True
        for extension in extensions:
            for copy in extension.copies:
                for slot in range(P):
                    self.memory[copy.group, copy.target, slot] = self.memory.get((copy.group, copy.source, slot))
        for _, ((blocks, tokens), count) in zip(extensions, work):
            for position in range(len(tokens), len(tokens) + count):
                self.clock += 1
                written.append((tokens, self.clock))
                for group, table in enumerate(blocks.tables):
                    self.memory[group, table[position // P], position % P] = self.clock
        if fail:
            for extension in reversed(extensions):
                self.tables.rollback(extension)
            assert snapshot == [([list(t) for t in blocks.tables], list(blocks.reserved)) for blocks, _ in self.live]
            assert free == [pool.num_free for pool in self.tables.pools]
        else:
            for extension in extensions:
                self.tables.commit(extension)
            for tokens, token in written:
                tokens.append(token)

    @precondition(lambda self: self.live)
    @rule(choices=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 6)), min_size=1, max_size=3), fail=st.booleans())
    def step(self, choices, fail):
        work = {choice % len(self.live): count for choice, count in choices}
        self.grow([(self.live[i], count) for i, count in work.items()], fail)

    @precondition(lambda self: self.live)
    @rule(choice=st.integers(0, 9), dropped=st.sampled_from([0, 0, 1, 2, 5, 30]))
    def fork(self, choice, dropped):
        blocks, tokens = self.pick(choice)
        length = max(0, len(tokens) - dropped)
        self.live.append((self.tables.fork(blocks, length), tokens[:length]))

    @precondition(lambda self: self.live)
    @rule(choice=st.integers(0, 9), length=st.integers(0, 30))
    def truncate(self, choice, length):
        blocks, tokens = self.pick(choice)
        del tokens[length:]
        self.tables.truncate(blocks, len(tokens))

    @precondition(lambda self: self.live)
    @rule(choice=st.integers(0, 9), count=st.integers(0, 10))
    def reserve(self, choice, count):
        blocks, tokens = self.pick(choice)
        stop = len(tokens) + count
        if self.tables.reserve(blocks, len(tokens), stop) and count:
            self.grow([((blocks, tokens), count)], False)   # a promise is kept: no CapacityError, so it has grown
            assert len(tokens) == stop and not any(blocks.reserved)

    @precondition(lambda self: self.live)
    @rule(choice=st.integers(0, 9))
    def close(self, choice):
        blocks, _ = self.live.pop(choice % len(self.live))
        self.tables.close(blocks)

    @invariant()
    def holds(self):
        if not hasattr(self, "tables"):
            return
        self.tables.check()
        for blocks, tokens in self.live:
            for group, table in enumerate(blocks.tables):
                assert len(table) == self.tables.count(len(tokens))
                assert [self.memory[group, table[i // P], i % P] for i in range(len(tokens))] == tokens


Tables.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
TestTables = Tables.TestCase


def test_relatives_of_different_lengths_in_one_failed_step():
    """The longer one copies first; the shorter must not take the block then for its own, or undoing finds it overwritten."""
    machine = Tables()
    machine.start(1, 8)
    machine.open()
    machine.grow([(machine.live[0], 6)], False)
    machine.fork(0, 1)
    machine.grow([(machine.live[0], 1), (machine.live[1], 1)], True)
    machine.holds()


def test_a_full_pool_says_so():
    pool = BlockPool(2)
    pool.reserve(1)
    pool.allocate()
    with pytest.raises(CapacityError, match="1 of 2 blocks used, 1 promised"):
        pool.allocate()
    assert pool.allocate(reserved=True) == 1


@pytest.mark.parametrize("break_it", [
    lambda pool: pool._free.pop(),
    lambda pool: pool._free.append(pool._free[0]),
    lambda pool: pool.share(0),
    lambda pool: setattr(pool, "num_reserved", 99),
])
def test_the_checker_sees_broken_pools(break_it):
    """Negative controls."""
    pool = BlockPool(4)
    held = [pool.allocate()]
    pool.check([held])
    break_it(pool)
    with pytest.raises(AssertionError):
        pool.check([held])
