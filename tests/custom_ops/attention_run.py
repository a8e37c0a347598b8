"""Runs a case through onnxruntime with the op library, and through the NumPy reference."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import onnxruntime as ort
from attention_cases import FlashCase, PagedCase
from octavo import custom_ops
from octavo.custom_ops import reference
from octavo.custom_ops.contract import DOMAIN, OPS, OPSET, OpContract
from onnx import TensorProto, helper

Array = np.ndarray
_ELEMENT = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.float16): TensorProto.FLOAT16,
    np.dtype(np.uint8): TensorProto.UINT8,
    np.dtype(np.int32): TensorProto.INT32,
    np.dtype(bool): TensorProto.BOOL,
}


def node_model(contract: OpContract, inputs: Mapping[str, Array], attributes: Mapping[str, Any]) -> bytes:
    """A graph of one node of the op; ports of the contract that `inputs` lacks are absent."""
    names = [port.name if port.name in inputs else "" for port in contract.inputs]
    while names and not names[-1]:
        names.pop()
    node = helper.make_node(contract.name, names, [port.name for port in contract.outputs], domain=contract.domain, **attributes)
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info(n, _ELEMENT[inputs[n].dtype], [None] * inputs[n].ndim) for n in names if n],
        [helper.make_tensor_value_info(port.name, TensorProto.FLOAT, None) for port in contract.outputs],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, OPSET)], ir_version=9)
    return model.SerializeToString()


@cache
def node_session(model: bytes, threads: int) -> ort.InferenceSession:
    """A model of our ops, opened once for all cases that run it."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    custom_ops.register(options)
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run_op(name: str, inputs: Mapping[str, Array], attributes: Mapping[str, Any], threads: int = 1) -> Array:
    """One node through onnxruntime. Cache arrays among `inputs` are updated in place."""
    model = node_model(OPS[name], inputs, attributes)
    return node_session(model, threads).run(None, dict(inputs))[0]


def run_paged(inputs: Mapping[str, Array], case: PagedCase, threads: int = 1) -> reference.PagedResult:
    """Through the kernels, on copies of the caches."""
    given = {**inputs, "key_cache": inputs["key_cache"].copy(), "value_cache": inputs["value_cache"].copy()}
    output = run_op("PagedAttention", given, case.attributes, threads)
    return reference.PagedResult(output, given["key_cache"], given["value_cache"])


def run_flash(inputs: Mapping[str, Array], case: FlashCase, threads: int = 1) -> Array:
    return run_op("FlashAttention", inputs, case.attributes, threads)


def same_bits(a: Array, b: Array) -> bool:
    """Equal as memory: NaNs and signs of zeros included."""
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()
