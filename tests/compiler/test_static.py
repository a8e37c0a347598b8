"""Activations with scales from calibration: what the option asks for, what it decides, how near it comes, and that rows keep their bits in company."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import octavo
import onnx
import pytest
from octavo.errors import OptionError, RefusedError
from octavo.models.tiny import TINY, build_llama, tiny_weights, write_config
from octavo.passes.linears import smooth
from octavo.passes.quantize.groups import Scheme
from octavo.passes.quantize.rtn import rtn

IDS = np.random.default_rng(3).integers(3, 320, 500).tolist()
STATIC: dict[str, Any] = {"weights": "int8", "activations": "int8-static", "kv_cache": "fp32"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers in which a few channels of each norm, and of each gated product, are eight times as large as the others."""
    import onnx_ir as ir

    folder, config = tmp_path_factory.mktemp("source"), TINY["llama3"]
    weights = tiny_weights(config, 0)
    for name, array in weights.items():
        if name.endswith("layernorm.weight"):
            array[5::32] *= 8
        elif name.endswith("up_proj.weight"):
            array[7::32] *= 8
        elif name.endswith("down_proj.weight"):
            array[:, 7::32] /= 8
        elif name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight")):
            array[:, 5::32] /= 8
    ir.save(build_llama(config, weights), folder / "model.onnx", external_data="model.onnx.data")
    write_config(folder, config)
    (folder / "ids.json").write_text(json.dumps(IDS[:300]))
    return folder


def _compile(folder: Path, out: Path, **options: Any) -> dict[str, octavo.Decision]:
    given = {**STATIC, "calibration": folder / "ids.json", **options}
    return {d.feature: d for d in octavo.compile(folder / "model.onnx", out, options=octavo.CompileOptions(**given)).decisions}


def _error(folder: Path, artifact: Path) -> float:
    with octavo.load(folder / "model.onnx") as original, octavo.load(artifact) as model:
        return float(np.mean((model.predict(IDS[300:]) - original.predict(IDS[300:])) ** 2))


def test_static_scales_are_nearer_with_smoothing_and_every_choice_is_told(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decided = _compile(folder, tmp_path / "smoothed")
    assert decided["activations"].value == "int8-static" and "23 of 23 weights" in decided["activations"].reason
    assert "scales from calibration" in decided["activations"].reason and decided["calibration"].value == "text"
    assert decided["smoothing"].value == "19 of 22 linears" and "layers.*.attn.o" in decided["smoothing"].reason
    check = octavo.check(tmp_path / "smoothed", folder / "model.onnx")
    checked = check.results
    assert check.ok, check.to_text()
    assert {result.comparison for result in checked} == {"reference", "rewrite", "original"}
    assert all((result.mean_kl or 0) < 0.05 for result in checked)
    nodes = [node for node in onnx.load(tmp_path / "smoothed" / "model.onnx", load_external_data=False).graph.node if node.op_type == "QuantLinear"]
    assert len(nodes) == 3 * 4 + 1 and all(len(node.input) == 7 and node.input[6] for node in nodes)
    monkeypatch.setattr(smooth, "_source", lambda *_: None)
    assert _compile(folder, tmp_path / "plain")["smoothing"].value == "0 of 22 linears"
    monkeypatch.undo()
    _compile(folder, tmp_path / "fp32", activations="fp32", calibration=None)
    errors = [_error(folder, tmp_path / name) for name in ("fp32", "smoothed", "plain")]
    assert errors[0] < errors[1] < 0.5 * errors[2], errors


def test_scales_of_another_text_are_others(folder: Path, tmp_path: Path) -> None:
    """Calibrated on what a model never sees, here one token again and again, its inputs saturate."""
    (tmp_path / "one.json").write_text(json.dumps([7] * 300))
    for name, text in (("right", folder / "ids.json"), ("wrong", tmp_path / "one.json")):
        _compile(folder, tmp_path / name, calibration=text)
    assert _error(folder, tmp_path / "wrong") > 2 * _error(folder, tmp_path / "right")


def test_rows_keep_their_bits_in_chunks_and_in_company(folder: Path, tmp_path: Path) -> None:
    _compile(folder, tmp_path / "art")
    with octavo.load(tmp_path / "art") as model, model.begin_session() as session:
        whole = model.predict(IDS[:70])
        sequence = session.new_sequence()
        chunks = [sequence.append(IDS[a:b], rows="all") for a, b in ((0, 31), (31, 32), (32, 70))]
        np.testing.assert_array_equal(np.concatenate(chunks), whole)


@pytest.mark.parametrize("options", [{"weights": "int4"}, {"weights": {"layers.0.*": "fp32", "*": "int8"}}, {"quantizer": "gptq", "weights": "int4"}],
                         ids=["int4", "some", "gptq"])  # fmt: skip
def test_other_weights_take_static_scales_too(options: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    decided = _compile(folder, tmp_path / "static", **options)
    assert decided["smoothing"].value == ("13 of 22 linears" if isinstance(options["weights"], dict) else "19 of 22 linears")
    with octavo.load(tmp_path / "static") as model:
        assert np.isfinite(model.predict(IDS[300:])).all()


def test_smoothed_inputs_are_what_gptq_sees(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With XᵀX of the inputs as they were it makes up for the wrong errors."""
    options = {"quantizer": "gptq", "weights": {"*": "int4"}, "group_size": 32, "zero_point": "none"}
    _compile(folder, tmp_path / "right", **options)
    monkeypatch.setattr(smooth.SmoothLinears, "inputs", lambda self, unsmoothed: unsmoothed)
    _compile(folder, tmp_path / "wrong", **options)
    assert _error(folder, tmp_path / "right") < _error(folder, tmp_path / "wrong")


@pytest.mark.parametrize("options, message, hint", [
    ({"calibration": None}, "takes its scales from a text", "calibration="), ({"weights": "fp32"}, "weights='fp32' has none", 'weights="int8"'),
    ({"weights": {"*": "fp32"}}, "has none", 'weights="int8"'), ({"weights": "int4", "weight_budget": "1MB"}, "weight_budget", "one of them"),
])  # fmt: skip
def test_what_it_needs_is_said(options: dict[str, Any], message: str, hint: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=message) as caught:
        octavo.CompileOptions(**{**STATIC, "calibration": tmp_path / "a.txt", **options})
    assert hint in caught.value.hint


@pytest.mark.parametrize("options, message", [
    ({"weights": "stored"}, "no linear of this model is quantized"), ({"paged": False, "weights": "stored"}, "contiguous, whose linears stay as they are"),
])
def test_a_model_without_such_linears_is_refused(options: dict[str, Any], message: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=message):
        _compile(folder, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_what_the_source_stores_quantized_stays_so(tmp_path: Path) -> None:
    """Smoothing it would round it again: its scales are static, its weights exact, and a check proves that."""
    import onnx_ir as ir

    config = TINY["one_layer"]
    weights = {name: rtn(array, Scheme(8, 32)).dequantize() if array.ndim == 2 else array for name, array in tiny_weights(config, 0).items()}
    ir.save(build_llama(config, weights), tmp_path / "model.onnx")
    write_config(tmp_path, config)
    (tmp_path / "ids.json").write_text(json.dumps(IDS[:300]))
    decided = _compile(tmp_path, tmp_path / "out", weights="stored")
    assert decided["smoothing"].value == "0 of 8 linears" and "not rounded here" in decided["smoothing"].reason
    assert json.loads((tmp_path / "out" / "octavo.json").read_text())["weights"] == "exact"
    rewrite = [result for result in octavo.check(tmp_path / "out", tmp_path / "model.onnx").results if result.comparison == "rewrite"]
    assert rewrite and all(result.ok and result.mean_kl is not None and result.mean_kl < 1e-8 for result in rewrite)
