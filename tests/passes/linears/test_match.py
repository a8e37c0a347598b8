"""Linears are found, named by where they stand, and refused with a reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest
from graphs import token_flat, written
from octavo.models.onnx_reader import read_onnx
from octavo.passes.linears.match import find_linears
from octavo.passes.normalize import FoldDequantize, Normalize

LAYER = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")


def expected(layers: int) -> list[str]:
    return [*(f"layers.{i}.{place}" for i in range(layers) for place in LAYER), "head"]


@pytest.mark.parametrize(("name", "layers", "embed"), [("llama", 2, False), ("llama3", 3, True), ("qwen2", 2, False)])
def test_a_token_flat_decoder(name: str, layers: int, embed: bool) -> None:
    """Two layers share nothing, though they look alike; a tied table goes by the head's name."""
    found = find_linears(token_flat(name))
    assert sorted(found.names) == sorted([*expected(layers), *(["embed"] if embed else [])])
    weights = {site.name: str(site.weight.name) for site in found.sites}
    hidden = {"q": "self_attn.q_proj", "down": "mlp.down_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj", "o": "self_attn.o_proj"}
    for place in ("attn.q", "attn.o", "mlp.gate", "mlp.up", "mlp.down"):
        assert all(weights[f"layers.{i}.{place}"] == f"model.layers.{i}.{hidden[place.split('.')[1]]}.weight" for i in range(layers))
    assert weights["head"] == ("lm_head.weight" if embed else "model.embed_tokens.weight")
    assert [table.name for table in found.embeddings] == ["embed" if embed else "head"] and not found.refusals
    biased = {site.name.split(".")[-1] for site in found.sites if site.bias is not None}
    assert biased == ({"q", "k", "v"} if name == "qwen2" else set())


def test_what_lies_around() -> None:
    found = find_linears(token_flat("llama"))
    normed = {site.name.rpartition(".")[2] for site in found.sites if site.input in found.norms}
    added = {site.name.rpartition(".")[2] for site in found.sites if site.output in found.residuals}
    assert normed == {"q", "k", "v", "gate", "up", "head"} and added == {"o", "down"}
    assert [(gate.gate.site.name, gate.up.site.name, gate.activation) for gate in found.gates] == [
        (f"layers.{i}.mlp.gate", f"layers.{i}.mlp.up", "silu") for i in range(2)
    ]


@pytest.mark.parametrize(
    ("name", "variant"), [("llama", {}), ("qwen2", {"exporter": "torchscript", "opset": 17}), ("llama3", {"opset": 18})], ids=str,
)
def test_exporters_agree(exported: Callable[..., Path], name: str, variant: dict) -> None:
    """Names don't depend on who wrote the graph, nor on what it was rewritten to."""
    model = token_flat(name, exported(name, **variant))
    assert sorted(find_linears(model).names) == sorted(find_linears(token_flat(name)).names)
    assert all(site.input in find_linears(model).norms for site in find_linears(model).sites if site.name.endswith(("q", "gate", "head")))


def test_a_graph_as_exported(tiny_onnx: Path) -> None:
    """Before any rewrite: standard Attention, and sizes that only a run can tell."""
    model = read_onnx(tiny_onnx / "model.onnx")
    Normalize()(model)
    FoldDequantize()(model)
    assert sorted(find_linears(model).names) == sorted(expected(2))


def test_a_block_with_both_branches_on_one_norm() -> None:
    """As in Phi and GPT-NeoX: the MLP reads what the attention reads."""
    layer = """
n{i} = RMSNormalization<axis = -1>(x{i}, w)
q{i} = MatMul(n{i}, a) k{i} = MatMul(n{i}, b) v{i} = MatMul(n{i}, c)
t{i} = com.microsoft.MultiHeadAttention<num_heads = 2>(q{i}, k{i}, v{i}) o{i} = MatMul(t{i}, d)
u{i} = MatMul(n{i}, e) g{i} = Gelu(u{i}) f{i} = MatMul(g{i}, h)
s{i} = Add(x{i}, o{i}) x{j} = Add(s{i}, f{i})
"""
    square = dict.fromkeys("abcdeh", (64, 64))
    body = layer.format(i=0, j=1) + layer.format(i=1, j=2) + "y = MatMul(x2, a)"
    model = written(body, {"w": (64,), **square}, "float[b,n,64] y", inputs="float[b,n,64] x0")
    places = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down")
    assert [site.name for site in find_linears(model).sites] == [*(f"layers.{i}.{place}" for i in range(2) for place in places), "head"]


def test_several_linears_of_one_place_are_numbered() -> None:
    model = written("a = MatMul(x, v) b = MatMul(x, w) c = Exp(a) d = Exp(b) y = Sub(c, d)", {"v": (64, 32), "w": (64, 32)})
    assert find_linears(model).names == ("input", "input.1")


SPELLINGS = {
    "MatMul": ("y = MatMul(x, w)", (64, 32), False),
    "transposed": ("t = Transpose<perm = [1, 0]>(w) y = MatMul(x, t)", (32, 64), True),
    "Gemm": ("y = Gemm(x, w)", (64, 32), False),
    "Gemm, transB": ("y = Gemm<transB = 1>(x, w)", (32, 64), True),
    "Gemm, transB of a Transpose": ("t = Transpose(w) y = Gemm<transB = 1>(x, t)", (64, 32), False),
    "Gemm with a bias": ("y = Gemm(x, w, c)", (64, 32), False),
    "bias added": ("p = MatMul(x, w) y = Add(c, p)", (64, 32), False),
}


@pytest.mark.parametrize(("body", "shape", "transposed"), SPELLINGS.values(), ids=SPELLINGS.keys())
def test_spellings(body: str, shape: tuple[int, int], transposed: bool) -> None:
    site = find_linears(written(body, {"w": shape, "c": (32,)})).sites[0]
    assert (site.K, site.M, site.transposed, site.input.name, site.output.name) == (64, 32, transposed, "x", "y")
    assert (site.bias is not None) == ("c" in body.replace("MatMul", "").replace("Transpose", ""))


REFUSED = {
    "y = Gemm<alpha = 0.5>(x, w)": "a Gemm with factors, or of a transposed input",
    "y = Gemm<transA = 1>(x, w)": "a Gemm with factors, or of a transposed input",
    "y = Gemm(x, w, row)": "a bias that is no constant vector",
    "y = MatMul(w, x)": "its weight is on the left",
    "y = MatMul(x, cube)": "a weight for each of a batch",
    "e = Exp(w) y = MatMul(x, e)": "its weight is computed in the graph",
    "y = com.microsoft.FusedMatMul(x, w)": "a product that onnxruntime has fused",
}


@pytest.mark.parametrize(("body", "reason"), REFUSED.items())
def test_refusals(body: str, reason: str) -> None:
    model = written(body, {"w": (64, 64), "cube": (2, 64, 64)}, inputs="float[n,64] x, float[64] row")
    found = find_linears(model)
    assert [refusal.reason for refusal in found.refusals] == [reason] and not found.sites


def test_products_of_data_are_no_linears() -> None:
    found = find_linears(written("t = Transpose(x) y = MatMul(x, t)", {}))
    assert not found.sites and not found.refusals


def test_rows_by_position_are_no_embedding() -> None:
    model = written("y = Gather(w, position_ids)", {"w": (64, 64)}, inputs="int64[n] position_ids")
    assert not find_linears(model).embeddings
    assert find_linears(model, ids="position_ids").embeddings


def test_a_residual_of_another_shape_is_none() -> None:
    """One row added to all: the op would read beyond it."""
    for other, found in (("float[n,32] r", 1), ("float[1,32] r", 0), ("float[k,32] r", 0)):
        model: ir.Model = written("p = MatMul(x, w) y = Add(p, r)", {"w": (64, 32)}, inputs=f"float[n,64] x, {other}")
        assert len(find_linears(model).residuals) == found, other
