"""The block pool: who holds which block, in integers. No arrays, no sequences, no policy.

A block is free, or used by as many holders as its reference count says. `reserve` promises free blocks to a holder-to-be, so that an
admitted request never finds the pool empty halfway.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from ...errors import CapacityError


class BlockPool:
    """`num_blocks` blocks 0 … num_blocks − 1 of one KV group."""

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks >= 1, num_blocks
        self.num_blocks = num_blocks
        self.num_reserved = 0
        self._refcounts = [0] * num_blocks
        # Taken from the end: low blocks first, and a block just freed, warm in the cache, is the next to go.
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, reserved ones included."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    @property
    def num_shared(self) -> int:
        """Blocks with more than one holder."""
        return sum(1 for count in self._refcounts if count > 1)

    @property
    def num_available(self) -> int:
        """Blocks that can still be promised or taken."""
        return self.num_free - self.num_reserved

    def can_reserve(self, count: int) -> bool:
        return count <= self.num_available

    def reserve(self, count: int) -> None:
        """Promises `count` blocks; `allocate(reserved=True)` takes them one by one."""
        assert 0 <= count <= self.num_available, (count, self.num_available)
        self.num_reserved += count

    def unreserve(self, count: int) -> None:
        assert 0 <= count <= self.num_reserved, (count, self.num_reserved)
        self.num_reserved -= count

    def allocate(self, *, reserved: bool = False) -> int:
        """A free block, now with one holder. Raises CapacityError where none is left that is not promised to others."""
        if reserved:
            assert self.num_reserved > 0
            self.num_reserved -= 1
        elif self.num_available <= 0:
            raise CapacityError(
                f"the block pool is full: {self.num_used} of {self.num_blocks} blocks used, {self.num_reserved} promised",
                hint="close sequences, or load the model with more memory=",
            )
        block = self._free.pop()
        self._refcounts[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more holder of a used block."""
        assert self._refcounts[block] > 0, block
        self._refcounts[block] += 1

    def free(self, block: int) -> None:
        """One holder less; without any, the block is free."""
        assert self._refcounts[block] > 0, block
        self._refcounts[block] -= 1
        if self._refcounts[block] == 0:
            self._free.append(block)

    def is_shared(self, block: int) -> bool:
        assert self._refcounts[block] > 0, block
        return self._refcounts[block] > 1

    def check(self, holdings: Iterable[Iterable[int]]) -> None:
        """The invariants, given every holder's blocks: free + used == total, each refcount explained, promises covered."""
        held = Counter(block for blocks in holdings for block in blocks)
        free = set(self._free)
        assert len(free) == len(self._free), "a block is free twice"
        assert self.num_free + sum(1 for count in self._refcounts if count > 0) == self.num_blocks, "free + used != total"
        assert all(self._refcounts[block] == 0 for block in free), "a free block has holders"
        assert 0 <= self.num_reserved <= self.num_free, "more blocks promised than free"
        assert {block: count for block, count in enumerate(self._refcounts) if count} == dict(held), "refcounts don't fit the holders"
