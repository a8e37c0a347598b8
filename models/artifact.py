"""A compiled model on disk: a folder with a manifest, the graph, its weights, and the tokenizer's files.

    model.onnx  model.onnx.data  octavo.json  report.json  [tokenizer.json, tokenizer_config.json, chat_template.jinja, …]

The manifest (`octavo.json`) is the only thing the compiler tells the runtime. It names no path outside its own folder, none is followed.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from ..custom_ops.contract import CACHE_LAYOUT, WEIGHT_LAYOUT
from ..errors import ArtifactError, ModelError
from .decision import Decision
from .external_data import check_external_paths
from .interface import GraphInterface
from .json_record import SchemaError, read_record
from .spec import Kind, ModelSpec
from .staging import StagedFolder

FORMAT_VERSION = 1
MANIFEST = "octavo.json"
GRAPH = "model.onnx"
WEIGHTS = "model.onnx.data"
REPORT = "report.json"

# Copied from beside the source when they are there; read by runtime/tokenizer.py.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json", "config.json",
)

_COMPILE_AGAIN = "compile the model again"
_MAX_SIZE = 2**31 - 1   # positions and ids of a step are int32


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
    """All that the runtime knows about an artifact. `spec` is None where the graph is no decoder.

    `weights` tells whether every parameter is what the source means ("exact", quantized or not) or some were rounded by the compiler;
    `weight_layout` is None where no weight is packed.
    """

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
    weights: Literal["exact", "rounded"] = "exact"
    weight_layout: str | None = None
    format_version: int = FORMAT_VERSION

    def fingerprint(self) -> str:
        """Names graph and weights by their recorded hashes."""
        return "+".join(self.files[name].sha256 for name in (GRAPH, WEIGHTS) if name in self.files)


def write_manifest(manifest: Manifest, path: str | os.PathLike[str]) -> None:
    """Writes `manifest` as JSON to the file `path`."""
    text = json.dumps(asdict(manifest), indent=1, ensure_ascii=False, allow_nan=False)
    Path(path).write_text(text + "\n", encoding="utf-8")


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """The manifest in the file `path`. ArtifactError where it is missing, malformed, of another version, or has keys we don't know."""
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except FileNotFoundError:
        hint = "give the folder that octavo compile wrote"
        raise ArtifactError(f"{path.parent} is not an artifact: it holds no {path.name}", hint=hint) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is not readable JSON: {error}", hint=_COMPILE_AGAIN) from error
    version = data.get("format_version") if isinstance(data, dict) else None
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise ArtifactError(f"{path} has format version {version!r}, this Octavo reads {FORMAT_VERSION}", hint=_COMPILE_AGAIN)
    try:
        manifest = read_record(Manifest, data, "the manifest")
    except SchemaError as error:
        raise ArtifactError(f"{path}: {error}", hint=_COMPILE_AGAIN) from error
    for name in manifest.files:
        if not _is_bare(name):
            raise ArtifactError(f"{path} records a file {name!r}, which is not a plain name", hint=_COMPILE_AGAIN)
    if wrong := _wrong_spec(manifest):
        raise ArtifactError(f"{path}: {wrong}", hint=_COMPILE_AGAIN)
    return manifest


@dataclass(frozen=True)
class Artifact:
    """An artifact whose manifest, file sizes and cache layout have been checked. `verify_contents` checks the bytes."""

    folder: Path
    manifest: Manifest

    @property
    def graph(self) -> Path:
        return self.folder / GRAPH

    @staticmethod
    def open(path: str | os.PathLike[str]) -> Artifact:
        """The artifact in the folder `path`.

        Raises ArtifactError for a folder that is none, another format version or cache layout, a file missing or of another size, or a
        graph that reads files other than those recorded.
        """
        folder = Path(path)
        if not folder.is_dir():
            what = "is not a folder" if folder.exists() else "does not exist"
            raise ArtifactError(f"{folder} {what}", hint="give the folder that octavo compile wrote")
        artifact = Artifact(folder.resolve(), read_manifest(folder / MANIFEST))
        artifact._check()
        return artifact

    def _check(self) -> None:
        manifest = self.manifest
        if manifest.kind == "paged" and manifest.cache_layout != CACHE_LAYOUT:
            message = f"{self.folder} was compiled for the cache layout {manifest.cache_layout!r}, the kernels here have {CACHE_LAYOUT!r}"
            raise ArtifactError(message, hint=_COMPILE_AGAIN)
        if manifest.weight_layout not in (None, WEIGHT_LAYOUT):
            message = f"{self.folder} was compiled for the weight layout {manifest.weight_layout!r}, the kernels here have {WEIGHT_LAYOUT!r}"
            raise ArtifactError(message, hint=_COMPILE_AGAIN)
        if GRAPH not in manifest.files:
            raise ArtifactError(f"{self.folder / MANIFEST} records no {GRAPH}", hint=_COMPILE_AGAIN)
        for name, record in manifest.files.items():
            try:
                info = (self.folder / name).lstat()
            except OSError:
                raise ArtifactError(f"{self.folder / name} is missing", hint=f"copy the whole folder, or {_COMPILE_AGAIN}") from None
            if not stat.S_ISREG(info.st_mode):
                raise ArtifactError(f"{self.folder / name} is not a regular file", hint=f"copy the whole folder, or {_COMPILE_AGAIN}")
            if info.st_size != record.size:
                message = f"{self.folder / name} has {info.st_size} bytes, the manifest records {record.size}"
                raise ArtifactError(message, hint=f"it was changed or truncated: {_COMPILE_AGAIN}")
        try:
            read = check_external_paths(self.graph)
        except ModelError as error:
            raise ArtifactError(error.message, hint=_COMPILE_AGAIN) from error
        stray = [file for file in read if file.parent != self.folder or file.name not in manifest.files]
        if stray:
            raise ArtifactError(f"{self.graph} reads {stray[0]}, which the manifest does not record", hint=_COMPILE_AGAIN)

    def verify_contents(self) -> None:
        """Hashes every recorded file. ArtifactError names the first whose contents are not those that were written."""
        for name, record in self.manifest.files.items():
            if _sha256(self.folder / name) != record.sha256:
                raise ArtifactError(f"the contents of {self.folder / name} are not those recorded", hint=_COMPILE_AGAIN)


class ArtifactWriter:
    """Writes an artifact beside its target and renames it there at the end, so that a target is whole or as it was before.

        with ArtifactWriter("out/") as writer:
            ...                             # write GRAPH, WEIGHTS and REPORT into writer.folder
            writer.copy_tokenizer(folder)   # of the source
            artifact = writer.finish(manifest)

    Leaving the block without `finish` removes what was written. An existing target is replaced when it is an artifact (nothing else lies in
    it: what we did not write is never deleted) or an empty folder, and refused (ArtifactError) when it is anything else.
    """

    def __init__(self, target: str | os.PathLike[str]) -> None:
        self._staged = StagedFolder(target, replaceable=_is_artifact, error=ArtifactError)

    @property
    def folder(self) -> Path:
        """Where to write the files."""
        return self._staged.folder

    def __enter__(self) -> ArtifactWriter:
        self._staged.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._staged.__exit__(kind, error, trace)

    def copy_tokenizer(self, source_folder: str | os.PathLike[str]) -> tuple[str, ...]:
        """Copies the TOKENIZER_FILES that lie in `source_folder` as regular files, and returns their names. Links are not followed."""
        copied = []
        for name in TOKENIZER_FILES:
            source = Path(source_folder) / name
            if source.is_file() and not source.is_symlink():
                shutil.copyfile(source, self.folder / name)
                copied.append(name)
        return tuple(copied)

    def finish(self, manifest: Manifest) -> Artifact:
        """Records size and hash of every file written (they replace `manifest.files`), and puts the folder in the target's place."""
        files = {}
        for file in sorted(self.folder.iterdir()):
            assert file.is_file() and not file.is_symlink(), f"an artifact holds plain files only: {file}"
            files[file.name] = FileRecord(size=file.stat().st_size, sha256=_sha256(file))
        assert GRAPH in files, "an artifact has a graph"
        write_manifest(replace(manifest, files=files), self.folder / MANIFEST)
        Artifact.open(self.folder)  # what can't be loaded is never put in place
        return Artifact.open(self._staged.commit())


def _is_artifact(folder: Path) -> bool:
    """Holds nothing but what a compile writes."""
    ours = (MANIFEST, GRAPH, WEIGHTS, REPORT, *TOKENIZER_FILES)
    return (folder / MANIFEST).is_file() and all(file.name in ours for file in folder.iterdir())


def _wrong_spec(manifest: Manifest) -> str:
    """What no decoder's sizes can be, or "". A group beyond the last would be a cache that no fork ever copies."""
    spec = manifest.spec
    if spec is None:
        return 'kind "paged" without a spec' if manifest.kind == "paged" else ""
    if manifest.kind == "paged" and not spec.cache_layers:
        return 'kind "paged" without a cache'
    sizes = [spec.vocab_size, spec.max_context, *(size for c in spec.cache_layers for size in (c.kv_heads, c.head_size, c.value_size))]
    if not all(1 <= size <= _MAX_SIZE for size in sizes):
        return f"the spec has a size that is not in 1 … {_MAX_SIZE}"
    if not all(0 <= layer.group < len(spec.cache_groups) for layer in spec.cache_layers):
        return "a cache layer is in a group that the spec doesn't have"
    return ""


def _is_bare(name: str) -> bool:
    return name not in ("", ".", "..", MANIFEST) and not set(name) & set("/\\\0:")


def _sha256(file: Path) -> str:
    import hashlib  # not before it is needed: libcrypto is 4 MB

    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key is given twice")
    return dict(pairs)


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")
