"""The hand-built decoder computes what transformers computes with the same weights, and any text survives the tiny tokenizer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from octavo.errors import OptionError
from octavo.models.tiny import SPECIALS, TINY, tiny_config, tiny_llama_onnx, tiny_weights, write_tiny_tokenizer
from tokenizers import Tokenizer


@pytest.mark.parametrize("name", TINY)
def test_the_decoder_agrees_with_torch(name: str, tmp_path: Path) -> None:
    """Over a past, with padding on the left. Tolerance as in test_export: float32 over two or three layers of width 64."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from octavo.models.export import load_tiny

    config = TINY[name]
    session = ort.InferenceSession(tiny_llama_onnx(tmp_path / "out", seed=3, config=config))
    rng = np.random.default_rng(1)
    kv = rng.normal(0, 1, (config["num_hidden_layers"], 2, 2, config["num_key_value_heads"], 6, 16)).astype(np.float32)
    mask = np.ones((2, 10), np.int64)
    mask[0, :3] = 0
    feeds = {"input_ids": rng.integers(0, 320, (2, 4)), "attention_mask": mask, "position_ids": np.maximum(mask.cumsum(1) - 1, 0)[:, 6:]}
    cache = transformers.DynamicCache([(torch.from_numpy(key.copy()), torch.from_numpy(value.copy())) for key, value in kv])
    with torch.no_grad():
        tensors = {key: torch.from_numpy(value) for key, value in feeds.items()}
        logits = load_tiny(name, seed=3).model(**tensors, past_key_values=cache).logits.numpy()
    expected = [logits, *(tensor.numpy() for layer in cache.layers for tensor in (layer.keys, layer.values))]
    pasts = {f"past_key_values.{i}.{part}": kv[i, j] for i in range(len(kv)) for j, part in enumerate(("key", "value"))}
    for got, want in zip(session.run(None, {**feeds, **pasts}), expected, strict=True):
        np.testing.assert_allclose(got, want, atol=5e-5, rtol=0)


def test_a_valid_model_that_the_seed_decides(tmp_path: Path) -> None:
    paths = [tiny_llama_onnx(tmp_path / str(i), seed=seed, layers=1) for i, seed in enumerate((0, 0, 1))]
    onnx.checker.check_model(str(paths[0]), full_check=True)
    data = [(path.parent / "model.onnx.data").read_bytes() for path in paths]
    assert data[0] == data[1] != data[2]
    graph = onnx.load(paths[0], load_external_data=False).graph
    assert [node.op_type for node in graph.node].count("Attention") == 1
    assert {output.name for output in graph.output} == {"logits", "present.0.key", "present.0.value"}


def test_no_weight_is_trivial() -> None:
    """Norms of one and biases of zero would hide that they were dropped."""
    assert all(array.std() > 0.05 for array in tiny_weights(TINY["qwen2"], 0).values())


def test_configs() -> None:
    changed = tiny_config("llama", num_hidden_layers=5)
    assert changed["num_hidden_layers"] == 5 and TINY["llama"]["num_hidden_layers"] == 2
    with pytest.raises(OptionError, match="no tiny model"):
        tiny_config("mistral")
    with pytest.raises(OptionError, match="layers"):
        tiny_config("llama", layers=5)


def test_it_needs_no_torch() -> None:
    code = "import sys, octavo.models.tiny; sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'onnx_ir', 'onnx')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_file(str(write_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))))


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=40))
def test_any_text_round_trips(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() <= 320
    assert [tokenizer.token_to_id(token) for token in SPECIALS] == [0, 1, 2]
    assert tokenizer.encode("<|im_end|>").ids == [TINY["llama"]["eos_token_id"]]
    assert len(tokenizer.encode(" the").ids) == 1, "merges are used"
    assert len(tokenizer.encode("🙂").ids) == 3, "a character is split over tokens"
