"""Every exported graph computes what its torch model computes: as a prefill, over a past, and for a padded batch.

Tolerance: logits are sums of 64 products of numbers near one (eps 1.2e-7, magnitude below 8, two layers deep), so 5e-5 leaves an order of
magnitude; a graph with a wrong mask, position or head is off by more than 0.1.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from octavo.errors import ModelError, OptionError, UnsupportedError
from octavo.models.artifact import TOKENIZER_FILES
from octavo.models.tiny import TINY, tiny_config

torch = pytest.importorskip("torch", reason='needs torch and transformers: pip install "octavo[export]"')
transformers = pytest.importorskip("transformers", reason='needs torch and transformers: pip install "octavo[export]"')

from octavo.models.export import OPSETS, ExportVariant, export_checkpoint, export_tiny, load_checkpoint, load_tiny  # noqa: E402

TOLERANCE = 5e-5

Case = tuple[str, dict[str, Any]]

FAST: list[Case] = [
    ("llama", {"opset": 18}),
    ("llama", {"opset": 23}),
    ("llama", {"opset": 18, "with_past": False}),
    ("llama", {"opset": 18, "attention": "eager"}),
    ("llama", {"exporter": "torchscript", "opset": 14}),
    ("llama", {"exporter": "torchscript", "opset": 17}),
    ("llama", {"exporter": "torchscript", "opset": 17, "attention": "eager"}),
    ("llama", {"exporter": "torchscript", "opset": 17, "with_past": False}),
    ("llama", {"exporter": "torchscript", "opset": 17, "position_ids": False}),
    ("llama", {"exporter": "torchscript", "opset": 17, "position_ids": False, "attention_mask": False}),
    ("qwen2", {"exporter": "torchscript", "opset": 17}),
    ("llama3", {"exporter": "torchscript", "opset": 17}),
]

GRID: list[Case] = [
    (name, dict(exporter=exporter, opset=opset, with_past=past, position_ids=positions, attention_mask=mask, attention=attention))  # noqa: C408
    for exporter, opsets in OPSETS.items()
    for past in (True, False)
    for positions, mask in ((True, True), (False, True), (False, False))
    for attention in ("sdpa", "eager")
    for opset in opsets
    for name in (TINY if positions and attention == "sdpa" and opset in (17, 18, 23) else ("llama",))
    if exporter == "dynamo" or past or mask  # torch.onnx has no aten::diff, which transformers looks for packed sequences with
]


def label(case: Case) -> str:
    return "-".join([case[0], *(f"{key}={value}" for key, value in case[1].items())])


@pytest.mark.parametrize("case", FAST, ids=label)
def test_a_graph_agrees_with_torch(case: Case, exported: Callable[..., Path], tiny_decoder: Callable[..., Any]) -> None:
    name, variant = case
    compare(tiny_decoder(name).model, exported(name, **variant), ExportVariant(**variant))


@pytest.mark.grid
@pytest.mark.parametrize("case", GRID, ids=label)
def test_the_whole_grid_agrees_with_torch(case: Case, tmp_path: Path, tiny_decoder: Callable[..., Any]) -> None:
    name, variant = case
    decoder = tiny_decoder(name)
    compare(decoder.model, decoder.export(tmp_path / "out", ExportVariant(**variant)).parent, ExportVariant(**variant))


def one_row_only(variant: ExportVariant) -> bool:
    """Without position ids the rotary tables have one row, and the `RotaryEmbedding` that torch's exporter fuses at opset 23 wants one for
    each row of the batch: such a graph is right for one sequence and fails in onnxruntime for several (torch 2.13, onnxscript 0.7).
    """
    return variant.exporter == "dynamo" and variant.opset == 23 and not variant.position_ids


def compare(model: Any, folder: Path, variant: ExportVariant) -> None:
    """Runs graph and model on the same inputs: (batch, new tokens, past, padding on the left of the first row)."""
    session = ort.InferenceSession(folder / "model.onnx")
    config = model.config
    rng = np.random.default_rng(7)
    model.set_attn_implementation(variant.attention)
    shapes = [(1, 6, 0, 0), (3, 4, 0, 0), (2, 7, 0, 2)]
    shapes += [(1, 1, 9, 0), (2, 1, 4, 0), (2, 5, 6, 3), (1, 40, 33, 0)] if variant.with_past else []
    for B, S, past, padding in shapes:
        if B > 1 and one_row_only(variant):
            continue
        ids = rng.integers(0, config.vocab_size, (B, S))
        mask = np.ones((B, past + S), np.int64)
        mask[0, :padding] = 0
        feeds = {"input_ids": ids}
        if variant.attention_mask:
            feeds["attention_mask"] = mask
        if variant.position_ids:
            feeds["position_ids"] = np.maximum(mask.cumsum(1) - 1, 0)[:, past:]
        kv = rng.normal(0, 1, (config.num_hidden_layers, 2, B, config.num_key_value_heads, past, config.head_dim)).astype(np.float32)
        names = [f"{i}.{part}" for i in range(config.num_hidden_layers) for part in ("key", "value")] if variant.with_past else []
        pasts = {f"past_key_values.{name}": array for name, array in zip(names, (array for pair in kv for array in pair))}

        with torch.no_grad():
            cache = transformers.DynamicCache([(torch.from_numpy(key.copy()), torch.from_numpy(value.copy())) for key, value in kv])
            tensors = {name: torch.from_numpy(value) for name, value in feeds.items()}
            extra = {"past_key_values": cache} if variant.with_past else {}
            expected = {"logits": model(**tensors, **extra, use_cache=variant.with_past).logits.numpy()}
            for name, tensor in zip(names, (tensor for layer in cache.layers for tensor in (layer.keys, layer.values))):
                expected[f"present.{name}"] = tensor.numpy()

        assert [port.name for port in session.get_inputs()] == [*feeds, *pasts]
        assert [port.name for port in session.get_outputs()] == list(expected)
        real = mask[:, past:] > 0 if variant.attention_mask else np.ones((B, S), bool)
        for name, got in zip(expected, session.run(None, {**feeds, **pasts})):
            # What a padding token computes is nobody's business, and the exporters differ there.
            want = expected[name]
            assert got.shape == want.shape and got.dtype == want.dtype
            if name != "logits":
                got, want = got.swapaxes(1, 2), want.swapaxes(1, 2)  # [B, past + S, G, D]
                np.testing.assert_array_equal(got[:, :past], want[:, :past])
                got, want = got[:, past:], want[:, past:]
            np.testing.assert_allclose(got[real], want[real], atol=TOLERANCE, rtol=0, err_msg=f"{name} at {(B, S, past, padding)}")


def test_the_comparison_sees_a_wrong_graph(exported: Callable[..., Path], tiny_decoder: Callable[..., Any]) -> None:
    """Negative control: the graph of other weights."""
    variant = {"exporter": "torchscript", "opset": 17}
    with pytest.raises(AssertionError, match="logits"):
        compare(tiny_decoder("llama", 1).model, exported("llama", **variant), ExportVariant(**variant))


def test_a_graph_for_one_row_only(exported: Callable[..., Path], tiny_decoder: Callable[..., Any]) -> None:
    """Fails when the exporter mends it: then `one_row_only` has to go."""
    variant = {"opset": 23, "with_past": False, "position_ids": False}
    compare(tiny_decoder().model, exported(**variant), ExportVariant(**variant))
    session = ort.InferenceSession(exported(**variant) / "model.onnx")
    with pytest.raises(Exception, match="RotaryEmbedding"):
        session.run(None, {"input_ids": np.ones((2, 3), np.int64), "attention_mask": np.ones((2, 3), np.int64)})


def test_spellings(exported: Callable[..., Path]) -> None:
    """What the compiler must understand is what the exporter wrote: `Attention` from opset 23, decomposed below."""
    def ops(**variant: Any) -> set[str]:
        return {node.op_type for node in onnx.load(exported(**variant) / "model.onnx", load_external_data=False).graph.node}

    assert {"Attention", "RMSNormalization"} <= ops(opset=23)
    assert {"Softmax", "IsNaN"} <= ops(opset=18) and "Attention" not in ops(opset=18)
    assert "IsNaN" not in ops(opset=18, attention="eager")
    assert {"Softmax", "ConstantOfShape"} <= ops(exporter="torchscript", opset=17)


def test_an_exported_folder_is_complete(exported: Callable[..., Path]) -> None:
    folder = exported("llama", exporter="torchscript", opset=17)
    names = {path.name for path in folder.iterdir()}
    assert names == {"model.onnx", "model.onnx.data", *set(TOKENIZER_FILES) - {"special_tokens_map.json"}}
    assert json.loads((folder / "config.json").read_text())["num_key_value_heads"] == 2
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    assert {entry.value for tensor in graph.initializer for entry in tensor.external_data if entry.key == "location"} == {"model.onnx.data"}
    assert [dim.dim_param or dim.dim_value for dim in graph.input[3].type.tensor_type.shape.dim] == ["batch", 2, "past_sequence", 16]


def test_a_checkpoint_folder(tmp_path: Path) -> None:
    """Saved by transformers, loaded again, exported; its tokenizer goes along; a second export replaces the first."""
    tiny = load_tiny("qwen2")
    tiny.model.save_pretrained(tmp_path / "checkpoint")
    tiny.write_side_files(tmp_path / "checkpoint")
    variant = {"exporter": "torchscript", "opset": 15}
    for _ in range(2):
        path = export_checkpoint(tmp_path / "checkpoint", tmp_path / "out", **variant)
    assert path == tmp_path / "out" / "model.onnx" and (path.parent / "tokenizer.json").is_file()
    compare(tiny.model, path.parent, ExportVariant(**variant))


def test_any_transformers_config(tmp_path: Path) -> None:
    """A config object of another family; its fresh norms and biases are shaken, and the global generator is left alone."""
    config = transformers.GPTNeoXConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64
    )
    state = torch.random.get_rng_state()
    decoder = load_tiny(config, seed=5)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(parameter.std() > 0.1 for parameter in decoder.model.parameters() if parameter.ndim == 1)
    session = ort.InferenceSession(decoder.export(tmp_path / "out", ExportVariant("torchscript", 17, with_past=False)))
    ids = np.arange(11)[None]
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": ids}
    with torch.no_grad():
        expected = decoder.model(**{name: torch.from_numpy(value) for name, value in feeds.items()}).logits.numpy()
    np.testing.assert_allclose(session.run(None, feeds)[0], expected, atol=TOLERANCE, rtol=0)


def test_the_seed_decides_the_weights() -> None:
    config = transformers.LlamaConfig(**tiny_config("one_layer"))
    for source in ("one_layer", config):
        a, b, c = (load_tiny(source, seed=seed).model.state_dict() for seed in (3, 3, 4))
        assert all(torch.equal(a[name], b[name]) for name in a)
        assert not any(torch.equal(a[name], c[name]) for name in a)


def test_half_precision(tmp_path: Path) -> None:
    """Weights, past and logits are float16; a product in half has 11 bits, the logits lie below 8."""
    decoder = load_tiny("one_layer", dtype="float16")
    path = decoder.export(tmp_path / "out", ExportVariant("torchscript", 17))
    graph = onnx.load(path, load_external_data=False).graph
    kinds = [tensor.data_type for tensor in graph.initializer if np.prod(tensor.dims) > 1000]
    # This exporter casts the attention's output to float32 and back, and folds one cast into the output projection.
    assert sorted(kinds) == [onnx.TensorProto.FLOAT, *[onnx.TensorProto.FLOAT16] * 8]
    ids = np.arange(20, 31)[None]
    past = np.zeros((1, 2, 0, 16), np.float16)
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": ids - 20}
    logits = ort.InferenceSession(path).run(["logits"], {**feeds, "past_key_values.0.key": past, "past_key_values.0.value": past})[0]
    with torch.no_grad():
        expected = decoder.model(torch.from_numpy(ids)).logits.numpy()
    assert logits.dtype == np.float16
    np.testing.assert_allclose(logits, expected, atol=0.05, rtol=0)


@pytest.mark.parametrize(
    "variant", [{"exporter": "tracing"}, {"opset": 17}, {"exporter": "torchscript", "opset": 18}, {"attention": "flash"}], ids=str
)
def test_a_bad_variant_is_refused_before_anything_is_loaded(variant: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(OptionError):
        export_checkpoint(tmp_path / "missing", tmp_path / "out", **variant)


def test_bad_sources(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="neither"):
        load_checkpoint(tmp_path / "missing")
    with pytest.raises(ModelError, match="can't be loaded"):
        load_checkpoint(tmp_path)
    with pytest.raises(OptionError, match="bfloat16"):
        load_tiny("llama", dtype="bfloat16")
    with pytest.raises(OptionError, match="no tiny model"):
        load_tiny("mistral")


def test_what_the_exporter_refuses_is_a_typed_error_and_leaves_nothing(tmp_path: Path, tiny_decoder: Callable[..., Any]) -> None:
    variant = ExportVariant("torchscript", 17, with_past=False, position_ids=False, attention_mask=False)
    with pytest.raises(UnsupportedError, match="diff"):
        tiny_decoder().export(tmp_path / "out", variant)
    assert not any(tmp_path.iterdir())


def test_a_folder_with_other_things_is_not_replaced(tmp_path: Path, tiny_decoder: Callable[..., Any]) -> None:
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(ModelError, match="not replaced"):
        tiny_decoder().export(tmp_path, ExportVariant("torchscript", 17))
    assert (tmp_path / "letter.txt").read_text() == "mine"


def test_without_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(UnsupportedError, match=r'pip install "octavo\[export\]"'):
        export_tiny("llama", tmp_path / "out")
