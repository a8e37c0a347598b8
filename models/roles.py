"""Guesses what a plain graph's inputs and outputs are for, from names, types and shapes alone.

Meaning goes first (element type, rank, which dimensions are fixed, what past and present share) and names break the ties: exporters agree
on the former and not on the latter. What fits nothing has the role "other", and a cache that is not complete has no cache roles at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal

from .interface import GraphInterface, GraphPort, Role

Triple = tuple[str, str, Sequence[int | str | None] | None]
Side = Literal["key", "value"]

_DTYPES = {"float": "float32", "double": "float64"}
_FLOATS = ("float32", "float16", "bfloat16", "float64")
_INTS = ("int64", "int32")

# `past_key_values` is the name of the whole cache: its "key" and "values" say nothing about one tensor.
_WHOLE_CACHE = re.compile(r"(past|present)_key_values?|pkv", re.IGNORECASE)
_SIDES: dict[str, Side] = {"key": "key", "keys": "key", "k": "key", "value": "value", "values": "value", "v": "value"}


def dtype_name(name: str) -> str:
    """The NumPy name of an element type in the spelling of onnxruntime ("tensor(float)"), ONNX ("FLOAT") or NumPy."""
    inner = re.fullmatch(r"tensor\((\w+)\)", name)
    plain = (inner[1] if inner else name).lower()
    return _DTYPES.get(plain, plain)


def guess_interface(inputs: Iterable[Triple], outputs: Iterable[Triple]) -> GraphInterface:
    """The interface of a graph whose inputs and outputs are given as (name, element type, shape or None).

    A float output of rank 3 that is the only one, or is named logits, counts as logits unless its name says hidden states: nothing in a
    graph's interface tells a vocabulary from a hidden size.
    """
    into = [_port(triple) for triple in inputs]
    out = [_port(triple) for triple in outputs]
    into, out = _with_cache(_with_token_inputs(into), _with_states(out))
    return GraphInterface(tuple(into), tuple(out))


def _port(triple: Triple) -> GraphPort:
    name, dtype, shape = triple
    return GraphPort(name, dtype_name(dtype), None if shape is None else tuple(_size(size) for size in shape), "other")


def _size(size: int | str | None) -> int | str | None:
    """A fixed size that an exporter wrote as a name: "16"."""
    return int(size) if isinstance(size, str) and size.isdecimal() else size


def _rank(port: GraphPort) -> int | None:
    return None if port.shape is None else len(port.shape)


def _with_token_inputs(ports: list[GraphPort]) -> list[GraphPort]:
    """Roles of the [B, S] inputs. They share type and rank, so names decide; a single unnamed integer one can only be the ids."""
    named: dict[str, Role] = {}
    for port in ports:
        if _rank(port) not in (2, None) or port.dtype not in (*_INTS, "bool"):
            continue
        name = port.name.lower()
        if "mask" in name and "encoder" not in name:
            named[port.name] = "attention_mask"
        elif port.dtype in _INTS and "position" in name:
            named[port.name] = "position_ids"
        elif port.dtype in _INTS and re.search(r"(^|\W)(decoder_)?input_?ids?$|^(tokens?|ids|token_ids)$", name):
            named[port.name] = "input_ids"
    rest = [port for port in ports if port.name not in named and port.dtype in _INTS and _rank(port) == 2]
    if "input_ids" not in named.values() and len(rest) == 1 and "type" not in rest[0].name.lower():
        named[rest[0].name] = "input_ids"
    for role in ("input_ids", "position_ids", "attention_mask"):
        holders = [name for name, held in named.items() if held == role]
        if len(holders) > 1:  # two masks, or positions of two kinds: which is meant can't be told
            named = {name: held for name, held in named.items() if held != role}
    return [replace(port, role=named.get(port.name, "other")) for port in ports]


def _with_states(ports: list[GraphPort]) -> list[GraphPort]:
    """Logits and hidden states among the float outputs of rank 3."""
    flat = [port for port in ports if port.dtype in _FLOATS and _rank(port) in (3, None)]
    hidden = [port for port in flat if "hidden" in port.name.lower()]
    logits = [port for port in flat if "logits" in port.name.lower()]
    if not logits:
        logits = [port for port in flat if port not in hidden and _rank(port) == 3]
    last = [port for port in hidden if "last" in port.name.lower()] or hidden
    roles: dict[str, Role] = {}
    if len(logits) == 1:
        roles[logits[0].name] = "logits"
    if len(last) == 1:
        roles[last[0].name] = "hidden"
    return [replace(port, role=roles.get(port.name, "other")) for port in ports]


def _with_cache(into: list[GraphPort], out: list[GraphPort]) -> tuple[list[GraphPort], list[GraphPort]]:
    """Past inputs and present outputs, layer by layer. All of a cache is recognised or none."""
    pasts = _by_name(port for port in into if _is_past(port))
    candidates = [port for port in out if port.dtype in _FLOATS and _rank(port) in (4, None) and port.role == "other"]
    presents = _by_name(candidates)
    if pasts and len(candidates) == len(pasts) and not any(_slot(port.name) for port in candidates):
        # Names that say nothing (dynamo's, when the user gave none): outputs come in the order in which the pasts went in.
        order = [slot for port in into for slot, past in pasts.items() if past is port]
        presents = dict(zip(order, candidates))
    if pasts and (set(pasts) != set(presents) or not all(_same_heads(pasts[slot], presents[slot]) for slot in pasts)):
        return into, out
    if not pasts and any(port.dtype in _FLOATS and _rank(port) not in (0, 1, 2) for port in into):
        return into, out  # a float input that could be a past of another form: its presents would be half a cache
    return _assigned(into, pasts, "past"), _assigned(out, presents, "present")


def _is_past(port: GraphPort) -> bool:
    """A float [B, G, past, D]: heads and head size fixed, past not. Another layout (past before heads, rank 3 or 5) is not a cache here."""
    if port.shape is None or len(port.shape) != 4 or port.dtype not in _FLOATS:
        return False
    return isinstance(port.shape[1], int) and not isinstance(port.shape[2], int) and isinstance(port.shape[3], int)


def _by_name(ports: Iterable[GraphPort]) -> dict[tuple[Side, int], GraphPort]:
    """Ports by side and layer; empty unless every layer has both sides exactly once. Ports whose names say neither are left out."""
    found: dict[tuple[Side, int], GraphPort] = {}
    for port in ports:
        slot = _slot(port.name)
        if slot is None:
            continue
        if slot in found:
            return {}
        found[slot] = port
    if {layer for side, layer in found if side == "key"} != {layer for side, layer in found if side == "value"}:
        return {}
    return found


def _slot(name: str) -> tuple[Side, int] | None:
    """Side and layer that a name spells: past_key_values.3.key, past_key_3, past_3_key, past_key_values_key_cache_3, pkv.3.key, …"""
    tokens = re.findall(r"[a-z]+|\d+", _WHOLE_CACHE.sub(" ", name.lower()))
    sides = {_SIDES[token] for token in tokens if token in _SIDES}
    numbers = [int(token) for token in tokens if token.isdigit()]
    # An encoder's keys belong to cross attention: they don't grow, so they are no cache in this sense.
    if len(sides) != 1 or len(numbers) != 1 or "encoder" in tokens or "cross" in tokens:
        return None
    return sides.pop(), numbers[0]


def _same_heads(past: GraphPort, present: GraphPort) -> bool:
    """Type, heads and head size agree, as far as the present's shape is known."""
    if past.dtype != present.dtype:
        return False
    if past.shape is None or present.shape is None:
        return True
    return all(not isinstance(present.shape[axis], int) or present.shape[axis] == past.shape[axis] for axis in (1, 3))


def _assigned(ports: list[GraphPort], slots: dict[tuple[Side, int], GraphPort], when: Literal["past", "present"]) -> list[GraphPort]:
    roles: dict[tuple[str, Side], Role] = {
        ("past", "key"): "past_key", ("past", "value"): "past_value",
        ("present", "key"): "present_key", ("present", "value"): "present_value",
    }
    places = {port.name: slot for slot, port in slots.items()}
    return [
        replace(port, role=roles[when, places[port.name][0]], layer=places[port.name][1]) if port.name in places else port for port in ports
    ]
