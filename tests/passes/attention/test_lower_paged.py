"""The token-flat graph against the exporter's own, in onnxruntime: prefill, chunks, single tokens, two ragged sequences, fewer rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from drivers import MAX_CONTEXT, Original, Paged, paged_error, seen
from octavo.custom_ops.contract import DOMAIN, PAGED_ATTENTION
from octavo.models.interface import GraphInterface
from octavo.models.onnx_reader import graph_interface, read_onnx
from octavo.passes.attention.match import sites_of
from octavo.passes.attention.site import AttentionSite
from octavo.passes.cache_interface import TokenFlatPlan, plan_token_flat
from octavo.passes.cleanup import Cleanup
from octavo.passes.outcome import Refusal
from sketches import VOCAB, Sketch, build

TOLERANCE = 1e-4  # of the largest logit


def planned(sketch: Sketch, **options: object) -> tuple[ir.Model, GraphInterface, TokenFlatPlan]:
    model, interface = build(sketch)
    observation, found = seen(model, interface)
    assert len(sites_of(found)) == len(found), found
    plan = plan_token_flat(observation, sites_of(found), max_context=MAX_CONTEXT, **options)  # type: ignore[arg-type]
    assert isinstance(plan, TokenFlatPlan), str(plan)
    return model, interface, plan


def error(sketch: Sketch, change: Callable[[AttentionSite], AttentionSite] = lambda site: site) -> float:
    """The paged error of a sketch, its sites changed after they were matched."""
    model, interface, plan = planned(sketch)
    plan = replace(plan, sites=tuple(change(site) for site in plan.sites))
    return paged_error(Original(build(sketch)[0], interface), Paged(model, plan), VOCAB)


SKETCHES = {
    "output_heads_first": Sketch(gate="heads_first"),
    "output_tokens_first": Sketch(gate="tokens_first", op=True),
    "past": Sketch(),
    "no_past_no_padding": Sketch(past=False, padding=False),
    "mha_min_guard": Sketch(G=4, mask="min", guard=True),
    "mqa_tile_divided": Sketch(G=1, heads="tile", scale="divided"),
    "broadcast_boolean_where": Sketch(heads="broadcast", mask="boolean_where"),
    "both_sides_three_d": Sketch(scale="both_sides", key="three_d"),
    "runtime_scale_fused": Sketch(scale="runtime", fused=True),
    "folded_query_interleaved": Sketch(scale="folded_query", rotary="interleaved"),
    "partial": Sketch(rotary="partial", D=16),
    "split": Sketch(rotary="split"),
    "query_norm_microsoft": Sketch(norm="q", rotary="microsoft"),
    "no_rotary": Sketch(rotary="none"),
    "window": Sketch(window=5),
    "softcap": Sketch(softcap=3.0, factor=1.5),
    "slopes": Sketch(slopes="keys"),
    "slopes_no_past": Sketch(slopes="last", past=False, rotary="none", window=7),
    "chunks": Sketch(chunk=8),
    "sinks": Sketch(sinks="plain", window=5),
    "sinks_shifted": Sketch(sinks="shifted", G=4, mask="min"),
    "rows_that_see_nothing": Sketch(empty="rows"),
    "packed": Sketch(packed=True, past=False, padding=False),
    "op": Sketch(op=True, rotary="op"),
    "op_cache_tokens_first": Sketch(op=True, op_cache=True, op_heads_first=False, rotary="op_interleaved", softcap=2.0, window=6),
    "op_causal_no_past": Sketch(op=True, past=False, padding=False, is_causal=True),
}


@pytest.mark.parametrize("sketch", SKETCHES.values(), ids=SKETCHES)
def test_the_logits_are_the_exporters(sketch: Sketch) -> None:
    assert error(sketch) < TOLERANCE


MUTATIONS: dict[str, tuple[Sketch, Callable[[AttentionSite], AttentionSite]]] = {
    "scale_off_by_a_hundredth": (Sketch(), lambda site: replace(site, scale=site.scale * 1.01)),
    "window_off_by_one": (Sketch(window=5), lambda site: replace(site, mask=replace(site.mask, window=4))),
    "window_dropped": (Sketch(window=5), lambda site: replace(site, mask=replace(site.mask, kind="causal", window=None))),
    "slopes_dropped": (Sketch(slopes="keys"), lambda site: replace(site, mask=replace(site.mask, slopes=()))),
    "slopes_turned_round": (Sketch(slopes="keys"), lambda site: replace(site, mask=replace(site.mask, slopes=site.mask.slopes[::-1]))),
    "chunk_off_by_one": (Sketch(chunk=8), lambda site: replace(site, mask=replace(site.mask, chunk=9))),
    "chunk_dropped": (Sketch(chunk=8), lambda site: replace(site, mask=replace(site.mask, kind="causal", chunk=None))),
    "chunk_for_window": (Sketch(chunk=8), lambda site: replace(site, mask=replace(site.mask, kind="window", window=8, chunk=None))),
    "sinks_dropped": (Sketch(sinks="plain"), lambda site: replace(site, sinks=())),
    "softcap_dropped": (Sketch(softcap=3.0, factor=1.5), lambda site: replace(site, softcap=0.0)),
    "key_for_value": (Sketch(), lambda site: replace(site, value=site.key)),
    "rotary_dropped": (Sketch(), lambda site: replace(site, rotary=replace(site.rotary, interleaved=True)) if site.rotary else site),
}


@pytest.mark.parametrize(("sketch", "change"), MUTATIONS.values(), ids=MUTATIONS)
def test_a_wrongly_accepted_site_shows(sketch: Sketch, change: Callable[[AttentionSite], AttentionSite]) -> None:
    assert error(sketch, change) > 10 * TOLERANCE


NEAR_MISSES: dict[str, tuple[Sketch, Sketch]] = {
    "a hole": (Sketch(hole=True), Sketch()),
    "keys hidden by what their token is": (Sketch(mask="ids"), Sketch()),
    "a window of one less": (Sketch(window=4), Sketch(window=5)),
    "a window far beyond the first probes": (Sketch(window=30), Sketch()),
    "a chunk of one more": (Sketch(chunk=9), Sketch(chunk=8)),
    "a prefix": (Sketch(prefix=6, past=False, padding=False), Sketch(past=False, padding=False)),
    "all keys": (Sketch(mask="none", past=False, padding=False), Sketch(past=False, padding=False)),
    "slopes that change along the row": (Sketch(slopes="curved", factor=0.05), Sketch(slopes="keys", factor=0.05)),
    "other heads": (Sketch(heads="permuted"), Sketch(heads="expand")),
    "other heads' probabilities": (Sketch(shuffled=True), Sketch()),
    "results emptied on some rows": (Sketch(empty="wrong"), Sketch()),
    "angles by the longest position": (Sketch(rotary="ntk"), Sketch()),
}


@pytest.mark.parametrize(("miss", "taken"), NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_a_near_miss_taken_for_its_nearest_would_show(miss: Sketch, taken: Sketch) -> None:
    """Each is refused, or has another meaning; and if a matcher took it for what it is nearest to, the comparison above would fail."""
    observation, found = seen(*build(miss))
    plan = plan_token_flat(observation, sites_of(found), max_context=MAX_CONTEXT) if sites_of(found) else None
    right = sites_of(seen(*build(taken))[1])[0]
    assert not isinstance(plan, TokenFlatPlan) or plan.sites[0].mask != right.mask
    model, interface, wrong = planned(taken)
    assert paged_error(Original(build(miss)[0], interface), Paged(model, wrong), VOCAB) > 10 * TOLERANCE


def test_permuted_heads_would_show() -> None:
    """What the matcher refuses (head h reading h % G) is a different model indeed."""
    right, wrong = (Original(*build(Sketch(heads=heads))) for heads in ("expand", "permuted"))
    ids = np.arange(12)[None]
    assert np.abs(right.run(ids) - wrong.run(ids)).max() > 0.01


def test_the_node_is_what_the_contract_says() -> None:
    model, _, plan = planned(Sketch(window=5, softcap=3.0))
    Paged(model, plan)
    node, = (node for node in model.graph if node.domain == DOMAIN)
    assert node.name == "layers.0.attention"
    assert node.op_type == PAGED_ATTENTION.name
    assert {name: attribute.value for name, attribute in node.attributes.items()} == {
        "num_heads": 4, "kv_num_heads": 2, "scale": pytest.approx(0.3), "softcap": pytest.approx(3.0), "local_window_size": 5, "rotary_interleaved": 0}
    for port, value in zip(PAGED_ATTENTION.inputs, node.inputs):
        assert (value is None) == (port.optional and port.name not in ("key", "value", "cos_cache", "sin_cache")), port.name


def test_masks_caches_and_rotary_are_gone() -> None:
    model, _, plan = planned(Sketch())
    Paged(model, plan)
    Cleanup()(model)
    kinds = {node.op_type for node in model.graph}
    assert not kinds & {"Softmax", "Where", "Range", "Cos", "Sin", "Expand", "Concat", "LessOrEqual", "Transpose"}


def test_parameters_keep_their_bits_and_their_tensors() -> None:
    model, _, plan = planned(Sketch())
    before = {value.name: value.const_value for value in model.graph.initializers.values()}
    Paged(model, plan)
    kept = [value for value in model.graph.initializers.values() if value.name in before]
    assert len(kept) > 8
    assert all(value.const_value is before[value.name] for value in kept)


def test_half_caches() -> None:
    model, interface, plan = planned(Sketch(), caches=["fp16"])
    assert plan.spec.cache_layers[0].cache == "fp16"
    assert paged_error(Original(build(Sketch())[0], interface), Paged(model, plan), VOCAB) < 5e-3


def test_rotary_by_the_longest_position_does_not_page() -> None:
    model, interface = build(Sketch(rotary="ntk"))
    observation, found = seen(model, interface)
    refusal = plan_token_flat(observation, sites_of(found), max_context=MAX_CONTEXT)
    assert isinstance(refusal, Refusal)


def test_rotary_that_changes_at_a_length_pages_up_to_it() -> None:
    sketch = Sketch(rotary="longrope")
    model, interface = build(sketch)
    observation, found = seen(model, interface)
    beyond = plan_token_flat(observation, sites_of(found), max_context=33)
    assert isinstance(beyond, Refusal) and "max_context=32 would do" in str(beyond)
    plan = plan_token_flat(observation, sites_of(found), max_context=32)
    assert isinstance(plan, TokenFlatPlan), str(plan)
    assert "over 32" in plan.frozen
    original, paged, ids = Original(build(sketch)[0], interface), Paged(model, plan), np.arange(33) % VOCAB
    want = original.run(ids[None])[0]
    got = np.concatenate([paged.step([(0, ids[:20])]), paged.step([(0, ids[20:32])])])
    short = original.run(ids[None, :32])[0]
    assert np.abs(got - short).max() < TOLERANCE * np.abs(short).max()
    assert np.abs(got - want[:32]).max() > 10 * TOLERANCE * np.abs(want).max()  # one token more is another model


def test_a_convolution_over_tokens_does_not_page() -> None:
    model, interface = build(Sketch(conv=True))
    observation, found = seen(model, interface)
    refusal = plan_token_flat(observation, sites_of(found), max_context=MAX_CONTEXT)
    assert isinstance(refusal, Refusal)
    assert "Conv" in str(refusal)


VARIANTS = [
    ("llama", {"opset": 18}), ("llama", {"opset": 18, "with_past": False}), ("llama", {"opset": 23}),
    ("qwen2", {"exporter": "torchscript", "opset": 17, "attention": "eager"}), ("mha", {"opset": 23, "attention_mask": False}),
]


@pytest.mark.parametrize(("name", "variant"), VARIANTS, ids=[f"{n}_" + "_".join(map(str, v.values())) for n, v in VARIANTS])
def test_exported_decoders(exported: Callable[..., Path], tmp_path: Path, name: str, variant: dict[str, object]) -> None:
    check_decoder(exported(name, **variant) / "model.onnx", tmp_path)


def test_hand_built_decoder(tiny_onnx: Path, tmp_path: Path) -> None:
    check_decoder(tiny_onnx / "model.onnx", tmp_path)


def check_decoder(path: Path, folder: Path) -> None:
    model = read_onnx(path)
    interface = graph_interface(model)
    observation, found = seen(model, interface)
    plan = plan_token_flat(observation, sites_of(found), max_context=MAX_CONTEXT)
    assert isinstance(plan, TokenFlatPlan), str(plan)
    assert all(table is not None for table in plan.tables)
    assert paged_error(Original(path, interface), Paged(model, plan, folder), plan.spec.vocab_size) < TOLERANCE
