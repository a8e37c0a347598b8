"""Every case of a check finds the fault it is there for: shown on a toy language model in NumPy, with and without each fault."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from octavo.compiler.check_cases import CASES, LONG, SHORT, SHORTEST, Tokens, tokens_for
from octavo.custom_ops.contract import CHUNK
from octavo.errors import ModelError, RequestError
from octavo.models.tiny import write_tiny_tokenizer

V = 32
TABLE = np.random.default_rng(0).standard_normal((V, V)).astype(np.float32)


def _logits(ids: list[int]) -> np.ndarray:
    """A causal model: each row is a decaying sum over the tokens up to its own, so that every earlier token shows in it."""
    rows, state = [], np.zeros(V, np.float32)
    for token in ids:
        state = 0.9 * state + TABLE[token]
        rows.append(state.copy())
    return np.array(rows, np.float32)


class ToySequence:
    def __init__(self, toy: Toy, ids: list[int]) -> None:
        self.toy, self.ids = toy, ids

    def append(self, token_ids, *, rows="last"):
        past = len(self.ids)
        self.ids += [int(token) for token in token_ids]
        seen = list(self.ids)
        if self.toy.fault == "decode" and past and len(token_ids) == 1:
            seen = seen[:-2] + seen[-1:]
        if self.toy.fault == "chunk" and past and len(token_ids) > 1:
            seen[0] = (seen[0] + 1) % V
        if self.toy.fault == "far" and len(seen) > CHUNK:
            seen[CHUNK - 1] = (seen[CHUNK - 1] + 1) % V
        logits = _logits(seen)[-len(token_ids) :]
        return logits if rows == "all" else logits[-1:]

    def fork(self):
        return ToySequence(self.toy, self.ids if self.toy.fault == "fork" else list(self.ids))

    def truncate(self, length):
        del self.ids[length + (self.toy.fault == "truncate") :]

    def close(self):
        pass

    def __len__(self):
        return len(self.ids)


class ToySession:
    def __init__(self, toy: Toy) -> None:
        self.toy = toy
        toy.sessions += 1

    def new_sequence(self):
        return ToySequence(self.toy, [])

    def append_batch(self, work, *, rows="last"):
        out = [sequence.append(ids, rows=rows) for sequence, ids in work]
        if self.toy.fault == "batch":
            out[0] = out[0] + 0.1 * out[1][:1]
        return out

    def close(self):
        self.toy.sessions -= 1


class Toy:
    kind = "paged"

    def __init__(self, fault: str = "") -> None:
        self.fault, self.sessions = fault, 0

    def predict(self, token_ids):
        return _logits([int(token) for token in token_ids])[:: -1 if self.fault == "predict" else 1]

    def begin_session(self):
        return ToySession(self)

    def close(self):
        pass


@pytest.fixture(params=[9, 40, LONG])
def tokens(request, tmp_path) -> Tokens:
    return tokens_for(tmp_path, V, request.param)


@pytest.mark.parametrize("fault, finders", [
    ("", ()),
    ("predict", ("predict",)),
    ("decode", ("chunks of 1", "decode over a past", "mixed batch")),
    ("chunk", ("chunks of 7",)),
    ("batch", ("mixed batch",)),
    ("fork", ("after fork",)),
    ("truncate", ("after truncate",)),
])
def test_each_case_finds_its_fault(tokens, fault, finders):
    good, bad = Toy(), Toy(fault)
    found = {case.name for case in CASES if not np.array_equal(case.run(good, tokens), case.run(bad, tokens))}
    assert found >= set(finders)
    assert bool(found) == bool(fault)
    assert good.sessions == bad.sessions == 0, "every session is closed"


def test_the_long_cases_cross_a_chunk_edge(tmp_path):
    tokens = tokens_for(tmp_path, V, 4096)
    found = {case.name for case in CASES if not np.array_equal(case.run(Toy(), tokens), case.run(Toy("far"), tokens))}
    assert found == {"prefill", "decode over a past"}


def test_cases_return_one_row_per_token_asked_for(tokens):
    rows = {case.name: case.run(Toy(), tokens) for case in CASES}
    assert all(r.ndim == 2 and r.shape[1] == V and r.dtype == np.float32 for r in rows.values())
    assert len(rows["prefill"]) == len(tokens.long) and len(rows["chunks of 7"]) == len(tokens.short)


def test_no_case_goes_beyond_the_context(tmp_path):
    """The longest sequence of any case fits in the model's context, at every context a check takes."""
    for context in range(SHORTEST, 80):
        longest = 0

        class Counting(ToySequence):
            def append(self, token_ids, *, rows="last"):
                nonlocal longest
                self.ids += list(token_ids)
                longest = max(longest, len(self.ids))
                return np.zeros((len(token_ids) if rows == "all" else 1, V), np.float32)

            def fork(self):
                return Counting(self.toy, list(self.ids))

        class CountingSession(ToySession):
            def new_sequence(self):
                return Counting(self.toy, [])

        toy = Toy()
        toy.begin_session = lambda toy=toy: CountingSession(toy)
        tokens = tokens_for(tmp_path, V, context)
        for case in CASES:
            case.run(toy, tokens)
        assert longest <= context, f"a case of {longest} tokens in a context of {context}"


def test_tokens_are_seeded_and_below_the_vocabulary(tmp_path):
    a, b, c = tokens_for(tmp_path, V, 99), tokens_for(tmp_path, V, 99), tokens_for(tmp_path, V, 99, seed=1)
    assert np.array_equal(a.long, b.long) and not np.array_equal(a.long, c.long)
    assert len(a.long) == 99 and len(a.short) == len(a.other) == SHORT
    assert a.long.min() >= 0 and max(a.long.max(), a.other.max()) < V
    assert not np.array_equal(a.short, a.other)


def test_text_is_used_where_there_is_a_tokenizer(tmp_path: Path):
    with pytest.raises(RequestError, match=r"no tokenizer\.json"):
        tokens_for(tmp_path, 400, 99, text="abc")
    write_tiny_tokenizer(tmp_path)
    a, b = tokens_for(tmp_path, 400, 99, text="abc"), tokens_for(tmp_path, 400, 99, text="xyz")
    assert not np.array_equal(a.long[:2], b.long[:2]) and np.array_equal(a.long[3:], b.long[3:])


def test_a_context_too_short_is_an_error(tmp_path):
    with pytest.raises(ModelError, match="too short to check"):
        tokens_for(tmp_path, V, SHORTEST - 1)
