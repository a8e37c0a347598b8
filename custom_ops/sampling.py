"""What it means to choose a token, in NumPy: from a row of logits, parameters, the tokens so far and (seed, completion, index).

Order, as the field has it: logit_bias and the ban of stop tokens below min_tokens; repetition, then frequency and presence penalties;
temperature; min_p; top_k; top_p; the draw. Bias and penalties are computed in float64 and each rounded to float32; all else is float64 here.
Randomness is a counter-based generator keyed by (seed, completion) and counted by the token's index, so a token depends on nothing else that
runs at the time.

The native function `octavo_sample` (src/native/sample.cc) takes the same tokens: exactly where they are the most likely, and by draw unless
the point lies within float32 rounding (about 1e-6) of the border between two tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Row = NDArray[np.float32]
Ids = NDArray[np.int64]
NAN, NOTHING_FINITE = "the model's logits are not numbers (NaN)", "no token has a finite logit"


class Parameters(Protocol):
    """The fields of `SamplingParams` that choosing a token looks at."""

    @property
    def temperature(self) -> float: ...
    @property
    def top_k(self) -> int: ...
    @property
    def top_p(self) -> float: ...
    @property
    def min_p(self) -> float: ...
    @property
    def repetition_penalty(self) -> float: ...
    @property
    def presence_penalty(self) -> float: ...
    @property
    def frequency_penalty(self) -> float: ...
    @property
    def logit_bias(self) -> Mapping[int, float]: ...
    @property
    def penalizes(self) -> bool: ...


def sample(
    logits: Row, params: Parameters, *, prompt: Ids, output: Ids, banned: tuple[int, ...], seed: int, completion: int, index: int,
) -> int:
    """Token `index` of a completion. `logits` (V) is not changed; `banned` ids can't be drawn. ValueError if nothing can be.

    `prompt` and `output` are looked at where `params.penalizes`.
    """
    greedy = params.temperature == 0
    if greedy and not (params.penalizes or params.logit_bias or banned):
        return _best(logits)
    scores = adjust(logits, params, prompt=prompt, output=output, banned=banned)
    if greedy:
        return _best(scores)
    probs = distribution(scores, params)
    cumulative = np.cumsum(probs)
    point = uniform(seed, completion, index) * cumulative[-1]
    token = int(np.searchsorted(cumulative, point, side="right"))
    # Rounding can put the point on the very end: the last token with any probability then.
    return token if token < len(probs) else int(np.flatnonzero(probs)[-1])


def _best(scores: NDArray[Any]) -> int:
    token = int(scores.argmax())    # the first NaN, where there is one
    if not math.isfinite(scores[token]):
        raise ValueError(NAN if math.isnan(scores[token]) else NOTHING_FINITE)
    return token


def uniform(seed: int, completion: int, index: int) -> float:
    """A float64 in [0, 1) that depends on these three numbers alone."""
    key = np.array([seed, completion], dtype=np.uint64)
    return float(np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, index])).random())


def adjust(logits: Row, params: Parameters, *, prompt: Ids, output: Ids, banned: tuple[int, ...] = ()) -> Row:
    """Scores (V) after bias, bans and penalties."""
    if np.isnan(logits).any():
        raise ValueError(NAN)
    scores = logits.astype(np.float32)
    for token, bias in params.logit_bias.items():
        scores[token] = np.float64(scores[token]) + bias
    if banned:
        scores[list(banned)] = -np.inf
    if params.penalizes:
        tokens = np.unique(np.concatenate([prompt, output]))
        counts = np.bincount(output, minlength=len(scores))[tokens]
        values = scores[tokens].astype(np.float64)
        factor = params.repetition_penalty
        with np.errstate(invalid="ignore", over="ignore"):
            values = np.where(values > 0, values / factor, values * factor)
            scores[tokens] = values - np.where(counts > 0, params.frequency_penalty * counts + params.presence_penalty, 0.0)
    return scores


def distribution(scores: NDArray[Any], params: Parameters) -> NDArray[np.float64]:
    """Probabilities (V) to draw from, summing to 1, for temperature > 0."""
    scores = scores.astype(np.float64)
    best = scores.max()
    if not math.isfinite(best):
        raise ValueError(NOTHING_FINITE)
    with np.errstate(over="ignore"):
        probs = np.exp((scores - best) / params.temperature)
    probs /= probs.sum()
    if params.min_p > 0:
        probs[probs < params.min_p * probs.max()] = 0
    if 0 < params.top_k < len(probs):
        border = np.partition(scores, -params.top_k)[-params.top_k]
        kept = scores > border
        # Equals at the border: the smaller ids stay, so that exactly k do.
        kept[np.flatnonzero(scores == border)[: params.top_k - np.count_nonzero(kept)]] = True
        probs[~kept] = 0
    if params.top_p < 1:
        probs /= probs.sum()
        # All below this together are less than 1 − p, so p is reached without any of them: a vocabulary need not be sorted.
        probs[probs < (1 - params.top_p) / len(probs)] = 0
        order = np.flatnonzero(probs)
        order = order[np.argsort(-scores[order], kind="stable")]
        before = np.cumsum(probs[order]) - probs[order]
        # A token stays while those above it have not reached p: the first always does.
        probs[order[1:][before[1:] >= params.top_p]] = 0
    return probs / probs.sum()


def logprobs(logits: Row, token: int, k: int) -> tuple[float, int, tuple[tuple[int, float], ...]]:
    """`token`'s log probability, its rank (1 is the most likely) and the k most likely (id, log probability), from raw logits (V)."""
    values = logits.astype(np.float64)
    peak = values.max()
    values -= peak + math.log(np.exp(values - peak).sum())
    best = np.lexsort((np.arange(len(values)), -values))[:k]
    return float(values[token]), int((values > values[token]).sum()) + 1, tuple((int(i), float(values[i])) for i in best)
