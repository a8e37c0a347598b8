"""Sessions and sequences: a sequence is a value that grows, forks and shrinks; a session is a scope of sequences.

Operations on one sequence serialise; different sequences can be driven from different threads, and their work shares steps.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import CapacityError, OptionError, RequestError
from ..models.runner import Ids, Rows
from .executor import Logits
from .named import NamedSessions
from .plan import SequenceState
from .prompt import check_ids
from .request import AppendRequest
from .results import Result
from .sampling import SamplingParams
from .saved import SavedSequence, read_sequence, write_sequence
from .stream import PieceStream

if TYPE_CHECKING:
    from .engine import Engine
    from .model import Model


class Session:
    """A scope of independent sequences; closing it closes them. Made by `model.begin_session()`.

    A named one keeps its sequences until they are closed, and closing the session writes them to disk: whoever begins it again has them back.
    """

    def __init__(self, model: Model, name: str | None = None, store: NamedSessions | None = None) -> None:
        self._model, self._name, self._store = model, name, store
        self._lock = threading.Lock()       # of the two that follow
        self._sequences: weakref.WeakSet[Sequence] = weakref.WeakSet()
        self._kept: list[Sequence] = []     # of a named session, in the order in which they were made
        self._closed = False
        if name is not None:
            assert store is not None
            store.claim(name)
            self._release = weakref.finalize(self, store.release, name)
            try:
                for saved in store.load(name, model.fingerprint):
                    self._restore(saved)
            except BaseException:
                self._discard()
                raise

    @property
    def name(self) -> str | None:
        return self._name

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        """The open sequences of a named session, in the order in which they were made. An unnamed one does not keep them."""
        return tuple(sequence for sequence in self._kept if not sequence.closed)

    def new_sequence(self, *, priority: int = 0, salt: str | None = None) -> Sequence:
        """An empty sequence. Its work comes before that of lower `priority`; it shares cached prefixes with sequences of the same `salt` alone."""
        self._check_open()
        check_salt(salt)
        check_priority(priority)
        engine = self._model.engine
        with engine.turn:
            engine.collect_dropped()
            state = engine.executor.open(salt)
            state.priority = priority
            return self._adopt(state)

    def restore(self, path: str | os.PathLike[str]) -> Sequence:
        """The sequence that `Sequence.save` wrote to the file `path`, with the same bits. What is not cached there is computed with the next append.

        Raises SavedSequenceError (damaged, another version, another model), CapacityError (no room for it).
        """
        self._check_open()
        return self._restore(read_sequence(path, self._model.fingerprint))

    def _restore(self, saved: SavedSequence) -> Sequence:
        engine = self._model.engine
        tokens = check_ids(saved.tokens, engine.executor.vocab_size) if saved.tokens else []
        check_length(engine, len(tokens))
        with engine.turn:
            engine.collect_dropped()
            state = engine.executor.open(saved.scope)
            state.tokens.extend(tokens)
            try:
                engine.restore(state, saved.cache)
                engine.rest(state)
            except BaseException:
                engine.release(state)
                raise
            return self._adopt(state)

    def append_batch(self, work: Iterable[tuple[Sequence, Ids]], *, rows: Rows = "last") -> list[Logits]:
        """Appends to several different sequences, in shared steps where the kind can. All of them or none (but see StepError).

        Returns each one's logits as `Sequence.append` does. Where a step fails, the sequences it fails for are as before, the others have
        grown, and StepError is raised.
        """
        self._check_open()
        try:
            work = [(sequence, ids) for sequence, ids in work]
        except (TypeError, ValueError):
            raise RequestError("append_batch takes pairs of a sequence and its token ids") from None
        sequences = [sequence for sequence, _ in work]
        if any(not isinstance(sequence, Sequence) or sequence._model is not self._model for sequence in sequences):
            # Another model's blocks mean nothing here, and would be written all the same.
            raise RequestError("append_batch takes sequences of its own model", hint="make them with new_sequence() of this model's sessions")
        if len({id(sequence) for sequence in sequences}) != len(sequences):
            raise RequestError("a sequence is given twice", hint="append its tokens in one go")
        with ExitStack() as stack:
            # In one order for everyone, so that two batches over the same sequences can't wait for each other.
            for sequence in sorted(sequences, key=id):
                stack.enter_context(sequence._held())
            return append(self._model.engine, [(sequence._state, ids) for sequence, ids in work], rows)

    def close(self) -> None:
        """Closes every sequence; those of a named session are written to disk first. Closing twice is fine.

        SavedSequenceError where they can't be written: the session is then open as before.
        """
        if self._closed:
            return
        if self._name is not None:
            assert self._store is not None
            for sequence in self.sequences:
                sequence.end_stream()
            self._store.store(self._name, [sequence._saved() for sequence in self.sequences])
        self._discard()

    def _discard(self) -> None:
        with self._lock:
            self._closed = True
            sequences = list(self._sequences)
        for sequence in sequences:
            sequence.close()
        self._kept.clear()
        if self._name is not None:
            self._release()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _adopt(self, state: SequenceState) -> Sequence:
        sequence = Sequence(self, self._model, state)
        with self._lock:
            if self._closed:    # by another thread; the sequence is freed as it is dropped
                raise _closed_error()
            self._sequences.add(sequence)
            if self._name is not None:
                self._kept = [*self.sequences, sequence]
        return sequence

    def _check_open(self) -> None:
        self._model.check_open()
        if self._closed:
            raise _closed_error()


class Sequence:
    """Tokens and what the model has cached of them. Dropping the last reference frees it, as `close` does."""

    def __init__(self, session: Session, model: Model, state: SequenceState) -> None:
        self._session, self._model, self._state = session, model, state
        self._lock = threading.RLock()
        self._stream: weakref.ref[PieceStream] | None = None
        self._finalizer = weakref.finalize(self, _drop, model.engine, state)
        self._finalizer.atexit = False

    @property
    def tokens(self) -> tuple[int, ...]:
        """The token ids so far: appended and generated."""
        return tuple(self._state.tokens)

    @property
    def closed(self) -> bool:
        return not self._finalizer.alive

    def __len__(self) -> int:
        return len(self._state.tokens)

    def append(self, token_ids: Ids, *, rows: Rows = "last") -> Logits:
        """Appends tokens and returns float32 logits: of the last one, (1, V), or with rows="all" of each, (len(token_ids), V).

        Raises RequestError (no tokens, an id out of range, a closed sequence), CapacityError (beyond the model's context or the memory),
        StepError (a kernel failed); the sequence is as before then.
        """
        with self._held():
            return append(self._model.engine, [(self._state, token_ids)], rows)[0]

    def fork(self) -> Sequence:
        """A second sequence with the same tokens. Nothing is copied until one of them writes."""
        with self._held():
            engine = self._model.engine
            with engine.turn:
                state = engine.fork(self._state)
                engine.rest(state)
                return self._session._adopt(state)

    def truncate(self, length: int) -> None:
        """Keeps the first `length` tokens; RequestError where there are fewer."""
        with self._held():
            if not isinstance(length, int | np.integer) or isinstance(length, bool) or not 0 <= length <= len(self):
                raise RequestError(f"can't truncate {len(self)} tokens to {length!r}")
            engine = self._model.engine
            with engine.turn:
                engine.executor.truncate(self._state, int(length))
                del self._state.tokens[int(length) :]

    def reset(self) -> None:
        """Back to the empty sequence."""
        self.truncate(0)

    def generate(self, params: SamplingParams | None = None, *, deadline: float | None = None) -> Result:
        """Goes on from where the sequence is, and keeps what it generates. RequestError on an empty sequence, or with n > 1.

        deadline: seconds from now; what has not ended then ends with finish_reason "error".
        """
        with self._held():
            engine = self._model.engine
            generation = self._model.begin_generation(self._state, self._params(params), deadline, streamed=False)
            try:
                engine.run(generation.requests, lambda: generation.done)
                return generation.result()
            except BaseException:
                engine.cancel_soon(generation.requests)
                raise

    def stream(self, params: SamplingParams | None = None, *, deadline: float | None = None) -> PieceStream:
        """Like `generate`, piece by piece. Until the stream has ended or is closed, the sequence can do nothing else."""
        with self._held():
            engine = self._model.engine
            generation = self._model.begin_generation(self._state, self._params(params), deadline, streamed=True)
            try:
                stream = PieceStream(engine, generation, owner=self)
                self._stream = weakref.ref(stream)
                return stream
            except BaseException:
                engine.cancel_soon(generation.requests)
                raise

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes tokens and cache to the file `path`, in one go: it is as it was where that fails (SavedSequenceError)."""
        write_sequence(path, self._saved())

    def _saved(self) -> SavedSequence:
        with self._held():
            engine, state = self._model.engine, self._state
            with engine.turn:
                cache = engine.executor.save(state)
            return SavedSequence(self._model.fingerprint, state.scope, tuple(state.tokens), cache)

    def end_stream(self) -> None:
        """Closes the stream that the sequence may have; what it generated so far is kept."""
        with self._lock:
            if self._stream is not None and (stream := self._stream()) is not None:
                stream.close()

    def close(self) -> None:
        """Frees what the sequence holds. Closing twice is fine."""
        with self._lock:
            self.end_stream()
            if self._finalizer.detach():
                engine = self._model.engine
                with engine.turn:
                    engine.collect_dropped()
                    engine.release(self._state)

    def _params(self, params: SamplingParams | None) -> SamplingParams:
        params = self._model.default_params if params is None else params
        if not isinstance(params, SamplingParams):
            raise OptionError(f"params is a {type(params).__name__}, not SamplingParams")
        if params.num_completions > 1 or params.prompt_logprobs is not None:
            what = "n > 1" if params.num_completions > 1 else "prompt_logprobs"
            hint = "fork() the sequence for several; append(rows='all') gives a prompt's logits"
            raise RequestError(f"a sequence has no {what}", hint=hint)
        return params

    @contextmanager
    def _held(self) -> Iterator[None]:
        """One operation at a time: waits for the one before."""
        with self._lock:
            self._model.check_open()
            if not self._finalizer.alive:
                raise RequestError("the sequence is closed", hint="make another with session.new_sequence()")
            if self._stream is not None:
                if (stream := self._stream()) is None:
                    with self._model.engine.turn:
                        # A stream that was dropped: the step that runs now may be its last, and no token may come after this.
                        self._model.engine.collect_dropped()
                    self._stream = None
                elif not stream.ended:
                    raise RequestError("the sequence is being streamed", hint="read the stream to its end, or close() it")
            yield


def append(engine: Engine, work: list[tuple[SequenceState, Any]], rows: Rows) -> list[Logits]:
    """Appends to several sequences at once; on an error those that failed are as before."""
    if rows not in ("last", "all"):
        raise RequestError(f'rows={rows!r} is neither "last" nor "all"')
    executor = engine.executor
    checked = [(state, check_ids(ids, executor.vocab_size)) for state, ids in work]
    for state, ids in checked:
        check_length(engine, len(state.tokens) + len(ids))
    requests = [
        AppendRequest(state, len(state.tokens) + (0 if rows == "all" else len(ids) - 1), length_before=len(state.tokens))
        for state, ids in checked
    ]
    engine.let_the_overdue_in()
    try:
        with engine.turn:
            for state, ids in checked:
                state.tokens.extend(ids)
            engine.submit(requests)
        engine.run(requests)
    except BaseException:
        engine.cancel_soon(requests)    # refused or interrupted, even before they were queued
        raise
    for request in requests:
        if request.error is not None:
            raise request.error
    return [request.logits for request in requests]


def _closed_error() -> RequestError:
    return RequestError("the session is closed", hint="begin another with model.begin_session()")


def check_priority(priority: int) -> None:
    """OptionError where it is none."""
    if not isinstance(priority, int) or isinstance(priority, bool) or abs(priority) > 2**31:
        raise OptionError(f"priority={priority!r} is not a whole number", hint="higher comes first; 0 is usual")


def check_salt(salt: str | None) -> None:
    """OptionError where it is none."""
    if salt is not None and not isinstance(salt, str):
        raise OptionError(f"salt={salt!r} is not a text")


def check_length(engine: Engine, length: int) -> None:
    """CapacityError where no sequence can have `length` tokens."""
    executor = engine.executor
    if executor.max_context is not None and length > executor.max_context:
        message = f"{length} tokens are more than the model's context of {executor.max_context}"
        raise CapacityError(message, hint="shorten the prompt, or truncate()")
    if executor.max_cached is not None and length > executor.max_cached:
        stats = executor.stats()
        raise CapacityError(
            f"{length} tokens never fit the pool: {stats['blocks_total']} blocks hold {executor.max_cached} tokens",
            hint="load the model with more memory=",
        )


def _drop(engine: Engine, state: SequenceState) -> None:
    """A finalizer: it may run in the middle of a step, so it only leaves a note."""
    engine.drop(lambda: engine.release(state))
