"""Block tables: which blocks each sequence's positions lie in, over all KV groups; growth, copy-on-write, fork, truncate. Integers only.

Position p of a sequence lies in slot p % P of block `tables[group][p // P]`. A block that two sequences hold is never written: the writer
gets a copy of its own first. Growth is a transaction: `extend`, then `commit` once the step has succeeded or `rollback` if not.

In a group with a window, blocks that no later token can see are released, and their place in the table says −1. Full blocks are entered in
the prefix index, if there is one, where later sequences find them (`adopt`).
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from ...errors import CapacityError
from .blocks import BlockPool
from .prefix import Node, PrefixIndex, first_seen


@dataclass(eq=False)
class SequenceBlocks:
    """One sequence's blocks: `tables[group][i]` covers positions [i·P, (i+1)·P), −1 where released. `reserved[group]` are promised to it.

    `scope` says whose blocks it may find in the prefix index, `chain` where it is there: a root, and the node of each full block.
    """

    tables: list[list[int]]
    reserved: list[int]
    scope: str | None = None
    chain: list[Node] = field(default_factory=list)


@dataclass(frozen=True)
class Copy:
    """Block `source` is to be copied over block `target` in all layers of `group` before the step runs."""

    group: int
    source: int
    target: int


@dataclass
class Extension:
    """What `extend` changed, so that it can be undone: copies made for writing, (group, blocks appended), blocks taken from the reserve."""

    blocks: SequenceBlocks
    copies: list[Copy] = field(default_factory=list)
    replaced: list[tuple[int, int]] = field(default_factory=list)   # (group, index in the table) of each copy
    appended: list[int] = field(default_factory=list)               # the group of each appended block
    from_reserve: list[int] = field(default_factory=list)           # the group of each block that came out of the reserve


class BlockTables:
    """All sequences' tables over one pool per KV group. `windows[group]` is how many positions a token sees, itself included (None: all)."""

    def __init__(self, windows: Sequence[int | None], num_blocks: int, block_size: int, *, prefix_cache: bool = False) -> None:
        self.block_size = block_size
        self.pools = tuple(BlockPool(num_blocks, partial(self._evicted, group)) for group in range(len(windows)))
        self.num_copies = 0
        self._windows = tuple(windows)
        self._index = PrefixIndex(self.pools, self._windows, block_size) if prefix_cache else None
        self._live: weakref.WeakSet[SequenceBlocks] = weakref.WeakSet()

    def open(self, scope: str | None = None) -> SequenceBlocks:
        blocks = SequenceBlocks([[] for _ in self.pools], [0] * len(self.pools), scope)
        if self._index is not None:
            blocks.chain.append(self._index.root(scope))
        self._live.add(blocks)
        return blocks

    def adopt(self, blocks: SequenceBlocks, tokens: Sequence[int], limit: int) -> int:
        """Fills empty tables with the longest prefix of `tokens` that the index has, of at most `limit` tokens; returns its length."""
        assert not any(blocks.tables), "only an empty sequence can adopt a prefix"
        if self._index is None or limit <= 0:
            return 0
        hit = self._index.find(self._index.root(blocks.scope), tokens, limit)
        revived = [sum(pool.is_cached(block) for block in table if block >= 0) for pool, table in zip(self.pools, hit.tables)]
        if any(count > pool.num_available for pool, count in zip(self.pools, revived)):
            return 0    # they are promised to others
        for pool, table in zip(self.pools, hit.tables):
            for block in table:
                if block >= 0:
                    pool.share(block)
        blocks.tables, blocks.chain = hit.tables, hit.chain
        return hit.length

    def place(self, blocks: SequenceBlocks, length: int) -> None:
        """Gives an empty sequence blocks of its own for positions [0, length), whole blocks, as far as later tokens see them.

        Raises CapacityError and changes nothing where the pool has too few.
        """
        assert not any(blocks.tables) and length % self.block_size == 0
        firsts = [self._first_seen(window, length) for window in self._windows]
        counts = [length // self.block_size - first for first in firsts]
        for pool, count in zip(self.pools, counts):
            if not pool.can_reserve(count):
                raise CapacityError(f"{count} blocks are needed, {pool.num_available} can be had", hint="close sequences, or load the model with more memory=")
        blocks.tables = [[-1] * first + [pool.allocate() for _ in range(count)] for pool, first, count in zip(self.pools, firsts, counts)]

    def whole(self, blocks: SequenceBlocks, length: int) -> tuple[int, list[list[int]]]:
        """The most of the first `length` positions that full blocks hold, and the blocks that `place` would give for them.

        None, where a window has let go of what a token after them would see.
        """
        whole = length // self.block_size * self.block_size
        if not self.sees_all(blocks, whole):
            whole = 0
        stop = whole // self.block_size
        return whole, [table[self._first_seen(window, whole) : stop] for window, table in zip(self._windows, blocks.tables)]

    def settle(self, blocks: SequenceBlocks, tokens: Sequence[int], length: int) -> None:
        """After positions [0, length) are committed: enters full blocks in the index, releases those that no later token sees."""
        if self._index is not None:
            self._index.grow(blocks.chain, tokens, blocks.tables, length)
        for group, (window, table) in enumerate(zip(self._windows, blocks.tables)):
            if window is None:
                continue
            # Seen from the last full block, so that the prefix that ends there (what is saved, and found by others) is whole.
            whole = length // self.block_size * self.block_size
            for index in range(self._first_seen(window, whole) - 1, -1, -1):
                if table[index] < 0:
                    break
                self.release(blocks, group, index)

    def count(self, length: int) -> int:
        """Blocks that `length` positions fill, the last perhaps in part."""
        return -(-length // self.block_size)

    def need(self, blocks: SequenceBlocks, start: int, stop: int) -> list[int]:
        """Per group, blocks that writing positions [start, stop) takes: new ones at the end, and a copy of each that is shared or kept.

        A kept one that has no other holder now may have one before it is written, so that its copy has to be promised too.
        """
        first, last = start // self.block_size, self.count(stop)
        return [
            max(0, last - len(table)) + sum(pool.is_shared(block) or pool.is_kept(block) for block in table[first:last])
            for pool, table in zip(self.pools, blocks.tables)
        ]

    def reserve(self, blocks: SequenceBlocks, start: int, stop: int) -> bool:
        """Promises what writing positions [start, stop) takes, in place of what was promised before. All groups or none (False)."""
        if self._within(blocks, start, stop):
            return True
        self.unreserve(blocks)
        if not self._fits(wanted := self.need(blocks, start, stop)):
            self._forget(blocks, start, stop)
            if not self._fits(wanted := self.need(blocks, start, stop)):
                return False
        for group, count in enumerate(wanted):
            self.pools[group].reserve(count)
            blocks.reserved[group] = count
        return True

    def _within(self, blocks: SequenceBlocks, start: int, stop: int) -> bool:
        """Whether nothing is promised, and positions [start, stop) lie in one block of each group that can be written as it is: most steps of a stream."""
        return start // self.block_size == (stop - 1) // self.block_size and not any(blocks.reserved) and self.can_write(blocks, start)

    def can_write(self, blocks: SequenceBlocks, position: int) -> bool:
        """Whether `position` lies in a block of each group that can be written as it is."""
        index = position // self.block_size
        return not any(
            index >= len(table) or pool.is_shared(table[index]) or pool.is_kept(table[index]) for pool, table in zip(self.pools, blocks.tables)
        )

    def room(self, blocks: SequenceBlocks, length: int) -> int:
        """Up to so many positions need no `reserve`, `extend` or `settle` after the first `length`: all but the last of a block that can be written."""
        return self.count(length) * self.block_size - 1 if length and self._within(blocks, length, length + 1) else 0

    def _fits(self, wanted: Sequence[int]) -> bool:
        return all(pool.can_reserve(count) for pool, count in zip(self.pools, wanted))

    def _forget(self, blocks: SequenceBlocks, start: int, stop: int) -> None:
        """What is only kept, in the way of positions [start, stop), gives way where there is no room for copies."""
        for group, (pool, table) in enumerate(zip(self.pools, blocks.tables)):
            for block in table[start // self.block_size : self.count(stop)]:
                if pool.is_kept(block) and not pool.is_shared(block):
                    pool.forget(block)
                    self._evicted(group, block)

    def unreserve(self, blocks: SequenceBlocks) -> None:
        for group, count in enumerate(blocks.reserved):
            self.pools[group].unreserve(count)
            blocks.reserved[group] = 0

    def extend(self, blocks: SequenceBlocks, start: int, stop: int) -> Extension:
        """Makes positions [start, stop) writable. Raises CapacityError and changes nothing where the pool has no blocks left."""
        extension = Extension(blocks)
        if self._within(blocks, start, stop):
            return extension
        try:
            if not any(blocks.reserved) and not self._fits(self.need(blocks, start, stop)):
                self._forget(blocks, start, stop)
            for group, table in enumerate(blocks.tables):
                for index in range(start // self.block_size, self.count(stop)):
                    assert index <= len(table), "positions before start are not mapped"
                    if index == len(table):
                        table.append(self._allocate(extension, group))
                        extension.appended.append(group)
                    elif self.pools[group].is_shared(table[index]) or self.pools[group].is_kept(table[index]):
                        target = self._allocate(extension, group)
                        extension.copies.append(Copy(group, table[index], target))
                        extension.replaced.append((group, index))
                        table[index] = target
        except BaseException:
            self.rollback(extension)
            raise
        return extension

    def release(self, blocks: SequenceBlocks, group: int, index: int) -> None:
        """Lets go of a block whose positions no later token sees."""
        self.pools[group].free(blocks.tables[group][index])
        blocks.tables[group][index] = -1

    def commit(self, extension: Extension) -> None:
        # A source stays held until here: another writer of this step must not find it unshared while a rollback may still want it back.
        for copy in extension.copies:
            self.pools[copy.group].free(copy.source)
        self.num_copies += len(extension.copies)

    def rollback(self, extension: Extension) -> None:
        """Tables, refcounts and promises as before `extend`."""
        blocks = extension.blocks
        for (group, index), copy in zip(extension.replaced, extension.copies):
            self.pools[group].free(copy.target)
            blocks.tables[group][index] = copy.source
        for group in extension.appended:
            self.pools[group].free(blocks.tables[group].pop())
        for group in extension.from_reserve:
            self.pools[group].reserve(1)
            blocks.reserved[group] += 1

    def fork(self, blocks: SequenceBlocks, length: int) -> SequenceBlocks:
        """A second holder of the blocks of the first `length` positions, all that are left of them."""
        fork = self.open(blocks.scope)
        fork.chain = blocks.chain[: length // self.block_size + 1]
        for group, table in enumerate(blocks.tables):
            fork.tables[group] = table[: self.count(length)]
            for block in fork.tables[group]:
                if block >= 0:
                    self.pools[group].share(block)
        return fork

    def truncate(self, blocks: SequenceBlocks, length: int) -> int:
        """Lets go of the blocks after the first `length` positions; of all, where a next token would see one that was released.

        Returns how many positions are still there: `length` or 0.
        """
        if not self.sees_all(blocks, length):
            length = 0
        for group, table in enumerate(blocks.tables):
            while len(table) > self.count(length):
                if (block := table.pop()) >= 0:
                    self.pools[group].free(block)
        del blocks.chain[length // self.block_size + 1 :]
        return length

    def close(self, blocks: SequenceBlocks) -> None:
        self.unreserve(blocks)
        self.truncate(blocks, 0)
        self._live.discard(blocks)

    def sees_all(self, blocks: SequenceBlocks, length: int) -> bool:
        """No block is missing that the token at position `length` would see."""
        return all(table[index] >= 0 for table, seen in zip(blocks.tables, self.seen(length)) for index in seen)

    def seen(self, length: int) -> list[range]:
        """Per group, which blocks of the first `length` positions the token after them sees."""
        return [range(self._first_seen(window, length), self.count(length)) for window in self._windows]

    def _first_seen(self, window: int | None, length: int) -> int:
        return first_seen(window, length, self.block_size)

    def _evicted(self, group: int, block: int) -> None:
        assert self._index is not None, "only the index keeps blocks"
        self._index.evicted(group, block)

    def _allocate(self, extension: Extension, group: int) -> int:
        promised = extension.blocks.reserved[group] > 0
        block = self.pools[group].allocate(reserved=promised)
        if promised:
            extension.blocks.reserved[group] -= 1
            extension.from_reserve.append(group)
        return block

    def check(self) -> None:
        """Every pool's invariants against every live table, and the index's."""
        for group, pool in enumerate(self.pools):
            held = ([block for block in blocks.tables[group] if block >= 0] for blocks in self._live)
            pool.check(held, () if self._index is None else self._index.kept(group))
            assert pool.num_reserved == sum(blocks.reserved[group] for blocks in self._live), "promises don't fit their holders"
        if self._index is not None:
            self._index.check()
