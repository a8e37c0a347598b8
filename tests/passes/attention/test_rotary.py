"""Rotary tables are the graph's own values by position, or refused."""

from __future__ import annotations

import numpy as np
import pytest
from drivers import seen
from octavo.passes.attention.laboratory import Laboratory
from octavo.passes.attention.match import sites_of
from octavo.passes.attention.rotary import RotaryTables, context_bound, read_tables
from octavo.passes.outcome import Refusal
from sketches import Sketch, build, frequencies


def tables(sketch: Sketch, length: int = 50) -> RotaryTables | Refusal:
    observation, found = seen(*build(sketch))
    site, = sites_of(found)
    assert site.rotary is not None
    return read_tables(Laboratory(observation), site.rotary.key, length, site.name)


@pytest.mark.parametrize("past", [True, False])
@pytest.mark.parametrize("rotary", ["half", "interleaved", "split", "partial", "op", "op_interleaved", "microsoft"])
def test_tables_are_the_graphs_angles(rotary: str, past: bool) -> None:
    sketch = Sketch(rotary=rotary, D=16, past=past)
    read = tables(sketch)
    assert not isinstance(read, Refusal), str(read)
    angles = np.arange(50, dtype=np.float32)[:, None] * frequencies(sketch)
    assert read.cos.dtype == read.sin.dtype == np.float32
    np.testing.assert_allclose(read.cos, np.cos(angles), rtol=0, atol=3e-7)
    np.testing.assert_allclose(read.sin, np.sin(angles), rtol=0, atol=3e-7)


def test_angles_that_look_at_the_longest_position_are_refused() -> None:
    refusal = tables(Sketch(rotary="ntk"))
    assert isinstance(refusal, Refusal)
    assert "more than the position" in refusal.reason
    assert "would do" not in refusal.nearest  # at no length


@pytest.mark.parametrize("past", [True, False])
def test_angles_that_change_at_a_length_are_read_up_to_it(past: bool) -> None:
    """The short factors hold for every sequence of up to 32 tokens: one token more and no table is right for all lengths."""
    sketch = Sketch(rotary="longrope", D=16, past=past)
    for length in (31, 32):
        read = tables(sketch, length)
        assert isinstance(read, RotaryTables) and len(read.cos) == length
        assert "over 32" in read.frozen
        np.testing.assert_allclose(read.cos, np.cos(np.arange(length, dtype=np.float32)[:, None] * frequencies(sketch)), rtol=0, atol=3e-7)
    for length in (33, 50):
        refusal = tables(sketch, length)
        assert isinstance(refusal, Refusal)
        assert "max_context=32 would do" in refusal.nearest


def test_what_does_not_change_is_not_frozen() -> None:
    read = tables(Sketch(), 31)
    assert isinstance(read, RotaryTables) and not read.frozen


def test_a_table_is_not_read_beyond_its_rows() -> None:
    assert isinstance(tables(Sketch(rotary="microsoft"), 65), Refusal)
    observation, _ = seen(*build(Sketch(rotary="microsoft")))
    bound = context_bound(observation)
    assert bound is not None and bound[0] == 64


def test_a_graph_that_computes_its_angles_has_no_bound() -> None:
    observation, _ = seen(*build(Sketch()))
    assert context_bound(observation) is None
