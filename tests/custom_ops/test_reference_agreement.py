"""NumPy reference, onnxscript function and kernels agree on every declared case."""

from __future__ import annotations

import functools

import numpy as np
import onnxruntime as ort
import pytest
from attention_cases import FLASH_CASES, PAGED_CASES, FlashCase, PagedCase
from attention_run import run_flash, run_paged, same_bits
from octavo.custom_ops import reference


def _paged_reference(case: PagedCase, inputs: dict[str, np.ndarray]) -> reference.PagedResult:
    return reference.paged_attention(case.heads, rotary_interleaved=case.interleaved, chunk_size=case.chunk, **inputs)


@pytest.mark.parametrize("case", PAGED_CASES, ids=lambda c: c.name)
def test_paged_kernels_agree_with_reference(case: PagedCase) -> None:
    inputs = case.build()
    expected, got = _paged_reference(case, inputs), run_paged(inputs, case)
    assert np.isfinite(got.output).all()
    case.assert_agrees(got.output, expected.output, inputs)
    assert same_bits(got.key_cache, expected.key_cache)
    assert same_bits(got.value_cache, expected.value_cache)


@pytest.mark.parametrize("case", FLASH_CASES, ids=lambda c: c.name)
def test_flash_kernels_agree_with_reference(case: FlashCase) -> None:
    inputs = case.build()
    expected = reference.flash_attention(case.heads, is_causal=case.causal, **inputs)
    np.testing.assert_allclose(run_flash(inputs, case), expected, rtol=0, atol=case.tolerance(inputs))


@pytest.fixture(scope="module")
def function_session() -> object:
    """Sessions of a model whose one node calls the onnxscript function with the case's attributes."""

    from octavo.custom_ops.functions import FlashAttention
    from onnx import TensorProto, helper

    @functools.cache
    def make(attributes: tuple[tuple[str, float], ...]) -> ort.InferenceSession:
        function = FlashAttention.to_function_proto()
        node = helper.make_node(function.name, list(function.input), list(function.output), domain=function.domain, **dict(attributes))
        types = {"key_mask": TensorProto.BOOL}
        graph = helper.make_graph(
            [node],
            "one",
            [helper.make_tensor_value_info(n, types.get(n, TensorProto.FLOAT), None) for n in function.input],
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in function.output],
        )
        opsets = [helper.make_opsetid("", 18), helper.make_opsetid(function.domain, 1)]
        model = helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=9)
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    return make


@pytest.mark.parametrize("case", [c for c in FLASH_CASES if c.B and c.S and c.T], ids=lambda c: c.name)
def test_onnxscript_function_agrees_with_kernels(case: FlashCase, function_session) -> None:  # type: ignore[no-untyped-def]
    """The function adds masks to what they hide, so it can't hide NaN; there the hidden numbers are plain ones."""
    from octavo.custom_ops.functions import flash_attention_neutral

    inputs = case.build()
    for name in ("key", "value"):
        inputs[name] = np.nan_to_num(inputs[name], nan=3.0)
    given = {**flash_attention_neutral(case.B, case.T, case.H), **inputs}
    if given["attention_bias"].dtype == bool:
        given["attention_bias"] = np.where(given["attention_bias"], np.float32(0), np.float32(-np.inf))
    expected = function_session(tuple(case.attributes.items())).run(None, given)[0]
    # The function is float32 too: both sides may be off by the tolerance.
    np.testing.assert_allclose(run_flash(inputs, case), expected, rtol=0, atol=2 * case.tolerance(inputs))


@pytest.mark.parametrize("field", ["scale", "softcap", "window"])
def test_tolerance_notices_a_wrong_attribute(field: str) -> None:
    """Negative control: 1 % off in scale or softcap, or a window one key wider, is far outside the tolerance."""
    from dataclasses import replace

    case = next(c for c in PAGED_CASES if c.name == "everything")
    inputs = case.build()
    off = {"scale": 0.303, "softcap": 5.05, "window": 39}[field]
    wrong = replace(case, features=replace(case.features, **{field: off}))
    error = np.abs(run_paged(inputs, wrong).output - _paged_reference(case, inputs).output).max()
    assert error > 2 * case.tolerance(inputs)
