"""Calibration: what a file may hold, what is told of it, and GPTQ through a whole compile."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import octavo
import pytest
from octavo.compiler.calibration import MAX_TOKENS, read_calibration
from octavo.errors import ModelError, OptionError

V = 320


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Words over and over, in a seeded order."""
    file = tmp_path_factory.mktemp("text") / "calibration.txt"
    words = ["the", "book", "is", "made", "of", "folded", "sheets", "and", "a", "page", "holds", "many", "tokens", "that", "one", "reads", "in", "turn"]
    file.write_text(" ".join(np.random.default_rng(0).choice(words, 600)), encoding="utf-8")
    return file


def test_text_is_encoded_by_the_tokenizer_beside_the_source(text: Path, tiny_onnx: Path) -> None:
    found = read_calibration(text, tiny_onnx, V)
    assert found.words.startswith(f"{len(found.sequences[0]):,} tokens of calibration.txt, sha256 ")
    with octavo.load(tiny_onnx / "model.onnx") as model:
        assert model.tokenizer is not None
        assert found.sequences == (tuple(model.tokenizer.encode(text.read_text())),)


def test_ids_come_as_a_list_or_as_lists_and_the_first_ones_count(tmp_path: Path) -> None:
    file = tmp_path / "ids.json"
    full = [5] * MAX_TOKENS
    for ids, expected in (([1, 2, 3], [3]), ([[1, 2], [], [7]], [2, 1]), ([full, [6]], [MAX_TOKENS]), ([[6] * 9, full], [9, MAX_TOKENS - 9])):
        file.write_text(json.dumps(ids))
        assert [len(sequence) for sequence in read_calibration(file, None, V).sequences] == expected


def test_without_a_file_ids_are_random_and_always_the_same() -> None:
    found = read_calibration(None, None, V)
    assert found == read_calibration(None, None, V) and "random" in found.words and "no text was given" in found.words
    assert sum(map(len, found.sequences)) == 2048 and max(map(max, found.sequences)) < V


@pytest.mark.parametrize("name, content, message", [
    ("a.json", b"[1, 2", "no JSON"), ("a.json", b"[1, 320]", "0 to 319"), ("a.json", b"[1, -1]", "0 to 319"), ("a.json", b"[true]", "0 to 319"),
    ("a.json", b'{"ids": [1]}', "0 to 319"), ("a.json", b"[[1], 2]", "0 to 319"), ("a.json", b"[]", "no tokens"), ("a.txt", b"\xff\xfe", "not UTF-8"),
    ("a.txt", b"", "no tokens"), ("a.txt", None, "can't be read"),
])
def test_files_that_hold_something_else_are_option_errors(name: str, content: bytes | None, message: str, tiny_onnx: Path, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(OptionError, match=message):
        read_calibration(tmp_path / name, tiny_onnx, V)


def test_text_without_a_tokenizer_or_with_a_broken_one_is_an_error(text: Path, tmp_path: Path) -> None:
    for folder in (None, tmp_path):
        with pytest.raises(OptionError, match=r"no tokenizer\.json"):
            read_calibration(text, folder, V)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer\.json can't be read"):
        read_calibration(text, tmp_path, V)


def test_gptq_is_nearer_to_the_source_than_rounding_and_says_what_it_saw(text: Path, tiny_onnx: Path, tmp_path: Path) -> None:
    source, errors, decided = tiny_onnx / "model.onnx", {}, {}
    ids = read_calibration(text, tiny_onnx, V).sequences[0][-300:]
    with octavo.load(source) as original:
        expected = original.predict(ids)
    for name, options in {"rtn": {}, "gptq": {"calibration": text}, "gptq again": {"calibration": text}, "gptq, random": {}}.items():
        out, method = tmp_path / name, name.split(",")[0].split()[0]
        report = octavo.compile(
            source, out, options=octavo.CompileOptions(weights="int4", quantizer=method, activations="fp32", kv_cache="fp32", **options),  # type: ignore[arg-type]
        )
        decided[name] = {d.feature: d for d in report.decisions}
        with octavo.load(out) as model:
            errors[name] = float(np.mean((model.predict(ids) - expected) ** 2))
    assert errors["gptq"] < 0.8 * errors["rtn"] and errors["gptq again"] == errors["gptq"]
    assert errors["gptq"] < errors["gptq, random"]
    assert decided["gptq"]["quantizer"].value == "gptq" and "calibration" not in decided["rtn"]
    assert (decided["gptq"]["calibration"].value, decided["gptq, random"]["calibration"].value) == ("text", "random")
    manifest = json.loads((tmp_path / "gptq" / "octavo.json").read_text())
    assert manifest["options"]["calibration"] == "calibration.txt" and str(text.parent) not in json.dumps(manifest)


@pytest.mark.parametrize("zero_point, quantizer", [("uint8", "search"), ("float", "search"), ("float", "hqq"), ("uint8", "gptq")])
def test_asymmetric_groups_are_had_by_asking(zero_point: str, quantizer: str, tiny_onnx: Path, tmp_path: Path) -> None:
    options = octavo.CompileOptions(
        weights={"head": "int8", "*": "int4"}, group_size=32, zero_point=zero_point, quantizer=quantizer,  # type: ignore[arg-type]
    )
    report = octavo.compile(tiny_onnx / "model.onnx", tmp_path / "out", options=options)
    weights = next(d.reason for d in report.decisions if d.feature == "weights")
    words = {"uint8": "with zero points", "float": "with minimums"}[zero_point]
    assert f"int4 in groups of 32, {words}: 14" in weights and "int8 in groups of 32, symmetric: 1 (head)" in weights


def test_int4_by_itself_is_the_default_that_was_measured(tiny_onnx: Path, tmp_path: Path) -> None:
    """Minimums, groups of 64 where they divide, the head in int8; a map has no head of its own."""
    for weights, expected in (
        ("int4", ("int4 in groups of 64, with minimums: 12 (", "int4 in groups of 32, with minimums: 2 (layers.*.mlp.down)",
                  "int8 in groups of 64, symmetric: 1 (head)")),
        ({"*": "int4"}, ("int4 in groups of 64, with minimums: 13 (", "int4 in groups of 32, with minimums: 2 (")),
    ):
        report = octavo.compile(tiny_onnx / "model.onnx", tmp_path / "out", options=octavo.CompileOptions(weights=weights))  # type: ignore[arg-type]
        reason = next(d.reason for d in report.decisions if d.feature == "weights")
        assert all(part in reason for part in expected), reason
    with pytest.raises(OptionError, match=r"groups of 64 don't divide the 96 inputs of .*down_proj"):
        octavo.compile(tiny_onnx / "model.onnx", tmp_path / "out", options=octavo.CompileOptions(weights="int4", group_size=64))


@pytest.mark.parametrize("options, message", [
    ({"calibration": "a.txt"}, "nothing calibrates"), ({"calibration": 3, "quantizer": "gptq"}, "is no path"),
    ({"quantizer": "hqq", "zero_point": "none"}, "zero_point"),
    ({"zero_point": "int8"}, "zero_point"),
])
def test_options_that_contradict_each_other(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        octavo.CompileOptions(weights="int4", **options)  # type: ignore[arg-type]
