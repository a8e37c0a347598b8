"""From a graph as exported to a graph that serves: the stages in order, and which kind comes of them.

    normalize → dequantize, fold weights → observe → match attention → (paged | contiguous | stateless) → clean → verify → quantize linears

Every target plans before it changes anything, so that a target that refuses leaves the graph as it was and the next one is tried. One that
fails later (an exception, or a lowered graph that onnxruntime doesn't run) costs reading the source again. What nothing can be made of
runs as `baseline`, the graph as it was read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

import onnx_ir as ir
from onnx_ir.passes import common

from ..errors import OptionError, RefusedError
from ..models.interface import GraphInterface
from ..models.onnx_reader import graph_interface
from ..passes.attention.direct import DirectSite
from ..passes.attention.direct_match import Anchors, match_direct
from ..passes.attention.expand import ExpandAttentionOps, unequal_lengths
from ..passes.attention.lower_contiguous import LowerContiguous, plan_contiguous
from ..passes.attention.lower_flash import LowerFlash, inexpressible, plan_flash
from ..passes.attention.lower_paged import LowerPaged
from ..passes.attention.mask_candidates import meaning
from ..passes.attention.match import candidates, match_anchors, refusals_of, sites_of
from ..passes.attention.packed_rows import PackedRows
from ..passes.attention.site import AttentionSite
from ..passes.cache_formats import cache_formats
from ..passes.cache_interface import CacheInterface, plan_token_flat
from ..passes.cleanup import Cleanup
from ..passes.empty_past import EmptyPast
from ..passes.fold_weights import FoldWeights
from ..passes.linears.lower_quant import QuantizeLinears
from ..passes.linears.rehearsal import Rehearsal
from ..passes.linears.smooth import SmoothLinears
from ..passes.linears.stretches import Stretches
from ..passes.linears.weights import WeightPlan
from ..passes.logits import LogitRows
from ..passes.normalize import FoldDequantize, Normalize
from ..passes.observe import Observation, ObservationError, observe
from ..passes.obstacles import obstacle
from ..passes.outcome import Outcome, Refusal
from ..passes.ports import RestorePorts, half_ports, restored
from ..passes.quantize.methods import quantizer
from ..passes.quantize.stored import Stored, find_stored
from ..passes.race import Finish, Race, Timer, fastest
from ..passes.scatter_cache import scatter_interface
from ..passes.trial_run import Trial
from ..passes.verify import Verify, contract_refusals
from ..passes.widen import WidenHalf
from .calibration import read_calibration
from .context import max_context_of
from .features import decide
from .ledger import Ledger
from .options import CompileOptions
from .report import SiteLine
from .rewritten import Rewritten


@dataclass(frozen=True)
class Understood:
    """A normalized graph, what its values are, and its attentions. No target has changed it yet.

    `half` are the source's inputs and outputs in half precision, which are float32 now.
    `direct` are attentions taken at their word: in a graph without a cache those that were refused as sites, or that FlashAttention can't be
    by what was proved of them; in one that has inputs of another model's (an encoder's states) beside its cache, all.
    """

    model: ir.Model
    observation: Observation
    sites: tuple[AttentionSite, ...]
    refusals: tuple[Refusal, ...]
    direct: tuple[DirectSite, ...]
    max_context: int
    quantized: bool
    stored: Mapping[str, Stored]
    half: Mapping[str, ir.DataType]
    folder: Path | None


class _Slower(Exception):
    """A rewrite that is slower here than what it replaces."""

    def __init__(self, feature: str, finish: Finish) -> None:
        super().__init__(f"{(finish.ratio - 1):.0%} slower on this machine than the graph's own attention ({finish})")
        self.feature = feature


class _DoesNotRun(Exception):
    """A lowered graph failed its trial."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal


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
    decide(rewritten, options, ledger)
    return rewritten


def _rewrite(read: Callable[[], ir.Model], folder: Path | None, options: CompileOptions, ledger: Ledger) -> Rewritten | None:
    understood = _understand(read(), folder, options, ledger)
    if understood is None:
        return None
    for name, target in _targets(options):
        if ledger.watch is not None:
            ledger.watch.begin()
        try:
            rewritten = target(understood, options, ledger)
        except (OptionError, RefusedError):
            raise
        except Exception as error:
            if isinstance(error, _DoesNotRun):
                ledger.decide(name, "off", error.refusal.reason, error.refusal.where)
            elif isinstance(error, _Slower):
                ledger.decide(error.feature, "off", str(error))
            else:
                ledger.caught(name, error, "lowering")
            # The target may have changed the graph before it failed.
            if ledger.watch is not None:
                ledger.watch.undone()
            understood = _understand(read(), folder, options, Ledger(strict=False))
            assert understood is not None, "the same source was understood before"
            if not isinstance(error, _Slower) or error.feature != "flash_attention":
                continue
            rewritten = target(understood, replace(options, flash_attention=False, tune=False), ledger)
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
    half = half_ports(model)
    ledger.run(WidenHalf(), model)
    stored = find_stored(model) if options.quantizes else {}
    quantized = ledger.run(FoldDequantize(), model).matched > 0
    ledger.run(FoldWeights(), model)
    expansion = ExpandAttentionOps()
    ledger.run(expansion, model)
    ledger.attentions = candidates(model)
    start, nodes = perf_counter(), len(model.graph)
    interface = scatter_interface(model, graph_interface(model))
    blocked = obstacle(model, interface)
    if blocked is not None:
        ledger.refuse([blocked])
        return None
    try:
        observation = observe(model, interface)
    except ObservationError as error:
        ledger.refuse([Refusal(error.message, "graph", error.hint)])
        return None
    max_context, reason = max_context_of(observation, folder, options)
    ledger.decide("max_context", str(max_context), reason)
    ledger.enter(Outcome("observe", nodes_before=nodes, nodes_after=nodes, seconds=perf_counter() - start))
    unequal = unequal_lengths(observation, expansion.lengths, max_context)
    if unequal is not None:
        ledger.refuse([unequal])
        return None
    if expansion.lengths:  # proved and no longer read
        common.RemoveUnusedNodesPass()(model)
    start = perf_counter()
    anchors = match_anchors(model, observation, max_context=max_context)
    found = [item for _, item in anchors]
    sites, refusals = sites_of(found), refusals_of(found)
    ledger.attentions, ledger.sites = len(found), tuple(_line(site, "") for site in sites)
    read = _at_their_word(observation, anchors) if options.flash_attention else {}
    direct = tuple(site for site in read.values() if isinstance(site, DirectSite))
    taken = {site.name for site in direct}
    told = tuple(
        item for refusal in refusals if refusal.where not in taken
        for item in dict.fromkeys((refusal, read.get(refusal.where, refusal))) if isinstance(item, Refusal)
    )
    seconds = perf_counter() - start
    notes = tuple(f"{refusal}: taken as it is" for refusal in refusals if refusal.where in taken)
    ledger.enter(Outcome("match_attention", "sites", len(found), 0, told, notes, nodes_before=nodes, nodes_after=nodes, seconds=seconds))
    _assert_masking(sites, options)
    if not sites and not direct:
        ledger.refuse([Refusal("no attention was understood", "graph", f"{len(refusals)} candidates were refused")])
        return None
    return Understood(model, observation, sites, refusals, direct, max_context, quantized, stored, half, folder)


def _at_their_word(observation: Observation, anchors: Anchors) -> dict[str, DirectSite | Refusal]:
    if observation.cached and not _serves_another(observation):
        return {}
    return match_direct(observation, anchors, lambda site: observation.cached or inexpressible(site) is not None)


def _serves_another(observation: Observation) -> bool:
    """Whether a decoder takes inputs that no decoder alone has: its attention can't page, but it can keep its cache."""
    return any(port.role == "other" for port in observation.interface.inputs)


def _paged(understood: Understood, options: CompileOptions, ledger: Ledger) -> Rewritten | None:
    if understood.refusals:
        first = understood.refusals[0]
        reason = f"a site that was refused would attend across sequences: {first.reason}"
        ledger.decide("paged", "off", f"{reason} [{first.nearest}]" if first.nearest else reason, first.where)
        return None
    ahead = _sees_ahead(understood)
    if ahead is not None:
        ledger.decide("paged", "off", f"{meaning(ahead.mask)}: tokens see later ones", ahead.name)
        return None
    caches = cache_formats(options.cache_formats, len(understood.sites))
    plan = plan_token_flat(understood.observation, understood.sites, max_context=understood.max_context, caches=caches)
    if isinstance(plan, Refusal):
        ledger.refuse([plan])
        ledger.decide("paged", "off", plan.reason, plan.where)
        return None
    if plan.frozen:
        ledger.decide("rotary", "frozen", plan.frozen)
    model, rehearsed = understood.model, _rehearsed(understood, plan.spec.vocab_size, options, ledger)
    for stage in (LowerPaged(plan), LogitRows(plan), CacheInterface(plan), Cleanup()):
        ledger.run(stage, model)
    verified = ledger.run(Verify(plan.interface), model)
    if verified.refusals:
        raise AssertionError(f"the token-flat graph does not hold what was planned: {verified.refusals[0]}")
    rounded = _quantize(understood, options, ledger, plan.interface, rehearsed)
    for stage in (PackedRows(), Cleanup()):
        ledger.run(stage, model)
    broken = contract_refusals(model, plan.interface)
    if broken:
        raise AssertionError(f"the finished graph breaks a contract: {broken[0]}")
    ledger.sites = tuple(_line(site, "PagedAttention") for site in plan.sites)
    return Rewritten(model, "paged", plan.interface, plan.spec, understood.quantized, rounded)


def _sees_ahead(understood: Understood) -> AttentionSite | None:
    """A site of a graph without a cache in which tokens see later ones: an encoder's. Nothing was refused then."""
    if understood.observation.cached:
        return None
    return next((site for site in understood.sites if site.mask.kind in ("bidirectional", "prefix")), None)


def _rehearsed(understood: Understood, vocab_size: int, options: CompileOptions, ledger: Ledger) -> tuple[Rehearsal | None, Stretches | None]:
    """The graph as it is now, on calibration text: for what is measured of it, and for GPTQ. None where nothing asks for it."""
    if not (options.quantizes and options.calibrates):
        return None, None
    calibration = read_calibration(options.calibration, understood.folder, vocab_size)
    ledger.decide("calibration", "text" if options.calibration is not None else "random", calibration.words)
    model, interface, texts = understood.model, understood.observation.interface, calibration.sequences
    measured = options.weight_budget is not None or options.activations == "int8-static"
    rehearsal = Rehearsal(model, interface, texts) if measured else None
    return rehearsal, Stretches(model, interface, texts, understood.sites) if options.quantizer == "gptq" else None


def _quantize(
    understood: Understood, options: CompileOptions, ledger: Ledger, interface: GraphInterface, rehearsed: tuple[Rehearsal | None, Stretches | None],
) -> bool:
    """Linears to QuantLinear, after the rows were proved apart: the op computes each row by itself. True where weights were rounded."""
    if not options.quantizes:
        return False
    rehearsal, stretches = rehearsed
    plan = WeightPlan(
        options.patterns, options.group_size, quantizer(options.quantizer, stretches), options.zero_point, options.head,  # type: ignore[arg-type]
        activation_bits=32 if options.activations == "fp32" else 8, trial=quantizer("search") if stretches is not None else None,
    )
    port = interface.input("input_ids")
    model, ids = understood.model, port.name if port else ""
    if rehearsal is not None and options.activations == "int8-static":
        smooth = SmoothLinears(plan, understood.stored, rehearsal.maxima(), ids)
        outcome = ledger.run(smooth, model)
        ledger.decide("smoothing", f"{outcome.rewritten} of {outcome.matched} linears", "; ".join(outcome.notes))
        plan = replace(plan, quantize=quantizer(options.quantizer, None if stretches is None else smooth.inputs(stretches)), maxima=smooth.maxima)
    budget = None if rehearsal is None or options.budget_bytes is None else (options.budget_bytes, rehearsal)
    stage = QuantizeLinears(plan, understood.stored, ids, budget)
    ledger.run(stage, model)
    if stretches is not None:
        heard = f"{stretches.averaged} of {len(understood.sites)} attentions' values are rounded for averages of their inputs"
        ledger.decide("gptq", "in order", f"linears are rounded for inputs behind those rounded before; {heard}")
    if stage.raised is not None:
        ledger.decide("weight_budget", f"{len(stage.raised.units)} products in int8", str(stage.raised))
    ledger.run(Cleanup(), model)
    broken = contract_refusals(model, interface)
    if broken:
        raise AssertionError(f"the quantized graph breaks a contract: {broken[0]}")
    return bool(stage.rounded)


def _contiguous(understood: Understood, options: CompileOptions, ledger: Ledger) -> Rewritten | None:
    if understood.direct or _sees_ahead(understood) is not None:
        return None    # no decoder, or one that nothing caches
    plan = plan_contiguous(
        understood.observation, understood.sites, max_context=understood.max_context, refused=len(understood.refusals),
    )
    if isinstance(plan, Refusal):
        ledger.refuse([plan])
        ledger.decide("contiguous", "off", plan.reason, plan.where)
        return None
    trial, race = Trial(understood.observation), _race(understood, options)
    for stage in (LowerContiguous(plan), Cleanup()):
        ledger.run(stage, understood.model)
    _try(trial, understood.model, plan.interface, ledger, batched=False)
    _finish(race, "contiguous", understood.model, plan.interface, ledger)
    targets = {layer.site.name: "GroupQueryAttention" for layer in plan.layers}
    ledger.sites = tuple(_line(site.with_rotary_in_graph(), targets.get(site.name, "")) for site in understood.sites)
    return Rewritten(understood.model, "contiguous", plan.interface, plan.spec, understood.quantized)


def _stateless(understood: Understood, options: CompileOptions, ledger: Ledger) -> Rewritten | None:
    """Encoders, and decoders without a cache: asked for with kv_cache=False, or because no cache can be had."""
    observation, model = understood.observation, understood.model
    direct = understood.direct if not observation.cached or options.kv_cache is not False else ()
    if observation.cached and options.kv_cache is not False and not direct:
        return None    # a decoder that brings a cache keeps it, as a baseline
    if observation.capacity is not None:
        ledger.refuse([Refusal("a cache whose places are written by index can't be taken away", "graph", f"{observation.capacity} places")])
        return None
    taken = {site.name for site in direct}
    sites = tuple(site for site in understood.sites if site.name not in taken)
    interface, target, trial = observation.interface, "", Trial(observation)
    race = _race(understood, options) if options.flash_attention else None
    if options.flash_attention:
        plan = plan_flash(observation, sites, refused=len(understood.refusals), direct=direct)
        if isinstance(plan, Refusal):
            ledger.refuse([plan])
            return None
        ledger.run(LowerFlash(plan), model)
        interface, target = plan.interface, "FlashAttention"
    elif observation.cached:
        emptied = EmptyPast(observation)
        ledger.run(emptied, model)
        interface = emptied.interface
    ledger.run(Cleanup(), model)
    _try(trial, model, interface, ledger, batched=observation.batched)
    _finish(race, "flash_attention", model, interface, ledger)
    if understood.half and not (interface.input("input_ids") and interface.output("logits")):
        ledger.run(RestorePorts(understood.half), model)
        ledger.run(Cleanup(), model)
        interface = restored(interface, understood.half)
    lines = (*(_line(site.with_rotary_in_graph(), target) for site in sites), *map(_direct_line, direct))
    ledger.sites = tuple(sorted(lines, key=lambda line: _place(line.name)))
    return Rewritten(model, "stateless", interface, None, understood.quantized)


def _try(trial: Trial, model: ir.Model, interface: GraphInterface, ledger: Ledger, *, batched: bool) -> None:
    refusals = ledger.enter(trial.run(model, interface, batched=batched)).refusals
    if refusals:
        raise _DoesNotRun(refusals[0])


# What measures under tune=True; a name of its own so that another clock can stand in.
timer: Timer = fastest


def _race(understood: Understood, options: CompileOptions) -> Race | None:
    return Race(understood.observation, max_context=understood.max_context, timer=timer) if options.tune else None


def _finish(race: Race | None, feature: str, model: ir.Model, interface: GraphInterface, ledger: Ledger) -> None:
    """Raises _Slower where the rewritten graph lost."""
    if race is None:
        return
    finish = race.against(model, interface)
    if finish.ratio > 1:
        raise _Slower(feature, finish)
    ledger.decide("tune", f"{feature} kept", f"{1 / finish.ratio:.2f} times as fast on this machine as the graph's own attention ({finish})")


def _baseline(model: ir.Model) -> Rewritten:
    """Whether its weights are quantized is not known, so the wider limits of `check` hold."""
    return Rewritten(model, "baseline", graph_interface(model), None, quantized=True)


def _assert_masking(sites: Sequence[AttentionSite], options: CompileOptions) -> None:
    """`masking="causal"` and `"none"` are assertions about what the graph's masks mean."""
    if options.masking == "auto":
        return
    wanted = {"causal": "causal", "none": "bidirectional"}[options.masking]
    for site in sites:
        if site.mask.kind != wanted:
            proved = f"a window of {site.mask.window}" if site.mask.kind == "window" else meaning(site.mask)
            raise OptionError(f'masking="{options.masking}" was asserted, and the mask of {site.name} was proved to be {proved}', hint="leave masking out")


def _place(name: str) -> list[int]:
    """Numbers in a name, so that layers are told in order."""
    return [int(part) for part in name.split(".") if part.isdigit()]


def _direct_line(site: DirectSite) -> SiteLine:
    return SiteLine(site.name, site.query.heads, site.key.heads, site.query.size, site.scale, site.mask.text, "no rotary folded", "FlashAttention")


def _line(site: AttentionSite, target: str) -> SiteLine:
    mask = site.mask
    words = meaning(mask) + (" with ALiBi" if mask.slopes else "") + (" and sinks" if site.sinks else "")
    rotary = "no rotary folded" if site.rotary is None else f"rotary {site.rotary.width} {'interleaved' if site.rotary.interleaved else 'half'}"
    return SiteLine(
        site.name, site.num_heads, site.kv_heads, site.head_size, site.scale, words + (" with key padding" if mask.key_padding else ""), rotary, target,
    )
