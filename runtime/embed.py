"""Vectors of texts: an encoder's last states, or a decoder's where its graph gives them, pooled over each text's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ..errors import OptionError, RequestError, UnsupportedError
from ..models.interface import GraphInterface, GraphPort
from .executor import step_error

Pooling = Literal["mean", "cls", "last"]

# Rows of one run. Beyond a few hundred tokens a longer batch is no faster, and padding costs more.
_ROWS = 16

_FLOATS = ("float32", "float16", "float64")


class Embedder:
    """Drives a graph with a `hidden` output. UnsupportedError, with the reason, where a graph gives no states or takes unknown inputs."""

    def __init__(self, session: ort.InferenceSession, interface: GraphInterface) -> None:
        self._session = session
        hidden, ids = interface.output("hidden"), interface.input("input_ids")
        hint = "compile with kv_cache=False a graph whose output is named last_hidden_state; model.run feeds any graph by name"
        if hidden is None or ids is None or hidden.dtype not in _FLOATS:
            what = "token ids" if ids is None else "last hidden states"
            raise UnsupportedError(f"the graph has no {what} to make a vector from", hint=hint)
        self._hidden, self._inputs = hidden, interface.inputs
        strange = next((port for port in self._inputs if not _is_fed(port)), None)
        if strange is not None:
            raise UnsupportedError(f"nothing tells what to feed to the graph's input {strange.name!r}", hint="model.run feeds inputs by name")
        self._masked = interface.input("attention_mask") is not None
        self._rows = 1 if ids.shape and ids.shape[0] == 1 else _ROWS
        self._length = ids.shape[1] if ids.shape and len(ids.shape) == 2 and isinstance(ids.shape[1], int) else None

    def embed(self, texts: Sequence[Sequence[int]], pooling: Pooling) -> NDArray[np.float32]:
        """float32 [N, K] of N lists of token ids. Texts of a run are padded on the right where the graph takes a mask, else of one length."""
        if pooling not in get_args(Pooling):
            raise OptionError(f"pooling={pooling!r} is not one of {', '.join(map(repr, get_args(Pooling)))}")
        vectors: dict[int, NDArray[np.float32]] = {}
        for batch in self._batches(texts):
            states = self._states([texts[index] for index in batch])
            for index, rows in zip(batch, states):
                vectors[index] = _pooled(rows[: len(texts[index])], pooling)
        return np.stack([vectors[index] for index in range(len(texts))])

    def _batches(self, texts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Places of texts that run together: neighbours in length, so that little is padded."""
        batches: list[list[int]] = []
        for index in sorted(range(len(texts)), key=lambda i: len(texts[i])):
            last = batches[-1] if batches else None
            fits = last is not None and len(last) < self._rows and (self._masked or len(texts[last[0]]) == len(texts[index]))
            if fits and last is not None:
                last.append(index)
            else:
                batches.append([index])
        return batches

    def _states(self, texts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """[B, S, K]."""
        longest = max(map(len, texts))
        length = self._length or longest
        if longest > length or (longest < length and not self._masked):
            raise RequestError(f"{longest} tokens don't fit a graph of {length}", hint="export it with a free sequence length")
        ids, mask = np.zeros((len(texts), length), np.int64), np.zeros((len(texts), length), np.int64)
        for row, text in enumerate(texts):
            ids[row, : len(text)], mask[row, : len(text)] = text, 1
        try:
            states = self._session.run([self._hidden.name], {port.name: _feed(port, ids, mask) for port in self._inputs})[0]
        except Exception as error:
            if type(error).__name__ == "InvalidArgument":
                raise RequestError(f"the tokens don't fit the graph: {str(error).strip()}", hint="is it another model's tokenizer?") from error
            raise step_error(error) from error
        if states.shape[:2] != ids.shape:
            raise UnsupportedError(f"{self._hidden.name} of {states.shape} has no row for each of {ids.shape} tokens")
        return states.astype(np.float32)


def _is_fed(port: GraphPort) -> bool:
    if port.role in ("past_key", "past_value"):
        return port.shape is not None and isinstance(port.shape[1], int) and isinstance(port.shape[3], int)
    return port.role in ("input_ids", "attention_mask", "position_ids") or "token_type" in port.name.lower()


def _feed(port: GraphPort, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[Any]:
    if port.role in ("past_key", "past_value"):
        assert port.shape is not None, "found to be fed"
        return np.zeros((len(ids), port.shape[1], 0, port.shape[3]), port.dtype)  # type: ignore[arg-type]
    values = {"input_ids": ids, "attention_mask": mask, "position_ids": np.broadcast_to(np.arange(ids.shape[1]), ids.shape)}
    found = values.get(port.role)
    return np.zeros(ids.shape, port.dtype) if found is None else found.astype(port.dtype)


def _pooled(states: NDArray[np.float32], pooling: Pooling) -> NDArray[np.float32]:
    """One vector of a text's states [S, K]."""
    if pooling == "mean":
        return states.mean(axis=0, dtype=np.float32)
    return states[0 if pooling == "cls" else -1]
