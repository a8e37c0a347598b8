"""Cached prefixes and windows: the same bits as computed anew, found by tokens and scope alone, given up where room lacks."""

from __future__ import annotations

import numpy as np
import octavo
import pytest
from octavo.errors import OptionError

RNG = np.random.default_rng(5)
SHARED = RNG.integers(3, 300, 40).tolist()      # two blocks of 16 and a half
TAIL = RNG.integers(3, 300, 9).tolist()
GREEDY = octavo.SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture(params=["paged", "paged_fp16", "paged_int8", "paged_hybrid"])
def model(request, tools, paths, op_library):
    with tools.small_paged(paths, 24, name=request.param) as model:
        yield model
        tools.check_idle(model)


def anew(model, ids):
    """The last row, of a sequence that finds nothing."""
    return model.predict(ids)[-1:]


def computed(model, work):
    before = model.stats()["tokens"]
    result = work()
    return result, model.stats()["tokens"] - before


def test_a_hit_has_the_bits_of_none(model):
    expected = anew(model, SHARED + TAIL)
    session = model.begin_session()
    session.new_sequence().append(SHARED)       # dropped at once
    got, count = computed(model, lambda: session.new_sequence().append(SHARED + TAIL))
    np.testing.assert_array_equal(got, expected)
    # predict left all 49 tokens behind: three full blocks, and the last token's logits are always computed.
    assert count == 1 and model.stats()["prefix_hit_tokens"] >= 48


def test_part_of_a_block_is_copied(model):
    session = model.begin_session()
    session.new_sequence().append(SHARED + TAIL)
    other = [*SHARED[:37], 7, 7, 7]
    got, count = computed(model, lambda: session.new_sequence().append(other))
    assert count == 3, "37 of 40 tokens were there, five of them in a block that goes on otherwise"
    np.testing.assert_array_equal(got, anew(model, other))
    again, count = computed(model, lambda: session.new_sequence().append(SHARED + TAIL))
    assert count == 1, "the block that was copied from is whole"
    np.testing.assert_array_equal(again, anew(model, SHARED + TAIL))


def test_all_rows_are_computed_where_they_are_wanted(model):
    first = model.predict(SHARED)
    second, count = computed(model, lambda: model.predict(SHARED))
    assert count == len(SHARED)
    np.testing.assert_array_equal(first, second)
    params = octavo.SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1)
    _, count = computed(model, lambda: model.generate([SHARED], params))
    assert count == len(SHARED)


def test_salts_share_nothing(model):
    session = model.begin_session()
    session.new_sequence(salt="a").append(SHARED)
    for salt, expected in (("b", len(SHARED)), (None, len(SHARED)), ("a", 8)):      # its two full blocks
        _, count = computed(model, lambda salt=salt: session.new_sequence(salt=salt).append(SHARED))
        assert count == expected
    fork = session.new_sequence(salt="c")
    fork.append(SHARED)
    fork.fork().append(TAIL)
    _, count = computed(model, lambda: session.new_sequence(salt="c").append(SHARED + TAIL))
    assert count == 1, "a fork is of its sequence's scope"
    with pytest.raises(OptionError, match="salt"):
        session.new_sequence(salt=3)


def test_generations_find_each_other(model):
    expected = model.generate([SHARED], GREEDY)[0].completions
    result, count = computed(model, lambda: model.generate([SHARED], GREEDY)[0].completions)
    assert result == expected and count == 8 + 7, "two full blocks of the prompt were there"
    assert model.stats()["prefix_hits"] == 1


def test_off_is_off(tools, paths, op_library):
    with tools.small_paged(paths, 24, prefix_cache=False) as model:
        model.generate([SHARED], GREEDY)
        _, count = computed(model, lambda: model.generate([SHARED], GREEDY))
        stats = model.stats()
        assert count == len(SHARED) + 7 and (stats["blocks_cached"], stats["prefix_hits"]) == (0, 0)
        assert any(d.feature == "prefix_cache" and d.value == "off" for d in model.decisions)


@pytest.mark.parametrize("name", ["paged", "paged_hybrid"])
def test_many_beginnings_in_a_pool_too_small(name, tools, paths, op_library):
    """Cached blocks come and go; tokens are those of a model that keeps nothing."""
    prompts = [SHARED[: 8 * (i % 5)] + RNG.integers(3, 300, 1 + i % 7).tolist() for i in range(30)]
    with tools.small_paged(paths, 24, name=name, prefix_cache=False) as plain, tools.small_paged(paths, 9, name=name) as model:
        expected = [plain.generate([p], GREEDY)[0].completions for p in prompts]
        for at in range(0, 30, 6):
            assert [r.completions for r in model.generate(prompts[at : at + 6], GREEDY)] == expected[at : at + 6]
            with model.engine.turn:
                model.engine.check()
        stats = model.stats()
        assert stats["prefix_hits"] > 0 and stats["prefix_evictions"] > 0


def test_a_window_lets_go_and_going_back_recomputes(tools, paths, op_library):
    """Before what a window has released, the sequence is computed again, counted, and to the same bits."""
    ids = SHARED + TAIL
    with tools.small_paged(paths, 24, name="paged_hybrid", prefix_cache=False) as model:
        rows = model.predict(ids)
        sequence = model.begin_session().new_sequence()
        sequence.append(ids)
        assert model.stats()["blocks_used"] == 4 + 3       # positions 0 to 25 are out of sight, and one whole block of them
        sequence.truncate(48)
        assert model.stats()["tokens_recomputed"] == 0
        np.testing.assert_array_equal(sequence.append(ids[48:]), rows[-1:])
        sequence.truncate(30)
        assert (model.stats()["tokens_recomputed"], model.stats()["blocks_used"], len(sequence)) == (30, 0, 30)
        fork = sequence.fork()
        np.testing.assert_array_equal(sequence.append(ids[30:], rows="all"), rows[30:])
        np.testing.assert_array_equal(fork.append(ids[30:33]), rows[32:33])


def test_a_hundred_forks_cost_a_block_each(tools, paths, op_library):
    with tools.small_paged(paths, 140) as model:
        session = model.begin_session()
        sequence = session.new_sequence()
        sequence.append(RNG.integers(3, 300, 500).tolist())
        used = model.stats()["blocks_used"]
        forks = [sequence.fork() for _ in range(100)]
        assert model.stats()["blocks_used"] == used == 32
        session.append_batch([(fork, [i]) for i, fork in enumerate(forks)])
        assert model.stats()["blocks_used"] == used + 100
