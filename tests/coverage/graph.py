"""Runs an exported decoder as it stands in onnxruntime, without any optimization: what the graph itself says.

Tells an exporter's fault from the compiler's, and is the oracle where the source is not torch's model any more: by mistake, or on purpose
(fp16, int4), where the copy that `at_full_accuracy` makes computes in float32 with the same weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, numpy_helper

_TYPES = {
    "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64, "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}


class CannotDrive(Exception):
    """The graph's interface is not one that this driver feeds; the reason is its message."""


class Decoder:
    """One session over `model` (a path or bytes). `run` continues a past: None at the start, then what the last call returned.

    `head_size` and `capacity` fill in what a graph's interface leaves open: the last axis of its cache, the length of a static one.
    """

    def __init__(self, model: str | bytes, head_size: int, capacity: int) -> None:
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self._inputs = {port.name: port for port in self._session.get_inputs()}
        cache = [name for name in self._inputs if "past_key_values" in name or ".cache." in name]
        # transformers 5.24 hands each windowed layer's window through the graph; nothing there reads it.
        self._idle = {name for name in cache if name.endswith("_sliding_window_tensor")}
        self._past = [name for name in cache if name not in self._idle]
        outputs = [port.name for port in self._session.get_outputs() if not port.name.endswith("_sliding_window_tensor")]
        if "logits" not in outputs:
            raise CannotDrive(f"no output named logits among {outputs[:3]}")
        # Without past inputs the keys and values of a prefill are outputs that nothing takes.
        self._outputs = ["logits", *(name for name in outputs if self._past and name != "logits" and "hidden" not in name)]
        if len(self._outputs) != len(self._past) + 1:
            raise CannotDrive(f"{len(self._past)} inputs of the past and {len(self._outputs) - 1} outputs of it")
        self._static = any(name.endswith("cumulative_length") for name in self._past)
        self._sizes = (head_size, capacity)
        self.cached = bool(self._past)
        # A graph that was exported for one token at a time takes a prompt so, too.
        self._one = self._inputs["input_ids"].shape[1] == 1

    def run(self, ids: np.ndarray, past: list[np.ndarray] | None, start: int) -> tuple[np.ndarray, list[np.ndarray] | None]:
        """Logits float32 [S, V] of `ids` [S] after `start` tokens, and the new past."""
        if not self._one:
            return self._step(ids, past, start)
        rows = []
        for t in range(len(ids)):
            row, past = self._step(ids[t : t + 1], past, start + t)
            rows.append(row)
        return np.concatenate(rows), past

    def _step(self, ids: np.ndarray, past: list[np.ndarray] | None, start: int) -> tuple[np.ndarray, list[np.ndarray] | None]:
        total = start + len(ids)
        if self._past and past is None:
            past = [self._empty(self._inputs[name]) for name in self._past]
        known = {
            "input_ids": ids[None], "position_ids": np.arange(start, total)[None], "cache_position": np.arange(start, total),
            "attention_mask": self._mask(start, total),
        }
        feeds = {**dict(zip(self._past, past or ())), **dict.fromkeys(self._idle, np.zeros((), np.int64))}
        for name, port in self._inputs.items():
            if name in known:
                feeds[name] = known[name].astype(_TYPES[port.type])
            elif name not in feeds:
                raise CannotDrive(f"unknown input {name} {port.type} {port.shape}")
        logits, *present = self._session.run(self._outputs, feeds)
        return logits[0].astype(np.float32), present if self._past else None

    def _mask(self, start: int, total: int) -> np.ndarray:
        port = self._inputs.get("attention_mask")
        if port is None or len(port.shape) == 2:
            return np.ones((1, total))
        visible = np.arange(self._sizes[1] if self._static else total)[None] <= np.arange(start, total)[:, None]
        return (visible if port.type == "tensor(bool)" else np.where(visible, 0.0, np.finfo(np.float32).min))[None, None]

    def _empty(self, port: Any) -> np.ndarray:
        """Batch first, head size last; the past is the other open axis. transformers 5 writes fixed sizes as names: "16"."""
        head_size, capacity = self._sizes
        shape = [int(size) if isinstance(size, int) or size.isdigit() else None for size in port.shape]
        open_axes = {0: 1, len(shape) - 1: head_size}
        filled = [size if size is not None else open_axes.get(axis, capacity if self._static else 0) for axis, size in enumerate(shape)]
        return np.zeros(filled, _TYPES[port.type])


def logits_of(model: str | bytes, sequences: list[np.ndarray], decode: int, *, head_size: int, capacity: int) -> dict[str, np.ndarray]:
    """`prefill.{i}` and, for a graph with a cache, `decode.{i}`: shapes as in torch_model.logits."""
    decoder = Decoder(model, head_size, capacity)
    found: dict[str, np.ndarray] = {}
    for i, ids in enumerate(sequences):
        found[f"prefill.{i}"], _ = decoder.run(ids, None, 0)
        if not decoder.cached:
            continue
        cut = len(ids) - decode
        _, past = decoder.run(ids[:cut], None, 0)
        rows = []
        for t in range(cut, len(ids)):
            row, past = decoder.run(ids[t : t + 1], past, t)
            rows.append(row[-1])
        found[f"decode.{i}"] = np.stack(rows)
    return found


def distance(expected: np.ndarray, actual: np.ndarray) -> float:
    """The largest difference over the largest expected magnitude; infinite where shapes or NaNs differ."""
    if expected.shape != actual.shape or not np.isfinite(actual).all():
        return float("inf")
    return float(np.abs(expected - actual).max() / np.abs(expected).max())


def at_full_accuracy(path: str) -> bytes:
    """The graph with float16 turned into float32 throughout, and MatMulNBits told not to quantize its activations."""
    model = onnx.load(path)
    _widen_graph(model.graph)
    return model.SerializeToString()


def _widen_graph(graph: Any) -> None:
    for value in [*graph.input, *graph.output, *graph.value_info]:
        if value.type.tensor_type.elem_type == TensorProto.FLOAT16:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for tensor in graph.initializer:
        _widen(tensor)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                _widen(attribute.t)
            elif attribute.name == "to" and attribute.i == TensorProto.FLOAT16:
                attribute.i = TensorProto.FLOAT
            elif attribute.name == "accuracy_level":
                attribute.i = 1
            elif attribute.HasField("g"):
                _widen_graph(attribute.g)


def _widen(tensor: Any) -> None:
    if tensor.data_type == TensorProto.FLOAT16:
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), name))
