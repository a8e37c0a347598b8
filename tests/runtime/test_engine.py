"""What the engine promises: bits that don't depend on company, rollback, room made and given back, threads."""

from __future__ import annotations

import gc
import threading

import numpy as np
import octavo
import pytest
from octavo.errors import CapacityError, RequestError, StepError

RNG = np.random.default_rng(11)
PROMPTS = [RNG.integers(3, 300, n).tolist() for n in (33, 1, 70, 16, 15, 17, 48, 5)]
GREEDY = octavo.SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def alone(paths, op_library):
    """Each prompt's logits and greedy tokens, one model and one request at a time."""
    with octavo.load(paths.paged, options=octavo.RuntimeOptions(threads=1)) as model:
        yield [(model.predict(p), model.generate([p], GREEDY)[0].completions[0].token_ids) for p in PROMPTS]


# --- bits ---------------------------------------------------------------------------------------------------------------------


def test_a_batch_of_eight_has_the_bits_of_one(paged, alone):
    session = paged.begin_session()
    sequences = [session.new_sequence() for _ in PROMPTS]
    before = paged.stats()["steps"]
    got = session.append_batch(list(zip(sequences, PROMPTS)), rows="all")
    assert paged.stats()["steps"] == before + 1, "one step for all"
    for rows, (expected, _) in zip(got, alone):
        np.testing.assert_array_equal(rows, expected)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunks_have_the_bits_of_the_whole(paged, alone, chunk):
    expected = alone[2][0]
    sequence = paged.begin_session().new_sequence()
    rows = [sequence.append(PROMPTS[2][at : at + chunk], rows="all") for at in range(0, 70, chunk)]
    np.testing.assert_array_equal(np.concatenate(rows), expected)


def test_prefill_beside_decode_has_the_bits_of_each(paged, alone):
    session = paged.begin_session()
    a, b = session.new_sequence(), session.new_sequence()
    a.append(PROMPTS[0][:-1])
    (last, rows) = session.append_batch([(a, PROMPTS[0][-1:]), (b, PROMPTS[2])], rows="all")
    np.testing.assert_array_equal(last, alone[0][0][-1:])
    np.testing.assert_array_equal(rows, alone[2][0])


@pytest.mark.parametrize("block_size", [16, 128])
@pytest.mark.parametrize("threads", [1, 2])
def test_block_size_and_threads_change_no_bits(paths, op_library, alone, block_size, threads):
    with octavo.load(paths.paged, options=octavo.RuntimeOptions(threads=threads, block_size=block_size)) as model:
        np.testing.assert_array_equal(model.predict(PROMPTS[2]), alone[2][0])


def test_tokens_do_not_depend_on_company(paged, tools, paths):
    params = octavo.SamplingParams(seed=5, max_tokens=12, ignore_eos=True, top_p=0.9, repetition_penalty=1.1)
    together = paged.generate(PROMPTS[:5], params)
    with tools.small_paged(paths, 24, batching=False) as single:
        apart = [single.generate([p], params)[0] for p in PROMPTS[:5]]
        queued = single.generate(PROMPTS[:5], params)
    assert together == apart == queued


def test_batching_off_is_one_sequence_a_step(tools, paths, op_library, alone):
    with tools.small_paged(paths, 24, batching=False) as model:
        session = model.begin_session()
        got = session.append_batch([(session.new_sequence(), p) for p in PROMPTS[:3]])
        assert model.stats()["steps"] == 3
        assert any(d.feature == "batching" and d.value == "off" for d in model.decisions)
        for rows, (expected, _) in zip(got, alone):
            np.testing.assert_array_equal(rows, expected[-1:])


# --- blocks -------------------------------------------------------------------------------------------------------------------


def test_forks_share_and_the_first_write_copies(paged):
    session = paged.begin_session()
    sequence = session.new_sequence()
    sequence.append(PROMPTS[0])          # 33 tokens: 3 blocks, the last with one
    forks = [sequence.fork() for _ in range(4)]
    assert (paged.stats()["blocks_used"], paged.stats()["blocks_shared"]) == (3, 3)
    for fork in forks:
        fork.append([9])
    stats = paged.stats()
    assert (stats["blocks_used"], stats["blocks_shared"], stats["block_copies"]) == (3 + 4, 2, 4)
    sequence.append([9])                 # the last holder writes in place
    assert paged.stats()["block_copies"] == 4


def test_a_fork_at_a_block_edge_copies_nothing(paged):
    session = paged.begin_session()
    sequence = session.new_sequence()
    sequence.append(PROMPTS[3])
    sequence.fork().append([1])
    assert paged.stats()["block_copies"] == 0


def test_truncate_frees_blocks(paged):
    sequence = paged.begin_session().new_sequence()
    sequence.append(PROMPTS[2])
    for length, blocks in ((70, 5), (64, 4), (49, 4), (48, 3), (1, 1), (0, 0)):
        sequence.truncate(length)
        assert paged.stats()["blocks_used"] == blocks


def test_hybrid_groups_have_tables_of_their_own(tools, paths, op_library):
    """Two KV groups, one with a window: chunks and batches agree with the whole, bit for bit, and both pools empty."""
    with tools.small_paged(paths, 30, name="paged_hybrid") as model:
        whole = model.predict(PROMPTS[2])
        sequence = model.begin_session().new_sequence()
        rows = [sequence.append(PROMPTS[2][at : at + 13], rows="all") for at in range(0, 70, 13)]
        np.testing.assert_array_equal(np.concatenate(rows), whole)
        assert model.stats()["blocks_used"] == 5 + 3, "of the windowed group, positions 0 to 46 are seen by nobody any more"
        fork = sequence.fork()
        np.testing.assert_array_equal(fork.append([4]), sequence.append([4]))
        del sequence, fork
        gc.collect()
        tools.check_idle(model)


def test_memory_figures(tools, paths, op_library):
    for name, itemsize in (("paged", 4), ("paged_fp16", 2), ("paged_int8", 1.25)):     # int8: a scale of 4 bytes for 16
        with tools.small_paged(paths, 10, name=name) as model:
            stats = model.stats()
            assert stats["blocks_total"] == 10
            assert stats["cache_bytes"] == 10 * 16 * 2 * 2 * (16 + 16) * itemsize     # N · P · L · G · (D + E) · bytes


def test_fp16_caches_are_near(tools, paths, op_library, alone):
    with tools.small_paged(paths, 24, name="paged_fp16") as model:
        got, expected = model.predict(PROMPTS[2]).astype(np.float64), alone[2][0].astype(np.float64)
        p = [np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (expected, got)]
        assert np.abs(got - expected).max() > 0
        assert (p[0] * np.log(p[0] / p[1])).sum(-1).mean() < 1e-5


def test_int8_caches_are_near_and_forks_keep_their_bits(tools, paths, op_library, alone):
    with tools.small_paged(paths, 24, name="paged_int8") as model, model.begin_session() as session:
        got, expected = model.predict(PROMPTS[2]), alone[2][0]
        assert 0 < np.abs(got - expected).max() < 0.05 * np.abs(expected).max()
        first = session.new_sequence()
        first.append(PROMPTS[2][:-2])
        second = first.fork()           # shares a block that both go on writing: it is copied, scales and all
        second.append([1, 2])
        assert first.append(PROMPTS[2][-2:], rows="all").tobytes() == got[-2:].tobytes()


# --- not enough room ----------------------------------------------------------------------------------------------------------


def test_append_beyond_the_pool_is_refused_and_changes_nothing(tools, paths, op_library):
    with tools.small_paged(paths, 6) as model:
        session = model.begin_session()
        a, b = session.new_sequence(), session.new_sequence()
        a.append(PROMPTS[2])                                      # 5 of 6 blocks
        with pytest.raises(CapacityError, match="1 of 6 blocks"):
            session.append_batch([(a, [1]), (b, PROMPTS[5])])     # the first would fit
        assert (len(a), len(b)) == (70, 0)
        tools.check_idle(model)
        b.append(PROMPTS[3])
        with pytest.raises(CapacityError, match="6 blocks hold 96 tokens"):
            a.append(PROMPTS[0])
        a.truncate(48)
        b.append([1])


def test_requests_wait_while_others_finish(tools, paths, op_library, alone):
    """A pool for about two of eight at once: the same tokens as alone, and nothing is left behind."""
    with tools.small_paged(paths, 8) as model:
        results = model.generate(PROMPTS, GREEDY)
        assert [r.completions[0].token_ids for r in results] == [tokens for _, tokens in alone]
        tools.check_idle(model)


def test_the_youngest_gives_way_and_is_recomputed_to_the_same_bits(tools, paths, op_library, alone):
    with tools.small_paged(paths, 7) as model:
        picks = [1, 4, 7, 3]                                      # short prompts, all admitted, that outgrow the pool together
        params = octavo.SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
        results = model.generate([PROMPTS[i] for i in picks], params)
        assert model.stats()["preemptions"] > 0
        for i, result in zip(picks, results):
            assert result.completions[0].token_ids[:24] == alone[i][1] and len(result.completions[0].token_ids) == 40


def test_what_never_fits_is_refused_with_the_arithmetic(tools, paths, op_library):
    with tools.small_paged(paths, 3) as model:
        with pytest.raises(CapacityError, match="3 blocks hold 48 tokens"):
            model.generate([PROMPTS[2]], GREEDY)
        with pytest.raises(CapacityError, match="3 blocks hold 48 tokens"):
            model.generate([PROMPTS[0]], octavo.SamplingParams(max_tokens=17))
        assert len(model.generate([PROMPTS[0]], octavo.SamplingParams(max_tokens=16, ignore_eos=True))[0].completions[0].token_ids) == 16
        # Without max_tokens the pool's end is the completion's.
        completion = model.generate([PROMPTS[0]], octavo.SamplingParams(ignore_eos=True, seed=1))[0].completions[0]
        assert (len(completion.token_ids), completion.finish_reason) == (16, "length")


def test_idle_sequences_make_room_and_are_computed_again(tools, paths, op_library, alone):
    with tools.small_paged(paths, 6) as model:
        held = model.begin_session().new_sequence()
        held.append(PROMPTS[2])
        fits, wants = model.generate([PROMPTS[1], PROMPTS[0]], octavo.SamplingParams(max_tokens=3, ignore_eos=True))
        assert fits.completions[0].finish_reason == wants.completions[0].finish_reason == "length"
        assert (model.stats()["idle_drops"], held.tokens) == (1, tuple(PROMPTS[2]))
        again = held.append([9], rows="all")
        tools.check_idle(model)
        np.testing.assert_array_equal(again, model.predict([*PROMPTS[2], 9])[-1:])
        assert len(held) == 71


def test_a_request_that_outgrows_the_pool_ends_with_the_cause(tools, paths, op_library, monkeypatch):
    """Nothing idle, nothing to preempt: what is generated is kept, and the reason given."""
    with tools.small_paged(paths, 6) as model:
        held = model.begin_session().new_sequence()
        held.append(PROMPTS[2])
        monkeypatch.setattr(model.engine, "_idle", {})
        starved, cut = model.generate([PROMPTS[0]], GREEDY), model.generate([PROMPTS[4]], octavo.SamplingParams(max_tokens=20, ignore_eos=True))
        assert starved[0].completions[0].finish_reason == "error" and "1 of 6 blocks" in starved[0].completions[0].error
        assert cut[0].completions[0].finish_reason == "error" and len(cut[0].completions[0].token_ids) == 2
        tools.check_idle(model)


def test_an_append_takes_room_from_running_generations(tools, paths, op_library, alone):
    with tools.small_paged(paths, 6) as model:
        stream = model.stream(PROMPTS[0], GREEDY)
        tokens = [next(stream).token_ids[0] for _ in range(3)]
        sequence = model.begin_session().new_sequence()
        np.testing.assert_array_equal(sequence.append(PROMPTS[6], rows="all"), alone[6][0])
        assert model.stats()["preemptions"] == 0
        sequence.append([5, 6])
        assert model.stats()["preemptions"] == 1
        sequence.close()
        assert (*tokens, *(piece.token_ids[0] for piece in stream)) == alone[0][1]


def test_the_context_ends(paged, tools):
    sequence = paged.begin_session().new_sequence()
    sequence.append(RNG.integers(3, 300, 380).tolist())
    with pytest.raises(CapacityError, match="context of 512"):
        sequence.append([1] * 133)
    with pytest.raises(CapacityError, match="context of 512"):
        paged.predict([1] * 513)


# --- failures -----------------------------------------------------------------------------------------------------------------


class Faulty:
    """An onnxruntime session whose runs fail when `when` says so."""

    def __init__(self, session, when):
        self._session, self._when = session, when

    def __getattr__(self, name):
        return getattr(self._session, name)

    def run_with_iobinding(self, io):
        if self._when():
            raise RuntimeError("kernel out of luck")
        return self._session.run_with_iobinding(io)


def break_runs(model, monkeypatch, when):
    feed = model.engine.executor._feed
    monkeypatch.setattr(feed, "_session", Faulty(feed._session, when))


def test_a_failed_append_rolls_back(paged, tools, monkeypatch, alone):
    session = paged.begin_session()
    sequence = session.new_sequence()
    sequence.append(PROMPTS[2][:40])
    fork = sequence.fork()
    before = {k: v for k, v in paged.stats().items() if k.startswith(("blocks", "block_"))}
    tables = [list(t) for t in sequence._state.cache.tables]
    with monkeypatch.context() as patch:
        break_runs(paged, patch, lambda: True)
        for _ in range(2):
            with pytest.raises(StepError, match="out of luck"):
                sequence.append(PROMPTS[2][40:])
    assert {k: v for k, v in paged.stats().items() if k.startswith(("blocks", "block_"))} == before
    assert [list(t) for t in sequence._state.cache.tables] == tables and len(sequence) == 40
    (failure,) = [d for d in paged.decisions if d.stage == "run"]
    assert (failure.feature, failure.value) == ("step", "failed") and "out of luck" in failure.reason and "(2 times)" in failure.reason
    np.testing.assert_array_equal(sequence.append(PROMPTS[2][40:], rows="all"), alone[2][0][40:])
    np.testing.assert_array_equal(fork.append(PROMPTS[2][40:], rows="all"), alone[2][0][40:])


def test_an_append_that_fails_in_a_later_chunk_is_undone_as_a_whole(paths, op_library, monkeypatch, tools):
    with tools.small_paged(paths, 24, max_step_tokens=32) as model:
        sequence = model.begin_session().new_sequence()
        expected = sequence.append(PROMPTS[2], rows="all")
        sequence.truncate(3)
        runs = iter([False, True])
        with monkeypatch.context() as patch:
            break_runs(model, patch, lambda: next(runs))
            with pytest.raises(StepError):
                sequence.append(PROMPTS[2][3:])
        assert len(sequence) == 3 and model.stats()["blocks_used"] == 1
        np.testing.assert_array_equal(sequence.append(PROMPTS[2][3:], rows="all"), expected[3:])


def test_only_the_culprit_ends(paged, monkeypatch, alone):
    """A fault that goes with one sequence: it ends with the cause after four tokens, the others' tokens are as ever."""
    culprit = PROMPTS[3]

    def when():
        feed = paged.engine.executor._feed
        past, ids = feed._buffers["past_seqlens"], feed._buffers["input_ids"]
        count = feed._shapes["past_seqlens"][0]
        return any(past[b] == 19 and ids[feed._buffers["cumulative_sequence_length"][b]] == alone[3][1][3] for b in range(count))

    with monkeypatch.context() as patch:
        break_runs(paged, patch, when)
        results = paged.generate(PROMPTS[:5], GREEDY)
    for prompt, result, (_, tokens) in zip(PROMPTS, results, alone):
        (completion,) = result.completions
        if prompt is culprit:
            assert completion.finish_reason == "error" and "out of luck" in completion.error and completion.token_ids == tokens[:4]
        else:
            assert (completion.finish_reason, completion.token_ids) == ("length", tokens)
    assert any("out of luck" in d.reason for d in paged.decisions if d.stage == "run")


def test_a_kernel_that_refuses_ends_only_its_request(paged, alone):
    """A block that the pool does not have: the kernel itself says no."""
    session = paged.begin_session()
    good, bad = session.new_sequence(), session.new_sequence()
    session.append_batch([(good, PROMPTS[2][:40]), (bad, PROMPTS[0])])
    table = bad._state.cache.tables[0]
    held, table[1] = table[1], 999
    with pytest.raises(StepError):
        session.append_batch([(good, PROMPTS[2][40:]), (bad, [1])])
    table[1] = held
    assert (len(good), len(bad)) == (70, 33)
    good.truncate(40)
    np.testing.assert_array_equal(good.append(PROMPTS[2][40:], rows="all"), alone[2][0][40:])


def test_logits_that_are_no_numbers_end_the_request(paged, monkeypatch):
    feed = paged.engine.executor._feed
    monkeypatch.setattr(feed, "run", lambda plan: np.full((plan.num_rows, 320), np.nan, np.float32))
    (result,) = paged.generate([PROMPTS[0]], octavo.SamplingParams(n=3, max_tokens=2))
    assert [c.finish_reason for c in result.completions] == ["error"] * 3 and "NaN" in result.completions[0].error


def test_a_prompt_that_fails_ends_every_completion_of_it(paged, monkeypatch):
    break_runs(paged, monkeypatch, lambda: True)
    params = octavo.SamplingParams(n=2, max_tokens=2)
    (result,) = paged.generate([PROMPTS[0]], params)
    assert [(c.finish_reason, c.token_ids) for c in result.completions] == [("error", ())] * 2
    assert [(p.index, p.finish_reason) for p in paged.stream(PROMPTS[0], params)] == [(0, "error"), (1, "error")]


def test_an_interrupt_leaves_nothing_running(paged, monkeypatch, alone):
    class Interrupt(BaseException):
        pass

    def when():
        raise Interrupt

    sequence = paged.begin_session().new_sequence()
    sequence.append(PROMPTS[2][:40])
    with monkeypatch.context() as patch:
        break_runs(paged, patch, when)
        for use in (lambda: paged.generate(PROMPTS, GREEDY), lambda: sequence.append(PROMPTS[2][40:]), lambda: paged.predict([1])):
            with pytest.raises(Interrupt):
                use()
    assert (paged.stats()["sequences"], len(sequence)) == (1, 40)
    np.testing.assert_array_equal(sequence.append(PROMPTS[2][40:], rows="all"), alone[2][0][40:])


@pytest.mark.parametrize("place", ["accept", "take"])
def test_an_interrupt_between_execute_and_emit_loses_nobody_elses_token(paged, monkeypatch, alone, place):
    """A thread that steps for another, and is interrupted before it hands the other's row out."""
    from octavo.runtime.request import GenerateRequest

    mine, other = paged.stream(PROMPTS[0], GREEDY), paged.stream(PROMPTS[1], GREEDY)
    tokens = [*next(other).token_ids]
    untouched = getattr(GenerateRequest, place)

    def interrupted(self, *_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(GenerateRequest, place, interrupted)
        with pytest.raises(KeyboardInterrupt):
            for _ in mine:
                pass
    assert getattr(GenerateRequest, place) is untouched
    tokens += [token for piece in other for token in piece.token_ids]
    assert tuple(tokens) == alone[1][1]


# --- one sequence, many threads -----------------------------------------------------------------------------------------------


def test_many_threads(paged, alone):
    """Appends and generations from six threads at once: everyone's bits as alone."""
    failures, session = [], paged.begin_session()
    barrier = threading.Barrier(6)

    def work(i):
        try:
            barrier.wait()
            for _ in range(3):
                if i % 2:
                    (result,) = paged.generate([PROMPTS[i]], GREEDY)
                    assert result.completions[0].token_ids == alone[i][1]
                else:
                    sequence = session.new_sequence()
                    np.testing.assert_array_equal(sequence.append(PROMPTS[i], rows="all"), alone[i][0])
                    sequence.close()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures and not any(thread.is_alive() for thread in threads)
    assert paged.stats()["sequences"] == 0


def test_a_sequence_that_streams_does_nothing_else(paged):
    sequence = paged.begin_session().new_sequence()
    sequence.append(PROMPTS[0])
    stream = sequence.stream(octavo.SamplingParams(max_tokens=8, ignore_eos=True))
    next(stream)
    for use in (lambda: sequence.append([1]), sequence.fork, lambda: sequence.truncate(3), sequence.generate):
        with pytest.raises(RequestError, match="being streamed"):
            use()
    length = len(sequence)
    stream.close()
    assert len(sequence) == length and sequence.append([1]).shape == (1, 320)


def test_interleaved_streams(paged, alone):
    streams = [paged.stream(p, GREEDY) for p in PROMPTS[:3]]
    tokens = [[], [], []]
    for pieces in zip(*streams):
        for out, piece in zip(tokens, pieces):
            out += piece.token_ids
    assert [tuple(t) for t in tokens] == [t for _, t in alone[:3]]


def test_the_best_of_several_completions(paged):
    """They are the completions that n would give, in order of their mean log probability; the prompt is computed once."""
    params = {"max_tokens": 9, "seed": 4, "ignore_eos": True}
    every = paged.generate([PROMPTS[0]], octavo.SamplingParams(n=6, logprobs=0, **params))[0].completions
    before = paged.stats()
    (result,) = paged.generate([PROMPTS[0]], octavo.SamplingParams(n=2, best_of=6, **params))
    means = [sum(entry.logprob for entry in completion.logprobs) / 9 for completion in every]
    best = sorted(every, key=lambda completion: -means[every.index(completion)])[:2]
    assert [completion.token_ids for completion in result.completions] == [completion.token_ids for completion in best]
    assert [completion.logprobs for completion in result.completions] == [None, None] and len(set(means)) == 6
    assert paged.stats()["forks"] == before["forks"] + 5 and result.usage.completion_tokens == 54
    sequence = paged.begin_session().new_sequence()
    sequence.append(PROMPTS[0])
    for use in (lambda: paged.stream(PROMPTS[0], octavo.SamplingParams(best_of=2)), lambda: sequence.generate(octavo.SamplingParams(best_of=2))):
        with pytest.raises(RequestError):
            use()
    for wrong in (1, 129, True, 1.0):
        with pytest.raises(octavo.errors.OptionError):
            octavo.SamplingParams(n=2, best_of=wrong)


def test_appends_one_after_the_other_keep_no_generation_out(tools, paths, op_library):
    """Each needs the memory that the generation has. It is put off for some; then it goes next, and they find no room until it has ended."""
    params = octavo.SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    with tools.small_paged(paths, 10, max_step_tokens=16) as model:
        expected = model.generate([[7] * 60], params)[0].completions[0].token_ids
        stream, session = model.stream([7] * 60, params), model.begin_session()
        overtook = 0
        with pytest.raises(CapacityError, match="no room"):
            for overtook in range(100):
                session.new_sequence().append([9, overtook] * 64)
        assert 10 < overtook < 20
        assert tuple(token for piece in stream for token in piece.token_ids) == expected
        assert len(session.new_sequence().append([9] * 128)) == 1
        tools.check_idle(model)
