"""The JSON form of a diff, and its JSON Schema, both made from the dataclasses, so that they can't disagree."""

from __future__ import annotations

import dataclasses
import math
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .model import SCHEMA_VERSION, GraphDiff
from .numbers import CaseNumbers, Numbers

# Verdicts that are worked out from the fields of a record and stand beside them.
_DERIVED: dict[type, dict[str, dict[str, Any]]] = {
    GraphDiff: {"same": {"type": "boolean"}, "ok": {"type": "boolean"}, "moved": {"type": "boolean"}, "exit_code": {"enum": [0, 1, 2]}},
    Numbers: {"ok": {"type": "boolean"}}, CaseNumbers: {"ok": {"type": "boolean"}},
}


def as_json(value: Any) -> Any:
    """Dataclasses as objects, tuples as lists, what is not finite as text (JSON has no spelling for it)."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: as_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return fields | {name: getattr(value, name) for name in _DERIVED.get(type(value), {})}
    if isinstance(value, tuple):
        return [as_json(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of `octavo diff --json`. `version` goes up when a field changes its meaning or goes; new fields may come."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": f"octavo diff, version {SCHEMA_VERSION}", **_schema(GraphDiff)}


def _schema(hint: Any) -> dict[str, Any]:
    origin, arguments = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        hints = get_type_hints(hint)
        names = [field.name for field in dataclasses.fields(hint)]
        derived = next((found for record, found in _DERIVED.items() if record is hint), {})
        return {"type": "object", "properties": {name: _schema(hints[name]) for name in names} | derived, "required": [*names, *derived]}
    if origin in (Union, types.UnionType):
        return {"anyOf": [_schema(argument) for argument in arguments]}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is tuple:
        return {"type": "array", "items": _schema(arguments[0])}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema(arguments[1])}
    if hint is float:
        return {"anyOf": [{"type": "number"}, {"enum": ["inf", "-inf", "nan"]}]}
    return {"type": {int: "integer", str: "string", bool: "boolean", type(None): "null"}[hint]}
