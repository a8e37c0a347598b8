"""What is wrong with a quantized linear is said in a sentence that names the input or attribute."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from octavo import custom_ops
from octavo.custom_ops.contract import OPS
from octavo.custom_ops.packing import pack
from quant_cases import QuantCase, quant_model

_BAD_ATTRIBUTES: dict[str, tuple[Any, ...]] = {
    "K": (0, 190, -32, 2**40, 32.0, None),
    "M": (0, -1, 2**40, 8.0, None),
    "bits": (2, 0, 16, 4.0),
    "group_size": (0, 16, 33, 256, 32.0),
    "zero_point": (-1, 3, 1.0),
    "scale_type": (0, 2, 16, 10.0),
    "activation_bits": (0, 4, 16, 8.0),
    "gate": (-1, 4, 1.0),
    "norm_epsilon": (-1.0, float("nan"), float("inf"), 1),
}


def _session(op: str, inputs: dict[str, np.ndarray], changed: dict[str, Any], packed: np.ndarray | None = None) -> ort.InferenceSession:
    weight = QuantCase("status").weight()
    fmt = weight.format()

    class Changed:
        def attributes(self) -> dict[str, Any]:
            return {k: v for k, v in {**fmt.attributes(), **changed}.items() if v is not None}

    model = quant_model(op, Changed(), pack(weight) if packed is None else packed, inputs, {}, sums=False)  # type: ignore[arg-type]
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    custom_ops.register(options)
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _inputs(op: str) -> dict[str, np.ndarray]:
    return {"ids": np.zeros(1, np.int64)} if op == "QuantEmbedding" else QuantCase("status").build()


@pytest.mark.parametrize(
    ("op", "name", "value"), [(op, a.name, v) for op in ("QuantLinear", "QuantEmbedding") for a in OPS[op].attributes for v in _BAD_ATTRIBUTES[a.name]]
)
def test_bad_attribute_fails_the_session(op: str, name: str, value: Any) -> None:
    with pytest.raises(Exception, match=f"{op}.*{name}"):
        _session(op, _inputs(op), {name: value})


_F = np.float32
_BAD_INPUTS = {
    "input": np.zeros((3, 191), _F),
    "norm_weight": np.zeros(191, _F),
    "skip": np.zeros((2, 192), _F),
    "bias": np.zeros(80, _F),
    "residual": np.zeros((3, 41), _F),
    "activation_scale": np.ones(5, _F),
}


@pytest.mark.parametrize("name", _BAD_INPUTS)
def test_bad_shape_is_refused_by_name(name: str) -> None:
    inputs = {**_inputs("QuantLinear"), name: _BAD_INPUTS[name]}
    with pytest.raises(Exception, match=f"QuantLinear.*'{name}'"):
        _session("QuantLinear", inputs, {}).run(None, inputs)


@pytest.mark.parametrize("bad", [0.0, -0.01, 2.0**-121, float("nan"), float("inf")])
def test_scales_of_activations_are_positive_numbers(bad: float) -> None:
    inputs = {**_inputs("QuantLinear"), "activation_scale": np.array([1, 1, 1, bad, 1, 1], _F)}
    with pytest.raises(Exception, match=r"QuantLinear.*'activation_scale' holds .* at 3"):
        _session("QuantLinear", inputs, {}).run(None, inputs)


def test_float_activations_have_no_scales() -> None:
    inputs = {**_inputs("QuantLinear"), "activation_scale": np.ones(6, _F)}
    _session("QuantLinear", inputs, {}).run(None, inputs)
    with pytest.raises(Exception, match=r"QuantLinear.*'activation_scale' is given, and activations are float32"):
        _session("QuantLinear", inputs, {"activation_bits": 32}).run(None, inputs)


@pytest.mark.parametrize("op", ["QuantLinear", "QuantEmbedding"])
@pytest.mark.parametrize("change", [{"K": 160}, {"M": 20}, {"bits": 8}, {"group_size": 64}, {"zero_point": 1}, {"scale_type": 1}])
def test_a_weight_of_another_format_is_refused(op: str, change: dict[str, int]) -> None:
    """Bytes are counted before any is read."""
    inputs = _inputs(op)
    if "K" in change and "input" in inputs:
        inputs["input"] = np.zeros((3, 160), np.float32)
    with pytest.raises(Exception, match=f"{op}.*weight"):
        _session(op, inputs, change).run(None, inputs)
