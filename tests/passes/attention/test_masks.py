"""Masks are proved by their values: what agrees on every probe is named, what differs in one cell is refused with that cell."""

from __future__ import annotations

import numpy as np
import pytest
from drivers import seen
from octavo.passes.attention.laboratory import Laboratory
from octavo.passes.attention.mask_candidates import Bidirectional, Causal, Chunked, Prefix, Window
from octavo.passes.attention.mask_source import MaskSource
from octavo.passes.attention.masks import MaskProver
from octavo.passes.attention.match import sites_of
from octavo.passes.attention.site import Mask
from octavo.passes.outcome import Refusal
from sketches import Sketch, build


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
