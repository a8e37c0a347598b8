"""An ONNX file without its weights: the wire format is walked, large tensor payloads are left where they lie and only their place is kept.

What comes out is small however large the file is, and is parsed by the onnx package as any model. Nothing is trusted but what that parse
gives; the places point into the model's own file.
"""

from __future__ import annotations

import mmap
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx

from ...errors import ModelError
from ...models.external_data import read_varint

# Messages and payloads up to this size are copied as they are.
_SMALL = 1024
# A skeleton above this is no graph that anybody compares: nodes take some hundred bytes each.
_MOST = 512 << 20

# message → {field number: message of that field}. Field numbers are those of onnx.proto.
_CHILDREN: dict[str, dict[int, str]] = {
    "model": {7: "graph", 25: "function"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph"},
}
_RAW_DATA, _DOC_STRING = 9, 12
# Payload fields whose packed bytes are the tensor's own: raw_data, float_data, double_data; and those that are varints or text.
_PLAIN, _CODED = (_RAW_DATA, 4, 10), (5, 6, 7, 11)
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_EXPORT_AGAIN = "export the model again, or load and save it with a current onnx package"


@dataclass(frozen=True)
class Place:
    """Bytes of the model's own file: `plain` ones are the tensor's content, else they are a serialized TensorProto."""

    offset: int
    length: int
    plain: bool


@dataclass(frozen=True)
class Skeleton:
    """A parsed model, and where the payloads lie that it lacks."""

    proto: onnx.ModelProto
    _mark: str
    _places: tuple[Place, ...]

    def place(self, tensor: onnx.TensorProto) -> Place | None:
        """Where the payload of `tensor` lies in the file; None where the tensor has all of it."""
        mark, _, index = tensor.doc_string.partition(":")
        return self._places[int(index)] if mark == self._mark else None


def read_skeleton(path: Path) -> Skeleton:
    """The model in the file `path`, which has to be there. ModelError for what is no ONNX model."""
    try:
        with path.open("rb") as stream:
            view = memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} can't be read: {error}", hint="check the path and its permissions") from error
    if view[:4] == b"GGUF":
        raise ModelError(f"{path} is a GGUF file", hint="import it first: octavo import MODEL.gguf -o DIR")
    walk = _Walk(secrets.token_hex(8), [])
    try:
        reduced = walk.message("model", view, 0)
        proto = onnx.ModelProto.FromString(reduced)
    except ModelError as error:
        raise ModelError(f"{path}: {error.message}", hint=error.hint) from None
    except Exception as error:  # protobuf's DecodeError
        raise ModelError(f"{path} is not an ONNX model, or it is truncated: {error}", hint=_EXPORT_AGAIN) from error
    if not proto.HasField("graph"):
        raise ModelError(f"{path} is not an ONNX model: it holds no graph", hint="give the path of an .onnx file")
    return Skeleton(proto, walk.mark, tuple(walk.places))


@dataclass
class _Walk:
    mark: str
    places: list[Place]
    total: int = 0

    def message(self, kind: str, view: memoryview, base: int) -> bytes:
        """The message without large payloads. `base` is where `view` begins in the file. Nesting is bounded by protobuf's own parser."""
        if kind == "tensor":
            return self._tensor(view, base)
        children, parts = _CHILDREN[kind], []
        for number, wire, start, payload, end in _spans(view):
            if wire == _BYTES and number in children and end - payload > _SMALL:
                if len(self._depth) > 100:
                    raise ModelError("its graphs are nested too deeply", hint=_EXPORT_AGAIN)
                self._depth.append(kind)
                body = self.message(children[number], view[payload:end], base + payload)
                self._depth.pop()
                parts.append(_field(number, body))
            else:
                parts.append(bytes(view[start:end]))
                self.total += end - start
            if self.total > _MOST:
                raise ModelError(f"without its weights the model still has more than {_MOST >> 20} MiB", hint="it is no graph to compare")
        return b"".join(parts)

    def __post_init__(self) -> None:
        self._depth: list[str] = []

    def _tensor(self, view: memoryview, base: int) -> bytes:
        spans = list(_spans(view))
        large = [span for span in spans if span[1] == _BYTES and span[0] in (*_PLAIN, *_CODED) and span[4] - span[3] > _SMALL]
        if not large:
            return bytes(view)
        payloads = [span for span in spans if span[0] in (*_PLAIN, *_CODED)]
        if len(payloads) == 1 and large[0][0] in _PLAIN:
            self.places.append(Place(base + large[0][3], large[0][4] - large[0][3], plain=True))
        else:
            self.places.append(Place(base, len(view), plain=False))
        kept = [bytes(view[start:end]) for number, _, start, _, end in spans if number not in (*_PLAIN, *_CODED, _DOC_STRING)]
        return b"".join([*kept, _field(_DOC_STRING, f"{self.mark}:{len(self.places) - 1}".encode())])


def _field(number: int, body: bytes) -> bytes:
    return _encode(number << 3 | _BYTES) + _encode(len(body)) + body


def _encode(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _spans(view: memoryview) -> Iterator[tuple[int, int, int, int, int]]:
    """(field number, wire type, start of the field, start of its payload, end) of each field."""
    at, size = 0, len(view)
    while at < size:
        start = at
        tag, at = read_varint(view, at)
        payload, wire = at, tag & 7
        if wire == _VARINT:
            _, at = read_varint(view, at)
        elif wire == _BYTES:
            length, payload = read_varint(view, at)
            at = payload + length
        elif wire in (_FIXED64, _FIXED32):
            at += 8 if wire == _FIXED64 else 4
        else:
            raise ModelError("it is not an ONNX model: malformed protobuf", hint=_EXPORT_AGAIN)
        if tag >> 3 == 0 or tag >> 32 or at > size:
            raise ModelError("it is not an ONNX model, or it is truncated", hint=_EXPORT_AGAIN)
        yield tag >> 3, wire, start, payload, at
