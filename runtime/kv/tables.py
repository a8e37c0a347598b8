"""Block tables: which blocks each sequence's positions lie in, over all KV groups; growth, copy-on-write, fork, truncate. Integers only.

Position p of a sequence lies in slot p % P of block `tables[group][p // P]`. A block that two sequences hold is never written: the writer
gets a copy of its own first. Growth is a transaction: `extend`, then `commit` once the step has succeeded or `rollback` if not.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

from .blocks import BlockPool


@dataclass(eq=False)
class SequenceBlocks:
    """One sequence's blocks: `tables[group][i]` covers positions [i·P, (i+1)·P). `reserved[group]` blocks are promised to it."""

    tables: list[list[int]]
    reserved: list[int]


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
    """All sequences' tables over one pool per KV group."""

    def __init__(self, num_groups: int, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.pools = tuple(BlockPool(num_blocks) for _ in range(num_groups))
        self.num_copies = 0
        self._live: weakref.WeakSet[SequenceBlocks] = weakref.WeakSet()

    def open(self) -> SequenceBlocks:
        blocks = SequenceBlocks([[] for _ in self.pools], [0] * len(self.pools))
        self._live.add(blocks)
        return blocks

    def count(self, length: int) -> int:
        """Blocks that `length` positions fill, the last perhaps in part."""
        return -(-length // self.block_size)

    def need(self, blocks: SequenceBlocks, start: int, stop: int) -> list[int]:
        """Per group, blocks that writing positions [start, stop) takes: new ones at the end, and a copy of each shared one."""
        first, last = start // self.block_size, self.count(stop)
        return [
            max(0, last - len(table)) + sum(pool.is_shared(block) for block in table[first:last])
            for pool, table in zip(self.pools, blocks.tables)
        ]

    def reserve(self, blocks: SequenceBlocks, start: int, stop: int) -> bool:
        """Promises what writing positions [start, stop) takes, in place of what was promised before. All groups or none (False)."""
        self.unreserve(blocks)
        wanted = self.need(blocks, start, stop)
        if not all(pool.can_reserve(count) for pool, count in zip(self.pools, wanted)):
            return False
        for group, count in enumerate(wanted):
            self.pools[group].reserve(count)
            blocks.reserved[group] = count
        return True

    def unreserve(self, blocks: SequenceBlocks) -> None:
        for group, count in enumerate(blocks.reserved):
            self.pools[group].unreserve(count)
            blocks.reserved[group] = 0

    def extend(self, blocks: SequenceBlocks, start: int, stop: int) -> Extension:
        """Makes positions [start, stop) writable. Raises CapacityError and changes nothing where the pool has no blocks left."""
        extension = Extension(blocks)
        try:
            for group, table in enumerate(blocks.tables):
                for index in range(start // self.block_size, self.count(stop)):
                    assert index <= len(table), "positions before start are not mapped"
                    if index == len(table):
                        table.append(self._allocate(extension, group))
                        extension.appended.append(group)
                    elif self.pools[group].is_shared(table[index]):
                        target = self._allocate(extension, group)
                        extension.copies.append(Copy(group, table[index], target))
                        extension.replaced.append((group, index))
                        table[index] = target
        except BaseException:
            self.rollback(extension)
            raise
        return extension

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
        """A second holder of the blocks of the first `length` positions."""
        fork = self.open()
        for group, table in enumerate(blocks.tables):
            fork.tables[group] = table[: self.count(length)]
            for block in fork.tables[group]:
                self.pools[group].share(block)
        return fork

    def truncate(self, blocks: SequenceBlocks, length: int) -> None:
        """Lets go of the blocks after the first `length` positions."""
        for group, table in enumerate(blocks.tables):
            while len(table) > self.count(length):
                self.pools[group].free(table.pop())

    def close(self, blocks: SequenceBlocks) -> None:
        self.unreserve(blocks)
        self.truncate(blocks, 0)
        self._live.discard(blocks)

    def _allocate(self, extension: Extension, group: int) -> int:
        promised = extension.blocks.reserved[group] > 0
        block = self.pools[group].allocate(reserved=promised)
        if promised:
            extension.blocks.reserved[group] -= 1
            extension.from_reserve.append(group)
        return block

    def check(self) -> None:
        """Every pool's invariants against every live table."""
        for group, pool in enumerate(self.pools):
            pool.check(blocks.tables[group] for blocks in self._live)
            assert pool.num_reserved == sum(blocks.reserved[group] for blocks in self._live), "promises don't fit their holders"
