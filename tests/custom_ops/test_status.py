"""What is wrong with a step is said in a sentence that names the input, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from attention_cases import FLASH_CASES, PAGED_CASES, FlashCase, PagedCase
from attention_run import run_op
from octavo.custom_ops.contract import OPS
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

Array = np.ndarray


def _case(name: str) -> PagedCase:
    return next(c for c in PAGED_CASES if c.name == name)


def _flash(name: str) -> FlashCase:
    return next(c for c in FLASH_CASES if c.name == name)


def _set(name: str, index: Any, value: float) -> Any:
    def change(inputs: dict[str, Array]) -> None:
        inputs[name] = inputs[name].copy()
        inputs[name][index] = value

    return change


def _replace(name: str, array: Array) -> Any:
    return lambda inputs: inputs.update({name: array})


def _tables(change: Callable[[Array], Array]) -> Any:
    return lambda inputs: inputs.update({name: change(inputs[name]) for name in ("cos_cache", "sin_cache")})


# The case has sequences (300, 3), (0, 50), (14, 1), blocks of 32, a window of 40, rotary tables of 303 rows.
_BAD_PAGED = {
    "cumulative_start": ("cumulative_sequence_length", _set("cumulative_sequence_length", 0, 1)),
    "cumulative_falls": ("cumulative_sequence_length", _set("cumulative_sequence_length", 1, 60)),
    "cumulative_end": ("cumulative_sequence_length", _set("cumulative_sequence_length", 3, 53)),
    "cumulative_empty": ("cumulative_sequence_length", _replace("cumulative_sequence_length", np.zeros(0, np.int32))),
    "cumulative_length": ("past_seqlens", _replace("cumulative_sequence_length", np.array([0, 54], np.int32))),
    "past_negative": ("past_seqlens", _set("past_seqlens", 1, -1)),
    "past_beyond_table": ("cos_cache", _set("past_seqlens", 2, 303)),
    "past_enormous": ("token 53", _set("past_seqlens", 2, 2**31 - 1)),
    "unmapped": ("block_table", _set("block_table", (0, 9), -1)),
    "unmapped_past": ("block_table", _set("block_table", (0, 8), -1)),
    "block_outside_pool": ("block_table", _set("block_table", (1, 0), 10_000)),
    "table_too_narrow": ("block_table", lambda i: i.update(block_table=i["block_table"][:, :9].copy())),
    "slot_outside_pool": ("slot_mapping", _set("slot_mapping", 0, 10_000)),
    "slot_negative": ("slot_mapping", _set("slot_mapping", 0, -2)),
    "slot_twice": ("slot_mapping", lambda i: _set("slot_mapping", 5, i["slot_mapping"][4])(i)),
    "parent_after": ("parent", _set("parent", 4, 4)),
    "parent_of_another_sequence": ("parent", _set("parent", 3, 2)),
    "parent_negative": ("parent", _set("parent", 0, -2)),
    "query_rank": ("query", _replace("query", np.zeros(54 * 288, np.float32))),
    "query_rank_high": ("query", _replace("query", np.zeros((1, 1, 54, 1, 288), np.float32))),
    "query_rows": ("key", _replace("query", np.zeros((2, 54, 288), np.float32))),
    "query_width": ("query", _replace("query", np.zeros((54, 289), np.float32))),
    "head_too_wide": ("query", _replace("query", np.zeros((54, 6 * 257), np.float32))),
    "key_rows": ("key", _replace("key", np.zeros((53, 96), np.float32))),
    "key_width": ("key", _replace("key", np.zeros((54, 98), np.float32))),
    "key_leading": ("key", _replace("key", np.zeros((2, 54, 96), np.float32))),
    "value_rows": ("value", _replace("value", np.zeros((53, 80), np.float32))),
    "key_cache_heads": ("key_cache", _replace("key_cache", np.zeros((20, 3, 48, 32), np.float16))),
    "key_cache_block_size": ("key_cache", _replace("key_cache", np.zeros((20, 2, 48, 48), np.float16))),
    "value_cache_shape": ("value_cache", _replace("value_cache", np.zeros((20, 2, 40, 32), np.float16))),
    "cache_types": ("value_cache", lambda i: i.update(value_cache=i["value_cache"].astype(np.float32))),
    "cache_type": ("key_cache", lambda i: i.update(key_cache=np.zeros(i["key_cache"].shape, np.int32))),
    "slot_length": ("slot_mapping", _replace("slot_mapping", np.zeros(3, np.int32))),
    "parent_length": ("parent", _replace("parent", np.zeros(3, np.int32))),
    "sink_length": ("head_sink", _replace("head_sink", np.zeros(2, np.float32))),
    "slopes_length": ("alibi_slopes", _replace("alibi_slopes", np.zeros(2, np.float32))),
    "key_without_value": ("key", lambda i: i.pop("value")),
    "packed_width": ("query", lambda i: [i.pop("key"), i.pop("value")]),
    "q_norm_alone": ("k_norm_weight", _replace("q_norm_weight", np.ones(48, np.float32))),
    "q_norm_length": ("q_norm_weight", lambda i: i.update(q_norm_weight=np.ones(47, np.float32), k_norm_weight=np.ones(48, np.float32))),
    "k_norm_length": ("k_norm_weight", lambda i: i.update(q_norm_weight=np.ones(48, np.float32), k_norm_weight=np.ones(47, np.float32))),
    "int8_key_width": ("key_cache", lambda i: i.update({n: np.zeros(i[n].shape, np.uint8) for n in ("key_cache", "value_cache")})),
    "int8_value_width": ("value_cache", lambda i: i.update(key_cache=np.zeros((20, 2, 56, 32), np.uint8), value_cache=np.zeros((20, 2, 32, 40), np.uint8))),
    "cos_without_sin": ("sin_cache", lambda i: i.pop("sin_cache")),
    "cos_and_sin_differ": ("sin_cache", lambda i: i.update(sin_cache=i["sin_cache"][:-1].copy())),
    "rotary_too_wide": ("cos_cache", _tables(lambda table: np.zeros((303, 25), np.float32))),
    "table_of_positions_too_short": ("cos_cache", _tables(lambda table: table[:302].copy())),
    **{
        f"reserved_{name}": (name, _replace(name, np.zeros(1, np.int32 if name == "attention_metadata" else np.float32)))
        for name in ("k_scale", "v_scale", "attention_metadata")
    },
}


@pytest.mark.parametrize("name", _BAD_PAGED)
def test_bad_step_is_refused_by_name(name: str) -> None:
    words, change = _BAD_PAGED[name]
    case = _case("everything")
    inputs = case.build()
    change(inputs)
    before = {cache: inputs[cache].copy() for cache in ("key_cache", "value_cache")}
    with pytest.raises(InvalidArgument, match=f"PagedAttention.*{words}"):
        run_op("PagedAttention", inputs, case.attributes)
    assert all(before[cache].tobytes() == inputs[cache].tobytes() for cache in before)


def test_a_hidden_unmapped_block_is_fine() -> None:
    """The window hides positions before 261: blocks 0 to 7 of the first sequence are released already, and their entries are not read."""
    case = _case("everything")
    inputs = case.build()
    assert (inputs["block_table"][0, :8] == -1).all()
    expected = run_op("PagedAttention", {**inputs, "key_cache": inputs["key_cache"].copy()}, case.attributes)
    inputs["block_table"] = inputs["block_table"].copy()
    inputs["block_table"][0, :8] = 10_000
    assert run_op("PagedAttention", inputs, case.attributes).tobytes() == expected.tobytes()


_BAD_FLASH = {
    "query_rank": ("query", _replace("query", np.zeros((6, 64), np.float32))),
    "key_width": ("key", _replace("key", np.zeros((2, 20, 30), np.float32))),
    "key_batch": ("key", _replace("key", np.zeros((1, 20, 32), np.float32))),
    "value_length": ("value", _replace("value", np.zeros((2, 19, 32), np.float32))),
    "bias_rank": ("attention_bias", _replace("attention_bias", np.zeros((6, 20), np.float32))),
    "bias_keys": ("attention_bias", _replace("attention_bias", np.zeros((1, 1, 1, 1), np.float32))),
    "bias_heads": ("attention_bias", _replace("attention_bias", np.zeros((2, 2, 6, 20), np.float32))),
    "bias_type": ("attention_bias", _replace("attention_bias", np.zeros((1, 1, 1, 20), np.int32))),
    "mask_shape": ("key_mask", _replace("key_mask", np.ones((1, 20), bool))),
    "sink_length": ("head_sink", _replace("head_sink", np.zeros(3, np.float32))),
    "slopes_length": ("alibi_slopes", _replace("alibi_slopes", np.zeros(3, np.float32))),
}


@pytest.mark.parametrize("name", _BAD_FLASH)
def test_bad_flash_input_is_refused_by_name(name: str) -> None:
    words, change = _BAD_FLASH[name]
    case = _flash("bias_full")
    inputs = case.build()
    change(inputs)
    with pytest.raises(InvalidArgument, match=f"FlashAttention.*{words}"):
        run_op("FlashAttention", inputs, case.attributes)


_BAD_ATTRIBUTES = {
    "num_heads": (0, 4.0, None),
    "kv_num_heads": (0, 4, 12, 2.0, None),
    "scale": (1, float("inf"), float("nan"), "0.5"),
    "softcap": (-1.0, 3, float("nan")),
    "local_window_size": (0, -2, 3.0),
    "rotary_interleaved": (2, -1, 1.0),
    "chunk_size": (0, -2, 3.0),
    "qk_norm_epsilon": (-1.0, float("nan"), 1),
    "is_causal": (2, -1, 1.0),
}


@pytest.mark.parametrize(
    ("op", "name", "value"), [(op, a.name, v) for op in ("PagedAttention", "FlashAttention") for a in OPS[op].attributes for v in _BAD_ATTRIBUTES[a.name]]
)
def test_bad_attribute_fails_the_session(op: str, name: str, value: Any) -> None:
    case = _case("everything") if op == "PagedAttention" else _flash("everything")
    attributes = {**case.attributes, name: value}
    if value is None:
        del attributes[name]
    with pytest.raises(Exception, match=name):
        run_op(op, case.build(), attributes)


def test_a_window_needs_a_causal_mask() -> None:
    with pytest.raises(Exception, match="local_window_size"):
        run_op("FlashAttention", _flash("window").build(), {**_flash("window").attributes, "is_causal": 0})


@pytest.mark.parametrize("op", ["PagedAttention", "FlashAttention"])
def test_absent_attributes_have_the_defaults_of_the_contract(op: str) -> None:
    case = _case("group_6_2") if op == "PagedAttention" else _flash("group_6_2")
    required = {a.name: case.attributes[a.name] for a in OPS[op].attributes if a.default is None}
    spelled_out = required | {a.name: a.default for a in OPS[op].attributes if a.default is not None}
    inputs = case.build()
    assert run_op(op, inputs, required).tobytes() == run_op(op, inputs, spelled_out).tobytes()
