"""Which pass of a compile moved the numbers: the source is compiled again, and every graph on the way runs one prompt.

Caches and activations are fp32 then, so that nothing rounds but weights that the options round. The pass that is told is the first after
which the logits differ from the source's; between its two graphs `locate` tells the node.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from ...custom_ops.contract import DOMAIN
from ...models.artifact import Manifest
from ...models.external_data import source_sha256
from ...models.interface import GraphInterface, GraphPort
from ...models.onnx_reader import graph_interface, read_onnx
from ...passes.extract import constant_info, constant_proto, is_large, open_session, ort_value, run
from ...passes.outcome import Outcome
from ..ledger import Ledger
from ..options import CompileOptions
from ..pipeline import rewrite
from ..thresholds import quality, tight
from .graph import Snapshot
from .live import LiveReader, proto_of
from .locate import Tokens, difference, feeds, locate
from .numbers import PassFault

# A source in half precision rounds every value to 2⁻¹¹: what widening it may move.
_WIDENED = 2e-2


def blame(source: Path, manifest: Manifest, tokens: Tokens) -> tuple[PassFault | None, str]:
    """The pass that moved the numbers between `source` and what it was compiled to, or why none is told. Never raises over a graph."""
    if not manifest.source.sha256 or source_sha256(source) != manifest.source.sha256:
        return None, f"{source.name} is not the file that the artifact was compiled from: its passes were not searched."
    runs = _Runs(manifest, tokens)
    try:
        first = read_onnx(source)
        runs.start(first)
        pending = [first]
        rewrite(lambda: pending.pop() if pending else read_onnx(source), source.parent, _options(manifest), Ledger(False, runs))
    except Exception as error:  # options of another version, and what onnxruntime raises
        runs.failed = runs.failed or f"{type(error).__name__}: {error}"
    finally:
        runs.close()
    if runs.fault is None and runs.failed:
        return None, f"The pass that did it was not found: {runs.failed.strip().splitlines()[0][:200]}"
    if runs.fault is None:
        return None, "Compiled again pass by pass, with fp32 caches and activations, no pass moves the numbers: what rounds did, or another version."
    return runs.fault, ""


def _options(manifest: Manifest) -> CompileOptions:
    known = {field.name for field in fields(CompileOptions)}
    given = {name: value for name, value in manifest.options.items() if name in known and value is not None}
    exact = {"kv_cache": False if given.get("kv_cache") is False else "fp32", "activations": "fp32", "strict": False, "tune": False, "calibration": None}
    return CompileOptions(**{**given, **exact})


@dataclass(frozen=True)
class _Frame:
    """A graph between two passes, as it was then: weights are still where they were."""

    snapshot: Snapshot
    proto: onnx.ModelProto
    weights: Mapping[str, ir.TensorProtocol]
    ports: Mapping[str, GraphPort]

    def values(self, names: Sequence[str], tokens: Tokens) -> list[NDArray[Any]]:
        """The named values of one prompt, without fusions."""
        proto = onnx.ModelProto()
        proto.CopyFrom(self.proto)
        fed = {name: tensor for name, tensor in self.weights.items() if is_large(tensor)}
        declared = [_port(self.ports, value) for value in proto.graph.input]
        proto.graph.initializer.extend(constant_proto(name, tensor) for name, tensor in self.weights.items() if name not in fed)
        proto.graph.input.extend(constant_info(name, tensor) for name, tensor in fed.items())
        wanted = list(dict.fromkeys(names))
        there = {value.name: value for value in proto.graph.output}
        del proto.graph.output[:]
        proto.graph.output.extend(there.get(name) or onnx.helper.make_empty_tensor_value_info(name) for name in wanted)
        session = open_session(proto, custom_ops=any(entry.domain == DOMAIN for entry in proto.opset_import), threads=0)
        given = {**{name: ort_value(tensor.numpy()) for name, tensor in fed.items()}, **feeds(GraphInterface(tuple(declared), ()), tokens)}
        found = dict(zip(wanted, run(session, given)))
        return [np.array(found[name]) for name in names]


def _port(ports: Mapping[str, GraphPort], value: onnx.ValueInfoProto) -> GraphPort:
    """Its role goes by its name, its type and shape are those that the graph has now."""
    tensor = value.type.tensor_type
    shape = tuple(dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in tensor.shape.dim)
    dtype = str(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)))
    known = ports.get(value.name)
    return GraphPort(value.name, dtype, shape, "other") if known is None else replace(known, dtype=dtype, shape=shape)


class _Runs:
    """A `Watch` that runs every graph that differs from the one before it, until one gives other numbers."""

    def __init__(self, manifest: Manifest, tokens: Tokens) -> None:
        self.fault: PassFault | None = None
        self.failed = ""
        self._manifest, self._tokens = manifest, tokens
        self._reader = LiveReader()
        self._ports: dict[str, GraphPort] = {port.name: port for port in manifest.interface.inputs}
        self._frame: _Frame | None = None
        self._logits: NDArray[Any] | None = None
        self._outputs: tuple[str, ...] = ()
        self._relative = 0.0
        self._kept: tuple[PassFault | None, _Frame | None, float] = (None, None, 0.0)
        self._limit = tight(None).relative or 0.0

    def close(self) -> None:
        self._reader.close()

    def start(self, model: ir.Model) -> None:
        interface = graph_interface(model)
        self._ports |= {port.name: port for port in interface.inputs}
        logits = interface.output("logits")
        self._outputs = (logits.name,) if logits is not None else tuple(sorted(port.name for port in interface.outputs))
        self._frame = self._seen(model)
        self._logits = self._run(self._frame)

    def after(self, outcome: Outcome, model: ir.Model) -> None:
        """What goes wrong here is no fault of the pass, and must not look like one to the compile."""
        if self.fault is None and not self.failed:
            try:
                self._compare(outcome, model)
            except Exception as error:
                self.failed = f"after {outcome.stage}: {error}"

    def _compare(self, outcome: Outcome, model: ir.Model) -> None:
        assert self._frame is not None and self._logits is not None, "a source comes before its passes"
        frame = self._seen(model)
        if frame.snapshot == self._frame.snapshot:
            return
        logits = self._run(frame)
        relative = difference(self._logits, logits) if logits.size == self._logits.size else float("inf")
        if outcome.stage == "quantize_linears" and self._manifest.weights == "rounded":
            self._limit = quality(self._manifest.thresholds).relative or self._limit
        # Written so that a NaN counts.
        if not relative <= (_WIDENED if outcome.stage == "widen" else self._limit):
            located = locate(self._frame, frame, self._tokens)
            self.fault = PassFault(outcome.stage, self._relative, relative, located.divergence)
        elif outcome.stage == "widen":
            self._logits, relative = logits, 0.0
        self._frame, self._relative = frame, relative

    def begin(self) -> None:
        self._kept = self.fault, self._frame, self._relative

    def undone(self) -> None:
        self.fault, self._frame, self._relative = self._kept

    def _seen(self, model: ir.Model) -> _Frame:
        proto, weights = proto_of(model)
        return _Frame(self._reader.snapshot(model), proto, weights, self._ports)

    def _run(self, frame: _Frame) -> NDArray[Any]:
        there = {value.name for value in frame.proto.graph.output}
        names = self._outputs if there.issuperset(self._outputs) else ("logits",)
        return np.concatenate([array.astype(np.float32).ravel() for array in frame.values(names, self._tokens)])
