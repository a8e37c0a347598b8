"""Writes what a compile made: the graph with its parameters beside it, the manifest, the report, the tokenizer's files."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path

import onnx_ir as ir

from ..models.artifact import GRAPH, REPORT, WEIGHTS, Artifact, ArtifactWriter, Manifest
from .report import CompileReport

# A page, so that the runtime maps parameters and never copies them. Tensors below a page lie densely.
ALIGNMENT = 4096
# Smaller tensors stay inside the graph file: onnxruntime reads them during its own constant folding.
EXTERNAL_FROM_BYTES = 1024


def emit(model: ir.Model, manifest: Manifest, report: CompileReport, out: str | PathLike[str], *, source_folder: Path | None) -> Artifact:
    """Writes the artifact into `out` (beside it first, then renamed). Tokenizer files are copied from `source_folder`."""
    with ArtifactWriter(out) as writer:
        ir.save(
            model, writer.folder / GRAPH, external_data=WEIGHTS, size_threshold_bytes=EXTERNAL_FROM_BYTES, alignment=ALIGNMENT,
            align_threshold=ALIGNMENT,
        )
        (writer.folder / REPORT).write_text(json.dumps(report.to_json(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        if source_folder is not None:
            writer.copy_tokenizer(source_folder)
        return writer.finish(manifest)
