"""A compiled model on disk: a folder with a manifest, the graph, its weights, and the tokenizer's files.

    model.onnx  model.onnx.data  octavo.json  report.json  [tokenizer.json, tokenizer_config.json, chat_template.jinja, generation_config.json, …]

The manifest (`octavo.json`) is the only thing the compiler tells the runtime. It names no path outside its own folder, and none is followed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .decision import Decision
from .interface import GraphInterface
from .spec import Kind, ModelSpec

FORMAT_VERSION = 1
MANIFEST = "octavo.json"
GRAPH = "model.onnx"
WEIGHTS = "model.onnx.data"
REPORT = "report.json"

# Copied from beside the source when they are there; read by runtime/text.py.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json", "config.json",
)


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes (checked at load) and sha256 in hex (checked by `octavo check`)."""

    size: int
    sha256: str


@dataclass(frozen=True)
class SourceRecord:
    """Where the artifact came from: the source's file name (never a path) and its sha256 over graph and external data."""

    name: str
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """All that the runtime knows about an artifact. `spec` is None where the graph is no decoder."""

    kind: Kind
    interface: GraphInterface
    spec: ModelSpec | None
    source: SourceRecord
    options: dict[str, Any]
    decisions: tuple[Decision, ...]
    files: dict[str, FileRecord]
    cache_layout: str | None
    octavo_version: str
    thresholds: dict[str, float] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
