"""The native sampler against its meaning: tokens, cuts, penalties, log probabilities, and what depends on nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from octavo.custom_ops import sampling
from octavo.custom_ops.native import SampleRow, SampleRows
from octavo.runtime.decisions import DecisionLog
from octavo.runtime.sampler import Draw, NativeSampler, ReferenceSampler, open_sampler
from octavo.runtime.sampling import SamplingParams

SIZES = (1, 2, 15, 17, 128, 129, 1000, 5003)


@pytest.fixture(scope="module")
def samplers():
    return {V: NativeSampler(V) for V in SIZES}


def shaped_row(rng, V, shape):
    """Logits of a peaked, a flat, a tied or a mostly hidden row, or of one with a few very likely tokens."""
    if shape == "tied":
        return rng.integers(-3, 4, V).astype(np.float32)
    row = rng.normal(0, {"peaked": 6, "flat": 0.01, "hidden": 2, "few": 1}[shape], V).astype(np.float32)
    if shape == "hidden":
        row[rng.random(V) < 0.9] = -np.inf
        row[rng.integers(V)] = 0
    if shape == "few":
        row[rng.integers(0, V, 3)] += 12
    return row


params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1e-300, 0.3, 1.0, 2.5, 1e300]), top_k=st.sampled_from([0, 1, 3, 40, 200, 100_000]),
    top_p=st.sampled_from([1e-9, 0.1, 0.5, 0.9, 0.999, 1.0]), min_p=st.sampled_from([0.0, 1e-4, 0.05, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]), presence_penalty=st.sampled_from([0.0, 0.5, -2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.3]), logit_bias=st.sampled_from([{}, {0: 3.0}, {0: -100.0}]), logprobs=st.sampled_from([None, 0, 1, 20]),
    min_tokens=st.sampled_from([0, 9]),
)


def border_distance(row, draw):
    """How near the point of the reference's draw is to the border of two tokens, and the mass of a cut's last token to where it cuts."""
    scores = sampling.adjust(
        row, draw.params, prompt=np.array(draw.prompt, np.int64), output=np.array(draw.output, np.int64), banned=draw.banned[: draw.row.num_banned],
    )
    whole = sampling.distribution(scores, draw.params)
    cumulative = np.cumsum(whole)
    point = sampling.uniform(draw.seed, draw.completion, len(draw.output))
    near = [np.abs(cumulative - point).min()]
    if draw.params.top_p < 1:
        wide = sampling.distribution(scores, SamplingParams(temperature=draw.params.temperature, top_k=draw.params.top_k, min_p=draw.params.min_p))
        near.append(np.abs(np.cumsum(np.sort(wide)[::-1]) - draw.params.top_p).min())
    if draw.params.min_p > 0:
        wide = sampling.distribution(scores, SamplingParams(temperature=draw.params.temperature))
        near.append(np.abs(wide / wide.max() - draw.params.min_p).min())
    return min(near)


@settings(deadline=None, max_examples=400)
@given(seed=st.integers(0, 2**32), V=st.sampled_from(SIZES), shape=st.sampled_from(["peaked", "flat", "tied", "hidden", "few"]), params=params,
       count=st.integers(0, 12))
def test_tokens_are_the_references(samplers, seed, V, shape, params, count):
    rng = np.random.default_rng(seed)
    row = shaped_row(rng, V, shape)
    before = row.copy()
    prompt = rng.integers(0, V, 5).tolist()
    native, reference = (Draw(params, prompt=prompt, banned=[V - 1], seed=seed, completion=1) for _ in range(2))
    for token in rng.integers(0, V, count).tolist():
        native.add(token)
        reference.add(token)
    samplers[V].choose([(native, row)])
    ReferenceSampler().choose([(reference, row)])
    np.testing.assert_array_equal(row, before)
    assert native.failure == reference.failure
    if native.failure:
        return
    if params.temperature == 0:
        assert native.token == reference.token
    elif native.token != reference.token:
        assert border_distance(row, reference) < 2e-6
    if params.logprobs is not None:
        want = sampling.logprobs(row, native.token, params.logprobs)
        got = native.logprob
        assert (got.token_id, got.rank, [i for i, _ in got.top]) == (native.token, want[1], [i for i, _ in want[2]])
        np.testing.assert_allclose([got.logprob, *(p for _, p in got.top)], [want[0], *(p for _, p in want[2])], rtol=1e-6, atol=1e-6)


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 2**64 - 1), st.integers(0, 127), st.integers(0, 2**31))
def test_randomness_is_the_references(samplers, seed, completion, index):
    """1,000 equal logits cut the unit interval evenly: the token tells the number to within a thousandth."""
    draw = Draw(SamplingParams(), prompt=[], banned=[], seed=seed, completion=completion)
    draw.row.index = index
    samplers[1000].choose([(draw, np.zeros(1000, np.float32))])
    assert abs(draw.token - 1000 * sampling.uniform(seed, completion, index)) <= 1.001


def test_a_row_depends_on_nothing_beside_it(samplers):
    """Alone, or among others of other parameters, after any other call: the same answer."""
    rng = np.random.default_rng(5)
    rows = rng.normal(0, 3, (16, 5003)).astype(np.float32)
    asked = [SamplingParams(temperature=0.9, top_p=0.8, logprobs=3), SamplingParams(temperature=0), SamplingParams(top_k=50, repetition_penalty=1.2)]

    def draws():
        return [Draw(asked[i % 3], prompt=[1, 2, i], banned=[], seed=i, completion=0) for i in range(16)]

    def answers(draws):
        return [(draw.token, draw.logprob) for draw in draws]

    alone, together = draws(), draws()
    for draw, row in zip(alone, rows):
        samplers[5003].choose([(draw, row)])
    samplers[5003].choose(list(zip(together, rows))[::-1])
    assert answers(alone) == answers(together)


def test_a_bad_row_fails_alone(samplers):
    rows = np.zeros((4, 17), np.float32)
    rows[1, 16], rows[2], rows[3, 0] = np.nan, -np.inf, np.inf
    for params in (SamplingParams(temperature=0), SamplingParams(seed=1), SamplingParams(top_k=2), SamplingParams(top_p=0.5)):
        draws = [Draw(params, prompt=[], banned=[], seed=0, completion=0) for _ in rows]
        samplers[17].choose(list(zip(draws, rows)))
        assert [draw.failure for draw in draws] == ["", sampling.NAN, sampling.NOTHING_FINITE, sampling.NOTHING_FINITE]


def test_arguments_out_of_range_are_refused():
    """A token beyond the row, a scratch too small, a row without logits: nothing is read or written."""
    call, row = SampleRows(17), np.zeros(17, np.float32)
    ids = np.array([17], np.int32)
    bad = [
        {"logits": None}, {"given": 17}, {"logprobs": 21}, {"temperature": float("nan")}, {"top_p": 0.0}, {"min_p": 1.5},
        {"banned": ids.ctypes.data, "num_banned": 1}, {"bias_ids": ids.ctypes.data, "num_bias": 1}, {"seen": ids.ctypes.data, "num_seen": 1},
        {"num_seen": -1}, {"banned": None, "num_banned": 1},
    ]
    good = {"logits": row.ctypes.data, "top_p": 1.0, "given": -1, "logprobs": -1}
    call([SampleRow(**good)])
    for change in bad:
        with pytest.raises(ValueError, match="out of range"):
            call([SampleRow(**{**good, **change})])


def test_without_the_library_numpy_is_used_and_recorded(monkeypatch):
    from octavo.errors import LibraryError
    from octavo.runtime import sampler

    log = DecisionLog()
    assert isinstance(open_sampler(17, log), NativeSampler) and not log.all()
    monkeypatch.setattr(sampler, "library_error", lambda: LibraryError("it is not there"))
    assert isinstance(open_sampler(17, log), ReferenceSampler)
    assert [(d.feature, d.value) for d in log.all()] == [("sampling", "NumPy")] and "it is not there" in log.all()[0].reason
