"""The block pool: who holds which block, in integers. No arrays, no sequences, no policy.

A block is used by as many holders as its reference count says, or cached (nobody holds it, and what it holds may be wanted again), or free.
`reserve` promises blocks to a holder-to-be, so that an admitted request never finds the pool empty halfway; a cached block is as good for that
as a free one, since it can be taken: the one that nobody has wanted for longest goes first.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable

from ...errors import CapacityError


class BlockPool:
    """`num_blocks` blocks 0 … num_blocks − 1 of one KV group. `evicted` is told of a cached block that is taken for something else."""

    def __init__(self, num_blocks: int, evicted: Callable[[int], None] = lambda block: None) -> None:
        assert num_blocks >= 1, num_blocks
        self.num_blocks = num_blocks
        self.num_reserved = 0
        self.num_evicted = 0
        self._evicted = evicted
        self._refcounts = [0] * num_blocks
        # Taken from the end: low blocks first, and a block just freed, warm in the cache, is the next to go.
        self._free = list(range(num_blocks - 1, -1, -1))
        # Blocks whose contents are kept for others; those of them that nobody holds, the longest unwanted first.
        self._kept: set[int] = set()
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds and that hold nothing."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks that nobody holds, kept for what they hold."""
        return len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free - self.num_cached

    @property
    def num_shared(self) -> int:
        """Blocks with more than one holder."""
        return sum(1 for count in self._refcounts if count > 1)

    @property
    def num_available(self) -> int:
        """Blocks that can still be promised or taken."""
        return self.num_free + self.num_cached - self.num_reserved

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
        """A block with one holder: a free one, or what a cached one was. CapacityError where none is left that is not promised to others."""
        if reserved:
            assert self.num_reserved > 0
            self.num_reserved -= 1
        elif self.num_available <= 0:
            raise CapacityError(
                f"the block pool is full: {self.num_used} of {self.num_blocks} blocks used, {self.num_reserved} promised",
                hint="close sequences, or load the model with more memory=",
            )
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            self._kept.remove(block)
            self.num_evicted += 1
            self._evicted(block)
        self._refcounts[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more holder of a used block, or the first again of a cached one (which must not be promised to others)."""
        if block in self._cached:
            assert self.num_available > 0
            del self._cached[block]
        else:
            assert self._refcounts[block] > 0, block
        self._refcounts[block] += 1

    def free(self, block: int) -> None:
        """One holder less; without any, the block is free, or cached where its contents are kept."""
        assert self._refcounts[block] > 0, block
        self._refcounts[block] -= 1
        if self._refcounts[block] == 0:
            if block in self._kept:
                self._cached[block] = None
            else:
                self._free.append(block)

    def keep(self, block: int) -> None:
        """What a used block holds is wanted after its holders have gone."""
        assert self._refcounts[block] > 0 and block not in self._kept, block
        self._kept.add(block)

    def forget(self, block: int) -> None:
        """What a kept block holds is wanted no more."""
        self._kept.remove(block)
        if block in self._cached:
            del self._cached[block]
            self._free.append(block)

    def is_kept(self, block: int) -> bool:
        return block in self._kept

    def is_cached(self, block: int) -> bool:
        return block in self._cached

    def is_shared(self, block: int) -> bool:
        assert self._refcounts[block] > 0, block
        return self._refcounts[block] > 1

    def check(self, holdings: Iterable[Iterable[int]], kept: Iterable[int] = ()) -> None:
        """The invariants, given every holder's blocks and those kept: free + cached + used == total, refcounts explained, promises covered."""
        held = Counter(block for blocks in holdings for block in blocks)
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free), "a block is free twice"
        assert self.num_free + self.num_cached + sum(1 for count in self._refcounts if count > 0) == self.num_blocks, "free + cached + used != total"
        assert not free & cached and all(self._refcounts[block] == 0 for block in free | cached), "a free block has holders"
        assert cached == {block for block in self._kept if self._refcounts[block] == 0}, "cached blocks are those kept without a holder"
        assert self._kept == set(kept), "kept blocks don't fit what keeps them"
        assert 0 <= self.num_reserved <= self.num_free + self.num_cached, "more blocks promised than free"
        assert {block: count for block, count in enumerate(self._refcounts) if count} == dict(held), "refcounts don't fit the holders"
