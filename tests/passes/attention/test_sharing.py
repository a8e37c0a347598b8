"""Layers that read another layer's keys and values have one cache between them; what only looks alike has a cache of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from drivers import MAX_CONTEXT, Original, Paged, contiguous_error, flash_error, paged_error, seen
from octavo.models.onnx_reader import graph_interface, read_onnx
from octavo.passes.attention.lower_contiguous import ContiguousPlan, plan_contiguous
from octavo.passes.attention.lower_flash import FlashPlan, plan_flash
from octavo.passes.attention.match import sites_of
from octavo.passes.attention.sharing import readers_of
from octavo.passes.cache_interface import TokenFlatPlan, plan_token_flat
from sketches import VOCAB, Sketch, build

FIRST, SECOND = "layers.0.attention", "layers.1.attention"

SHARED = {
    "past": Sketch(second="shared"),
    "no_past": Sketch(second="shared", past=False),
    "tiled_no_rotary": Sketch(second="shared", heads="tile", rotary="none"),
    "narrow_reader": Sketch(second="shared", second_window=5),
    "narrow_owner": Sketch(second="shared", window=5),
    "two_windows": Sketch(second="shared", window=3, second_window=6),
}


@pytest.mark.parametrize("sketch", SHARED.values(), ids=SHARED)
def test_a_shared_cache_is_one_cache(sketch: Sketch) -> None:
    """Both sites on one pair of tensors, which keeps what the wider window sees; prefill, chunks, single tokens, two ragged sequences."""
    model, interface = build(sketch)
    observation, found = seen(model, interface)
    sites = sites_of(found)
    assert [(site.name, site.owner) for site in sites] == [(FIRST, None), (SECOND, FIRST)]
    plan = plan_token_flat(observation, sites, max_context=MAX_CONTEXT)
    assert isinstance(plan, TokenFlatPlan), str(plan)
    assert len(plan.spec.cache_layers) == 1 and plan.inputs.layer_of == (0, 0)
    windows = (sketch.window, sketch.second_window)
    assert plan.spec.cache_groups[0].window == (max(windows) if all(windows) else None)
    assert all(table is not None for table in plan.tables) or sketch.rotary == "none"
    error = paged_error(Original(build(sketch)[0], interface), Paged(model, plan), VOCAB)
    assert error < 1e-4
    nodes = [node for node in model.graph if node.op_type == "PagedAttention"]
    assert [node.inputs[3].name for node in nodes] == ["kv.0.key"] * 2
    assert [node.attributes["local_window_size"].as_int() for node in nodes] == [window or -1 for window in windows]


@pytest.mark.parametrize("kind", ["own_value", "turned"])
def test_keys_alone_or_turned_otherwise_are_not_shared(kind: str) -> None:
    sketch = Sketch(second=kind, past=False)
    model, interface = build(sketch)
    observation, found = seen(model, interface)
    assert [site.owner for site in sites_of(found)] == [None, None]
    plan = plan_token_flat(observation, sites_of(found), max_context=MAX_CONTEXT)
    assert isinstance(plan, TokenFlatPlan), str(plan)
    assert len(plan.spec.cache_layers) == 2
    assert paged_error(Original(build(sketch)[0], interface), Paged(model, plan), VOCAB) < 1e-4


@pytest.mark.parametrize("kind", ["own_value", "turned"])
def test_a_cache_wrongly_shared_shows(kind: str) -> None:
    sketch = Sketch(second=kind, past=False)
    model, interface = build(sketch)
    observation, found = seen(model, interface)
    first, second = sites_of(found)
    # What a matcher that compared too little would hand over: the second site on the first one's cache.
    wrong = replace(second, owner=FIRST, key=first.key, value=first.value, turned_key=first.turned_key)
    plan = plan_token_flat(observation, (first, wrong), max_context=MAX_CONTEXT)
    assert isinstance(plan, TokenFlatPlan), str(plan)
    assert paged_error(Original(build(sketch)[0], interface), Paged(model, plan), VOCAB) > 1e-3


def test_a_graph_with_a_cache_of_its_own_keeps_one() -> None:
    """Stock GroupQueryAttention: the reader is given the owner's past, and hands none on."""
    for sketch in (Sketch(second="shared", second_window=5), Sketch(second="shared", past=False)):
        model, interface = build(sketch)
        observation, found = seen(model, interface)
        plan = plan_contiguous(observation, sites_of(found), max_context=MAX_CONTEXT)
        assert isinstance(plan, ContiguousPlan), str(plan)
        assert [port.role for port in plan.interface.inputs] == ["input_ids", "position_ids", "past_key", "past_value"]
        assert len(plan.spec.cache_layers) == 1
        assert contiguous_error(Original(build(sketch)[0], interface), model, plan, VOCAB) < 1e-4


def test_without_a_cache_nothing_is_shared_but_values() -> None:
    sketch = Sketch(second="shared")
    model, interface = build(sketch)
    observation, found = seen(model, interface)
    plan = plan_flash(observation, sites_of(found))
    assert isinstance(plan, FlashPlan), str(plan)
    assert flash_error(Original(build(sketch)[0], interface), model, plan, VOCAB, batch=2) < 1e-4


def test_readers_are_told_by_owner() -> None:
    sites = sites_of(seen(*build(Sketch(second="shared")))[1])
    assert readers_of(sites) == ((0, 1),)
    assert readers_of(sites[:1]) == ((0,),)


GEMMA = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "max_position_embeddings": 64, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2, "vocab_size_per_layer_input": 320, "hidden_size_per_layer_input": 16, "bos_token_id": 1, "eos_token_id": 2,
}
FAMILIES = {
    "gemma3n_text": {"altup_num_inputs": 2, "laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 4},
    "gemma4_text": {"global_head_dim": 16},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_whose_last_layers_read_earlier_ones(family: str, tmp_path: Path) -> None:
    """As torch exports them: the third layer reads the first one's cache (a window of 8), the fourth the second's."""
    transformers = pytest.importorskip("transformers")
    from octavo.models.export import ExportVariant, load_tiny

    if family not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    decoder = load_tiny(transformers.AutoConfig.for_model(family, **GEMMA, **FAMILIES[family]))
    path = decoder.export(tmp_path / "exported", ExportVariant(exporter="torchscript", opset=17))
    model = read_onnx(path)
    interface = graph_interface(model)
    observation, found = seen(model, interface)
    assert [site.owner for site in sites_of(found)] == [None, None, FIRST, SECOND]
    plan = plan_token_flat(observation, sites_of(found), max_context=MAX_CONTEXT)
    assert isinstance(plan, TokenFlatPlan), str(plan)
    assert plan.inputs.layer_of == (0, 1, 0, 1) and [group.window for group in plan.spec.cache_groups] == [8, None]
    assert paged_error(Original(path, interface), Paged(model, plan, tmp_path), 320) < 1e-4
