"""A cache of another precision in some layers: KV groups, the same bits in any company, and what the report and the memory plan say of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import octavo
import pytest
from octavo.errors import CapacityError, OptionError, RefusedError
from octavo.models.artifact import Artifact
from octavo.models.tiny import TINY, tiny_llama_onnx
from octavo.runtime.kv.budget import block_bytes

MIXED = {"0": "fp16", "2": "int8", "*": "fp32"}
PROMPTS = [np.random.default_rng(seed).integers(0, 300, length).tolist() for seed, length in enumerate((1, 31, 70, 33))]
P = 16


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama_onnx(tmp_path_factory.mktemp("source"), layers=4)


@pytest.fixture(scope="module")
def artifact(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mixed") / "art"
    report = octavo.compile(source, out, options=octavo.CompileOptions(kv_cache=MIXED, strict=True))
    precision = next(d for d in report.decisions if d.feature == "kv_precision")
    assert precision.value == "fp16 (1 of 4 layers), fp32 (2 of 4 layers), int8 (1 of 4 layers)" and str(MIXED) in precision.reason
    return out


def _load(artifact: Path, blocks: int = 60) -> octavo.Model:
    spec = Artifact.open(artifact).manifest.spec
    assert spec is not None
    files = sum((artifact / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    options = octavo.RuntimeOptions(threads=2, block_size=P, prefix_cache=False, memory=files + blocks * block_bytes(spec, P))
    return octavo.load(artifact, options=options)


def _check(model: octavo.Model, held: int) -> None:
    """Blocks are conserved in every group: `held` of each."""
    with model.engine.turn:
        model.engine.collect_dropped()
        model.engine.check()
    stats = model.stats()
    assert stats["blocks_free"] + stats["blocks_used"] == stats["blocks_total"] == 3 * 60
    assert (stats["blocks_used"], stats["blocks_reserved"]) == (3 * held, 0)


def test_layers_of_one_format_are_a_group_and_each_has_its_bytes(artifact: Path) -> None:
    manifest = Artifact.open(artifact).manifest
    assert manifest.spec is not None and manifest.options["kv_cache"] == MIXED
    assert [(layer.group, layer.cache) for layer in manifest.spec.cache_layers] == [(0, "fp16"), (1, "fp32"), (2, "int8"), (1, "fp32")]
    assert [port.dtype for port in manifest.interface.inputs if port.role == "cache_key"] == ["float16", "float32", "uint8", "float32"]
    G, D = TINY["llama"]["num_key_value_heads"], TINY["llama"]["head_dim"]
    with _load(artifact) as model:
        assert model.stats()["cache_bytes"] == 60 * P * G * (2 * D * (2 + 4 + 4) + 2 * (D + 4))      # int8: a scale of 4 bytes each


def test_rows_have_the_same_bits_alone_in_company_and_in_pieces(artifact: Path) -> None:
    with _load(artifact) as model, model.begin_session() as session:
        alone = [model.predict(prompt) for prompt in PROMPTS]
        together = [session.new_sequence() for _ in PROMPTS]
        for rows, expected in zip(session.append_batch(list(zip(together, PROMPTS)), rows="all"), alone):
            assert rows.tobytes() == expected.tobytes()
        pieces = session.new_sequence()
        rows = [pieces.append(PROMPTS[2][a:b], rows="all") for a, b in ((0, 15), (15, 16), (16, 49), (49, 70))]
        assert np.concatenate(rows).tobytes() == alone[2].tobytes()
        _check(model, held=1 + 2 + 5 + 3 + 5)


def test_forks_copy_the_blocks_of_every_group(artifact: Path) -> None:
    with _load(artifact) as model, model.begin_session() as session:
        expected = model.predict(PROMPTS[2])
        first = session.new_sequence()
        first.append(PROMPTS[2][:-3])
        second = first.fork()
        second.append([5, 6])                   # both go on in one shared block
        assert first.append(PROMPTS[2][-3:], rows="all").tobytes() == expected[-3:].tobytes()
        assert model.stats()["block_copies"] == 3
        _check(model, held=6)
        second.truncate(20)
        assert second.append(PROMPTS[2][20:], rows="all").tobytes() == expected[20:].tobytes()
        first.close()
        second.close()
        _check(model, held=0)


def test_a_pool_that_is_full_in_all_groups_refuses_and_changes_nothing(artifact: Path) -> None:
    with _load(artifact) as model, model.begin_session() as session:
        sequences = [session.new_sequence() for _ in range(15)]
        for sequence in sequences[:12]:
            sequence.append(PROMPTS[2])
        with pytest.raises(CapacityError):
            session.append_batch([(sequence, [1]) for sequence in sequences[:13]])
        _check(model, held=60)


def test_every_layer_has_the_format_that_was_asked_for(source: Path, artifact: Path, tmp_path: Path) -> None:
    """All layers named one by one are the uniform format, to the bit; and each mixed layer moves the logits off fp32, a little."""
    logits = {}
    for name, kv_cache in {
        "fp32": "fp32", "int8": "int8", "one by one": {"0-1": "int8", "2": "int8", "3": "int8"}, "first": {"0": "int8", "*": "fp32"}, "rest": {"1-3": "fp32"},
    }.items():
        octavo.compile(source, tmp_path / name, options=octavo.CompileOptions(kv_cache=kv_cache))  # type: ignore[arg-type]
        with octavo.load(tmp_path / name) as model:
            logits[name] = model.predict(PROMPTS[2])
    with octavo.load(artifact) as model:
        logits["mixed"] = model.predict(PROMPTS[2])
    assert logits["one by one"].tobytes() == logits["int8"].tobytes()
    kl = {name: _mean_kl(logits["fp32"], rows) for name, rows in logits.items()}
    assert 0 < kl["rest"] < 1e-5 < kl["first"] < kl["int8"]         # "rest": layer 0 is fp16, as nothing names it
    assert kl["rest"] < kl["mixed"] < kl["int8"] < 1e-2


def _mean_kl(p: np.ndarray, q: np.ndarray) -> float:
    def log_softmax(x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float64)
        return x - np.logaddexp.reduce(x, axis=1, keepdims=True)
    a, b = log_softmax(p), log_softmax(q)
    return float((np.exp(a) * (a - b)).sum(axis=1).mean())


def test_layers_that_are_not_there_and_kinds_without_blocks_are_errors(source: Path, tmp_path: Path) -> None:
    for formats, message in (({"0-9": "int8"}, "'0-9' names layer 9, and the model has 4"), ({"*": "fp16", "1": "int8"}, "'1' decides nothing")):
        with pytest.raises(OptionError, match=message):
            octavo.compile(source, tmp_path / "out", options=octavo.CompileOptions(kv_cache=formats))  # type: ignore[arg-type]
    with pytest.raises(RefusedError, match="contiguous"):
        octavo.compile(source, tmp_path / "out", options=octavo.CompileOptions(kv_cache=MIXED, paged=False))  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
