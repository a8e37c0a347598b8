"""Rotary tables are the graph's own values by position, or refused."""

from __future__ import annotations

import numpy as np
import pytest
from drivers import seen
from octavo.passes.attention.laboratory import Laboratory
from octavo.passes.attention.match import sites_of
from octavo.passes.attention.rotary import context_bound, read_tables
from octavo.passes.outcome import Refusal
from sketches import Sketch, build, frequencies


def tables(sketch: Sketch, length: int = 50) -> tuple[np.ndarray, np.ndarray] | Refusal:
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
    assert read[0].dtype == read[1].dtype == np.float32
    np.testing.assert_allclose(read[0], np.cos(angles), rtol=0, atol=3e-7)
    np.testing.assert_allclose(read[1], np.sin(angles), rtol=0, atol=3e-7)


def test_angles_that_look_at_the_longest_position_are_refused() -> None:
    refusal = tables(Sketch(rotary="ntk"))
    assert isinstance(refusal, Refusal)
    assert "more than the position" in refusal.reason


def test_a_table_is_not_read_beyond_its_rows() -> None:
    assert isinstance(tables(Sketch(rotary="microsoft"), 65), Refusal)
    observation, _ = seen(*build(Sketch(rotary="microsoft")))
    bound = context_bound(observation)
    assert bound is not None and bound[0] == 64


def test_a_graph_that_computes_its_angles_has_no_bound() -> None:
    observation, _ = seen(*build(Sketch()))
    assert context_bound(observation) is None
