"""From a TensorProto, wherever its bytes lie, to the `Tensor` of the canonical graph: small ones by value, others by content hash."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from ...errors import ModelError
from ...models.external_data import check_entry, entry_from_pairs
from .graph import BITS, Tensor
from .hashing import Hasher, digest_of
from .skeleton import Place, Skeleton

# Tensors up to this size stand in the text by value: axes, shapes, scalars.
INLINE = 16
UNREAD = "unread"
_MOST_TEXT = 200   # characters of a value that is still readable on a line
_EXPORT_AGAIN = "export the model again, or load and save it with a current onnx package"
_NAMES = {
    number: {"FLOAT": "float32", "DOUBLE": "float64"}.get(name, name.lower()) for name, number in onnx.TensorProto.DataType.items()
}


def dtype_name(number: int) -> str:
    """The name of an element type of onnx.proto; ModelError for a number that is none."""
    if number not in _NAMES or number == onnx.TensorProto.UNDEFINED:
        raise ModelError(f"element type {number} is not one of ONNX's", hint=_EXPORT_AGAIN)
    return _NAMES[number]


def name_of(value: str | bytes) -> str:
    """A name out of a proto, which gives bytes where it is not UTF-8."""
    if isinstance(value, bytes):
        raise ModelError(f"it is not an ONNX model: the name {value[:40]!r} is not UTF-8", hint=_EXPORT_AGAIN)
    return value


@dataclass(frozen=True)
class Constants:
    """Reads the tensors of one model. `path` is the model's file, resolved. Without `weights` large tensors are told by their type alone."""

    path: Path
    skeleton: Skeleton
    hasher: Hasher
    weights: bool = True

    def tensor(self, proto: onnx.TensorProto) -> Tensor:
        """The tensor as the diff sees it. ModelError where its bytes are not those that its type and shape need."""
        dtype, shape = dtype_name(proto.data_type), tuple(proto.dims)
        if any(size < 0 for size in shape) or proto.HasField("segment"):
            raise ModelError(f"tensor {proto.name!r} has no valid shape: {list(shape)}", hint=_EXPORT_AGAIN)
        if dtype == "string":
            return Tensor(dtype, shape, _strings(self._whole(proto), prod(shape)))
        nbytes = (prod(shape) * BITS[dtype] + 7) // 8
        if not self.weights and (prod(shape) > INLINE or proto.external_data):
            return Tensor(dtype, shape, UNREAD)
        where = self._where(proto, nbytes)
        if prod(shape) <= INLINE:
            data = self._bytes(proto) if where is None else self.hasher.read(*where)
            _expect(proto, len(data), nbytes)
            text = _values(dtype, shape, data)
            return Tensor(dtype, shape, text or digest_of([data]))
        if where is not None:
            return Tensor(dtype, shape, self.hasher.digest(*where))
        data = self._bytes(proto)
        _expect(proto, len(data), nbytes)
        return Tensor(dtype, shape, digest_of([data]))

    def _where(self, proto: onnx.TensorProto, nbytes: int) -> tuple[Path, int, int] | None:
        """(file, offset, length) of the tensor's own bytes; None where they have to be decoded."""
        if proto.data_location == onnx.TensorProto.EXTERNAL or proto.external_data:
            entry = entry_from_pairs(name_of(proto.name), [(name_of(pair.key), name_of(pair.value)) for pair in proto.external_data])
            _expect(proto, nbytes if entry.length is None else entry.length, nbytes)
            file = check_entry(type(entry)(entry.tensor, entry.location, entry.offset, nbytes), self.path.parent)
            return file, entry.offset, nbytes
        place = self.skeleton.place(proto)
        if place is None or not place.plain:
            return None
        _expect(proto, place.length, nbytes)
        return self.path, place.offset, place.length

    def _whole(self, proto: onnx.TensorProto) -> onnx.TensorProto:
        place: Place | None = self.skeleton.place(proto)
        if place is None:
            return proto
        return onnx.TensorProto.FromString(self.hasher.read(self.path, place.offset, place.length))

    def _bytes(self, proto: onnx.TensorProto) -> bytes:
        whole = self._whole(proto)
        if whole.HasField("raw_data"):
            return bytes(whole.raw_data)
        from onnx_ir.serde import deserialize_tensor  # a second's import, for what few files have

        try:
            return bytes(deserialize_tensor(whole).tobytes())
        except Exception as error:  # NumPy and onnx_ir raise whatever a malformed tensor leads them into
            raise ModelError(f"tensor {proto.name!r} is malformed: {error}", hint=_EXPORT_AGAIN) from error


def _expect(proto: onnx.TensorProto, has: int, needs: int) -> None:
    if has != needs:
        raise ModelError(f"tensor {proto.name!r} needs {needs} bytes and has {has}", hint=_EXPORT_AGAIN)


def _values(dtype: str, shape: tuple[int, ...], data: bytes) -> str:
    """`{…}` in row order; empty where values can't be told apart by their text (NaNs)."""
    number = next(n for n, name in _NAMES.items() if name == dtype)
    array: Any = onnx.numpy_helper.to_array(onnx.TensorProto(dims=shape, data_type=number, raw_data=data)).reshape(-1)
    if array.dtype.kind == "b":
        return "" if set(data) - {0, 1} else _braces(str(value).lower() for value in array.tolist())
    if array.dtype.kind in "iu":
        return _braces(map(str, array.tolist()))
    if dtype in ("int4", "uint4", "int2", "uint2"):
        return _braces(str(int(value)) for value in array)
    if array.dtype.kind == "c":
        return ""
    wide = array if dtype in ("float32", "float64") else array.astype(np.float32)
    return "" if np.isnan(wide.astype(np.float64)).any() else _braces(map(str, wide))


def _braces(values: Any) -> str:
    return "{" + ", ".join(values) + "}"


def _strings(proto: onnx.TensorProto, count: int) -> str:
    if len(proto.string_data) != count:
        raise ModelError(f"tensor {proto.name!r} needs {count} strings and has {len(proto.string_data)}", hint=_EXPORT_AGAIN)
    try:
        text = _braces(json.dumps(value.decode(), ensure_ascii=False) for value in proto.string_data)
    except UnicodeDecodeError:
        text = " " * _MOST_TEXT
    if count <= INLINE and len(text) < _MOST_TEXT and text.isprintable():
        return text
    return digest_of(part for value in proto.string_data for part in (len(value).to_bytes(8, "little"), value))
