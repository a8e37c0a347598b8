"""Runs `paged` models: one token-flat row for all sequences of a step, caches in blocks, everything bound once.

Row t of a step is one token. Sequence b owns rows [c[b], c[b+1]) of `cumulative_sequence_length`; `slot_mapping.{g}[t]` says where its key
and value go, `block_table.{g}[b]` where the keys it sees lie (docs/reference/graph-interface.md).
"""

from __future__ import annotations

from collections import Counter
from typing import Any
from weakref import WeakSet

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ..custom_ops.contract import CACHE_LAYOUT
from ..errors import ArtifactError, SavedSequenceError
from ..models.spec import ModelSpec
from .executor import Logits, step_error
from .kv.store import BlockStore
from .kv.swap import SwapSpace
from .kv.tables import BlockTables, Extension, SequenceBlocks
from .plan import Limits, SequenceState, StepPlan
from .saved import CacheState

# A block table grows by so many blocks of a sequence at once: it is bound anew for each width.
_TABLE_STEP = 8


class PagedExecutor:
    """An Executor over `PagedAttention`."""

    def __init__(
        self, session: ort.InferenceSession, spec: ModelSpec, *, num_blocks: int, block_size: int, limits: Limits, prefix_cache: bool, swap_bytes: int = 0,
    ) -> None:
        self.vocab_size = spec.vocab_size
        self.max_context: int | None = spec.max_context
        self.max_cached: int | None = num_blocks * block_size
        self.limits = limits
        self._tables = BlockTables([group.window for group in spec.cache_groups], num_blocks, block_size, prefix_cache=prefix_cache)
        self._store = BlockStore(spec, num_blocks, block_size)
        self._swap = SwapSpace(self._tables, self._store, swap_bytes)
        self._feed = _Feed(session, spec, self._store, self.limits, block_size)
        self._block_size, self._layout = block_size, f"paged/{CACHE_LAYOUT}/{block_size}"
        self._num_open = 0
        self._live: WeakSet[SequenceState] = WeakSet()      # for `check`
        self._counters: Counter[str] = Counter()

    def open(self, scope: str | None = None) -> SequenceState:
        return self._opened(SequenceState([], self._tables.open(scope), scope=scope))

    def fork(self, sequence: SequenceState) -> SequenceState:
        sequence.room = 0
        blocks = self._tables.fork(_blocks(sequence), sequence.num_cached)
        self._swap.share(_blocks(sequence), blocks)
        return self._opened(SequenceState(list(sequence.tokens), blocks, sequence.num_cached, sequence.scope))

    def _opened(self, sequence: SequenceState) -> SequenceState:
        self._num_open += 1
        self._live.add(sequence)
        return sequence

    def truncate(self, sequence: SequenceState, length: int) -> None:
        blocks = _blocks(sequence)
        wanted, wanted_aside = min(sequence.num_cached, length), min(self._swap.length(blocks), length)
        sequence.room = 0
        sequence.num_cached = self._tables.truncate(blocks, wanted)
        self._counters["recomputed"] += wanted - sequence.num_cached + wanted_aside - self._swap.truncate(blocks, length)

    def close(self, sequence: SequenceState) -> None:
        self._num_open -= 1
        self._swap.truncate(_blocks(sequence), 0)
        self._tables.close(_blocks(sequence))
        sequence.num_cached = sequence.room = 0

    def adopt(self, sequence: SequenceState, limit: int) -> None:
        assert sequence.num_cached == 0
        sequence.num_cached = self._tables.adopt(_blocks(sequence), sequence.tokens, limit)
        self._counters["hits"] += sequence.num_cached > 0
        self._counters["hit_tokens"] += sequence.num_cached

    def disown(self, sequence: SequenceState) -> None:
        sequence.num_cached = self._tables.truncate(_blocks(sequence), 0)
        sequence.room = 0

    def put_aside(self, sequence: SequenceState) -> None:
        if sequence.num_cached:
            self._swap.put(_blocks(sequence), sequence.num_cached)
        self.disown(sequence)

    def reserve(self, sequence: SequenceState, stop: int) -> bool:
        blocks = _blocks(sequence)
        if not self._tables.reserve(blocks, sequence.num_cached, stop):
            return False
        if self._swap.length(blocks):
            sequence.num_cached = self._swap.bring_back(blocks, sequence.tokens, sequence.num_cached)
        return True

    def unreserve(self, sequence: SequenceState) -> None:
        self._tables.unreserve(_blocks(sequence))

    def save(self, sequence: SequenceState) -> CacheState:
        """Whole blocks: the slots behind a sequence's end may hold what others have left there."""
        blocks = _blocks(sequence)
        if self._swap.length(blocks):
            length, arrays = self._swap.whole(blocks)
        else:
            length, tables = self._tables.whole(blocks, sequence.num_cached)
            arrays = self._store.read(tables)
        return CacheState(self._layout, length, tuple(arrays))

    def restore(self, sequence: SequenceState, state: CacheState) -> None:
        assert sequence.num_cached == 0
        if state.layout != self._layout:
            self._counters["recomputed"] += state.length
            return
        blocks = _blocks(sequence)
        whole = state.length // self._block_size * self._block_size
        self._tables.place(blocks, whole)
        tables = [[block for block in table if block >= 0] for table in blocks.tables]
        if whole != state.length or [(array.dtype, array.shape) for array in state.arrays] != self._store.shapes(tables):
            self._tables.truncate(blocks, 0)
            raise SavedSequenceError("the saved cache is none of this model's", hint="compute the sequence again from its tokens")
        self._store.write(tables, state.arrays)
        sequence.num_cached = state.length
        self._tables.settle(blocks, sequence.tokens, state.length)

    def execute(self, plan: StepPlan) -> list[Logits]:
        extensions: list[Extension] = []
        growing = [part for part in plan.slices if part.stop > part.sequence.room]     # of streams, few
        try:
            for part in growing:
                extensions.append(self._tables.extend(_blocks(part.sequence), part.start, part.stop))
            if copies := [copy for extension in extensions for copy in extension.copies]:
                self._store.copy(copies)
            logits = self._feed.run(plan)
        except BaseException as error:
            # What the step has written lies in slots after each sequence's length, or in fresh copies: nobody sees it.
            for extension in reversed(extensions):
                self._tables.rollback(extension)
            if isinstance(error, Exception):
                raise step_error(error) from error
            raise
        for extension in extensions:
            self._tables.commit(extension)
        rows, end = [], 0
        for sequence, _, stop, first_row in plan.slices:
            sequence.num_cached = stop
            begin, end = end, end + stop - first_row
            rows.append(logits[begin:end])
        for part in growing:
            self._tables.settle(_blocks(part.sequence), part.sequence.tokens, part.stop)
            part.sequence.room = self._tables.room(_blocks(part.sequence), part.stop)
        return rows

    def stats(self) -> dict[str, int]:
        pools = self._tables.pools
        return {
            "blocks_total": sum(pool.num_blocks for pool in pools),
            "blocks_free": sum(pool.num_free for pool in pools),
            "blocks_cached": sum(pool.num_cached for pool in pools),
            "blocks_used": sum(pool.num_used for pool in pools),
            "blocks_shared": sum(pool.num_shared for pool in pools),
            "blocks_reserved": sum(pool.num_reserved for pool in pools),
            "block_copies": self._tables.num_copies,
            "prefix_hits": self._counters["hits"],
            "prefix_hit_tokens": self._counters["hit_tokens"],
            "prefix_evictions": sum(pool.num_evicted for pool in pools),
            "tokens_recomputed": self._counters["recomputed"],
            "swaps_out": self._swap.num_out,
            "swaps_in": self._swap.num_in,
            "swap_bytes": self._swap.nbytes,
            "cache_bytes": self._store.nbytes,
            "sequences": self._num_open,
        }

    def check(self) -> None:
        self._tables.check()
        self._swap.check()
        for sequence in self._live:
            roomy = range(sequence.num_cached, sequence.room)
            assert all(self._tables.can_write(_blocks(sequence), position) for position in roomy), "a sequence has room in blocks that are not its own"


def _blocks(sequence: SequenceState) -> SequenceBlocks:
    assert isinstance(sequence.cache, SequenceBlocks)
    return sequence.cache


class _Feed:
    """The session's inputs and outputs: caches bound once, small integers in buffers of the largest size, rebound when a shape changes."""

    def __init__(self, session: ort.InferenceSession, spec: ModelSpec, store: BlockStore, limits: Limits, block_size: int) -> None:
        assert limits.max_tokens is not None
        T, B, M = limits.max_tokens, limits.max_sequences, -(-spec.max_context // block_size)
        self._session, self._block_size, self._vocab_size = session, block_size, spec.vocab_size
        self._groups = range(len(spec.cache_groups))
        sizes: dict[str, tuple[int, type]] = {
            "input_ids": (T, np.int64), "position_ids": (T, np.int64), "cumulative_sequence_length": (B + 1, np.int32),
            "past_seqlens": (B, np.int32), "logit_rows": (T, np.int64), "parent": (T, np.int32),
            **{f"slot_mapping.{g}": (T, np.int32) for g in self._groups},
            **{f"block_table.{g}": (B * (M + _TABLE_STEP), np.int32) for g in self._groups},
        }
        caches = store.ort_values()
        wanted = {port.name for port in session.get_inputs()}
        if unknown := wanted - sizes.keys() - caches.keys():
            raise ArtifactError(f"the graph has an input {min(unknown)!r} that no paged decoder has", hint="compile the model again")
        self._buffers: dict[str, NDArray[Any]] = {name: np.zeros(size, dtype) for name, (size, dtype) in sizes.items() if name in wanted}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._tables: list[dict[int, list[int]]] = [{} for _ in self._groups]   # rows of each block table as they were written
        self._decoding = 0      # sequences of the last step, if each had one token
        self._io = session.io_binding()
        for name, value in caches.items():
            self._io.bind_ortvalue_input(name, value)
        self._caches = caches   # the binding doesn't keep the arrays alive
        self._logits: Logits = np.empty((0, spec.vocab_size), np.float32)

    def run(self, plan: StepPlan) -> Logits:
        """One step; logits (num_rows, V), overwritten by the next."""
        self._fill(plan)
        rows = max(plan.num_rows, 1)
        self._bind_logits(rows)
        self._session.run_with_iobinding(self._io)
        return self._logits[: plan.num_rows]

    def _fill(self, plan: StepPlan) -> None:
        if plan.num_tokens == len(plan.slices) == plan.num_rows:
            self._fill_decode(plan)
        else:
            self._fill_any(plan)
        for group in self._groups:
            self._put_table([part.sequence.cache.tables[group] for part in plan.slices], group)

    def _fill_decode(self, plan: StepPlan) -> None:
        """One token of each sequence: what most steps are, and in a list NumPy would take longer than the loop."""
        B, P = len(plan.slices), self._block_size
        positions = [part.start for part in plan.slices]
        self._put("input_ids", [part.sequence.tokens[part.start] for part in plan.slices], (1, B))
        self._put("position_ids", positions, (1, B))
        self._put("past_seqlens", positions, (B,))
        if self._decoding != B:
            self._put("cumulative_sequence_length", np.arange(B + 1), (B + 1,))
            self._put("parent", np.full(B, -1), (B,))
            self._put("logit_rows", np.arange(B), (B,))
            self._decoding = B
        for group in self._groups:
            slots = [part.sequence.cache.tables[group][at // P] * P + at % P for part, at in zip(plan.slices, positions)]
            self._put(f"slot_mapping.{group}", slots, (B,))

    def _fill_any(self, plan: StepPlan) -> None:
        self._decoding = 0
        T, B, P = plan.num_tokens, len(plan.slices), self._block_size
        lengths = np.array([part.stop - part.start for part in plan.slices])
        starts = np.concatenate([[0], np.cumsum(lengths)])
        positions = np.concatenate([np.arange(part.start, part.stop) for part in plan.slices])
        parent = np.arange(-1, T - 1)
        parent[starts[:-1]] = -1
        rows = np.concatenate([np.arange(end - part.num_rows, end) for part, end in zip(plan.slices, starts[1:])])
        self._put("input_ids", np.concatenate([part.sequence.tokens[part.start : part.stop] for part in plan.slices]), (1, T))
        self._put("position_ids", positions, (1, T))
        self._put("cumulative_sequence_length", starts, (B + 1,))
        self._put("past_seqlens", [part.start for part in plan.slices], (B,))
        self._put("parent", parent, (T,))
        # A step that wants no logits still computes one row: a graph with nothing to gather is a case that no kernel needs to know.
        self._put("logit_rows", rows if len(rows) else np.array([T - 1]), (max(len(rows), 1),))
        for group in self._groups:
            blocks = np.concatenate([
                np.array(_blocks(part.sequence).tables[group][part.start // P : -(-part.stop // P)])[np.arange(part.start, part.stop) // P - part.start // P]
                for part in plan.slices
            ])
            self._put(f"slot_mapping.{group}", blocks * P + positions % P, (T,))

    def _put_table(self, tables: list[list[int]], group: int) -> None:
        """The block table, as wide as a multiple of _TABLE_STEP; a row that stands there already is left."""
        name = f"block_table.{group}"
        width = -(-max(map(len, tables)) // _TABLE_STEP) * _TABLE_STEP
        rows = self._buffers[name][: len(tables) * width].reshape(len(tables), width)
        written = self._tables[group]
        if self._bind(name, rows):
            written.clear()
        for index, table in enumerate(tables):
            if written.get(index) != table:
                rows[index, : len(table)] = table
                rows[index, len(table) :] = -1
                written[index] = table.copy()

    def _put(self, name: str, values: NDArray[np.int64] | list[int], shape: tuple[int, ...]) -> None:
        buffer = self._buffers.get(name)
        if buffer is not None:      # else the graph has no use for it (position_ids, where attention rotates by itself)
            buffer[: len(values)] = values
            self._bind(name, buffer[: len(values)].reshape(shape))

    def _bind(self, name: str, view: NDArray[Any]) -> bool:
        """Binds the beginning of a buffer, unless it is bound in this shape already; whether it was not."""
        if self._shapes.get(name) == view.shape:
            return False
        self._io.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(view))
        self._shapes[name] = view.shape
        return True

    def _bind_logits(self, rows: int) -> None:
        """Into a buffer of our own: an output bound by device alone keeps the first step's shape."""
        if rows > len(self._logits):
            self._logits = np.empty((1 << (rows - 1).bit_length(), self._vocab_size), np.float32)
        elif self._shapes.get("logits") == (rows,):
            return
        self._io.bind_output("logits", "cpu", 0, np.float32, [rows, self._vocab_size], self._logits.ctypes.data)
        self._shapes["logits"] = (rows,)
