"""The plan is what load does: as many sequences as it says are held at once, and not one more."""

from __future__ import annotations

import octavo
import pytest
from octavo.errors import CapacityError, UnsupportedError
from octavo.runtime.memory_plan import plan_memory


@pytest.mark.parametrize("name", ["paged", "paged_hybrid"])
def test_as_many_as_it_says(paths, op_library, name):
    plan = plan_memory(getattr(paths, name), memory="1 MB", block_size=16)
    count = plan.sequences[128]
    assert count == plan.num_blocks // 8 > 1
    with octavo.load(getattr(paths, name), options=octavo.RuntimeOptions(memory="1 MB", block_size=16, prefix_cache=False)) as model:
        stats = model.stats()
        assert (stats["model_bytes"], stats["cache_bytes"]) == (plan.model_bytes, plan.cache_bytes)
        session = model.begin_session()
        sequences = [session.new_sequence() for _ in range(count)]
        for i, sequence in enumerate(sequences):
            sequence.append([3 + i] * 128)
        assert model.stats()["idle_drops"] == 0
        extra = session.new_sequence()
        extra.append([1] * 128)
        assert model.stats()["idle_drops"] > (0 if name == "paged" else -1)


def test_windows_hold_more_of_long_sequences(paths):
    from octavo.models.spec import CacheGroup, CacheLayer, ModelSpec
    from octavo.runtime.kv.budget import sequences_that_fit

    layers = (CacheLayer(0, 1, 8, 8, "fp32"),)
    assert sequences_that_fit(ModelSpec(10, 4096, layers, (CacheGroup(None),)), 16, 256, 4096) == 1
    assert sequences_that_fit(ModelSpec(10, 4096, layers, (CacheGroup(32),)), 16, 256, 4096) == 256 // 4


def test_text_and_json(paths):
    plan = plan_memory(paths.paged, memory="1 MB", block_size=32)
    assert "sequences at once" in plan.to_text() and f"{plan.num_blocks:,} blocks" in plan.to_text()
    assert plan.to_json()["sequences"][512] == plan.sequences[512]


def test_what_does_not_fit_is_refused_with_the_arithmetic(paths):
    with pytest.raises(CapacityError, match="no block of the cache fits"):
        plan_memory(paths.paged, memory="1 kB", block_size=16)
    with pytest.raises(UnsupportedError, match="no pool"):
        plan_memory(paths.contiguous, memory=None, block_size=16)
