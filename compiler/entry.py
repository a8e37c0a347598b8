"""`octavo.compile`, `octavo.inspect` and `octavo.import_model`: what users call, over the pipeline."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from time import perf_counter

from ..custom_ops.contract import CACHE_LAYOUT, WEIGHT_LAYOUT
from ..errors import ArtifactError, ModelError, OptionError
from ..models.artifact import REPORT, Artifact, Manifest, SourceRecord
from ..models.external_data import source_sha256
from ..models.gguf import import_gguf
from ..models.onnx_reader import Source, read_onnx
from ..passes.normalize import graph_size
from .emit import emit
from .ledger import Ledger, Watch
from .options import CompileOptions
from .pipeline import Rewritten, rewrite
from .report import CompileReport, Sizes
from .thresholds import quality_thresholds


def compile(
    source: Source, out: str | PathLike[str], *, options: CompileOptions | None = None, html: str | PathLike[str] | None = None,
) -> CompileReport:
    """Compiles an exported ONNX model into the artifact folder `out`, and tells what was done. `html` is a file for a page that shows it,
    pass by pass (docs/howto/diff.md).

    `source` is a path, an `onnx.ModelProto` or an `onnx_ir.Model`; it is never changed. Raises ModelError or UnsafePathError (can't be
    read), OptionError (options contradict the graph), RefusedError (`strict`, or an explicit wish that can't be had), ArtifactError (`out`
    is something else). A graph that can't be rewritten is no error: its kind is "baseline" and the report says why.
    """
    options = CompileOptions() if options is None else options
    if not isinstance(options, CompileOptions):
        raise OptionError(f"options is a {type(options).__name__}, not CompileOptions")
    trace = None
    if html is not None:
        from .diff.trace import Trace  # comparing graphs is no part of a compile that nobody looks at

        trace = Trace()
    compiled = _build(source, options, trace)
    manifest = Manifest(
        kind=compiled.rewritten.kind, interface=compiled.rewritten.interface, spec=compiled.rewritten.spec, source=compiled.record(),
        options=options.to_json(), decisions=compiled.report.decisions, files={},
        cache_layout=CACHE_LAYOUT if compiled.rewritten.kind == "paged" else None, octavo_version=_version(),
        thresholds=quality_thresholds(
            compiled.rewritten.spec, quantized=compiled.rewritten.quantized or options.quantizes, rounded=compiled.rewritten.rounded,
            static=options.activations == "int8-static",
        ),
        weight_layout=WEIGHT_LAYOUT if any(node.op_type == "QuantLinear" for node in compiled.rewritten.model.graph) else None,
        weights="rounded" if compiled.rewritten.rounded else "exact",
    )
    emit(compiled.rewritten.model, manifest, compiled.report, out, source_folder=compiled.folder)
    if html is not None and trace is not None:
        from .diff.html import compile_page

        trace.close()
        Path(html).write_text(compile_page(trace, out, compiled.report), encoding="utf-8")
    return compiled.report


def inspect(path: Source) -> CompileReport:
    """The report of an artifact, or of what a compile with default options would do to a graph. Writes nothing."""
    if isinstance(path, (str, PathLike)) and Path(path).is_dir():
        artifact = Artifact.open(path)
        file = artifact.folder / REPORT
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ArtifactError(f"{file} can't be read: {error}", hint="compile the model again") from error
        return CompileReport.from_json(data)
    return _build(path, CompileOptions()).report


def import_model(source: str | PathLike[str], out: str | PathLike[str], *, progress: Callable[[str, int, int], None] | None = None) -> Path:
    """Turns a GGUF file into plain ONNX with its tokenizer files in the folder `out`; the path of its `model.onnx`.

    Raises ModelError for anything but a GGUF file of a known architecture.
    """
    path = Path(source)
    if path.suffix != ".gguf":
        raise ModelError(f"{path} is not a .gguf file", hint="an .onnx needs no import: compile it")
    return import_gguf(path, out, progress)


@dataclass(frozen=True)
class _Compiled:
    rewritten: Rewritten
    report: CompileReport
    path: Path | None

    @property
    def folder(self) -> Path | None:
        return None if self.path is None else self.path.parent

    def record(self) -> SourceRecord:
        """A model handed in as an object has no file, and nothing to compare with later."""
        return SourceRecord("", "") if self.path is None else SourceRecord(self.path.name, source_sha256(self.path))


def _build(source: Source, options: CompileOptions, watch: Watch | None = None) -> _Compiled:
    start = perf_counter()
    path = Path(os.fspath(source)) if isinstance(source, (str, PathLike)) else None
    first = read_onnx(source)      # bad input is an error before anything else is tried
    nodes, size = graph_size(first)
    pending = [first]
    ledger = Ledger(options.strict, watch)
    if watch is not None:
        watch.start(first)
    rewritten = rewrite(lambda: pending.pop() if pending else read_onnx(source), path.parent if path else None, options, ledger)
    nodes_after, size_after = graph_size(rewritten.model)
    report = CompileReport(
        kind=rewritten.kind, source=path.name if path else str(first.graph.name or "model"), sites=ledger.sites, refusals=tuple(ledger.refusals),
        decisions=tuple(ledger.decisions), outcomes=tuple(ledger.outcomes), sizes=Sizes(nodes, nodes_after, size, size_after),
        seconds=perf_counter() - start, attentions=ledger.attentions,
    )
    return _Compiled(rewritten, report, path)


def _version() -> str:
    from .. import __version__

    return __version__
