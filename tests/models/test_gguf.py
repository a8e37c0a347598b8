"""The imported graph computes what transformers computes from the same file, and keeps every quantized weight bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from octavo.errors import ModelError
from octavo.models.gguf import import_gguf
from octavo.models.gguf_file import GgufFile
from octavo.models.gguf_weights import QUANTIZED, half_split_rows, split_blocks
from octavo.models.onnx_reader import graph_interface, read_onnx

MakeGguf = Callable[..., Path]


def session(model: str | bytes) -> ort.InferenceSession:
    """Without any optimization: onnxruntime's fusions of DequantizeLinear and MatMul calculate in int8."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 2
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


Arrays = dict[str, np.ndarray]


def step(runner: ort.InferenceSession, ids: np.ndarray, mask: np.ndarray, past: Arrays) -> tuple[np.ndarray, Arrays]:
    """Logits [B, S, V] and the grown cache. Positions count the unmasked tokens."""
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)[:, -ids.shape[1] :]
    names = [output.name for output in runner.get_outputs()]
    logits, *presents = runner.run(None, {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **past})
    return logits, {name.replace("present", "past_key_values"): value for name, value in zip(names[1:], presents)}


def empty_past(runner: ort.InferenceSession, batch: int) -> Arrays:
    return {i.name: np.zeros((batch, i.shape[1], 0, i.shape[3]), np.float32) for i in runner.get_inputs() if i.name.startswith("past")}


def largest_error(folder: Path, file: Path, ids: np.ndarray, split: int) -> float:
    """Largest difference of the logits of real tokens from transformers', over the largest logit: prefill, then a cached rest.

    The first row is padded on the left by two.
    """
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="transformers reads GGUF with accelerate")
    config = transformers.AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    if config.model_type == "qwen3":  # transformers takes 128 whatever the file says
        config.head_dim = GgufFile(file).get("qwen3.attention.key_length", int)
    model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, config=config, dtype=torch.float32).eval()
    mask = np.ones_like(ids)
    mask[0, :2] = 0
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    with torch.no_grad():
        arrays = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        expected = model(**{name: torch.from_numpy(array) for name, array in arrays.items()}).logits.numpy()
    runner = session(str(folder / "model.onnx"))
    first, past = step(runner, ids[:, :split], mask[:, :split], empty_past(runner, len(ids)))
    rest, past = step(runner, ids[:, split:], mask, past)
    assert past["past_key_values.0.key"].shape[2] == ids.shape[1]
    difference = np.abs(np.concatenate([first, rest], axis=1) - expected)[mask == 1]
    return float(difference.max() / np.abs(expected).max())


# Sums of at most 96 products in float32 over two layers: 1e-5 of the largest logit leaves a factor of about 10.
VARIANTS: list[dict[str, Any]] = [
    {"types": "F32", "embedding": "F32"},
    {"types": "F16", "embedding": "F16", "tied": False},
    {"types": "BF16", "embedding": "F32"},
    {"types": "Q4_0", "embedding": "Q4_0"},
    {"types": "Q4_1", "embedding": "Q8_0"},
    {"types": "Q4_1", "embedding": "Q4_1", "tied": False},
    {"types": "Q8_0", "embedding": "Q8_0", "tied": False},
    {"architecture": "qwen2", "bias": True},
    {"architecture": "qwen3", "types": "Q8_0"},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: "-".join(map(str, variant.values())))
def test_logits_equal_those_of_transformers(variant: dict[str, Any], make_gguf: MakeGguf, tmp_path: Path) -> None:
    file = make_gguf(**variant)
    folder = import_gguf(file, tmp_path / "out").parent
    ids = np.random.default_rng(1).integers(4, 250, (2, 9))
    assert largest_error(folder, file, ids, split=6) < 1e-5


def test_a_graph_that_keeps_the_permuted_rows_would_be_caught(make_gguf: MakeGguf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.models.gguf_graph.half_split_rows", lambda heads, size: np.arange(heads * size))
    file = make_gguf()
    folder = import_gguf(file, tmp_path / "out").parent
    assert largest_error(folder, file, np.random.default_rng(1).integers(4, 250, (2, 9)), split=6) > 1e-2


def test_a_llama_with_biases_has_them_permuted_as_its_rows(make_gguf: MakeGguf, tmp_path: Path) -> None:
    """transformers drops a llama's biases, so the oracle is qwen2: the same model with rows and biases stored in their own order."""
    path = make_gguf(types="F32", embedding="F32", bias=True)
    stored = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}
    llama = import_gguf(path, tmp_path / "llama")
    ordered = dict(stored)
    for name, values in stored.items():
        for part, heads in (("attn_q.", 4), ("attn_k.", 2)):
            if part in name:
                ordered[name] = values.reshape(heads, 8, 2, -1).swapaxes(1, 2).reshape(values.shape)
    qwen = import_gguf(make_gguf(architecture="qwen2", types="F32", embedding="F32", bias=True, tensors=ordered), tmp_path / "qwen")
    ids, mask = np.arange(4, 12)[None], np.ones((1, 8), np.int64)
    logits = [step(runner, ids, mask, empty_past(runner, 1))[0] for runner in (session(str(llama)), session(str(qwen)))]
    assert np.array_equal(*logits)


def test_llama3_frequencies_divide_the_rotation(make_gguf: MakeGguf, tmp_path: Path) -> None:
    """rope_freqs.weight divides each frequency: dividing all by 2 is what linear scaling by 2 does."""
    factors = {"rope_freqs.weight": np.full(8, 2, np.float32)}
    divided = import_gguf(make_gguf(tensors=factors), tmp_path / "divided")
    linear = import_gguf(make_gguf(metadata={"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}), tmp_path / "linear")
    plain = import_gguf(make_gguf(), tmp_path / "plain")
    logits = []
    for path in (divided, linear, plain):
        runner = session(str(path))
        logits.append(step(runner, np.arange(4, 12)[None], np.ones((1, 8), np.int64), empty_past(runner, 1))[0])
    assert np.array_equal(logits[0], logits[1])
    assert not np.allclose(logits[0], logits[2], atol=1e-3)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "Q5_0", "F16", "BF16"])
def test_a_matrix_in_the_graph_equals_gguf_dequantize_bit_for_bit(kind: str, make_gguf: MakeGguf, tmp_path: Path) -> None:
    matrix = "blk.0.ffn_down.weight"
    file = make_gguf(types=kind)
    model = onnx.load(import_gguf(file, tmp_path / "out"))
    product = next(node for node in model.graph.node if node.name == "/model/layers.0/mlp/down_proj/MatMul")
    weight = product.input[1]
    del model.graph.output[:]
    model.graph.output.append(onnx.helper.make_tensor_value_info(weight, onnx.TensorProto.FLOAT, None))
    if weight in {tensor.name for tensor in model.graph.initializer}:
        found = next(onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer if tensor.name == weight)
        assert kind not in QUANTIZED
    else:
        runner = session(onnx.utils.Extractor(model).extract_model([], [weight]).SerializeToString())
        (found,) = runner.run(None, {})
        assert kind in QUANTIZED
    tensor = next(tensor for tensor in gguf.GGUFReader(file).tensors if tensor.name == matrix)
    expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
    assert found.shape == expected.T.shape
    assert np.array_equal(found.view(np.uint32), np.ascontiguousarray(expected.T).view(np.uint32))


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(sorted(QUANTIZED)), rows=st.integers(1, 3), blocks=st.integers(1, 3)
)
def test_blocks_split_as_gguf_has_them(seed: int, kind: str, rows: int, blocks: int) -> None:
    """Any bytes, not only those a quantizer makes: negative scales, every nibble."""
    from octavo.models.gguf_file import GgufTensor

    rng = np.random.default_rng(seed)
    size = gguf.constants.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
    data = rng.integers(0, 256, (rows, blocks, size), dtype=np.uint8)
    header = 2 if kind == "Q4_1" else 1
    data[..., : 2 * header] = rng.normal(0, 1, (rows, blocks, header)).astype(np.float16).view(np.uint8)
    tensor = GgufTensor("w", kind, (rows, blocks * 32), data.reshape(rows, -1))
    parts = split_blocks(tensor)
    found = parts.values.astype(np.float32).reshape(rows, blocks, 32) * parts.scales[..., None]
    if parts.minimums is not None:
        found = found + parts.minimums[..., None]
    expected = gguf.quants.dequantize(tensor.data, gguf.GGMLQuantizationType[kind])
    assert np.array_equal(found.reshape(rows, -1), expected)


@pytest.mark.parametrize(("heads", "size"), [(1, 2), (3, 8), (4, 64)])
def test_half_split_rows_undoes_the_converters_permutation(heads: int, size: int) -> None:
    rows = np.arange(heads * size)
    permuted = rows.reshape(heads, 2, size // 2).swapaxes(1, 2).reshape(-1)
    assert np.array_equal(permuted[half_split_rows(heads, size)], rows)


def test_the_folder_holds_a_checked_model_and_all_its_companions(make_gguf: MakeGguf, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    path = import_gguf(make_gguf(), tmp_path / "out", lambda name, done, total: seen.append((done, total)))
    onnx.checker.check_model(str(path), full_check=True)
    assert {file.name for file in path.parent.iterdir()} == {
        "model.onnx", "model.onnx.data", "config.json", "generation_config.json",
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    }
    assert seen[-1][0] == seen[-1][1] == len(seen) > 10
    config = json.loads((path.parent / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["num_hidden_layers"], config["num_key_value_heads"], config["max_position_embeddings"]) == (2, 2, 64)
    assert json.loads((path.parent / "generation_config.json").read_text()) == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    model = read_onnx(path)
    offsets = [value.const_value.offset for value in model.graph.initializers.values() if hasattr(value.const_value, "offset")]
    assert offsets
    assert all(offset % 4096 == 0 for offset in offsets)
    roles = {port.role for port in graph_interface(model).inputs} | {port.role for port in graph_interface(model).outputs}
    assert roles == {
        "input_ids", "attention_mask", "position_ids", "past_key", "past_value", "present_key", "present_value", "logits"
    }


def test_an_import_replaces_an_import_and_nothing_else(make_gguf: MakeGguf, tmp_path: Path) -> None:
    file, out = make_gguf(), tmp_path / "out"
    import_gguf(file, out)
    import_gguf(file, out)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ModelError, match="holds other files"):
        import_gguf(file, out)
    assert (out / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf", "out"]


def test_a_failure_in_the_middle_leaves_nothing(make_gguf: MakeGguf, tmp_path: Path) -> None:
    def fail(name: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_gguf(make_gguf(), tmp_path / "out", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "mamba"}, "'mamba'.*llama, qwen2, qwen3 are supported"),
        ({"metadata": {"llama.rope.scaling.type": "yarn"}}, "'yarn'"),
        ({"metadata": {"llama.expert_count": 8}}, "mixture of experts"),
        ({"metadata": {"llama.attention.sliding_window": 8}}, "sliding_window"),
        ({"metadata": {"llama.block_count": None}}, "block_count"),
        ({"metadata": {"llama.block_count": "two"}}, "block_count"),
        ({"metadata": {"llama.attention.head_count_kv": 3}}, "can't share"),
        ({"metadata": {"llama.feed_forward_length": 128}}, r"blk\.0\.ffn_gate\.weight.*\[96, 64\].*\[128, 64\]"),
        ({"tensors": {"blk.1.attn_k.weight": None}}, r"no tensor 'blk\.1\.attn_k\.weight'"),
        ({"tensors": {"blk.0.attn_sinks.weight": np.zeros(4, np.float32)}}, r"'blk\.0\.attn_sinks\.weight' has no place"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_not_understood_is_refused_by_name(options: dict[str, Any], message: str, make_gguf: MakeGguf, tmp_path: Path) -> None:
    file = make_gguf(**options)
    with pytest.raises(ModelError, match=message) as caught:
        import_gguf(file, tmp_path / "out")
    assert caught.value.hint
    assert not (tmp_path / "out").exists()


def test_a_type_that_cannot_be_dequantized_is_named(make_gguf: MakeGguf, tmp_path: Path) -> None:
    file = make_gguf()
    content = bytearray(file.read_bytes())
    # the type follows name, rank and two sizes in the tensor table; I64 (27) has no dequantization
    name = b"blk.0.ffn_down.weight"
    at = content.index(name) + len(name) + 4 + 16
    assert content[at] == gguf.GGMLQuantizationType.Q4_1
    content[at] = gguf.GGMLQuantizationType.Q8_K
    file.write_bytes(content)
    with pytest.raises(ModelError, match=r"blk\.0\.ffn_down\.weight"):
        import_gguf(file, tmp_path / "out")


@pytest.mark.slow
def test_smollm2_equals_transformers(smollm2_gguf: Path, tmp_path: Path) -> None:
    """Thirty layers: 1e-5 of the largest logit again; measured 2e-6."""
    folder = import_gguf(smollm2_gguf, tmp_path / "out").parent
    ids = np.random.default_rng(2).integers(17, 49152, (2, 24))
    assert largest_error(folder, smollm2_gguf, ids, split=17) < 1e-5


def test_the_file_reads_as_the_gguf_package_reads_it(make_gguf: MakeGguf) -> None:
    path = make_gguf(types="Q4_0")
    ours, theirs = GgufFile(path), gguf.GGUFReader(path)
    assert ours.metadata == {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        found = ours.tensors[tensor.name]
        assert found.shape == tuple(int(size) for size in reversed(tensor.shape))
        assert found.type == tensor.tensor_type.name
        assert found.data.tobytes() == tensor.data.tobytes()
