"""Random operations on related sequences in a pool too small for all of them, against a model that computes each from nothing."""

from __future__ import annotations

import numpy as np
import octavo
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from octavo.errors import CapacityError

operations = st.lists(
    st.tuples(st.sampled_from(["new", "append", "append", "batch", "fork", "truncate", "reset", "close", "generate", "drop stream"]),
              st.integers(0, 9), st.integers(1, 40), st.integers(3, 300)),
    min_size=4, max_size=18,
)


@pytest.fixture(scope="module")
def oracle(paths, op_library):
    """tokens → logits of all of them; one at a time in a model of its own."""
    with octavo.load(paths.paged, options=octavo.RuntimeOptions(threads=1)) as model:
        yield model.predict


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(operations)
def test_sequences_are_values(tools, paths, oracle, ops):
    with tools.small_paged(paths, 9) as model:
        session, live = model.begin_session(), []
        for op, choice, count, token in ops:
            ids = [token + i % 7 for i in range(count)]
            if op == "new" or not live:
                live.append((session.new_sequence(), []))
                continue
            sequence, tokens = live[choice % len(live)]
            try:
                if op == "append":
                    rows = sequence.append(ids, rows="all")
                    tokens += ids
                    np.testing.assert_array_equal(rows, oracle(tokens)[-count:])
                elif op == "batch":
                    rows = session.append_batch([(s, ids[: i + 1]) for i, (s, _) in enumerate(live)])
                    for i, (row, (_, known)) in enumerate(zip(rows, live)):
                        known += ids[: i + 1]
                        np.testing.assert_array_equal(row, oracle(known)[-1:])
                elif op == "fork":
                    live.append((sequence.fork(), list(tokens)))
                elif op in ("truncate", "reset"):
                    del tokens[0 if op == "reset" else count :]
                    sequence.truncate(len(tokens))
                elif op == "close":
                    sequence.close()
                    live.remove((sequence, tokens))
                elif op == "generate" and tokens:
                    (completion,) = sequence.generate(octavo.SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)).completions
                    for token in completion.token_ids:
                        assert token == oracle(tokens)[-1].argmax()
                        tokens.append(token)
                elif op == "drop stream" and tokens:
                    piece = next(sequence.stream(octavo.SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)))
                    tokens += piece.token_ids
            except CapacityError:
                pass
            assert [s.tokens for s, _ in live] == [tuple(t) for _, t in live]
            tools.check_idle(model)
        session.close()
        tools.check_idle(model)
        assert model.stats()["blocks_used"] == 0
