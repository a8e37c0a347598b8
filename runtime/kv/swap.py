"""Caches put aside: what a sequence's blocks held, in memory beside the pool, until the sequence has blocks again.

Their sum is bounded by a number of bytes. What does not fit is not kept, and computed again from its tokens. A fork shares what was put aside.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from numpy.typing import NDArray

from .store import BlockStore
from .tables import BlockTables, SequenceBlocks


@dataclass(frozen=True, eq=False)
class Aside:
    """The first `length` positions. `indices[group]` are the places in the table of the blocks that `arrays` (of every layer) hold."""

    length: int
    indices: tuple[list[int], ...]
    arrays: list[NDArray[Any]]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)


class SwapSpace:
    """`limit` bytes of caches of sequences that hold no blocks."""

    def __init__(self, tables: BlockTables, store: BlockStore, limit: int) -> None:
        self.num_out = self.num_in = 0
        self._tables, self._store, self._limit = tables, store, limit
        self._held: dict[SequenceBlocks, Aside] = {}

    @property
    def nbytes(self) -> int:
        """Bytes in use; what forks share counts once."""
        return sum({id(aside.arrays): aside.nbytes for aside in self._held.values()}.values())

    def length(self, blocks: SequenceBlocks) -> int:
        """Positions that are put aside."""
        return self._held[blocks].length if blocks in self._held else 0

    def put(self, blocks: SequenceBlocks, length: int) -> bool:
        """Copies what lies in the blocks of the first `length` positions; False where that is too much."""
        assert blocks not in self._held
        indices = tuple([index for index, block in enumerate(table) if block >= 0] for table in blocks.tables)
        if self.nbytes + self._store.size(list(map(len, indices))) > self._limit:
            return False
        try:
            arrays = self._store.read([[table[index] for index in places] for table, places in zip(blocks.tables, indices)])
        except MemoryError:
            return False
        self._held[blocks] = Aside(length, indices, arrays)
        self.num_out += 1
        return True

    def bring_back(self, blocks: SequenceBlocks, tokens: Sequence[int], start: int) -> int:
        """Writes what was put aside into blocks promised for it, from position `start` on; before it lies what is cached already.

        Returns how many positions are cached now.
        """
        aside = self._held[blocks]
        if aside.length > start:
            first = start // self._tables.block_size
            stop = self._tables.count(aside.length)     # a truncated one has more
            wanted = [slice(bisect_left(places, first), bisect_left(places, stop)) for places in aside.indices]
            extension = self._tables.extend(blocks, start, aside.length)
            try:
                targets = [[table[index] for index in places[part]] for table, places, part in zip(blocks.tables, aside.indices, wanted)]
                self._store.write(targets, self._store.pick(aside.arrays, wanted))
            except BaseException:
                self._tables.rollback(extension)
                raise
            self._tables.commit(extension)
            for group, (table, places) in enumerate(zip(blocks.tables, aside.indices)):
                for index in set(range(first, len(table))) - set(places):
                    self._tables.release(blocks, group, index)      # it lies behind the window
            self._tables.settle(blocks, tokens, aside.length)
            self.num_in += 1
        del self._held[blocks]
        return max(start, aside.length)

    def truncate(self, blocks: SequenceBlocks, length: int) -> int:
        """Keeps the first `length` positions, or none where a window has let go of what a token after them would see. Returns how many."""
        aside = self._held.get(blocks)
        if aside is None:
            return 0
        if aside.length > length:
            seen = zip(self._tables.seen(length), aside.indices)
            if not length or not all(set(wanted) <= set(places) for wanted, places in seen):
                del self._held[blocks]
                return 0
            self._held[blocks] = replace(aside, length=length)
        return self.length(blocks)

    def share(self, blocks: SequenceBlocks, fork: SequenceBlocks) -> None:
        if blocks in self._held:
            self._held[fork] = self._held[blocks]

    def whole(self, blocks: SequenceBlocks) -> tuple[int, list[NDArray[Any]]]:
        """As `BlockTables.whole`, with copies of the contents."""
        aside = self._held[blocks]
        length = aside.length // self._tables.block_size * self._tables.block_size
        seen = self._tables.seen(length)
        if not all(set(wanted) <= set(places) for wanted, places in zip(seen, aside.indices)):
            length, seen = 0, self._tables.seen(0)
        chosen = [[places.index(index) for index in wanted] for wanted, places in zip(seen, aside.indices)]
        return length, self._store.pick(aside.arrays, chosen)

    def check(self) -> None:
        """Within the limit, and of sequences alone that hold no blocks."""
        assert self.nbytes <= self._limit, "more is put aside than there is room for"
        assert not any(any(blocks.tables) for blocks in self._held), "what is put aside is in the pool as well"
