"""Running a graph with bfloat16 inputs or outputs, which onnxruntime computes with and its NumPy bridge does not know."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ..errors import UnsupportedError
from ..models.interface import GraphInterface

# ONNX's number for the type.
_BFLOAT16 = 16


def run_named(session: ort.InferenceSession, interface: GraphInterface, inputs: Mapping[str, Any]) -> list[NDArray[Any]]:
    """All outputs of one run, in the order of `interface`."""
    half = {port.name for port in (*interface.inputs, *interface.outputs) if port.dtype == "bfloat16"}
    if not half:
        return list(session.run(None, {name: np.asarray(value) for name, value in inputs.items()}))
    dtype = _numpy_type()
    feeds = {
        name: ort.OrtValue.ortvalue_from_numpy_with_onnx_type(np.ascontiguousarray(value, dtype).view(np.uint16), _BFLOAT16) if name in half
        else ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value))
        for name, value in inputs.items()
    }
    names = [port.name for port in interface.outputs]
    found = session.run_with_ort_values(names, feeds)
    return [_array(value, dtype) if name in half else value.numpy() for name, value in zip(names, found)]


def _numpy_type() -> np.dtype[Any]:
    try:
        import ml_dtypes
    except ImportError as error:
        raise UnsupportedError("the graph takes or gives bfloat16, which NumPy lacks", hint="pip install ml_dtypes") from error
    return np.dtype(ml_dtypes.bfloat16)


def _array(value: ort.OrtValue, dtype: np.dtype[Any]) -> NDArray[Any]:
    """A copy of a value's elements."""
    count = value.tensor_size_in_bytes()
    return np.frombuffer(ctypes.string_at(value.data_ptr(), count), dtype).reshape(value.shape())
