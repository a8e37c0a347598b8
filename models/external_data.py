"""Which files an ONNX model reads besides its own, and whether it may: the one place where the rules for external data stand.

Needs neither onnx nor onnx_ir, so that a runtime without them can check a plain `.onnx` before onnxruntime opens it. The rules: a location
is relative, has no `..`, stays under the folder of the model, and names a regular file through no symbolic link and with a single hard
link (a second name can be a file outside the folder); offset and length lie inside the file.
"""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import ModelError, UnsafePathError

# Where tensors can be in a model: message → {field number: message of that field}. Field numbers are those of onnx.proto.
_MESSAGES: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
_GRAPH_FIELD = 7
_TENSOR_NAME, _TENSOR_EXTERNAL_DATA = 8, 13
_ENTRY_KEY, _ENTRY_VALUE = 1, 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

_NOT_A_MODEL = "give the path of an .onnx file as an exporter wrote it; a download that broke off has to be repeated"
_INSIDE = "put the model and its data files in one folder, with plain relative names, and export or save it again"


@dataclass(frozen=True)
class ExternalEntry:
    """One tensor's reference to bytes in another file. `length` is None where the model leaves it to the tensor's size."""

    tensor: str
    location: str
    offset: int = 0
    length: int | None = None


def model_file(source: str | os.PathLike[str]) -> Path:
    """`source` as a path of a non-empty regular file; a ModelError that says what it is instead."""
    path = Path(source)
    try:
        info = path.stat()
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist", hint="check the path") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} can't be read: {error}", hint="check the path and its permissions") from error
    if stat.S_ISDIR(info.st_mode):
        raise ModelError(f"{path} is a folder", hint="give the path of the model file inside it")
    if not stat.S_ISREG(info.st_mode):
        raise ModelError(f"{path} is not a regular file", hint="give the path of a model file")
    if info.st_size == 0:
        raise ModelError(f"{path} is empty", hint=_NOT_A_MODEL)
    return path


def check_external_paths(source: str | os.PathLike[str]) -> tuple[Path, ...]:
    """Validates all external data of the ONNX model at `source` and opens none of it.

    Returns the real paths of the data files in order of their locations. Raises UnsafePathError for a location that breaks a rule of this
    module, ModelError for a file that is no ONNX model or refers to data that is missing or too short.
    """
    return tuple(path for _, path in _located(model_file(source)))


def source_sha256(source: str | os.PathLike[str]) -> str:
    """sha256 in hex over the model file and then, in order of location, each data file's location, size and contents.

    Reads in chunks, after `check_external_paths`' validation, and never outside the model's folder.
    """
    import hashlib  # not before it is needed: libcrypto is 4 MB

    path = model_file(source)
    digest = hashlib.sha256()
    for location, file in (("", path), *_located(path)):
        # NOFOLLOW closes the gap between check and use for data files; the model itself the caller has named and may link.
        descriptor = os.open(file, os.O_RDONLY | (os.O_NOFOLLOW if location else 0))
        with os.fdopen(descriptor, "rb") as stream:
            digest.update(f"{location}\0{os.fstat(descriptor).st_size}\0".encode())
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _located(path: Path) -> list[tuple[str, Path]]:
    """(location, file) for each data file of the model at `path`, sorted by location, all entries validated."""
    try:
        with path.open("rb") as stream:
            # The map goes when its last view goes: an error on its way out still holds views, so it can't be closed here.
            entries = read_entries(memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)))
    except ModelError as error:
        raise type(error)(f"{path}: {error.message}", hint=error.hint) from None
    except OSError as error:
        raise ModelError(f"{path} can't be read: {error}", hint="check its permissions") from error
    return sorted({entry.location: check_entry(entry, path.parent) for entry in entries}.items())


def check_entry(entry: ExternalEntry, folder: str | os.PathLike[str]) -> Path:
    """The file that `entry` means in the model's folder, after every rule of this module has been held against it."""
    root = Path(folder).resolve()
    where = f"the external data of tensor {entry.tensor!r} ({entry.location!r})"
    parts = entry.location.split("/")
    if not entry.location or "\0" in entry.location or "\\" in entry.location or os.path.isabs(entry.location) or ":" in parts[0]:
        raise UnsafePathError(f"{where} is not a plain relative path", hint=_INSIDE)
    if ".." in parts:
        raise UnsafePathError(f"{where} leaves its folder by '..'", hint=_INSIDE)
    file = root
    for part in parts:
        file = file / part
        try:
            info = file.lstat()
        except OSError as error:
            raise ModelError(f"{where} is missing: {file}", hint="copy the data files beside the model, with their names") from error
        if stat.S_ISLNK(info.st_mode):
            raise UnsafePathError(f"{where} goes through a symbolic link: {file}", hint="replace the link by a copy of the file: cp -L")
    if not stat.S_ISREG(info.st_mode):
        raise UnsafePathError(f"{where} is not a regular file: {file}", hint=_INSIDE)
    if info.st_nlink != 1:
        raise UnsafePathError(
            f"{where} has {info.st_nlink} hard links, so it may be a file from elsewhere: {file}",
            hint="replace it by a copy: cp FILE FILE.copy && mv FILE.copy FILE",
        )
    end = entry.offset + (entry.length or 0)
    if end > info.st_size:
        hint = "the data file is truncated: copy or export it again"
        raise ModelError(f"{where} needs {end} bytes, the file has {info.st_size}", hint=hint)
    return file


def read_entries(data: memoryview) -> list[ExternalEntry]:
    """Every external-data entry of a serialized ModelProto, wherever a tensor can be: initializers, attributes, subgraphs, functions.

    Walks the wire format with an explicit stack, so that no nesting exhausts ours. A tensor with external data counts whether or not its
    `data_location` says so: readers that merge repeated fields could see it as external.
    """
    if data[:4] == b"GGUF":
        raise ModelError("this is a GGUF file", hint="import it first: octavo import MODEL.gguf -o DIR")
    entries: list[ExternalEntry] = []
    graphs = 0
    stack = [("model", data)]
    while stack:
        message, view = stack.pop()
        if message == "tensor":
            entries += _tensor_entries(view)
            continue
        children = _MESSAGES[message]
        for number, wire, payload in _fields(view):
            if wire == _BYTES and number in children:
                graphs += message == "model" and number == _GRAPH_FIELD
                stack.append((children[number], payload))
    if not graphs:
        raise ModelError("this is not an ONNX model: it holds no graph", hint=_NOT_A_MODEL)
    return entries


def _tensor_entries(view: memoryview) -> list[ExternalEntry]:
    """The tensor's one entry, or none."""
    name, pairs = "", []
    for number, wire, payload in _fields(view):
        if wire == _BYTES and number == _TENSOR_NAME:
            name = _text(payload)
        elif wire == _BYTES and number == _TENSOR_EXTERNAL_DATA:
            pair = {n: _text(p) for n, w, p in _fields(payload) if w == _BYTES and n in (_ENTRY_KEY, _ENTRY_VALUE)}
            pairs.append((pair.get(_ENTRY_KEY, ""), pair.get(_ENTRY_VALUE, "")))
    return [entry_from_pairs(name, pairs)] if pairs else []


def entry_from_pairs(tensor: str, pairs: list[tuple[str, str]]) -> ExternalEntry:
    """The entry that a TensorProto's `external_data` key-value pairs spell. Keys that no reader knows are refused."""
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ModelError(f"the external data of tensor {tensor!r} gives a key twice", hint=_NOT_A_MODEL)
    # onnxruntime's prepacked blobs refer to the same file; a checksum is for the writer's own use, no reader checks it.
    unknown = [key for key in values if key not in ("location", "offset", "length", "checksum") and not key.startswith("prepacked")]
    if unknown:
        raise ModelError(f"the external data of tensor {tensor!r} has an unknown key {unknown[0]!r}", hint=_NOT_A_MODEL)
    if "location" not in values:
        raise ModelError(f"the external data of tensor {tensor!r} has no location", hint=_NOT_A_MODEL)
    offset = _size(tensor, "offset", values.get("offset", "0"))
    length = _size(tensor, "length", values["length"]) if "length" in values else None
    return ExternalEntry(tensor, values["location"], offset, length)


def _size(tensor: str, key: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise ModelError(f"the external data of tensor {tensor!r} has {key} {text!r}, which is no size in bytes", hint=_NOT_A_MODEL)
    return int(text)


def _text(payload: memoryview) -> str:
    try:
        return str(payload, "utf-8")
    except UnicodeDecodeError:
        raise ModelError("this is not an ONNX model: a name is not UTF-8", hint=_NOT_A_MODEL) from None


def _fields(view: memoryview) -> Iterator[tuple[int, int, memoryview]]:
    """(field number, wire type, payload) of a protobuf message; the payload is empty but for length-delimited fields."""
    at, end = 0, len(view)
    nothing = view[:0]
    while at < end:
        tag, at = read_varint(view, at)
        number, wire = tag >> 3, tag & 7
        length = 0
        if wire == _VARINT:
            _, at = read_varint(view, at)
        elif wire == _BYTES:
            length, at = read_varint(view, at)
        elif wire in (_FIXED64, _FIXED32):
            at += 8 if wire == _FIXED64 else 4
        else:
            raise ModelError("this is not an ONNX model: malformed protobuf", hint=_NOT_A_MODEL)
        if number == 0 or tag >> 32 or length > end - at or at > end:
            raise ModelError("this is not an ONNX model, or it is truncated", hint=_NOT_A_MODEL)
        yield number, wire, view[at : at + length] if wire == _BYTES else nothing
        at += length


def read_varint(view: memoryview, at: int) -> tuple[int, int]:
    """(value, index after it)."""
    value = shift = 0
    while at < len(view) and shift < 70:
        byte = view[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise ModelError("this is not an ONNX model, or it is truncated", hint=_NOT_A_MODEL)
