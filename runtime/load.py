"""From a path to a Model: an artifact's folder, or an `.onnx` as it stands."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import LibraryError, ModelError, OptionError
from ..models.artifact import GRAPH, WEIGHTS, Artifact, Manifest
from ..models.context import configured_context
from ..models.external_data import check_external_paths, model_file, source_sha256
from ..models.interface import GraphInterface
from ..models.spec import Kind
from .config import RuntimeOptions
from .contiguous import ContiguousExecutor, why_not_a_decoder
from .decisions import DecisionLog
from .executor import Executor
from .kv.budget import free_memory, plan_blocks
from .model import Model, default_params, file_bytes
from .named import NamedSessions
from .ort_session import open_session, session_interface
from .paged import PagedExecutor
from .plan import Limits
from .sampling import SamplingParams
from .tokenizer import Tokenizer, read_json


def load(path: str | os.PathLike[str], *, options: RuntimeOptions | None = None, source: str | os.PathLike[str] | None = None) -> Model:
    """Opens a compiled artifact (a folder), or an `.onnx` as it stands (kind "baseline"; nothing is written).

    source: the `.onnx` that the artifact was compiled from, run as "baseline" where the op library can't be loaded; its hash must be the
    manifest's. Raises ArtifactError, ModelError, UnsafePathError, LibraryError, CapacityError (memory= holds no cache), OptionError.
    """
    options = RuntimeOptions() if options is None else options
    if not isinstance(options, RuntimeOptions):
        raise OptionError(f"options is a {type(options).__name__}, not RuntimeOptions")
    path = Path(path)
    try:
        is_file = not path.is_dir() and path.exists()
    except OSError as error:    # a name too long, a folder that may not be searched
        raise ModelError(f"{path} can't be read: {error.strerror}", hint="check the path and its permissions") from error
    if is_file:
        if source is not None:
            raise OptionError("source= goes with an artifact", hint="an .onnx is loaded as it stands")
        return _load_graph(path, options, DecisionLog(), tokenizer_folder=path.parent)
    artifact = Artifact.open(path)
    try:
        return _load_artifact(artifact, options)
    except LibraryError as error:
        if source is None:
            hint = f'{error.hint or "see octavo doctor"}; load(…, source="model.onnx") runs the source instead'
            raise LibraryError(error.message, hint=hint) from error
        return _load_source(artifact, Path(source), options, error)


def _load_artifact(artifact: Artifact, options: RuntimeOptions) -> Model:
    manifest, log = artifact.manifest, DecisionLog(artifact.manifest.decisions)
    session = _open_graph(artifact, options, log)
    _record_threads(log, options)
    model_bytes = file_bytes(artifact.graph, artifact.folder / WEIGHTS)
    executor: Executor | str
    if manifest.kind == "paged":
        executor = _paged(manifest, session, options, log, model_bytes)
    else:
        bound = None if manifest.spec is None else manifest.spec.max_context
        executor = _contiguous(manifest.interface, session, options, log, bound or _context_bound(artifact.folder, log))
    return _model(
        manifest.kind, session, manifest.interface, executor, options, log=log, folder=artifact.folder, model_bytes=model_bytes,
        fingerprint=manifest.fingerprint,
    )


def _open_graph(artifact: Artifact, options: RuntimeOptions, log: DecisionLog) -> Any:
    """The artifact's session; with our ops where its kind may have them (the others have onnxruntime's only)."""
    kind = artifact.manifest.kind
    try:
        return open_session(artifact.graph, options, op_library=kind in ("paged", "stateless"))
    except LibraryError as error:
        if kind != "stateless":
            raise
        try:
            session = open_session(artifact.graph, options, op_library=False)
        except LibraryError:
            raise error from None
        log.load("op library", "not loaded", f"{error.message}; the graph needs none of its ops")
        return session


def _load_graph(path: Path, options: RuntimeOptions, log: DecisionLog, *, tokenizer_folder: Path) -> Model:
    model_file(path)
    data = check_external_paths(path)
    session = open_session(path, options, op_library=False)
    _record_threads(log, options)
    log.load("kind", "baseline", "a graph that was not compiled runs as it stands", where=path.name)
    interface = session_interface(session)
    executor = _contiguous(interface, session, options, log, _context_bound(tokenizer_folder, log))
    return _model(
        "baseline", session, interface, executor, options, log=log, folder=tokenizer_folder, model_bytes=file_bytes(path, *data),
        fingerprint=lambda: source_sha256(path),
    )


def _load_source(artifact: Artifact, source: Path, options: RuntimeOptions, error: LibraryError) -> Model:
    recorded = artifact.manifest.source
    if source_sha256(source) != recorded.sha256:
        raise ModelError(f"{source} is not the {recorded.name} that {artifact.folder} was compiled from: its sha256 differs") from error
    log = DecisionLog(artifact.manifest.decisions)
    log.load("op library", "not loaded", error.message, where=GRAPH)
    return _load_graph(source, options, log, tokenizer_folder=artifact.folder)


def _paged(manifest: Manifest, session: Any, options: RuntimeOptions, log: DecisionLog, model_bytes: int) -> Executor:
    assert manifest.spec is not None, "a paged artifact has a spec"
    budget = plan_blocks(
        manifest.spec, options.block_size, memory=options.memory_bytes, model_bytes=model_bytes, free_memory=free_memory(),
    )
    log.load("memory", f"{budget.num_blocks} blocks, {budget.cache_bytes:,} bytes of cache", budget.reason)
    log.load("batching", "on" if options.batching else "off", "batching=True" if options.batching else "batching=False was asked for")
    log.load("prefix_cache", "on" if options.prefix_cache else "off", f"prefix_cache={options.prefix_cache}")
    swap = f"{options.swap_bytes:,} bytes for caches put aside" if options.swap_bytes else "what is put aside is computed again"
    log.load("swap", "on" if options.swap_bytes else "off", swap)
    return PagedExecutor(
        session, manifest.spec, num_blocks=budget.num_blocks, block_size=options.block_size, swap_bytes=options.swap_bytes,
        prefix_cache=options.prefix_cache, limits=Limits(options.max_sequences if options.batching else 1, options.max_step_tokens),
    )


def _contiguous(
    interface: GraphInterface, session: Any, options: RuntimeOptions, log: DecisionLog, max_context: int | None,
) -> Executor | str:
    """An executor, or what keeps the graph from being a decoder."""
    if why := why_not_a_decoder(interface):
        log.load("decoder", "off", f"run() only: {why}")
        return why
    executor = ContiguousExecutor(session, interface, max_context=max_context)
    if options.memory is not None:
        log.load("memory", "no pool", "the cache of this kind grows with each sequence; memory= bounds paged models")
    log.load("batching", "off", "this kind computes one sequence a step")
    if not executor.has_cache:
        log.load("kv_cache", "off", "the graph has no past: every step computes the sequence from its tokens")
    return executor


def _model(
    kind: Kind, session: Any, interface: GraphInterface, executor: Executor | str, options: RuntimeOptions, *, log: DecisionLog,
    folder: Path, model_bytes: int, fingerprint: Callable[[], str],
) -> Model:
    """The model, with tokenizer and defaults out of `folder`."""
    config = read_json(folder / "generation_config.json")
    params = SamplingParams()
    try:
        params = default_params(config)
        if params != SamplingParams():
            log.load("sampling defaults", "the model's", "used where no SamplingParams are given", where="generation_config.json")
    except OptionError as error:
        log.load("sampling defaults", "standard", f"generation_config.json is out of range: {error}", where="generation_config.json")
    return Model(
        kind, session, interface, executor, decisions=log, tokenizer=Tokenizer.open(folder), default_params=params, model_bytes=model_bytes,
        fingerprint=fingerprint, named=_named(options), policy=options.policy, max_waiting=options.max_waiting,
    )


def _named(options: RuntimeOptions) -> NamedSessions | None:
    return None if options.session_folder is None else NamedSessions(Path(options.session_folder), options.session_bytes)


def _context_bound(folder: Path, log: DecisionLog) -> int | None:
    """The longest sequence by the config.json beside a graph; None, recorded, where it says nothing."""
    found = configured_context(folder)
    if found is None:
        log.load("max_context", "unknown", "no config.json beside the graph tells it; generate needs max_tokens")
        return None
    log.load("max_context", str(found), "config.json beside the graph", where="config.json")
    return found


def _record_threads(log: DecisionLog, options: RuntimeOptions) -> None:
    reason = "threads= was given" if options.threads is not None else "the CPUs that this process may use"
    log.load("threads", str(options.num_threads), reason)
