"""Masks are proved by their values: what agrees on every probe is named, what differs in one cell is refused with that cell."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from drivers import seen
from octavo.passes.attention import masks
from octavo.passes.attention.chain import SCORES
from octavo.passes.attention.laboratory import Laboratory
from octavo.passes.attention.mask_candidates import Bidirectional, Causal, Chunked, Prefix, Window
from octavo.passes.attention.mask_source import MaskSource
from octavo.passes.attention.masks import MaskProver
from octavo.passes.attention.match import sites_of
from octavo.passes.attention.site import Mask
from octavo.passes.attention.sparse import sparse_situations
from octavo.passes.outcome import Refusal
from sketches import Sketch, alibi_slopes, build


def proved(sketch: Sketch, max_context: int = 64) -> Mask | Refusal:
    found = seen(*build(sketch), max_context)[1][0]
    return found if isinstance(found, Refusal) else found.mask


@pytest.mark.parametrize("past", [True, False])
@pytest.mark.parametrize("spelling", ["where", "min", "boolean_where"])
@pytest.mark.parametrize("window", [1, 2, 5, 19, 40])
def test_windows_are_found(window: int, spelling: str, past: bool) -> None:
    assert proved(Sketch(window=window, mask=spelling, past=past)) == Mask("window", window, key_padding=True)


def test_a_window_far_longer_than_the_first_probes_is_not_taken_for_causal() -> None:
    assert proved(Sketch(window=4096), max_context=8192) == Mask("window", 4096, key_padding=True)


@pytest.mark.parametrize("past", [True, False])
def test_a_window_written_as_a_fraction_is_not_taken_for_causal(past: bool) -> None:
    assert proved(Sketch(near=0.03, past=past)) == Mask("window", 34, key_padding=True)


def test_a_window_of_4096_is_refused_by_who_knows_causal_masks_alone() -> None:
    """With the one cell that tells them apart: the first key that the window hides, and no sooner."""
    observation, _ = seen(*build(Sketch(window=4096)), 8192)
    node = next(node for node in observation.model.graph if node.op_type == "Softmax")
    chain = next(c for computed, c in Laboratory(observation).graph.walk(node.inputs[0], SCORES) if computed and computed[0].producer().op_type == "MatMul")
    refusal = MaskProver(Laboratory(observation), 8192, (Causal(),)).prove(MaskSource(4, chain=chain), "here")
    assert isinstance(refusal, Refusal)
    assert "nearest is causal" in refusal.nearest and "key 0: expected visible, found hidden" in refusal.nearest


def test_a_window_beyond_the_context_is_causal_within_it() -> None:
    assert proved(Sketch(window=4096), max_context=1024) == Mask("causal", key_padding=True)


@pytest.mark.parametrize("padding", [True, False])
def test_bidirectional(padding: bool) -> None:
    assert proved(Sketch(past=False, mask="none", padding=padding)) == Mask("bidirectional", key_padding=padding)


@pytest.mark.parametrize("sketch", [Sketch(hole=True), Sketch(hole=True, past=False), Sketch(hole=True, window=4), Sketch(hole=True, op=True)])
def test_one_hidden_key_is_enough(sketch: Sketch) -> None:
    refusal = proved(sketch)
    assert isinstance(refusal, Refusal)
    assert "key 2" in refusal.nearest or "causal" in refusal.nearest or "window" in refusal.nearest


@pytest.mark.parametrize("past", [True, False])
@pytest.mark.parametrize("chunk", [3, 8, 40])
def test_chunks_are_found(chunk: int, past: bool) -> None:
    assert proved(Sketch(chunk=chunk, past=past, padding=False), 128) == Mask("chunked", chunk=chunk)


def test_a_chunk_far_longer_than_the_first_probes() -> None:
    assert proved(Sketch(chunk=4096), max_context=8192) == Mask("chunked", chunk=4096, key_padding=True)


def test_a_prefix_is_found() -> None:
    assert proved(Sketch(prefix=4, past=False, padding=False)) == Mask("prefix", prefix=4)


@pytest.mark.parametrize("past", [True, False])
@pytest.mark.parametrize("spelling", ["keys", "last", "shifted"])
def test_slopes_are_read_from_the_values(spelling: str, past: bool) -> None:
    sketch = Sketch(slopes=spelling, past=past)
    mask = proved(sketch, 2048)
    assert isinstance(mask, Mask)
    assert (mask.kind, mask.key_padding) == ("causal", True)
    assert mask.slopes == pytest.approx(alibi_slopes(sketch).tolist(), rel=1e-6)


def test_slopes_and_a_window() -> None:
    mask = proved(Sketch(slopes="keys", window=5))
    assert isinstance(mask, Mask)
    assert (mask.kind, mask.window, len(mask.slopes)) == ("window", 5, 4)


def test_slopes_that_change_along_the_row_are_refused_with_the_cell() -> None:
    refusal = proved(Sketch(slopes="curved"), 64)
    assert isinstance(refusal, Refusal)
    assert "is added to the score of query" in refusal.nearest and "slope" in refusal.nearest


def test_a_mask_by_runs_of_positions_is_told_from_one_by_places() -> None:
    assert proved(Sketch(packed=True, past=False, padding=False)) == Mask("causal", positional=True)
    assert proved(Sketch(past=False, padding=False)) == Mask("causal")


def test_rows_that_see_nothing_may_be_emptied() -> None:
    assert proved(Sketch(empty="rows")) == Mask("causal", key_padding=True)
    assert isinstance(proved(Sketch(empty="wrong")), Refusal)


@pytest.mark.parametrize("window", [4096, 8192])
def test_long_windows_without_a_past_cost_few_cells(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found, exactly, without ever computing the whole square of a sequence that is longer than the window."""
    largest = []
    whole = masks.bias
    monkeypatch.setattr(masks, "bias", lambda *given: largest.append((found := whole(*given)).size) or found)
    assert proved(Sketch(window=window, past=False), max_context=window + 100) == Mask("window", window, key_padding=True)
    assert max(largest) < 1 << 17


def test_positions_with_gaps_are_not_asked_of_a_triangle() -> None:
    """A Trilu knows places, not positions: all of it is computed."""
    model, interface = build(Sketch(past=False, padding=False))
    observation, _ = seen(model, interface)
    value = next(node for node in observation.model.graph if node.op_type == "LessOrEqual").outputs[0]
    assert list(sparse_situations(observation, [value], 600, [512]))
    triangle = ir.node("Trilu", [value], {"upper": 0})
    observation.model.graph.append(triangle)
    assert not list(sparse_situations(observation, [triangle.outputs[0]], 600, [512]))


def test_a_mask_of_ids_depends_on_data() -> None:
    for sketch in (Sketch(mask="ids"), Sketch(mask="ids", op=True)):
        refusal = proved(sketch)
        assert isinstance(refusal, Refusal)
        assert "depends on data" in refusal.reason


def test_predictions_against_their_definitions() -> None:
    rows, keys = np.arange(3, 7), np.arange(7)
    q, k = rows[:, None], keys[None]
    assert np.array_equal(Causal().predict(Mask("causal"), rows, keys), k <= q)
    assert np.array_equal(Window().predict(Mask("window", 2), rows, keys), (k <= q) & (k > q - 2))
    assert np.array_equal(Chunked().predict(Mask("chunked", chunk=4), rows, keys), (k <= q) & (k // 4 == q // 4))
    assert np.array_equal(Prefix().predict(Mask("prefix", prefix=5), rows, keys), (k <= q) | (k < 5))
    assert Bidirectional().predict(Mask("bidirectional"), rows, keys).all()


def test_equal_masks_are_evaluated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    observation, found = seen(*build(Sketch(op=True, op_cache=True)))
    node = next(node for node in observation.model.graph if node.op_type == "Attention")
    prover = MaskProver(Laboratory(observation), 64)
    source = MaskSource(4, operand=node.inputs[3], cached_in_op=True)
    assert prover.prove(source, "a") == sites_of(found)[0].mask
    monkeypatch.setattr(MaskProver, "_prove", lambda *_: pytest.fail("evaluated again"))
    assert prover.prove(MaskSource(4, operand=node.inputs[3], cached_in_op=True), "b") == sites_of(found)[0].mask


def test_a_refusal_keeps_the_name_of_its_own_site() -> None:
    observation, _ = seen(*build(Sketch(op=True, op_cache=True, hole=True)))
    node = next(node for node in observation.model.graph if node.op_type == "Attention")
    prover = MaskProver(Laboratory(observation), 64)
    source = MaskSource(4, operand=node.inputs[3], cached_in_op=True)
    first, second = (prover.prove(source, where) for where in ("a", "b"))
    assert isinstance(first, Refusal) and isinstance(second, Refusal)
    assert (first.where, second.where, first.nearest) == ("a", "b", second.nearest)
