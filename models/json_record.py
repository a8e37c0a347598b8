"""Reads JSON into frozen dataclasses, strictly: a key too many or too few, or a value of another type, is an error that names its place."""

from __future__ import annotations

import dataclasses
import types
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Record = TypeVar("Record")


class SchemaError(ValueError):
    """The data does not have the form that the dataclass declares. The message names the place."""


def read_record(record: type[Record], data: object, where: str) -> Record:
    """`data` (as json.loads gives it) as an instance of the dataclass `record`; `where` begins the place named in a SchemaError.

    Understands int, float, str, bool, None, Any, Literal, unions, tuple[X, ...], dict[str, X] and dataclasses. Fields with a default
    may be missing.
    """
    if not isinstance(data, dict):
        raise SchemaError(f"{where} is not an object")
    fields = {field.name: field for field in dataclasses.fields(record)}  # type: ignore[arg-type]
    if unknown := sorted(set(data) - set(fields)):
        raise SchemaError(f"{where} has an unknown key {unknown[0]!r}")
    for name, field in fields.items():
        if name not in data and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise SchemaError(f"{where} has no key {name!r}")
    hints = _hints(record)  # type: ignore[arg-type]
    return record(**{name: _read(hints[name], value, f"{where}.{name}") for name, value in data.items()})


@cache
def _hints(record: type[Any]) -> dict[str, Any]:
    return get_type_hints(record)


def _read(hint: Any, data: object, where: str) -> Any:
    """`data` as a value of the type `hint`."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return data
    if dataclasses.is_dataclass(hint):
        return read_record(hint, data, where)  # type: ignore[arg-type]
    if origin in (Union, types.UnionType):
        return _read_union(arguments, data, where)
    if origin is Literal and any(data == value and type(data) is type(value) for value in arguments):
        return data
    if origin is tuple and isinstance(data, list):
        return tuple(_read(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(data))
    if origin is dict and isinstance(data, dict):
        return {key: _read(arguments[1], value, f"{where}[{key!r}]") for key, value in data.items()}
    if hint is float and type(data) is int:
        return float(data)
    # type() and not isinstance: True is an int, and no size.
    if origin is None and type(data) is hint:
        return data
    raise SchemaError(f"{where} is {data!r}, which is no {getattr(hint, '__name__', hint)}"[:300])


def _read_union(members: tuple[Any, ...], data: object, where: str) -> Any:
    if data is None and type(None) in members:
        return None
    errors = []
    for member in members:
        if member is not type(None):
            try:
                return _read(member, data, where)
            except SchemaError as error:
                errors.append(error)
    raise errors[0]
