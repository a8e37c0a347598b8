"""Sampling against its definitions, spelled out token by token."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from octavo.custom_ops.sampling import adjust, distribution, logprobs, sample, uniform
from octavo.errors import OptionError, RequestError
from octavo.runtime.sampling import SamplingParams

NONE = np.array([], np.int64)

rows = st.lists(st.sampled_from([-3.0, -1.5, 0.0, 0.25, 1.0, 1.5, 4.0]), min_size=1, max_size=12)
tokens = st.lists(st.integers(0, 11), max_size=8)


def brute_scores(logits, params, prompt, output):
    scores = [float(x) + params.logit_bias.get(i, 0) for i, x in enumerate(logits)]
    for i in set(prompt) | set(output):
        scores[i] = scores[i] / params.repetition_penalty if scores[i] > 0 else scores[i] * params.repetition_penalty
    for i in set(output):
        scores[i] -= params.frequency_penalty * output.count(i) + params.presence_penalty
    return scores


def brute_distribution(scores, params):
    weights = [math.exp((s - max(scores)) / params.temperature) for s in scores]
    probs = {i: w / sum(weights) for i, w in enumerate(weights)}
    probs = {i: p for i, p in probs.items() if p >= params.min_p * max(probs.values())}
    order = sorted(probs, key=lambda i: (-probs[i], i))
    if params.top_k > 0:
        order = order[: params.top_k]
    total, kept, reached = sum(probs[i] for i in order), [], 0.0
    for i in order:
        if kept and reached >= params.top_p:
            break
        kept.append(i)
        reached += probs[i] / total
    norm = sum(probs[i] for i in kept)
    return [probs[i] / norm if i in kept else 0.0 for i in range(len(scores))]


@settings(deadline=None, max_examples=300)
@given(rows, tokens, tokens, st.sampled_from([0.5, 1.0, 1.7]), st.sampled_from([-2.0, 0.0, 0.6]), st.sampled_from([-0.5, 0.0, 2.0]))
def test_penalties(logits, prompt, output, repetition, presence, frequency):
    n = len(logits)
    prompt, output = [t % n for t in prompt], [t % n for t in output]
    params = SamplingParams(
        repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency, logit_bias={0: 2.5, n - 1: -1.0},
    )
    got = adjust(np.array(logits, np.float32), params, prompt=np.array(prompt, np.int64), output=np.array(output, np.int64))
    np.testing.assert_allclose(got, brute_scores(logits, params, prompt, output), rtol=1e-6, atol=1e-6)


@settings(deadline=None, max_examples=400)
@given(rows, st.sampled_from([0.3, 1.0, 2.5]), st.sampled_from([-1, 0, 1, 2, 5, 50]), st.sampled_from([0.07, 0.3, 0.61, 0.97, 1.0]),
       st.sampled_from([0.0, 0.03, 0.4, 1.0]))
def test_cuts(logits, temperature, top_k, top_p, min_p):
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    got = distribution(np.array(logits, np.float64), params)
    np.testing.assert_allclose(got, brute_distribution(logits, params), rtol=1e-9)
    assert abs(got.sum() - 1) < 1e-12


def draw(logits, params, index=0, *, banned=()):
    return sample(np.array(logits, np.float32), params, prompt=NONE, output=NONE, banned=banned, seed=1, completion=0, index=index)


def test_frequencies_are_the_distribution():
    """4,000 draws: each count within five standard deviations of what the probabilities say."""
    logits, params = [0.0, 1.0, 2.0, -1.0, 0.5], SamplingParams(temperature=0.8, top_p=0.95)
    expected = brute_distribution(logits, params)
    counts = np.bincount([draw(logits, params, i) for i in range(4000)], minlength=5)
    for count, p in zip(counts, expected):
        assert abs(count - 4000 * p) <= 5 * math.sqrt(4000 * p * (1 - p))


def test_randomness_depends_on_seed_completion_and_index_alone():
    numbers = [uniform(seed, completion, index) for seed in (0, 1, 2**64 - 1) for completion in (0, 1) for index in (0, 1, 100_000)]
    assert len(set(numbers)) == len(numbers) and all(0 <= x < 1 for x in numbers)
    assert numbers == [uniform(s, c, i) for s in (0, 1, 2**64 - 1) for c in (0, 1) for i in (0, 1, 100_000)]


def test_greedy_takes_the_smallest_of_equals_and_respects_bans():
    params = SamplingParams(temperature=0)
    assert draw([1, 5, 5, 0], params) == 1
    assert draw([1, 5, 5, 0], params, banned=(1, 2)) == 0
    assert draw([1, 5, 5, 0], SamplingParams(temperature=0, logit_bias={3: 100})) == 3


@pytest.mark.parametrize("temperature", [0, 1, 1e-300, 1e300])
def test_extremes_draw_a_token_or_say_why_not(temperature):
    params = SamplingParams(temperature=temperature)
    assert draw([-1e38, 1e38, -np.inf], params) in (0, 1)
    for bad in ([np.nan, 1.0], [-np.inf, -np.inf], [np.inf, 0.0]):
        with pytest.raises(ValueError, match=r"NaN|finite"):
            draw(bad, params)


@given(rows, st.integers(0, 11), st.integers(0, 14))
def test_logprobs(logits, token, k):
    token %= len(logits)
    logprob, rank, top = logprobs(np.array(logits, np.float32), token, k)
    norm = math.log(sum(map(math.exp, logits)))
    assert abs(logprob - (logits[token] - norm)) < 1e-9
    assert rank == 1 + sum(x > logits[token] for x in logits)
    assert [i for i, _ in top] == sorted(range(len(logits)), key=lambda i: (-logits[i], i))[:k]
    assert all(abs(p - (logits[i] - norm)) < 1e-9 for i, p in top)


BAD = {
    "max_tokens": [0, -1, 1.5, True, "3"], "min_tokens": [-1, 2**31], "temperature": [-0.1, math.inf, math.nan, "hot", True, 10**400],
    "top_k": [-2, 1.0], "top_p": [0, 1.01, -1, math.nan], "min_p": [-0.1, 1.1], "repetition_penalty": [0, -1],
    "presence_penalty": [2.1, -2.1], "frequency_penalty": [2.1, -2.1, None], "logit_bias": [{1: 101}, {-1: 0}, {1: "x"}, [1], {1.5: 0}],
    "stop": ["", [""], [1], 5, None, ["x"] * 65, "x" * 1025], "stop_token_ids": [[-1], ["a"], [True], [1.0]], "ignore_eos": [1, None],
    "seed": [-1, 2**64, 1.0], "n": [0, 129, True], "best_of": [0, 129, True, 1.5], "logprobs": [-1, 21, True], "prompt_logprobs": [-1, 21],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_out_of_range_is_refused(name, value):
    with pytest.raises(OptionError, match=name):
        SamplingParams(**{name: value})


def test_every_field_has_its_refusals():
    assert set(BAD) == set(SamplingParams.__dataclass_fields__)


def test_min_tokens_above_max_tokens_is_refused():
    with pytest.raises(OptionError):
        SamplingParams(max_tokens=3, min_tokens=4)


def test_token_ids_are_held_against_the_vocabulary():
    for params in (SamplingParams(logit_bias={10: 1.0}), SamplingParams(stop_token_ids=[10])):
        params.check_vocab(11)
        with pytest.raises(RequestError, match="ends at 9"):
            params.check_vocab(10)
