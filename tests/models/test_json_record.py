"""The strict reader gives back what asdict wrote and refuses everything else."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from octavo.models.json_record import SchemaError, read_record


@dataclass(frozen=True)
class Inner:
    size: int
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outer:
    kind: Literal["a", "b"]
    ratio: float
    flag: bool
    inner: Inner | None
    shape: tuple[int | str | None, ...]
    table: dict[str, Inner] = field(default_factory=dict)
    anything: Any = None


INNERS = st.builds(Inner, size=st.integers(), names=st.lists(st.text()).map(tuple))
OUTERS = st.builds(
    Outer, kind=st.sampled_from("ab"), ratio=st.floats(allow_nan=False), flag=st.booleans(), inner=st.none() | INNERS,
    shape=st.lists(st.none() | st.integers() | st.text()).map(tuple), table=st.dictionaries(st.text(), INNERS),
    anything=st.none() | st.lists(st.integers()),
)


@given(record=OUTERS)
def test_what_was_written_is_read(record: Outer) -> None:
    assert read_record(Outer, json.loads(json.dumps(asdict(record))), "r") == record


GOOD = {"kind": "a", "ratio": 1, "flag": True, "inner": None, "shape": []}


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"kind": "c"}, r"r\.kind"), ({"kind": ["a"]}, r"r\.kind"), ({"ratio": "1"}, r"r\.ratio"), ({"ratio": True}, r"r\.ratio"),
        ({"flag": 1}, r"r\.flag"), ({"inner": {}}, r"r\.inner has no key 'size'"), ({"inner": {"size": 1.0}}, r"r\.inner\.size"),
        ({"inner": {"size": 1, "more": 2}}, r"unknown key 'more'"), ({"shape": {}}, r"r\.shape"), ({"shape": [1.5]}, r"r\.shape\[0\]"),
        ({"shape": None}, r"r\.shape"), ({"table": {"x": 1}}, r"r\.table\['x'\]"), ({"more": 1}, "unknown key 'more'"),
    ],
)
def test_another_type_is_refused_at_its_place(change: dict[str, Any], place: str) -> None:
    assert read_record(Outer, GOOD, "r").ratio == 1.0
    with pytest.raises(SchemaError, match=place):
        read_record(Outer, {**GOOD, **change}, "r")


@pytest.mark.parametrize("name", GOOD)
def test_a_missing_key_is_refused(name: str) -> None:
    with pytest.raises(SchemaError, match=f"no key '{name}'"):
        read_record(Outer, {key: value for key, value in GOOD.items() if key != name}, "r")
