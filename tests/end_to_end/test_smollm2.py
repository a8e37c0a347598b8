"""The real model: SmolLM2-135M-Instruct from four exporters' hands, token for token what transformers generates in float32."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import octavo
import pytest

pytestmark = pytest.mark.slow

REFERENCE = json.loads((Path(__file__).parents[1] / "data" / "smollm2_greedy.json").read_text())["prompts"]
GREEDY = octavo.SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
EXPORTS = {
    "dynamo 18": {"exporter": "dynamo", "opset": 18},
    "dynamo 23": {"exporter": "dynamo", "opset": 23},
    "TorchScript 17": {"exporter": "torchscript", "opset": 17},
}


@pytest.fixture(scope="module")
def imported(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GGUF file as plain ONNX."""
    return octavo.import_model(smollm2_gguf, tmp_path_factory.mktemp("imported"))


@pytest.fixture(scope="module")
def fp32(imported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _compiled(imported, tmp_path_factory.mktemp("fp32"), "fp32")


def _compiled(source: Path, folder: Path, cache: str) -> Path:
    report = octavo.compile(source, folder / "artifact", options=octavo.CompileOptions(kv_cache=cache, strict=True))  # type: ignore[arg-type]
    assert report.kind == "paged" and len(report.sites) == 30 and not report.refusals
    return folder / "artifact"


def _assert_greedy(artifact: Path) -> None:
    """All eight prompts at once: 64 tokens each, equal to the reference."""
    with octavo.load(artifact, options=octavo.RuntimeOptions(memory="3GiB")) as model:
        results = model.generate([prompt["prompt_token_ids"] for prompt in REFERENCE], GREEDY)
        assert model.stats()["blocks_used"] == 0
    for prompt, result in zip(REFERENCE, results, strict=True):
        assert list(result.completions[0].token_ids) == prompt["greedy_token_ids"], prompt["name"]


def test_the_reference_is_eight_prompts_of_sixty_four_tokens() -> None:
    assert len(REFERENCE) == 8 and all(len(prompt["greedy_token_ids"]) == 64 for prompt in REFERENCE)


def test_gguf_import_generates_the_reference(fp32: Path) -> None:
    _assert_greedy(fp32)


@pytest.mark.parametrize("name", EXPORTS)
def test_torch_exports_generate_the_reference(name: str, smollm2_exported: Callable[..., Path], tmp_path: Path) -> None:
    artifact = _compiled(smollm2_exported(**EXPORTS[name]) / "model.onnx", tmp_path, "fp32")
    _assert_greedy(artifact)
    shutil.rmtree(artifact)  # 0.6 GB


def test_fp16_cache_costs_less_than_1e_5_nats(imported: Path, fp32: Path, tmp_path: Path) -> None:
    fp16 = _compiled(imported, tmp_path, "fp16")
    rows = {path: _rows(path) for path in (fp32, fp16)}
    kl = _mean_kl(rows[fp32], rows[fp16])
    print(f"mean KL of the fp16 cache to the fp32 cache over {len(rows[fp32])} rows: {kl:.2e}")
    assert 0 < kl < 1e-5


def test_int8_cache_costs_less_than_1e_3_nats(imported: Path, fp32: Path, tmp_path: Path) -> None:
    int8 = _compiled(imported, tmp_path, "int8")
    rows = {path: _rows(path) for path in (fp32, int8)}
    kl = _mean_kl(rows[fp32], rows[int8])
    print(f"mean KL of the int8 cache to the fp32 cache over {len(rows[fp32])} rows: {kl:.2e}")
    assert 0 < kl < 1e-3


def _rows(artifact: Path) -> np.ndarray:
    """Logits of every row of the reference's prompts and continuations."""
    with octavo.load(artifact, options=octavo.RuntimeOptions(memory="3GiB")) as model:
        return np.concatenate([model.predict(prompt["prompt_token_ids"] + prompt["greedy_token_ids"]) for prompt in REFERENCE])


def _mean_kl(p: np.ndarray, q: np.ndarray) -> float:
    total = 0.0
    for a, b in zip(p, q):
        log_a, log_b = (x - x.max() - np.log(np.exp(x - x.max()).sum()) for x in (a.astype(np.float64), b.astype(np.float64)))
        total += float(np.sum(np.exp(log_a) * (log_a - log_b)))
    return total / len(p)


def test_a_row_keeps_its_bits_alone_in_company_and_in_chunks(fp32: Path) -> None:
    """Attention keeps them by its canonical order, the linears by onnxruntime's MatMul, whose order over K does not follow the rows."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(100, 40_000, size) for size in (150, 90, 33, 64, 1, 200, 17, 128)]
    with octavo.load(fp32, options=octavo.RuntimeOptions(memory="3GiB")) as model, model.begin_session() as session:
        alone = [model.predict(ids) for ids in prompts]
        together = session.append_batch([(session.new_sequence(), ids) for ids in prompts], rows="all")
        for one, many in zip(alone, together):
            np.testing.assert_array_equal(one, many)
        for chunk in (1, 7, 64):
            sequence = session.new_sequence()
            rows = [sequence.append(prompts[0][at : at + chunk], rows="all") for at in range(0, len(prompts[0]), chunk)]
            np.testing.assert_array_equal(np.concatenate(rows), alone[0])
            sequence.close()
