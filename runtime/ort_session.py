"""From a file to a ready onnxruntime session. `Session` is the user's word; this is onnxruntime's."""

from __future__ import annotations

from pathlib import Path

import onnxruntime as ort

from ..custom_ops import register
from ..errors import LibraryError, ModelError
from ..models.interface import GraphInterface
from ..models.roles import guess_interface
from .config import RuntimeOptions

# Longer than the gap between two steps of a generation.
_SPIN_MICROSECONDS = 2000

# What onnxruntime says when a graph needs an op that is not registered.
_MISSING_OP = ("is not a registered function/op", "ai.octavo")


def open_session(graph: Path, options: RuntimeOptions, *, op_library: bool) -> ort.InferenceSession:
    """A session over `graph` with `options`, and with our ops where `op_library`.

    Raises LibraryError where the op library can't be loaded or lacks an op of the graph, ModelError where onnxruntime refuses the graph.
    """
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = options.num_threads
    settings.inter_op_num_threads = 1
    # Patterns are kept per combination of shapes: batches of ragged sequences would fill the table and never hit it.
    settings.enable_mem_pattern = False
    # Threads spin between the nodes of a step and from step to step, not while nobody asks for anything.
    settings.add_session_config_entry("session.intra_op.spin_duration_us", str(_SPIN_MICROSECONDS))
    settings.log_severity_level = 3     # a failed step is reported by us, with its cause
    if not options.optimize_graph:
        settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if options.profile is not None:
        settings.enable_profiling, settings.profile_file_prefix = True, options.profile
    if op_library:
        register(settings)
    try:
        return ort.InferenceSession(str(graph), settings, providers=["CPUExecutionProvider"])
    except Exception as error:
        message = str(error).strip()
        if any(sign in message for sign in _MISSING_OP):
            again, whole = "compile the model again with this Octavo", "a compiled artifact is loaded by its folder, not by its graph"
            hint = again if op_library else whole
            raise LibraryError(f"{graph.name} needs ops that are not there: {message}", hint=hint) from error
        raise ModelError(f"onnxruntime can't load {graph}: {message}", hint="is it a whole ONNX model, of opset 25 or below?") from error


def session_interface(session: ort.InferenceSession) -> GraphInterface:
    """What a plain graph's inputs and outputs are for, as far as their names, types and shapes tell."""
    inputs = [(port.name, port.type, port.shape) for port in session.get_inputs()]
    outputs = [(port.name, port.type, port.shape) for port in session.get_outputs()]
    return guess_interface(inputs, outputs)
