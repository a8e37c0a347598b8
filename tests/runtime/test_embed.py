"""Vectors of texts, against the graph's own states pooled by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import octavo
import onnx
import pytest
from octavo.errors import OptionError, RequestError, UnsupportedError

# One attention over a table of eight words; OUT names the states.
ENCODER = """
<ir_version: 10, opset_import: ["" : 18]>
g (INPUTS) => (float[b,s,8] OUT)
<float[8,8] table = {TABLE}, int64[2] axes = {1, 2}, float one = {1.0}, float low = {-10000.0}>
{
    h = Gather(table, input_ids)
    k = Transpose<perm = [0, 2, 1]>(h)
    product = MatMul(h, k)
    MASK
    weights = Softmax<axis = -1>(scores)
    OUT = MatMul(weights, h)
}
"""
PADDED = """real = Cast<to = 1>(attention_mask)
    gone = Sub(one, real)
    hidden = Mul(gone, low)
    middle = Constant<value = int64[1] {1}>()
    mask = Unsqueeze(hidden, middle)
    scores = Add(product, mask)"""


def written(folder: Path, *, masked: bool = True, out: str = "last_hidden_state", more: str = "") -> Path:
    table = ", ".join(map(str, np.random.default_rng(1).standard_normal(64).round(3)))
    inputs = "int64[b,s] input_ids" + (", int64[b,s] attention_mask" if masked else "") + more
    text = ENCODER.replace("TABLE", table).replace("INPUTS", inputs).replace("OUT", out)
    proto = onnx.parser.parse_model(text.replace("MASK", PADDED if masked else "scores = Identity(product)"))
    folder.mkdir()
    onnx.save(proto, folder / "model.onnx")
    return folder / "model.onnx"


TEXTS = [[1, 2, 3], [4], [5, 6, 7, 0, 1], [2, 2]]


def by_hand(graph: Path, pooling: str) -> np.ndarray:
    with octavo.load(graph) as model:
        masks = [{"attention_mask": np.ones((1, len(text)), np.int64)} if "padded" in str(graph) else {} for text in TEXTS]
        states = [model.run({"input_ids": np.array([text]), **mask})["last_hidden_state"][0] for text, mask in zip(TEXTS, masks)]
    return np.stack([{"mean": rows.mean(axis=0), "cls": rows[0], "last": rows[-1]}[pooling] for rows in states])


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("masked", [True, False])
def test_each_text_is_pooled_alone(pooling: str, masked: bool, tmp_path: Path) -> None:
    """In whatever company it runs: padded beside longer texts where the graph takes a mask, else with those of its length."""
    graph = written(tmp_path / ("padded" if masked else "plain"), masked=masked)
    report = octavo.compile(graph, tmp_path / "out")
    assert report.kind == "stateless" and report.rewritten == 1
    with octavo.load(tmp_path / "out") as model:
        found = model.embed(TEXTS, pooling=pooling)
        alone = model.embed(TEXTS[2], pooling=pooling)
    assert found.shape == (4, 8) and found.dtype == np.float32 and alone.shape == (1, 8)
    np.testing.assert_allclose(found, by_hand(graph, pooling), atol=1e-5)
    np.testing.assert_allclose(alone[0], found[2], atol=1e-5)


def test_what_can_not_be_embedded_says_why(tmp_path: Path) -> None:
    graph = written(tmp_path / "padded")
    with octavo.load(graph) as model:
        with pytest.raises(OptionError, match="pooling='max'"):
            model.embed(TEXTS, pooling="max")  # type: ignore[arg-type]
        with pytest.raises(RequestError, match="prompt is empty"):
            model.embed([])
        with pytest.raises(UnsupportedError, match="no tokenizer"):
            model.embed("some text")
        with pytest.raises(RequestError, match="don't fit the graph"):
            model.embed([99])
    with octavo.load(written(tmp_path / "logits", out="logits")) as model, pytest.raises(UnsupportedError, match="no last hidden states"):
        model.embed(TEXTS)
    with octavo.load(written(tmp_path / "more", more=", float[b,3] extra")) as model, pytest.raises(UnsupportedError, match="'extra'"):
        model.embed(TEXTS)
