"""Reads a GGUF file's metadata and tensor table, with every length checked against the file before it is used.

The `gguf` package knows the tensor types and how to dequantize them; its reader trusts the lengths it finds, so ours stands here.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..errors import ModelError
from .external_data import model_file

Value = TypeVar("Value", int, float, str, bool, list)

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_BROKEN = "the file is truncated or corrupt: download or convert it again"


@dataclass(frozen=True)
class GgufTensor:
    """A tensor as stored: ggml's name of its type ("Q4_1"), its shape in NumPy's order, its bytes [rows, bytes of a row], mapped."""

    name: str
    type: str
    shape: tuple[int, ...]
    data: NDArray[np.uint8]


class GgufFile:
    """A GGUF file: `metadata` by key, `tensors` by name. Raises ModelError for what is no GGUF file, truncated, or corrupt."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path: Path = model_file(path)
        self._bytes = np.memmap(self.path, mode="r", dtype=np.uint8)
        self._at = 0
        if bytes(self._bytes[:4]) != b"GGUF":
            raise ModelError(f"{self.path} is not a GGUF file", hint="give a .gguf file, or an .onnx file to compile")
        self._at = 4
        version = self._scalar("I")
        if version not in _VERSIONS:
            # A big-endian file shows as a huge version.
            raise ModelError(f"{self.path} has GGUF version {version}; versions 2 and 3, little-endian, are read", hint="convert it again")
        tensors, pairs = self._scalar("Q"), self._scalar("Q")
        self.metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = self._string()
            if key in self.metadata:
                raise self._error(f"the key {key!r} is given twice")
            self.metadata[key] = self._value(self._scalar("I"))
        self.tensors = self._tensor_table(tensors)

    def get(self, key: str, kind: type[Value], default: Value | None = None) -> Value:
        """The metadata value at `key`; `default` where it is missing (None: it must be there). An integer serves as a float."""
        value = self.metadata.get(key, default)
        if value is None:
            raise ModelError(f"{self.path} has no metadata key {key!r}", hint="convert the model again with a current converter")
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise ModelError(f"{self.path}: metadata key {key!r} holds {value!r:.60}, which is no {kind.__name__}", hint=_BROKEN)
        return value

    def _tensor_table(self, count: int) -> dict[str, GgufTensor]:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        entries: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(count):
            name, rank = self._string(), self._scalar("I")
            if name in entries or not 1 <= rank <= 4:
                raise self._error(f"the table entry of tensor {name!r} is malformed")
            shape = tuple(self._scalar("Q") for _ in range(rank))[::-1]
            entries[name] = (shape, self._scalar("I"), self._scalar("Q"))
        alignment = self.get("general.alignment", int, 32)
        if alignment < 1 or alignment & (alignment - 1):
            raise self._error(f"the alignment {alignment} is no power of two")
        start = -(-self._at // alignment) * alignment
        tensors = {}
        for name, (shape, number, offset) in entries.items():
            try:
                kind = GGMLQuantizationType(number)
            except ValueError:
                message = f"{self.path}: tensor {name!r} has type {number}, which the installed gguf package does not know"
                raise ModelError(message, hint="upgrade gguf, or convert the model to another type") from None
            block, size = GGML_QUANT_SIZES[kind]
            if shape[-1] % block:
                raise self._error(f"tensor {name!r} has rows of {shape[-1]}, which {kind.name} can't hold")
            row, rows = shape[-1] // block * size, math.prod(shape[:-1])
            begin, end = start + offset, start + offset + row * rows
            if end > len(self._bytes):
                raise self._error(f"tensor {name!r} ends at byte {end}, the file has {len(self._bytes)}")
            tensors[name] = GgufTensor(name, kind.name, shape, self._bytes[begin:end].reshape(rows, row))
        return tensors

    def _error(self, what: str) -> ModelError:
        return ModelError(f"{self.path}: {what}", hint=_BROKEN)

    def _take(self, size: int) -> bytes:
        if size > len(self._bytes) - self._at:
            raise self._error(f"it ends at byte {len(self._bytes)}, inside its header")
        taken = self._bytes[self._at : self._at + size].tobytes()
        self._at += size
        return taken

    def _scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))[0]

    def _string(self) -> str:
        try:
            return self._take(self._scalar("Q")).decode("utf-8")
        except UnicodeDecodeError:
            raise self._error("a string is not UTF-8") from None

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind != _ARRAY:
            raise self._error(f"a metadata value has the unknown type {kind}")
        item, length = self._scalar("I"), self._scalar("Q")
        if item in _SCALARS:
            size = struct.calcsize("<" + _SCALARS[item])
            if length > len(self._bytes) // size:
                raise self._error("an array is longer than the file")
            return list(struct.unpack(f"<{length}{_SCALARS[item]}", self._take(size * length)))
        if item != _STRING:
            raise self._error("a metadata array holds neither numbers nor strings")
        return [self._string() for _ in range(length)]
