"""A rehearsal sees what the linears see, and other weights move the logits as they do when they are in the graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from graphs import one_sequence, run, token_flat
from octavo.errors import RequestError
from octavo.models.onnx_reader import graph_interface, read_onnx
from octavo.passes.linears.rehearsal import Rehearsal
from octavo.passes.normalize import Normalize

RNG = np.random.default_rng(7)
TEXT = [RNG.integers(3, 320, 600).tolist(), RNG.integers(3, 320, 40).tolist()]


def test_the_maxima_are_those_of_the_inputs(tiny_onnx: Path) -> None:
    model = read_onnx(tiny_onnx / "model.onnx")
    Normalize()(model)
    found = Rehearsal(model, graph_interface(model), TEXT).maxima()
    table, norm = (model.graph.initializers[f"model.{name}.weight"].const_value.numpy() for name in ("embed_tokens", "layers.0.input_layernorm"))
    rows = table[np.concatenate([np.array(tokens) for tokens in TEXT])].astype(np.float64)
    rows = rows / np.sqrt((rows**2).mean(axis=1, keepdims=True) + 1e-5) * norm
    np.testing.assert_allclose(found["model.layers.0.self_attn.q_proj.weight"], np.abs(rows).max(axis=0), rtol=1e-5)
    assert len(found) == 15 and found["model.layers.1.mlp.down_proj.weight"].shape == (96,)
    first = Rehearsal(model, graph_interface(model), TEXT[:1]).maxima()
    assert all((found[name] >= first[name]).all() for name in found) and any((found[name] > first[name]).any() for name in found)


def test_no_text_is_an_error(tiny_onnx: Path) -> None:
    model = read_onnx(tiny_onnx / "model.onnx")
    with pytest.raises(RequestError, match="no tokens"):
        Rehearsal(model, graph_interface(model), [[]])


def test_other_weights_move_the_logits_as_in_the_graph(tiny_onnx: Path) -> None:
    """The divergence of fed weights is that of a graph that has them; the graph may change after the rehearsal was prepared."""
    source = read_onnx(tiny_onnx / "model.onnx")
    Normalize()(source)
    rehearsal = Rehearsal(source, graph_interface(source), [TEXT[0][:200]])
    feeds = one_sequence(token_flat("llama"), np.array(TEXT[0][:200]))
    p = run(token_flat("llama"), feeds)[0].astype(np.float64)
    for name in ("model.layers.0.mlp.down_proj.weight", "model.embed_tokens.weight"):
        changed = token_flat("llama")
        weight = changed.graph.initializers[name]
        other = np.round(weight.const_value.numpy() * 8) / 8
        weight.const_value = ir.Tensor(other.astype(np.float32), name=name)
        q = run(changed, feeds)[0].astype(np.float64)
        expected = (softmax(p) * (log_softmax(p) - log_softmax(q))).sum(axis=1).mean()
        assert rehearsal.knows(name)
        found = rehearsal.divergence({name: other.astype(np.float32)})
        assert found > 1e-3
        assert found == pytest.approx(expected, rel=1e-3)
    assert rehearsal.divergence({}) == 0


def log_softmax(x: np.ndarray) -> np.ndarray:
    return x - np.logaddexp.reduce(x, axis=1, keepdims=True)


def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(log_softmax(x))
