"""From a graph as exported to a graph that serves: the stages in order, and which kind comes of them.

    normalize → dequantize → observe → match attention → (paged | contiguous | stateless) → clean → verify

Every target plans before it changes anything, so that a target that refuses leaves the graph as it was and the next one is tried. What
nothing can be made of runs as `baseline`, the graph as it was read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import onnx_ir as ir

from ..errors import OptionError, RefusedError
from ..models.interface import GraphInterface
from ..models.onnx_reader import graph_interface
from ..models.spec import CacheName, Kind, ModelSpec
from ..passes.attention.lower_paged import LowerPaged
from ..passes.attention.match import match_attention
from ..passes.attention.site import AttentionSite
from ..passes.cache_interface import CacheInterface, plan_token_flat
from ..passes.cleanup import Cleanup
from ..passes.logits import LogitRows
from ..passes.normalize import FoldDequantize, Normalize
from ..passes.observe import Observation, ObservationError, observe
from ..passes.outcome import Outcome, Refusal
from ..passes.verify import Verify
from .context import max_context_of
from .ledger import Ledger
from .options import CompileOptions
from .report import SiteLine


@dataclass(frozen=True)
class Rewritten:
    """A graph and what it has become."""

    model: ir.Model
    kind: Kind
    interface: GraphInterface
    spec: ModelSpec | None
    quantized: bool


@dataclass(frozen=True)
class Understood:
    """A normalized graph, what its values are, and its attentions. No target has changed it yet."""

    model: ir.Model
    observation: Observation
    sites: tuple[AttentionSite, ...]
    refusals: tuple[Refusal, ...]
    max_context: int
    quantized: bool


Target = Callable[[Understood, CompileOptions, Ledger], Rewritten | None]


def rewrite(read: Callable[[], ir.Model], folder: Path | None, options: CompileOptions, ledger: Ledger) -> Rewritten:
    """Rewrites what `read` returns (a fresh model of our own at each call). `folder` is where the source lies, if it is a file.

    Never fails on a graph that it does not understand: that becomes a `baseline`, with the reason in `ledger`.
    """
    try:
        rewritten = _rewrite(read, folder, options, ledger)
    except (OptionError, RefusedError):
        raise
    except Exception as error:
        ledger.caught("rewrite", error, "the graph as a whole")
        rewritten = None
    rewritten = rewritten or _baseline(read())
    _decide(rewritten, options, ledger)
    return rewritten


def _rewrite(read: Callable[[], ir.Model], folder: Path | None, options: CompileOptions, ledger: Ledger) -> Rewritten | None:
    understood = _understand(read(), folder, options, ledger)
    if understood is None:
        return None
    for name, target in _targets(options):
        try:
            rewritten = target(understood, options, ledger)
        except (OptionError, RefusedError):
            raise
        except Exception as error:
            ledger.caught(name, error, "lowering")
            # The target may have changed the graph before it failed.
            understood = _understand(read(), folder, options, Ledger(strict=False))
            assert understood is not None, "the same source was understood before"
            continue
        if rewritten is not None:
            return rewritten
    return None


def _targets(options: CompileOptions) -> list[tuple[str, Target]]:
    """What to try, best first."""
    if options.kv_cache is False:
        return [("stateless", _stateless)]
    cached: list[tuple[str, Target]] = [("contiguous", _contiguous), ("stateless", _stateless)]
    return [("paged", _paged), *cached] if options.paged else cached


def _understand(model: ir.Model, folder: Path | None, options: CompileOptions, ledger: Ledger) -> Understood | None:
    """None where the graph can't be run at the probes, or holds no attention that was understood."""
    ledger.run(Normalize(), model)
    quantized = ledger.run(FoldDequantize(), model).matched > 0
    start, nodes = perf_counter(), len(model.graph)
    try:
        observation = observe(model, graph_interface(model))
    except ObservationError as error:
        ledger.refuse([Refusal(error.message, "graph", error.hint)])
        return None
    max_context, reason = max_context_of(observation, folder, options)
    ledger.decide("max_context", str(max_context), reason)
    ledger.enter(Outcome("observe", nodes_before=nodes, nodes_after=nodes, seconds=perf_counter() - start))
    start = perf_counter()
    found = match_attention(model, observation, max_context=max_context)
    sites = tuple(site for site in found if isinstance(site, AttentionSite))
    refusals = tuple(refusal for refusal in found if isinstance(refusal, Refusal))
    seconds = perf_counter() - start
    ledger.enter(Outcome("match_attention", "sites", len(found), 0, refusals, nodes_before=nodes, nodes_after=nodes, seconds=seconds))
    _assert_masking(sites, options)
    if not sites:
        ledger.refuse([Refusal("no attention was understood", "graph", f"{len(refusals)} candidates were refused")])
        return None
    return Understood(model, observation, sites, refusals, max_context, quantized)


def _paged(understood: Understood, options: CompileOptions, ledger: Ledger) -> Rewritten | None:
    if understood.refusals:
        ledger.decide("paged", "off", "a site that was refused would attend across sequences", understood.refusals[0].where)
        return None
    cache: CacheName = "fp32" if options.kv_cache == "fp32" else "fp16"
    plan = plan_token_flat(
        understood.observation, understood.sites, max_context=understood.max_context, caches=[cache] * len(understood.sites),
    )
    if isinstance(plan, Refusal):
        ledger.refuse([plan])
        ledger.decide("paged", "off", plan.reason, plan.where)
        return None
    model = understood.model
    for stage in (LowerPaged(plan), LogitRows(plan), CacheInterface(plan), Cleanup()):
        ledger.run(stage, model)
    verified = ledger.run(Verify(plan.interface()), model)
    if verified.refusals:
        raise AssertionError(f"the token-flat graph does not hold what was planned: {verified.refusals[0]}")
    ledger.sites = tuple(_line(site, "PagedAttention") for site in plan.sites)
    return Rewritten(model, "paged", plan.interface(), plan.spec, understood.quantized)


def _contiguous(understood: Understood, options: CompileOptions, ledger: Ledger) -> Rewritten | None:
    return None


def _stateless(understood: Understood, options: CompileOptions, ledger: Ledger) -> Rewritten | None:
    return None


def _baseline(model: ir.Model) -> Rewritten:
    return Rewritten(model, "baseline", graph_interface(model), None, quantized=True)


def _assert_masking(sites: Sequence[AttentionSite], options: CompileOptions) -> None:
    """`masking="causal"` and `"none"` are assertions about what the graph's masks mean."""
    if options.masking == "auto":
        return
    wanted = {"causal": "causal", "none": "bidirectional"}[options.masking]
    for site in sites:
        if site.mask.kind != wanted:
            proved = f"a window of {site.mask.window}" if site.mask.kind == "window" else site.mask.kind
            raise OptionError(f'masking="{options.masking}" was asserted, and the mask of {site.name} was proved to be {proved}', hint="leave masking out")


def _decide(rewritten: Rewritten, options: CompileOptions, ledger: Ledger) -> None:
    """One decision per feature, whatever came of it."""
    kind, spec = rewritten.kind, rewritten.spec
    formats = sorted({layer.cache for layer in spec.cache_layers}) if spec and kind == "paged" else []
    if options.kv_cache == "fp16" and kind != "paged":
        raise RefusedError(f"kv_cache={options.kv_cache!r} was asked for, and a {kind} model has no such cache", hint='use kv_cache="auto"')
    ledger.decide("kind", kind, _KINDS[kind])
    if kind == "paged":
        ledger.decide("paged", "on", f"all {len(ledger.sites)} sites page, and no token sees another outside them")
        ledger.decide("kv_cache", formats[0], "asked for" if options.kv_cache != "auto" else "auto: the smallest format that adds no measurable error")
        ledger.decide("kv_precision", formats[0], "one format for all layers")
        ledger.decide("flash_attention", "off", "a paged model attends through PagedAttention")
    else:
        if not options.paged:
            ledger.decide("paged", "off", "paged=False was asked for")
        cached = kind == "contiguous" or (kind == "baseline" and any(port.role == "past_key" for port in rewritten.interface.inputs))
        ledger.decide("kv_cache", "graph" if cached else "off", "past and present are the graph's own, fp32" if cached else "no cache in this kind's graph")
        flash = sum(site.target == "FlashAttention" for site in ledger.sites)
        reason = f"{flash} sites" if flash else ("flash_attention=False was asked for" if not options.flash_attention else f"nothing to use it in a {kind} model")
        ledger.decide("flash_attention", "on" if flash else "off", reason)
    masks = sorted({site.mask for site in ledger.sites})
    ledger.decide("masking", ", ".join(masks) or "the graph's own", f"proved by evaluation at {len(ledger.sites)} sites" if masks else "no mask was replaced")
    ledger.decide("weights", "fp32", "stored quantized, computed in fp32" if rewritten.quantized and kind != "baseline" else "as in the source")


_KINDS: dict[Kind, str] = {
    "paged": "token-flat, many sequences a step",
    "contiguous": "past and present as the exporter has them, one sequence a run",
    "stateless": "the graph's own interface, no cache",
    "baseline": "the graph as it stands",
}


def _line(site: AttentionSite, target: str) -> SiteLine:
    mask = site.mask
    meaning = f"window {mask.window}" if mask.kind == "window" else mask.kind
    rotary = "no rotary folded" if site.rotary is None else f"rotary {site.rotary.width} {'interleaved' if site.rotary.interleaved else 'half'}"
    return SiteLine(
        site.name, site.num_heads, site.kv_heads, site.head_size, site.scale, meaning + (" with key padding" if mask.key_padding else ""), rotary, target,
    )
