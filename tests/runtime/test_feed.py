"""What a step's inputs are, however the steps before it left the buffers."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from octavo.models.spec import CacheGroup, CacheLayer, ModelSpec
from octavo.runtime.kv.store import BlockStore
from octavo.runtime.kv.tables import SequenceBlocks
from octavo.runtime.paged import _Feed
from octavo.runtime.plan import Limits, SequenceState, Slice, StepPlan

P, CONTEXT, LIMITS = 16, 400, Limits(4, 64)
SPEC = ModelSpec(
    vocab_size=7, max_context=CONTEXT, cache_groups=(CacheGroup(window=None), CacheGroup(window=20)),
    cache_layers=(CacheLayer(group=0, kv_heads=1, head_size=4, value_size=4, cache="fp32"), CacheLayer(1, 1, 4, 4, "fp32")),
)
NAMES = ("input_ids", "position_ids", "cumulative_sequence_length", "past_seqlens", "logit_rows", "parent", "slot_mapping.0", "slot_mapping.1",
         "block_table.0", "block_table.1")


class Recorder:
    """A session that keeps what it was given to run with, and how often something was bound."""

    def __init__(self) -> None:
        self.bound, self.inputs, self.binds = {}, {}, 0

    def get_inputs(self):
        return [SimpleNamespace(name=name) for name in (*NAMES, "kv.0.key", "kv.0.value", "kv.1.key", "kv.1.value")]

    def io_binding(self):
        return self

    def bind_ortvalue_input(self, name, value):
        self.bound[name] = value
        self.binds += 1

    def bind_output(self, *_):
        self.binds += 1

    def run_with_iobinding(self, io):
        self.inputs = {name: self.bound[name].numpy() for name in NAMES}


def expected(plan):
    """Token by token, as docs/reference/graph-interface.md says it."""
    out = {name: [] for name in NAMES}
    out["cumulative_sequence_length"].append(0)
    row = 0
    for part in plan.slices:
        for position in range(part.start, part.stop):
            out["input_ids"].append(part.sequence.tokens[position])
            out["position_ids"].append(position)
            out["parent"].append(-1 if position == part.start else row - 1)
            for g in (0, 1):
                out[f"slot_mapping.{g}"].append(part.sequence.cache.tables[g][position // P] * P + position % P)
            if position >= part.first_row:
                out["logit_rows"].append(row)
            row += 1
        out["cumulative_sequence_length"].append(row)
        out["past_seqlens"].append(part.start)
    out["logit_rows"] = out["logit_rows"] or [row - 1]
    return out


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32))
def test_inputs_say_what_the_plan_says(seed):
    """Over prompts, decode steps and mixtures of them, tables that grow, are copied or released; rebinding only where a shape changes."""
    rng = np.random.default_rng(seed)
    session = Recorder()
    feed = _Feed(session, SPEC, BlockStore(SPEC, 4, P), LIMITS, P)
    sequences = [SequenceState(rng.integers(0, 7, CONTEXT).tolist(), SequenceBlocks([[], []], [0, 0])) for _ in range(6)]
    for _ in range(30):
        chosen = rng.permutation(6)[: rng.integers(1, 5)]
        decode = rng.random() < 0.6
        parts = []
        for sequence in (sequences[i] for i in chosen):
            start = sequence.num_cached
            stop = min(CONTEXT, start + (1 if decode else int(rng.integers(1, 17))))
            for table in sequence.cache.tables:
                while len(table) * P < stop:
                    table.append(int(rng.integers(0, 1000)))
            if rng.random() < 0.2:
                sequence.cache.tables[0][int(rng.integers(len(sequence.cache.tables[0])))] = int(rng.integers(0, 1000))
            if start > 40:
                sequence.cache.tables[1][0] = -1
            if stop > start:
                parts.append(Slice(sequence, start, stop, stop - 1 if decode else int(rng.integers(start, stop + 1))))
        if not parts:
            continue
        plan = StepPlan(tuple(parts))
        before, shapes = session.binds, {name: value.shape for name, value in session.inputs.items()}
        feed.run(plan)
        for name, values in expected(plan).items():
            if not name.startswith("block_table"):
                np.testing.assert_array_equal(session.inputs[name].ravel(), values, err_msg=name)
        for g in (0, 1):
            for row, part in zip(session.inputs[f"block_table.{g}"], plan.slices, strict=True):
                table = part.sequence.cache.tables[g]
                np.testing.assert_array_equal(row[: len(table)], table)
                assert (row[len(table) :] == -1).all()
        if shapes == {name: value.shape for name, value in session.inputs.items()}:
            assert session.binds == before
        for part in parts:
            part.sequence.num_cached = part.stop
