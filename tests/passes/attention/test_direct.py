"""Attentions taken at their word: spelled by hand, run before and after; what only looks like one is refused and left alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import octavo
import onnx
import onnxruntime as ort
import pytest

# query from words, keys and values from another sequence; MASK is what lies between product and softmax.
CROSS = """
<ir_version: 10, opset_import: ["" : 18]>
g (float[b,s,32] words, float[b,frames,32] other, int64[b,frames] encoder_attention_mask) => (float[b,s,32] out OUT)
<int64[4] split = {0, 0, 4, 8}, int64[3] join = {0, 0, 32}, float scale = {0.3}, float low = {-10000.0}, float one = {1.0}, int64[2] axes = {1, 2},
 float cap = {2.0}, float zero = {0.0}, float[1,4,1,1] table = {0.5, 1.0, -1.0, 2.0}, float[1,1,1,1] single = {0.25}>
{
    q4 = Reshape(words, split)
    q = Transpose<perm = [0, 2, 1, 3]>(q4)
    k4 = Reshape(other, split)
    k = Transpose<perm = [0, 2, 3, 1]>(k4)
    v = Transpose<perm = [0, 2, 1, 3]>(k4)
    real = Cast<to = 1>(encoder_attention_mask)
    gone = Sub(one, real)
    hidden = Mul(gone, low)
    mask = Unsqueeze(hidden, axes)
    seen = Cast<to = 9>(encoder_attention_mask)
    choice = Unsqueeze(seen, axes)
    raw = MatMul(q, k)
    product = Mul(raw, scale)
    MASK
    weights = Softmax<axis = -1>(scores)
    attended = MatMul(weights, v)
    back = Transpose<perm = [0, 2, 1, 3]>(attended)
    out = Reshape(back, join)
    EXTRA
}
"""

SPELLINGS = {
    "added": "scores = Add(product, mask)",
    "nothing": "scores = Identity(product)",
    "chosen": "scores = Where(choice, product, low)",
    "chosen the other way": "no = Not(choice) scores = Where(no, low, product)",
    "a bias for each head": "biased = Add(table, product) scores = Add(biased, mask)",
    "one number for all keys": "scores = Add(product, single)",
    "subtracted": "scores = Sub(product, mask) ",
    "capped": "small = Div(product, cap) bent = Tanh(small) capped = Mul(bent, cap) scores = Add(capped, mask)",
    "scaled behind the mask": "biased = Add(product, mask) scores = Mul(biased, scale)",
    "more data in the sum": "twice = MatMul(q, k) both = Add(product, twice) scores = Add(both, mask)",
    "chosen and added": "biased = Add(product, table) scores = Where(choice, biased, low)",
    "added and chosen": "some = Where(choice, product, low) scores = Add(some, table)",
}


def model_of(mask: str, extra: str = "", out: str = "") -> onnx.ModelProto:
    text = CROSS.replace("MASK", mask.replace(") ", ")\n    ")).replace("EXTRA", extra).replace("OUT", out)
    return onnx.parser.parse_model(text)


def feeds() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(3)
    mask = np.ones((2, 7), np.int64)
    mask[1, 4:] = 0
    return {"words": draw.standard_normal((2, 5, 32), np.float32), "other": draw.standard_normal((2, 7, 32), np.float32), "encoder_attention_mask": mask}


def run_of(proto: onnx.ModelProto) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    given = feeds()
    return session.run(None, {port.name: given[port.name] for port in session.get_inputs()})


def compiled(proto: onnx.ModelProto, folder: Path) -> tuple[octavo.CompileReport, list[str], list[np.ndarray]]:
    report = octavo.compile(proto, folder)
    ops = [node.op_type for node in onnx.load(folder / "model.onnx").graph.node]
    with octavo.load(folder, options=octavo.RuntimeOptions(threads=1)) as model:
        names = {value.name for value in proto.graph.input}
        found = model.run({name: array for name, array in feeds().items() if name in names})
    return report, ops, [found[value.name] for value in proto.graph.output]


@pytest.mark.parametrize("name", SPELLINGS)
def test_cross_attention_keeps_its_result(name: str, tmp_path: Path) -> None:
    proto = model_of(SPELLINGS[name])
    report, ops, got = compiled(proto, tmp_path / "out")
    assert report.kind == "stateless" and not report.refusals, report.to_text()
    assert ops.count("FlashAttention") == 1 and "Softmax" not in ops
    [want] = run_of(proto)
    np.testing.assert_allclose(got[0], want, atol=1e-5)


def test_what_the_graph_transposes_for_its_products_is_not_computed(tmp_path: Path) -> None:
    _, ops, _ = compiled(model_of(SPELLINGS["added"]), tmp_path / "out")
    assert "Transpose" not in ops


NEAR_MISSES = {
    "a choice that does not hide": ("scores = Where(choice, product, one)", "", "", "does not hide"),
    "a factor for each key": ("scores = Mul(product, mask)", "", "", "no single number"),
    "scores read elsewhere": ("scores = Add(product, mask)", "probabilities = Identity(weights)", ", float[b,4,s,frames] probabilities", "or elsewhere"),
    "a cap over the mask": ("biased = Add(product, mask) scores = Tanh(biased)", "", "", "behind a mask"),
    "taken from another": ("scores = Sub(mask, product)", "", "", "from another value"),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_are_refused_and_unharmed(name: str, tmp_path: Path) -> None:
    mask, extra, out, word = NEAR_MISSES[name]
    proto = model_of(mask, extra, out)
    report, ops, got = compiled(proto, tmp_path / "out")
    assert report.kind == "baseline" and "Softmax" in ops and "FlashAttention" not in ops
    assert report.attentions == 1 and report.rewritten == 0
    assert any(word in refusal.reason + refusal.nearest for refusal in report.refusals), [str(r) for r in report.refusals]
    for a, b in zip(got, run_of(proto), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


# A graph attention layer: scores are sums of two numbers, hidden by an adjacency that is data.
GAT = """
<ir_version: 10, opset_import: ["" : 18]>
g (float[b,s,32] words) => (float[b,s,32] out) <float[32,1] left = {L}, float[32,1] right = {R}, float low = {-1e9}, float zero = {0.0}>
{
    a = MatMul(words, left)
    c = MatMul(words, right)
    ct = Transpose<perm = [0, 2, 1]>(c)
    pairs = Add(a, ct)
    bent = LeakyRelu(pairs)
    near = Greater(bent, zero)
    scores = Where(near, bent, low)
    weights = Softmax<axis = -1>(scores)
    out = MatMul(weights, words)
}
""".replace("{L}", "{" + ", ".join(["0.1"] * 32) + "}").replace("{R}", "{" + ", ".join(["-0.2"] * 32) + "}")


def test_graph_attention_is_refused_and_unharmed(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(GAT)
    report, ops, got = compiled(proto, tmp_path / "out")
    assert report.kind == "baseline" and "Softmax" in ops and report.attentions == 1
    assert any("no product of query and key" in refusal.reason or "no single product" in refusal.reason for refusal in report.refusals)
    np.testing.assert_allclose(got[0], run_of(proto)[0], atol=1e-5)


def test_a_clock_decides_under_tune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the rewritten graph is slower the graph's own attention stays, and the report says by how much; else the report says that."""
    from octavo.compiler import pipeline

    proto = model_of(SPELLINGS["added"])
    for ours, kept in ((3.0, False), (0.5, True)):
        times = iter([1.0, ours, 1.0, ours])
        monkeypatch.setattr(pipeline, "timer", lambda call, times=times: next(times))
        out = tmp_path / str(kept)
        report = octavo.compile(proto, out, options=octavo.CompileOptions(tune=True))
        ops = [node.op_type for node in onnx.load(out / "model.onnx").graph.node]
        decided = {decision.feature: decision for decision in report.decisions}
        assert ("FlashAttention" in ops) == kept and ("Softmax" in ops) != kept
        assert decided["flash_attention"].value == ("on" if kept else "off")
        told = decided["tune" if kept else "flash_attention"].reason
        assert ("2.00 times as fast" if kept else "200% slower") in told


def test_a_cache_stays_where_another_sequence_is_attended_to(tmp_path: Path) -> None:
    """A decoder of an encoder's states with past and present: both attentions go to FlashAttention, the cache is the graph's own."""
    text = CROSS.replace("MASK", "scores = Add(product, mask)").replace("OUT", ", float[b,4,t,8] present_0_key, float[b,4,t,8] present_0_value")
    text = text.replace("EXTRA", """
    sk4 = Reshape(words, split)
    sk = Transpose<perm = [0, 2, 1, 3]>(sk4)
    present_0_key = Concat<axis = 2>(past_0_key, sk)
    present_0_value = Concat<axis = 2>(past_0_value, sk)
    turned = Transpose<perm = [0, 1, 3, 2]>(present_0_key)
    self = MatMul(q, turned)
    own = Softmax<axis = -1>(self)
    mixed = MatMul(own, present_0_value)
    flat4 = Transpose<perm = [0, 2, 1, 3]>(mixed)
    flat = Reshape(flat4, join)
    states = Add(flat, crossed)
    """).replace("    out = Reshape(back, join)", "    crossed = Reshape(back, join)").replace("states =", "out =")
    text = text.replace("encoder_attention_mask) =>", "encoder_attention_mask, float[b,4,p,8] past_0_key, float[b,4,p,8] past_0_value) =>")
    ids = {
        "float[b,s,32] words": "int64[b,s] input_ids", "<int64[4] split": "<float[8,32] rows = {ROWS}, int64[4] split",
        "{\n    q4": "{\n    words = Gather(rows, input_ids)\n    q4",
    }
    for old, new in ids.items():
        text = text.replace(old, new)
    proto = onnx.parser.parse_model(text.replace("ROWS", ", ".join(map(str, np.random.default_rng(4).standard_normal(256).round(3)))))
    report = octavo.compile(proto, tmp_path / "out")
    ops = [node.op_type for node in onnx.load(tmp_path / "out" / "model.onnx").graph.node]
    assert report.kind == "stateless" and ops.count("FlashAttention") == 2, report.to_text()
    past = {f"past_0_{kind}": np.random.default_rng(9).standard_normal((2, 4, 3, 8), np.float32) for kind in ("key", "value")}
    given = {"input_ids": np.arange(10).reshape(2, 5) % 8, **feeds(), **past}
    del given["words"]
    want = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, given)
    with octavo.load(tmp_path / "out") as model:
        got = model.run(given)
    for value, expected in zip(proto.graph.output, want, strict=True):
        np.testing.assert_allclose(got[value.name], expected, atol=1e-5)
