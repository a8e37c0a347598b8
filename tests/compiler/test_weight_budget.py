"""A budget of bytes: what int4 harms most is raised first, in whole products, and the budget is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import octavo
import onnx
import pytest
from octavo.errors import OptionError
from octavo.models.tiny import TINY, build_llama, tiny_weights, write_config

IDS = np.random.default_rng(3).integers(3, 320, 400).tolist()
OPTIONS: dict[str, Any] = {"weights": "int4", "group_size": 32, "zero_point": "none", "quantizer": "rtn", "activations": "fp32", "kv_cache": "fp32"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers and a head of its own; in one group of each row of layer 1's down projection a single weight is so large that int4 loses the others."""
    import onnx_ir as ir

    folder, config = tmp_path_factory.mktemp("source"), TINY["llama3"]
    weights = tiny_weights(config, 0)
    weights["model.layers.1.mlp.down_proj.weight"][:, ::32] *= 25
    ir.save(build_llama(config, weights), folder / "model.onnx", external_data="model.onnx.data")
    write_config(folder, config)
    (folder / "ids.json").write_text(json.dumps(IDS[:200]))
    return folder


def _compile(folder: Path, out: Path, **options: Any) -> tuple[dict[str, octavo.Decision], list[int], int]:
    """Decisions, the bits of each QuantLinear, and bytes of packed weights."""
    report = octavo.compile(folder / "model.onnx", out, options=octavo.CompileOptions(**{**OPTIONS, **options}))
    graph = onnx.load(out / "model.onnx", load_external_data=False).graph
    bits = {node.name: next(a.i for a in node.attribute if a.name == "bits") for node in graph.node if node.op_type == "QuantLinear"}
    packed = {node.input[1] for node in graph.node if node.op_type in ("QuantLinear", "QuantEmbedding")}
    size = sum(tensor.dims[0] for tensor in graph.initializer if tensor.name in packed)
    return {d.feature: d for d in report.decisions}, [value for _, value in sorted(bits.items())], size


def _error(folder: Path, artifact: Path) -> float:
    with octavo.load(folder / "model.onnx") as original, octavo.load(artifact) as model:
        return float(np.mean((model.predict(IDS[200:]) - original.predict(IDS[200:])) ** 2))


def test_the_most_harmful_is_raised_first_and_the_budget_is_kept(folder: Path, tmp_path: Path) -> None:
    _, bits, base = _compile(folder, tmp_path / "int4", weights={"*": "int4"})
    assert set(bits) == {4}
    extra = 64 * 96 // 2                                    # bytes by which int8 is longer for one down projection
    errors = {"int4": _error(folder, tmp_path / "int4")}
    for name, budget in {"one": base + extra, "more": base + 4 * extra}.items():
        decided, bits, size = _compile(folder, tmp_path / name, weight_budget=budget, calibration=folder / "ids.json")
        reason = decided["weight_budget"].reason
        assert reason.partition("taken: ")[2].startswith("layers.1.mlp.down (KL ")
        assert f"of 14 products raised to int8, {size:,} of {budget:,} bytes taken" in reason and base < size <= budget
        assert len(bits) == 3 * 4 + 1                       # q, k, v stay one product, gate and up too
        errors[name] = _error(folder, tmp_path / name)
    assert decided["calibration"].value == "text" and "200 tokens of ids.json" in decided["calibration"].reason
    _compile(folder, tmp_path / "other", weights={"layers.2.mlp.down": "int8", "*": "int4"})
    errors["other"] = _error(folder, tmp_path / "other")    # as many bytes elsewhere
    assert errors["more"] < errors["one"] < 0.9 * min(errors["other"], errors["int4"])


def test_the_measure_repeats_and_a_large_budget_raises_everything(folder: Path, tmp_path: Path) -> None:
    first, bits, _ = _compile(folder, tmp_path / "all", weight_budget="1MB")
    assert set(bits) == {8} and "14 of 14 products" in first["weight_budget"].reason and first["calibration"].value == "random"
    second, _, _ = _compile(folder, tmp_path / "again", weight_budget="1MB")
    assert first["weight_budget"] == second["weight_budget"]
    assert (tmp_path / "all" / "model.onnx.data").read_bytes() == (tmp_path / "again" / "model.onnx.data").read_bytes()


def test_with_gptq_harm_is_measured_by_searched_scales(folder: Path, tmp_path: Path) -> None:
    """GPTQ rounds in order, once: what it would make of one product alone is not asked."""
    given = {"weight_budget": 90_000, "calibration": folder / "ids.json"}
    searched, bits, size = _compile(folder, tmp_path / "search", quantizer="search", **given)
    in_order, same_bits, same_size = _compile(folder, tmp_path / "gptq", quantizer="gptq", **given)
    assert (bits, size) == (same_bits, same_size) and searched["weight_budget"] == in_order["weight_budget"]
    assert in_order["gptq"].value == "in order" and "3 of 3 attentions" in in_order["gptq"].reason
    assert _error(folder, tmp_path / "gptq") < _error(folder, tmp_path / "search")


def test_only_what_is_rounded_to_int4_is_raised(folder: Path, tmp_path: Path) -> None:
    decided, bits, _ = _compile(folder, tmp_path / "some", weights={"head": "fp32", "layers.0.*": "int8", "*": "int4"}, weight_budget="1MB")
    assert set(bits) == {8} and "9 of 9 products" in decided["weight_budget"].reason        # two layers of four, and the table of embeddings


@pytest.mark.parametrize("options, message", [
    ({"weight_budget": 1000}, "before any is raised, the budget is 1,000"), ({"weight_budget": "many"}, "weight_budget='many' is not a size"),
    ({"weight_budget": 0}, "positive size"), ({"weight_budget": "1MB", "weights": "int8"}, "none is asked for"),
    ({"weight_budget": "1MB", "weights": {"layers.0.*": "int8", "*": "stored"}}, "none is asked for"),
])
def test_budgets_that_cannot_be_kept_are_errors(options: dict[str, Any], message: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=message):
        _compile(folder, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
