"""Roles of plain graphs: every exporter's names, and nothing guessed where names and shapes don't settle it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from octavo.models.interface import GraphInterface
from octavo.models.roles import Triple, dtype_name, guess_interface

IDS: list[Triple] = [("input_ids", "tensor(int64)", ["B", "S"]), ("attention_mask", "tensor(int64)", ["B", "T"]),
                     ("position_ids", "tensor(int64)", ["B", "S"])]
LOGITS: Triple = ("logits", "tensor(float)", ["B", "S", 100])
PAST, PRESENT = ["B", 2, "past", 16], ["B", 2, "total", 16]

# (key of layer i, value of layer i) among inputs and among outputs
SPELLINGS: dict[str, tuple[str, str, str, str]] = {
    "optimum": ("past_key_values.{i}.key", "past_key_values.{i}.value", "present.{i}.key", "present.{i}.value"),
    "optimum decoder": (
        "past_key_values.{i}.decoder.key", "past_key_values.{i}.decoder.value", "present.{i}.decoder.key", "present.{i}.decoder.value"
    ),
    "numbered": ("past_key_{i}", "past_value_{i}", "present_key_{i}", "present_value_{i}"),
    "dynamo cache": (
        "past_key_values_key_cache_{i}", "past_key_values_value_cache_{i}",
        "present_key_values_key_cache_{i}", "present_key_values_value_cache_{i}",
    ),
    "dotted cache": (
        "past_key_values.key_cache.{i}", "past_key_values.value_cache.{i}",
        "present_key_values.key_cache.{i}", "present_key_values.value_cache.{i}",
    ),
    "layers": ("past_key_values_layers_{i}_keys", "past_key_values_layers_{i}_values", "present.{i}.keys", "present.{i}.values"),
    "middle": ("past_{i}_key", "past_{i}_value", "present_{i}_key", "present_{i}_value"),
    "short": ("pkv.{i}.key", "pkv.{i}.value", "out_pkv.{i}.key", "out_pkv.{i}.value"),
    "letters": ("cache.{i}.k", "cache.{i}.v", "new_cache.{i}.k", "new_cache.{i}.v"),
    "unnamed outputs": ("past_key_values.{i}.key", "past_key_values.{i}.value", "cat_{i}", "cat_{i}_1"),
}


def decoder(spelling: str, layers: int = 3, past: list[int | str] | None = None) -> tuple[list[Triple], list[Triple]]:
    names = SPELLINGS[spelling]
    into = [(name.format(i=i), "tensor(float)", past or PAST) for i in range(layers) for name in names[:2]]
    out = [(name.format(i=i), "tensor(float)", PRESENT) for i in range(layers) for name in names[2:]]
    return [*IDS, *into], [LOGITS, *out]


def cache_roles(interface: GraphInterface) -> set[str]:
    return {port.role for port in (*interface.inputs, *interface.outputs) if port.role.startswith(("past", "present"))}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_exporters_cache_is_recognised(spelling: str) -> None:
    into, out = decoder(spelling)
    interface = guess_interface(into, out)
    assert [port.role for port in interface.inputs[:3]] == ["input_ids", "attention_mask", "position_ids"]
    assert interface.outputs[0].role == "logits"
    for i in range(3):
        for offset, side in enumerate(("key", "value")):
            assert interface.input(f"past_{side}", i).name == into[3 + 2 * i + offset][0]
            assert interface.output(f"present_{side}", i).name == out[1 + 2 * i + offset][0]


@pytest.mark.parametrize("spelling", [name for name in SPELLINGS if name != "unnamed outputs"])
def test_order_does_not_matter_where_names_tell(spelling: str) -> None:
    into, out = decoder(spelling)
    forward, backward = guess_interface(into, out), guess_interface(into[::-1], out[::-1])
    assert {(port.name, port.role, port.layer) for port in (*forward.inputs, *forward.outputs)} == {
        (port.name, port.role, port.layer) for port in (*backward.inputs, *backward.outputs)
    }


@pytest.mark.parametrize(
    "past", [["B", "past", 2, 16], ["B", 2, 128, 16], [2, "B", 2, "past", 16], ["B", 2, "past", "D"], ["BG", "past", 16]], ids=str
)
def test_another_layout_is_no_cache(past: list[int | str]) -> None:
    assert cache_roles(guess_interface(*decoder("optimum", past=past))) == set()


def test_half_a_cache_is_no_cache() -> None:
    into, out = decoder("optimum")
    assert cache_roles(guess_interface(into[:-1], out)) == set()
    assert cache_roles(guess_interface(into, out[:-1])) == set()
    assert cache_roles(guess_interface(into, [*out[:-1], out[1]])) == set()
    assert cache_roles(guess_interface(into, [*out[:-1], (out[-1][0], "tensor(float)", ["B", 4, "total", 16])])) == set()
    assert cache_roles(guess_interface(into, [*out[:-1], (out[-1][0], "tensor(float16)", PRESENT)])) == set()


def test_unnamed_outputs_pair_only_when_the_counts_agree() -> None:
    into, out = decoder("unnamed outputs")
    assert cache_roles(guess_interface(into, [*out, ("attentions", "tensor(float)", ["B", 2, "S", "T"])])) == set()


def test_presents_without_a_past_are_presents() -> None:
    _, out = decoder("optimum")
    interface = guess_interface(IDS, out)
    assert interface.output("present_value", 2).name == "present.2.value"


def test_an_encoders_keys_are_no_cache() -> None:
    into, out = decoder("optimum decoder")
    names = [f"past_key_values.{i}.encoder.{side}" for i in range(3) for side in ("key", "value")]
    cross: list[Triple] = [(name, "tensor(float)", ["B", 2, "E", 16]) for name in names]
    interface = guess_interface([*into, *cross], out)
    assert [port.role for port in interface.inputs[-6:]] == ["other"] * 6
    assert interface.input("past_key", 0).name == "past_key_values.0.decoder.key"


@pytest.mark.parametrize(
    ("inputs", "roles"),
    [
        ([("input_ids", "int64", ["B", "S"])], ["input_ids"]),
        ([("x", "int64", ["B", "S"])], ["input_ids"]),
        ([("input", "int64", ["B", "S"]), ("mask", "bool", ["B", "S"])], ["input_ids", "attention_mask"]),
        ([("input_ids", "int64", [1, "S"]), ("token_type_ids", "int64", [1, "S"])], ["input_ids", "other"]),
        ([("decoder_input_ids", "int32", ["B", "S"]), ("encoder_attention_mask", "int64", ["B", "E"])], ["input_ids", "other"]),
        ([("a", "int64", ["B", "S"]), ("b", "int64", ["B", "S"])], ["other", "other"]),
        ([("mask_a", "int64", ["B", "S"]), ("mask_b", "int64", ["B", "S"])], ["other", "other"]),
        ([("input_ids", "float32", ["B", "S"]), ("position_ids", "int64", ["S"])], ["other", "other"]),
        ([("attention_mask", "float32", ["B", 1, "S", "T"]), ("cache_position", "int64", ["S"])], ["other", "other"]),
        ([("input_ids", "int64", None)], ["input_ids"]),
    ],
)
def test_token_inputs(inputs: list[Triple], roles: list[str]) -> None:
    assert [port.role for port in guess_interface(inputs, []).inputs] == roles


@pytest.mark.parametrize(
    ("outputs", "roles"),
    [
        ([LOGITS], ["logits"]),
        ([("linear_210", "float32", ["B", "S", 100])], ["logits"]),
        ([("last_hidden_state", "float32", ["B", "S", 64])], ["hidden"]),
        ([LOGITS, ("hidden_states.0", "float32", ["B", "S", 64]), ("last_hidden_state", "float32", ["B", "S", 64])],
         ["logits", "other", "hidden"]),
        ([("last_hidden_state", "float32", ["B", "S", 64]), ("pooler_output", "float32", ["B", 64])], ["hidden", "other"]),
        ([("a", "float32", ["B", "S", 64]), ("b", "float32", ["B", "S", 100])], ["other", "other"]),
        ([("logits", "float32", ["B", 2])], ["other"]),
        ([("logits", "int64", ["B", "S", 2])], ["other"]),
    ],
)
def test_states(outputs: list[Triple], roles: list[str]) -> None:
    assert [port.role for port in guess_interface([], outputs).outputs] == roles


@pytest.mark.parametrize(
    ("name", "expected"),
    [("tensor(float)", "float32"), ("tensor(int64)", "int64"), ("tensor(bool)", "bool"), ("FLOAT", "float32"), ("FLOAT16", "float16"),
     ("BFLOAT16", "bfloat16"), ("tensor(double)", "float64"), ("float32", "float32"), ("INT64", "int64")],
)
def test_type_names(name: str, expected: str) -> None:
    assert dtype_name(name) == expected


@pytest.mark.parametrize("variant", [{"opset": 18}, {"opset": 23}, {"exporter": "torchscript", "opset": 17}], ids=str)
def test_real_exports_from_onnxruntimes_view(variant: dict[str, object], exported: Callable[..., Path]) -> None:
    import onnxruntime as ort

    session = ort.InferenceSession(str(exported("llama", **variant) / "model.onnx"), providers=["CPUExecutionProvider"])
    triples = [[(arg.name, arg.type, arg.shape) for arg in args] for args in (session.get_inputs(), session.get_outputs())]
    interface = guess_interface(*triples)
    assert "other" not in {port.role for port in (*interface.inputs, *interface.outputs)}
    assert {"past_key", "present_value"} <= cache_roles(interface)
