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
    """The model: what each sequence's slots hold. A slot's content stands for all tokens up to it, as keys and values do.

    Writing a slot must never change what another sequence reads, nor what the index promises of it; tokens are few, so that prefixes meet.
    """

    @initialize(windows=st.lists(st.sampled_from([None, 1, 3, 6]), min_size=1, max_size=2), blocks=st.integers(2, 12), cached=st.booleans())
    def start(self, windows, blocks, cached):
        self.windows = windows
        self.tables = BlockTables(windows, blocks, P, prefix_cache=cached)
        self.memory = {}        # (group, block, slot) → the tokens up to it
        self.live = []          # (blocks, tokens)
        self.hits = 0

    def pick(self, choice):
        return self.live[choice % len(self.live)]

    @rule(scope=st.sampled_from([None, "a"]))
    def open(self, scope=None):
        self.live.append((self.tables.open(scope), []))

    @rule(scope=st.sampled_from([None, "a"]), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=14))
    def adopt(self, scope, tokens):
        blocks = self.tables.open(scope)
        length = self.tables.adopt(blocks, tokens, len(tokens) - 1)
        assert length < len(tokens)
        self.hits += length > 0
        self.live.append((blocks, tokens[:length]))

    def grow(self, work, fail):
        """One step over several sequences: extend all, copy, write; then commit and settle, or undo."""
        extensions, written = [], []
        snapshot = [([list(t) for t in blocks.tables], list(blocks.reserved)) for blocks, _ in self.live]
        used = [pool.num_used for pool in self.tables.pools]
        try:
            for (blocks, tokens), new in work:
                extensions.append(self.tables.extend(blocks, len(tokens), len(tokens) + len(new)))
        except CapacityError:
            fail = True
        for extension in extensions:
            for copy in extension.copies:
                for slot in range(P):
                    self.memory[copy.group, copy.target, slot] = self.memory.get((copy.group, copy.source, slot))
        for _, ((blocks, tokens), new) in zip(extensions, work):
            grown = tokens + new
            written.append((blocks, tokens, new))
            for position in range(len(tokens), len(grown)):
                for group, table in enumerate(blocks.tables):
                    self.memory[group, table[position // P], position % P] = (blocks.scope, *grown[: position + 1])
        if fail:
            for extension in reversed(extensions):
                self.tables.rollback(extension)
            assert snapshot == [([list(t) for t in blocks.tables], list(blocks.reserved)) for blocks, _ in self.live]
            assert used == [pool.num_used for pool in self.tables.pools]
        else:
            for extension in extensions:
                self.tables.commit(extension)
            for blocks, tokens, new in written:
                tokens += new
                self.tables.settle(blocks, tokens, len(tokens))

    @precondition(lambda self: self.live)
    @rule(choices=st.lists(st.tuples(st.integers(0, 9), st.lists(st.integers(0, 1), min_size=1, max_size=6)), min_size=1, max_size=3), fail=st.booleans())
    def step(self, choices, fail):
        work = {choice % len(self.live): new for choice, new in choices}
        self.grow([(self.live[i], new) for i, new in work.items()], fail)

    @precondition(lambda self: self.live)
    @rule(choice=st.integers(0, 9))
    def fork(self, choice):
        blocks, tokens = self.pick(choice)
        self.live.append((self.tables.fork(blocks, len(tokens)), list(tokens)))

    @precondition(lambda self: self.live)
    @rule(choice=st.integers(0, 9), length=st.integers(0, 30))
    def truncate(self, choice, length):
        blocks, tokens = self.pick(choice)
        wanted = min(length, len(tokens))
        kept = self.tables.truncate(blocks, wanted)
        assert kept == wanted or (kept == 0 and any(self.windows))
        del tokens[kept:]

    @precondition(lambda self: self.live)
    @rule(choice=st.integers(0, 9), new=st.lists(st.integers(0, 1), max_size=10))
    def reserve(self, choice, new):
        blocks, tokens = self.pick(choice)
        stop = len(tokens) + len(new)
        if self.tables.reserve(blocks, len(tokens), stop) and new:
            self.grow([((blocks, tokens), new)], False)   # a promise is kept: no CapacityError, so it has grown
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
            for window, (group, table) in zip(self.windows, enumerate(blocks.tables)):
                assert len(table) == self.tables.count(len(tokens))
                seen = range(0 if window is None else max(0, len(tokens) - window + 1), len(tokens))
                assert [self.memory[group, table[i // P], i % P] for i in seen] == [(blocks.scope, *tokens[: i + 1]) for i in seen]
                assert all(block >= 0 for block in table) or window is not None


Tables.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
TestTables = Tables.TestCase


def test_relatives_of_different_lengths_in_one_failed_step():
    """The longer one copies first; the shorter must not take the block then for its own, or undoing finds it overwritten."""
    machine = Tables()
    machine.start([None], 8, False)
    machine.open()
    machine.grow([(machine.live[0], [0] * 6)], False)
    machine.fork(0)
    machine.truncate(1, 5)
    machine.grow([(machine.live[0], [0]), (machine.live[1], [0])], True)
    machine.holds()


def test_a_prefix_is_found_by_its_tokens_alone():
    """Full blocks, a part of one, another scope, another beginning; and what was found is not written over."""
    machine = Tables()
    machine.start([None, 3], 12, True)
    machine.open()
    machine.grow([(machine.live[0], [0, 1, 1, 0, 1, 0, 1, 1, 0])], False)
    machine.close(0)
    for scope, tokens, length in [(None, [0, 1, 1, 0, 1, 0, 1, 1, 0, 0], 8), (None, [0, 1, 1, 0, 1, 0, 0, 0], 6), (None, [0, 1, 1, 0, 1], 4),
                                  (None, [1, 1, 1, 0, 1], 0), ("a", [0, 1, 1, 0, 1], 0), (None, [0, 1, 1], 2)]:
        machine.adopt(scope, tokens)
        assert len(machine.live[-1][1]) == length
    assert machine.hits == 4
    machine.grow([(machine.live[1], [0, 0, 0])], False)
    machine.holds()


def test_blocks_nobody_holds_are_taken_oldest_first():
    machine = Tables()
    machine.start([None], 4, True)
    for tokens in ([0] * 4, [1] * 4, [0, 1, 0, 1]):
        machine.open()
        machine.grow([(machine.live[0], tokens)], False)
        machine.close(0)
    machine.adopt(None, [0] * 5)      # wanted again: no longer the oldest
    machine.close(0)
    machine.open()
    machine.grow([(machine.live[0], [1, 0, 0, 0, 1])], False)   # the free one, and the oldest
    for tokens, length in (([1] * 5, 1), ([0] * 5, 4), ([0, 1, 0, 1, 0], 4)):
        machine.adopt(None, tokens)
        assert len(machine.live[-1][1]) == length
    assert machine.tables.pools[0].num_evicted == 1


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
    lambda pool: pool.forget(1),
    lambda pool: pool.share(1),
])
def test_the_checker_sees_broken_pools(break_it):
    """Negative controls."""
    pool = BlockPool(4)
    held = [pool.allocate()]
    pool.keep(pool.allocate())
    pool.free(1)
    pool.check([held], [1])
    break_it(pool)
    with pytest.raises(AssertionError):
        pool.check([held], [1])


def test_what_grows_after_a_truncation_is_entered_under_its_own_tokens():
    """Two blocks, cut to one and a half and grown otherwise to three: the third does not follow the old second."""
    machine = Tables()
    machine.start([None], 12, True)
    machine.open()
    machine.grow([(machine.live[0], [0, 1, 1, 0, 1, 1, 1, 1])], False)
    machine.truncate(0, 6)
    machine.grow([(machine.live[0], [0, 0, 1, 0, 1, 0])], False)
    for tokens, length in [([0, 1, 1, 0, 1, 1, 1, 1, 1, 0, 1, 0, 0], 8), ([0, 1, 1, 0, 1, 1, 0, 0, 1, 0, 1, 0, 0], 12)]:
        machine.adopt(None, tokens)
        assert len(machine.live[-1][1]) == length
        machine.holds()


def test_tokens_with_the_same_hash_are_not_the_same_prefix():
    """Python's hash of an integer is its remainder by 2⁶¹ − 1: these collide, in every block of the path."""
    tables = BlockTables([None, 3], 12, P, prefix_cache=True)
    ours, theirs = list(range(1, 10)), [token + 2**61 - 1 for token in range(1, 10)]
    assert hash(tuple(ours)) == hash(tuple(theirs))
    blocks = tables.open()
    tables.commit(tables.extend(blocks, 0, 9))
    tables.settle(blocks, ours, 9)
    same, other = tables.open(), tables.open()
    assert (tables.adopt(same, ours, 8), tables.adopt(other, theirs, 8)) == (8, 0)
    tables.check()


def test_a_scope_under_which_nothing_is_kept_leaves_nothing():
    """A salt for each user: those whose sequences fill no block, or whose blocks are gone, cost no memory."""
    tables = BlockTables([None], 8, P, prefix_cache=True)
    for user in range(100):
        blocks = tables.open(f"user {user}")
        length = P + 1 if user % 2 else P - 1
        tables.adopt(blocks, range(length), length - 1)
        tables.commit(tables.extend(blocks, 0, length))
        tables.settle(blocks, range(length), length)
        tables.close(blocks)
        tables.check()
    assert len(tables._index._roots) <= 8, "as many as there are blocks, at most"


def test_a_sequence_may_be_as_long_as_it_likes():
    """More blocks than Python lets functions call each other, grown one by one; and what has left the tree comes back, all the way."""
    tables, tokens, blocks = BlockTables([None], 1501, P, prefix_cache=True), list(range(1501 * P)), 1500
    first, lost = tables.open(), tables.open()
    for start in range(0, blocks * P, P):
        tables.commit(tables.extend(first, start, start + P))
        tables.settle(first, tokens, start + P)
    tables.close(first)
    assert tables.adopt(lost, tokens, blocks * P) == blocks * P
    chain = list(lost.chain)
    tables.close(lost)
    other = tables.open()
    tables.commit(tables.extend(other, 0, 1501 * P))    # takes every block: the tree is empty
    tables.close(other)
    tables.check()
    again = tables.open()
    again.chain[:] = chain
    again.tables[0].extend(tables.pools[0].allocate() for _ in range(blocks))
    tables.commit(tables.extend(again, blocks * P, 1501 * P))
    tables.settle(again, tokens, 1501 * P)
    tables.check()
    assert sum(1 for _ in tables._index.kept(0)) == 1 and not tables.adopt(tables.open(), tokens, P), "the last block alone is kept, after all others' tokens"


def test_a_long_prefix_whose_window_is_gone_is_looked_at_once(monkeypatch):
    """Not once for each of its ends; and what is left of it before that is found."""
    tables, tokens, looks = BlockTables([None, 8], 80, P, prefix_cache=True), list(range(70 * P)), []
    early, blocks = tables.open(), tables.open()
    for sequence, stop in ((early, 9 * P), (blocks, 60 * P)):
        tables.adopt(sequence, tokens, stop)
        for start in range(sum(map(bool, sequence.tables[0])) and 9 * P, stop, P):
            tables.commit(tables.extend(sequence, start, start + P))
            tables.settle(sequence, tokens, start + P)
    for block in list(tables.pools[1]._cached):
        tables.pools[1].forget(block)
        tables._index.evicted(1, block)
    look = tables._index._tables
    monkeypatch.setattr(tables._index, "_tables", lambda *given: looks.append(given) or look(*given))
    found = tables.open()
    assert tables.adopt(found, tokens, 50 * P) == 9 * P and len(looks) < 4
    tables.check()
