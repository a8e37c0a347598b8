"""What stands against a rewrite by a graph's inputs alone is named; what does not is left to the proofs."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from octavo.models.onnx_reader import graph_interface
from octavo.passes.obstacles import obstacle

_PAST = "float[B,2,P,4] past_key_0, float[B,2,P,4] past_value_0"
_PRESENT = "float[B,2,T,4] present_key_0, float[B,2,T,4] present_value_0"
_GROW = "present_key_0 = Identity(past_key_0) present_value_0 = Identity(past_value_0)"


def graph(inputs: str, body: str) -> ir.Model:
    return ir.from_onnx_text(f"""
<ir_version: 10, opset_import: ["" : 18]>
g ({inputs}, {_PAST}) => (float[B,S,8] logits, {_PRESENT}) <float[8,8] W = {{{", ".join(["0.5"] * 64)}}}, float[16,8] table = {{{", ".join(["0.5"] * 128)}}}>
{{ {body} {_GROW} }}
""")


EMBED = "h = Gather(table, input_ids)"
MERGED = f"{EMBED} logits = If (use_cache_branch) < then_branch = a () => (float[B,S,8] p) {{ p = MatMul(h, W) }}, " \
         "else_branch = b () => (float[B,S,8] q) { r = MatMul(h, W) q = Neg(r) } >"
CHOSEN_SCALE = f"{EMBED} s = If (use_cache_branch) < then_branch = a () => (float[B,S,8] p) {{ p = Neg(h) }}, " \
               "else_branch = b () => (float[B,S,8] q) { q = Abs(h) } > logits = MatMul(s, W)"


@pytest.mark.parametrize(("inputs", "body", "word"), [
    ("int64[B,S] input_ids, bool use_cache_branch", MERGED, "If-merged decoder"),
    ("float[B,S,8] inputs_embeds, int64[B,T] attention_mask", "logits = MatMul(inputs_embeds, W)", "embeddings and no token ids"),
    ("int64[B,1] input_ids", f"{EMBED} logits = MatMul(h, W)", "static shapes"),
])
def test_named(inputs: str, body: str, word: str) -> None:
    model = graph(inputs, body)
    found = obstacle(model, graph_interface(model))
    assert found is not None
    assert word in found.reason
    assert found.where and found.nearest


@pytest.mark.parametrize(("inputs", "body"), [
    ("int64[B,S] input_ids", f"{EMBED} logits = MatMul(h, W)"),
    ("int64[B,S] input_ids, bool use_cache_branch", CHOSEN_SCALE),
])
def test_others_are_left_to_the_proofs(inputs: str, body: str) -> None:
    model = graph(inputs, body)
    assert obstacle(model, graph_interface(model)) is None
