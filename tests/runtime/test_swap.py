"""Caches put aside and copied back: nothing is computed twice, the bits are the same, and the bytes stay within what was given."""

from __future__ import annotations

import numpy as np
import octavo
import pytest
from octavo.errors import OptionError

RNG = np.random.default_rng(17)
PROMPTS = [RNG.integers(3, 300, n).tolist() for n in (30, 9, 41, 17, 5, 26)]
PARAMS = octavo.SamplingParams(seed=3, top_p=0.9, max_tokens=40, ignore_eos=True, logprobs=2)
NAMES = ("paged", "paged_fp16", "paged_int8", "paged_hybrid")


@pytest.fixture(params=NAMES)
def name(request, op_library):
    return request.param


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_preempted_requests_are_not_computed_again(tools, paths, name, prefix_cache):
    with tools.small_paged(paths, 40, name=name, prefix_cache=False) as ample:
        expected = [ample.generate([prompt], PARAMS)[0].completions for prompt in PROMPTS]
        wanted = ample.stats()["tokens"]
    with tools.small_paged(paths, 9, name=name, prefix_cache=prefix_cache, swap_memory="8 MiB") as model:
        got = [result.completions for result in model.generate(PROMPTS, PARAMS)]
        stats = model.stats()
        assert got == expected
        assert stats["preemptions"] > 0 and stats["swaps_out"] > 0 and stats["swap_bytes"] == 0
        if not prefix_cache:
            assert stats["tokens"] == wanted and stats["swaps_in"] == stats["swaps_out"]
        tools.check_idle(model)


def test_an_idle_sequence_comes_back(tools, paths, name):
    """Grown, forked, truncated and saved while it holds no block."""
    ids = PROMPTS[2] + PROMPTS[0]
    with tools.small_paged(paths, 24, name=name, prefix_cache=False) as ample:
        rows = ample.predict(ids)
    with tools.small_paged(paths, 6, name=name, prefix_cache=False, swap_memory="8 MiB") as model:
        session = model.begin_session()
        held = session.new_sequence()
        held.append(ids[:52])
        tokens = model.stats()["tokens"]

        def push_out():
            other = session.new_sequence()
            other.append([7] * 90)
            other.close()
            return 90

        tokens += push_out()
        assert (model.stats()["idle_drops"], model.stats()["swaps_out"], model.stats()["blocks_used"]) == (1, 1, 0)
        once = model.stats()["swap_bytes"]
        fork = held.fork()
        assert model.stats()["swap_bytes"] == once > 0, "a fork shares it"
        fork.truncate(50)
        third = held.fork()
        third.truncate(45)      # a block less than was put aside
        np.testing.assert_array_equal(held.append(ids[52:60], rows="all"), rows[52:60])
        np.testing.assert_array_equal(fork.append(ids[50:53], rows="all"), rows[50:53])
        assert model.stats()["tokens"] == tokens + 8 + 3, "nothing was computed twice"
        fork.close()
        np.testing.assert_array_equal(third.append(ids[45:47], rows="all"), rows[45:47])
        third.close()
        push_out()
        held.close()
        assert model.stats()["swap_bytes"] == 0
        tools.check_idle(model)


def test_what_is_put_aside_can_be_saved(tools, paths, name, tmp_path):
    ids = PROMPTS[2] + PROMPTS[0]
    with tools.small_paged(paths, 6, name=name, prefix_cache=False, swap_memory="8 MiB") as model:
        session = model.begin_session()
        rows = model.predict(ids)
        for length in (3, 16, 37, 52):
            held = session.new_sequence()
            held.append(ids[:52])
            session.new_sequence().append([7] * 90)
            held.truncate(length)
            held.save(tmp_path / "a.seq")
            held.close()
            restored = session.restore(tmp_path / "a.seq")
            np.testing.assert_array_equal(restored.append(ids[length : length + 4], rows="all"), rows[length : length + 4])
            restored.close()
        tools.check_idle(model)


def test_before_a_window_it_is_computed_again(tools, paths, op_library):
    with tools.small_paged(paths, 8, name="paged_hybrid", prefix_cache=False, swap_memory="8 MiB") as model:
        rows = model.predict(PROMPTS[2] + PROMPTS[0])
        held = model.begin_session().new_sequence()
        held.append((PROMPTS[2] + PROMPTS[0])[:64])
        model.begin_session().new_sequence().append([7] * 110)
        assert model.stats()["swaps_out"] == 1
        held.truncate(30)
        assert (model.stats()["tokens_recomputed"], model.stats()["swap_bytes"]) == (30, 0)
        np.testing.assert_array_equal(held.append((PROMPTS[2] + PROMPTS[0])[30:33], rows="all"), rows[30:33])


def test_what_lay_behind_the_window_is_not_found_by_others(tools, paths, op_library):
    """It was not put aside, so that after coming back nobody may take its place in the table for what it was."""
    ids = PROMPTS[2] + PROMPTS[0]
    with tools.small_paged(paths, 8, name="paged_hybrid", swap_memory="8 MiB") as model:
        rows = model.predict(ids[:36])
        session = model.begin_session()
        held = session.new_sequence()
        held.append(ids[:64])
        session.new_sequence().append([7] * 120)        # every block, those kept for prefixes too
        held.append(ids[64:65])
        assert model.stats()["swaps_in"] == 1
        for length in (17, 20, 33, 36):
            np.testing.assert_array_equal(session.new_sequence().append(ids[:length]), rows[length - 1 : length])


def test_too_little_room_computes_again(tools, paths, op_library):
    """Never more bytes than were given; tokens are the same."""
    with tools.small_paged(paths, 40, prefix_cache=False) as ample:
        expected = [ample.generate([prompt], PARAMS)[0].completions for prompt in PROMPTS]
    for swap in (None, "1 kB", "20 kB"):
        with tools.small_paged(paths, 9, prefix_cache=False, swap_memory=swap) as model:
            assert [result.completions for result in model.generate(PROMPTS, PARAMS)] == expected
            assert (model.stats()["swaps_out"] > 0) == (swap == "20 kB")
            assert any(d.feature == "swap" and d.value == ("off" if swap is None else "on") for d in model.decisions)


def test_memory_that_is_not_there_computes_again(tools, paths, op_library, monkeypatch):
    with tools.small_paged(paths, 9, prefix_cache=False, swap_memory="8 MiB") as model:
        def none(tables):
            raise MemoryError

        monkeypatch.setattr(model.engine.executor._store, "read", none)
        results = model.generate(PROMPTS, PARAMS)
        assert all(result.completions[0].finish_reason == "length" for result in results)
        assert model.stats()["preemptions"] > 0 == model.stats()["swaps_out"]
        tools.check_idle(model)


@pytest.mark.parametrize("wrong", ["much", -1, True])
def test_it_is_a_size(wrong):
    with pytest.raises(OptionError, match="swap_memory"):
        octavo.RuntimeOptions(swap_memory=wrong)
