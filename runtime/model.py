"""A loaded model: what users hold. It turns what they give into requests, and hands the engine's answers back."""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ..errors import CapacityError, OptionError, RequestError, SavedSequenceError, UnsupportedError
from ..models.decision import Decision
from ..models.interface import GraphInterface
from ..models.runner import Ids
from ..models.spec import Kind
from .bfloat16 import run_named
from .decisions import DecisionLog
from .embed import Embedder, Pooling
from .engine import Engine
from .executor import Executor, step_error
from .named import NamedSessions
from .pace import Policy
from .plan import SequenceState
from .prompt import as_prompts, encode_prompt
from .request import GenerateRequest, Generation
from .results import Result
from .sampling import SamplingParams
from .session import Session, check_length, check_priority, check_salt
from .stream import PieceStream
from .text import TextStream
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from .astream import AsyncPieceStream

# Ids are held against the table by the graph that has it.
_ANY_ID = 1 << 31


class Model:
    """Made by `octavo.load`. Safe from several threads. `tokenizer` is None where no tokenizer.json lies beside the model; its files are read at
    first use, and ModelError is raised by what needs one that can't be read.
    """

    def __init__(
        self, kind: Kind, session: ort.InferenceSession, interface: GraphInterface, executor: Executor | str, *, decisions: DecisionLog,
        tokenizer: Tokenizer | None, default_params: SamplingParams, model_bytes: int, fingerprint: Callable[[], str],
        named: NamedSessions | None = None, policy: Policy = "auto", max_waiting: int | None = None,
    ) -> None:
        """`executor` is a text where the graph is no decoder: the reason. `fingerprint` may read the model's files."""
        self._kind, self._session, self._interface = kind, session, interface
        self._decisions, self._model_bytes = decisions, model_bytes
        self._engine = None if isinstance(executor, str) else Engine(executor, decisions, policy=policy, max_waiting=max_waiting)
        self._no_decoder = executor if isinstance(executor, str) else ""
        self._fingerprint, self._named = fingerprint, named
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()
        self._sessions_lock = threading.Lock()
        self._closed = False
        self.tokenizer = tokenizer
        self.default_params = default_params

    @property
    def kind(self) -> Kind:
        """"paged", "contiguous", "stateless" or "baseline"."""
        return self._kind

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """What was decided when compiling, loading and running, in that order."""
        return self._decisions.all()

    @cached_property
    def fingerprint(self) -> str:
        """Names what the model computes: another compile of the same source has another."""
        return self._fingerprint()

    @property
    def engine(self) -> Engine:
        """The engine behind sessions and generations; UnsupportedError where the graph is no decoder."""
        engine = self._engine   # before the check: another thread may close the model
        self.check_open()
        if engine is None:
            message = f"this model can't be driven as a decoder: {self._no_decoder}"
            raise UnsupportedError(message, hint="model.run feeds its inputs by name")
        return engine

    def stats(self) -> dict[str, int]:
        """Counters and sizes now.

        blocks_total, _free, _cached (nobody holds them, kept for prefixes), _used, _shared (of used), _reserved, block_copies, prefix_hits,
        prefix_hit_tokens, prefix_evictions, tokens_recomputed (before a window), swaps_out, swaps_in, swap_bytes (in use), cache_bytes (`paged`
        only); sequences (open), sequences_idle (of those: something cached, nothing to do), idle_drops, steps, tokens (computed), forks,
        failed_steps, preemptions, requests_waiting, requests_running; model_bytes (files).
        """
        engine = self._engine
        self.check_open()
        if engine is None:
            return {"model_bytes": self._model_bytes}
        with engine.turn:
            return {**engine.stats(), "model_bytes": self._model_bytes}

    def predict(self, token_ids: Ids) -> NDArray[np.float32]:
        """Logits (S, V) of `token_ids`, from nothing and leaving nothing behind."""
        with self.begin_session() as session:
            return session.new_sequence().append(token_ids, rows="all")

    def run(self, inputs: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        """The graph's own inputs to its own outputs, by name. UnsupportedError where compiling has replaced them (kind "paged")."""
        onnx_session = self._session
        self.check_open()
        if self._kind == "paged":
            hint = 'predict, sessions and generate drive it; the kinds "contiguous", "stateless" and "baseline" have run'
            raise UnsupportedError('a "paged" model has no inputs and outputs of its own', hint=hint)
        names = {port.name for port in self._interface.inputs}
        if not isinstance(inputs, Mapping):
            raise RequestError(f"the inputs are a {type(inputs).__name__}, not a mapping of names to arrays")
        if set(inputs) != names:
            off = sorted(set(inputs) ^ names)
            raise RequestError(f"the graph's inputs are {', '.join(sorted(names))}; missing or unknown: {', '.join(off)}")
        try:
            outputs = run_named(onnx_session, self._interface, inputs)
        except Exception as error:
            if type(error).__name__ == "InvalidArgument":
                raise RequestError(f"the inputs don't fit the graph: {str(error).strip()}") from error
            raise step_error(error) from error
        return dict(zip((port.name for port in self._interface.outputs), outputs))

    def embed(self, texts: Any, *, pooling: Pooling = "mean") -> NDArray[np.float32]:
        """float32 [N, K]: a vector of each text (text, or token ids; one or several), pooled over its tokens' last hidden states.

        pooling: "mean" over the tokens, "cls" the first token's, "last" the last one's. UnsupportedError where the graph gives no states.
        """
        onnx_session = self._session
        self.check_open()
        if self._kind == "paged":
            raise UnsupportedError('a "paged" model gives logits alone', hint="compile with kv_cache=False; the graph must give hidden states")
        embedder = Embedder(onnx_session, self._interface)
        return embedder.embed([encode_prompt(text, self.tokenizer, _ANY_ID) for text in as_prompts(texts)], pooling)

    def begin_session(self, *, name: str | None = None) -> Session:
        """A scope for sequences. `with` is optional.

        name: the session's sequences are kept on disk when it is closed, in RuntimeOptions.session_folder, and are there when it is begun
        again, by this process or another. Raises OptionError (no session_folder), RequestError (the name is in use), SavedSequenceError (what
        is kept is damaged or another model's), CapacityError (no room for it).
        """
        assert self.engine is not None     # or it raises
        if name is not None and (not isinstance(name, str) or name.encode(errors="ignore").decode() != name):   # half a surrogate pair
            raise OptionError(f"name={name!r} is not a text")
        if name is not None and self._named is None:
            raise OptionError("named sessions need a place on disk", hint="load the model with RuntimeOptions(session_folder=…)")
        session = Session(self, name, self._named)
        with self._sessions_lock:
            self._sessions.add(session)
        return session

    def generate(
        self, prompts: Any, params: SamplingParams | None = None, *, priority: int = 0, deadline: float | None = None, salt: str | None = None,
    ) -> list[Result]:
        """Completes one prompt or several (text, chat messages or token ids), together where the kind can. One Result per prompt, in order.

        params      None: `default_params`.
        priority    higher comes first.
        deadline    seconds from now; what has not ended then ends with finish_reason "error".
        salt        prompts of different salts (tenants, say) never share cached prefixes.

        Raises RequestError, OptionError, CapacityError (QueueFullError where too many wait), DeadlineError or UnsupportedError before anything
        has begun; what fails later ends with finish_reason "error".
        """
        engine = self.engine
        encoded = [encode_prompt(prompt, self.tokenizer, engine.executor.vocab_size) for prompt in as_prompts(prompts)]
        generations = self._begin([(ids, None) for ids in encoded], params, streamed=False, priority=priority, deadline=deadline, salt=salt)
        try:
            for generation in generations:
                engine.run(generation.requests, lambda generation=generation: generation.done)  # type: ignore[misc]
        except BaseException:
            engine.cancel_soon([request for generation in generations for request in generation.requests])
            raise
        return [generation.result() for generation in generations]

    def stream(
        self, prompt: Any, params: SamplingParams | None = None, *, priority: int = 0, deadline: float | None = None, salt: str | None = None,
    ) -> PieceStream:
        """Completes one prompt, piece by piece; as `generate`. Errors in what is asked are raised here, not at the first piece."""
        prompts = as_prompts(prompt)
        if len(prompts) != 1:
            raise RequestError(f"stream takes one prompt, not {len(prompts)}", hint="generate takes several")
        ids = encode_prompt(prompts[0], self.tokenizer, self.engine.executor.vocab_size)
        generations = self._begin([(ids, None)], params, streamed=True, priority=priority, deadline=deadline, salt=salt)
        return PieceStream(self.engine, generations[0])

    def astream(
        self, prompt: Any, params: SamplingParams | None = None, *, priority: int = 0, deadline: float | None = None, salt: str | None = None,
    ) -> AsyncPieceStream:
        """`stream` for `async for`. Steps run in a worker thread; cancelling the task that waits for a piece ends the request."""
        from .astream import AsyncPieceStream  # asyncio is 4 MB

        return AsyncPieceStream(self.engine, self.stream(prompt, params, priority=priority, deadline=deadline, salt=salt))

    def begin_generation(self, state: SequenceState, params: SamplingParams, deadline: float | None, *, streamed: bool) -> Generation:
        """Queues the continuation of a sequence (used by Sequence)."""
        if not state.tokens:
            raise RequestError("the sequence is empty", hint="append() a prompt first")
        return self._begin([(state.tokens, state)], params, streamed=streamed, deadline=deadline)[0]

    def close(self) -> None:
        """Ends what runs (finish_reason "error"), closes its sessions, and lets go of session and caches. Closing twice is fine.

        Raises SavedSequenceError where a named session could not be written; all else is closed then.
        """
        if self._engine is not None:
            self._engine.close()
        first: SavedSequenceError | None = None
        with self._sessions_lock:
            sessions = list(self._sessions)
        for session in sessions:
            try:
                session.close()
            except SavedSequenceError as error:
                first = first or error
        self._closed = True
        self._engine = self._session = None
        if first is not None:
            raise first

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check_open(self) -> None:
        """RequestError where the model is closed."""
        if self._closed:
            raise RequestError("the model is closed", hint="load it again")

    def _begin(
        self, work: list[tuple[list[int], SequenceState | None]], params: SamplingParams | None, *, streamed: bool, priority: int = 0,
        deadline: float | None = None, salt: str | None = None,
    ) -> list[Generation]:
        """Checks all, then queues all."""
        engine = self.engine
        params = self.default_params if params is None else params
        if not isinstance(params, SamplingParams):
            raise OptionError(f"params is a {type(params).__name__}, not SamplingParams")
        if params.stop_strings and self.tokenizer is None:
            raise UnsupportedError("stop strings need a tokenizer, and the model has none", hint="use stop_token_ids")
        params.check_vocab(engine.executor.vocab_size)
        if streamed and params.best_of is not None:
            raise RequestError("a stream has no best_of: its completions are known at the end", hint="use generate")
        check_priority(priority)
        check_salt(salt)
        number = isinstance(deadline, int | float) and not isinstance(deadline, bool)
        if deadline is not None and not (number and abs(deadline) <= sys.float_info.max):   # isfinite() overflows on an int beyond it
            raise OptionError(f"deadline={deadline!r} is not a number of seconds")
        end = None if deadline is None else engine.clock() + deadline
        generations = [self._generation(ids, params, owns=state is None, streamed=streamed, deadline=end) for ids, state in work]
        texts = [None if self.tokenizer is None else TextStream(self.tokenizer, ids, params.stop_strings) for ids, _ in work]
        try:
            with engine.turn:
                engine.collect_dropped()
                for (ids, state), generation, text in zip(work, generations, texts):
                    if state is None:
                        state = engine.executor.open(salt)
                        state.priority = priority
                        state.tokens.extend(ids)
                    else:
                        # The last token's logits are needed again: computing one row anew costs less than keeping V floats per sequence.
                        engine.executor.truncate(state, len(ids) - 1)
                    generation.requests.append(GenerateRequest(state, generation, 0, text))
                engine.submit([generation.requests[0] for generation in generations])
        except BaseException:
            engine.cancel_soon([request for generation in generations for request in generation.requests])
            raise
        return generations

    def _generation(self, ids: list[int], params: SamplingParams, *, owns: bool, streamed: bool, deadline: float | None) -> Generation:
        executor = self.engine.executor
        length = len(ids)
        check_length(self.engine, length)
        if executor.max_context is not None and length >= executor.max_context:
            message = f"a prompt of {length} tokens leaves no room in the model's context of {executor.max_context}"
            raise CapacityError(message, hint="shorten it")
        # The last token sampled is never computed: it needs no slot.
        if params.max_tokens is not None and executor.max_context is not None:
            check_length(self.engine, min(length + params.max_tokens - 1, executor.max_context))
        by_context = None if executor.max_context is None else executor.max_context - length
        by_cache = None if executor.max_cached is None else executor.max_cached - length + 1
        known = [limit for limit in (params.max_tokens, by_context, by_cache) if limit is not None]
        if not known:
            raise RequestError("nothing bounds the completion: the model's context is not known", hint="give max_tokens")
        eos = frozenset() if params.ignore_eos or self.tokenizer is None else self.tokenizer.eos_ids
        # A configuration may name ids that the logits don't have (−1 for "none"): such a token never comes, and can't be banned.
        eos = frozenset(token for token in eos if 0 <= token < executor.vocab_size)
        return Generation(
            prompt=tuple(ids), params=params, stop_ids=eos | frozenset(params.stop_token_ids), limit=min(known), owns_sequence=owns, deadline=deadline,
            streamed=streamed, seed=int.from_bytes(os.urandom(8)) if params.seed is None else params.seed,
        )


def default_params(config: Mapping[str, Any]) -> SamplingParams:
    """Sampling as the model's generation_config.json asks for it: its fields where it has them, the field's defaults else."""
    names = {"temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "repetition_penalty": "repetition_penalty",
             "max_new_tokens": "max_tokens"}
    given = {ours: config[theirs] for theirs, ours in names.items() if config.get(theirs) is not None}
    if config.get("do_sample") is False:
        given["temperature"] = 0
    return SamplingParams(**given)


def file_bytes(*files: os.PathLike[str]) -> int:
    """Sizes of the files that are there."""
    return sum(os.path.getsize(file) for file in files if os.path.exists(file))
