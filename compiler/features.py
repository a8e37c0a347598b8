"""One decision per feature, whatever came of a compile: what is on, what is off, and why."""

from __future__ import annotations

from collections import Counter

from ..errors import RefusedError
from ..models.spec import Kind
from .ledger import Ledger
from .options import Activations, CompileOptions
from .rewritten import Rewritten

_KINDS: dict[Kind, str] = {
    "paged": "token-flat, many sequences a step",
    "contiguous": "past and present as the exporter has them, one sequence a run",
    "stateless": "the graph's own interface, no cache",
    "baseline": "the graph as it stands",
}

_DOTS: dict[Activations, str] = {
    "int8": "int8 by groups, dynamic",
    "int8-static": "int8 by groups, with scales from calibration",
    "fp32": "fp32",
}


def decide(rewritten: Rewritten, options: CompileOptions, ledger: Ledger) -> None:
    """Enters the decisions. RefusedError where fp16 or int8 was asked for by name and the kind can't have it."""
    if {"fp16", "int8"} & set(options.cache_formats.values()) and rewritten.kind != "paged":
        raise RefusedError(
            f"kv_cache={options.kv_cache!r} was asked for, and this model becomes {rewritten.kind}, whose cache is fp32",
            hint='use kv_cache="auto", and see the refusals with octavo inspect',
        )
    ledger.decide("kind", rewritten.kind, _KINDS[rewritten.kind])
    if rewritten.kind == "paged":
        _paged(rewritten, options, ledger)
    else:
        _not_paged(rewritten, options, ledger)
    masks = sorted({site.mask for site in ledger.sites})
    proved = f"proved by evaluation at {len(ledger.sites)} sites" if masks else "no mask was understood"
    ledger.decide("masking", ", ".join(masks) or "the graph's own", proved)
    _weights(rewritten, options, ledger)


def _weights(rewritten: Rewritten, options: CompileOptions, ledger: Ledger) -> None:
    """RefusedError where quantized weights were asked for and the kind can't have them."""
    outcome = next((outcome for outcome in ledger.outcomes if outcome.stage == "quantize_linears"), None)
    if outcome is not None:
        asked = options.weights if isinstance(options.weights, str) else ", ".join(f"{name}: {value}" for name, value in options.weights.items())
        ledger.decide("weights", asked, "; ".join(outcome.notes) or "no linear was found")
        if rewritten.rounded:
            ledger.decide("quantizer", options.quantizer, f"how weights that the source doesn't store so are rounded, zero_point={options.zero_point!r}")
        dots = _DOTS[options.activations]
        ledger.decide("activations", options.activations, f"{outcome.rewritten} of {outcome.matched} weights multiply activations in {dots}")
        if options.activations == "int8-static" and not outcome.rewritten:
            raise RefusedError('activations="int8-static" was asked for, and no linear of this model is quantized', hint='use activations="int8"')
    elif options.quantizes and (options.weights != "stored" or options.activations == "int8-static"):
        raise RefusedError(
            f"weights={options.weights!r} was asked for, and this model becomes {rewritten.kind}, whose linears stay as they are",
            hint='use weights="fp32", and see the refusals with octavo inspect',
        )
    elif rewritten.quantized and rewritten.kind != "baseline":
        ledger.decide("weights", "fp32", "stored quantized, computed in fp32")
    else:
        ledger.decide("weights", "as in the source", "nothing was quantized")


def _paged(rewritten: Rewritten, options: CompileOptions, ledger: Ledger) -> None:
    assert rewritten.spec is not None, "a paged model has a spec"
    layers = rewritten.spec.cache_layers
    counts = Counter(layer.cache for layer in layers)
    formats = next(iter(counts)) if len(counts) == 1 else ", ".join(f"{name} ({counts[name]} of {len(layers)} layers)" for name in sorted(counts))
    asked = f"kv_cache={options.kv_cache!r} was asked for"
    ledger.decide("paged", "on", f"all {len(ledger.sites)} sites page, and no token sees another outside them")
    caches, sites = len(rewritten.spec.cache_layers), len(ledger.sites)
    shared = f"; {sites - caches} of {sites} sites read the keys and values of an earlier one" if caches < sites else ""
    ledger.decide("kv_cache", "paged", f"blocks, updated in place{shared}")
    ledger.decide("kv_precision", formats, "auto: half the bytes of fp32" if options.kv_cache == "auto" else asked)
    ledger.decide("flash_attention", "off", "a paged model attends through PagedAttention")


def _not_paged(rewritten: Rewritten, options: CompileOptions, ledger: Ledger) -> None:
    kind = rewritten.kind
    if not options.paged:
        ledger.decide("paged", "off", "paged=False was asked for")
    elif options.kv_cache is False:
        ledger.decide("paged", "off", "kv_cache=False was asked for")
    cached = any(port.role == "past_key" for port in rewritten.interface.inputs)
    why = "kv_cache=False was asked for" if options.kv_cache is False else f"a {kind} graph of this source has no cache"
    ledger.decide("kv_cache", "contiguous" if cached else "off", "past and present are inputs and outputs of the graph" if cached else why)
    if cached:
        ledger.decide("kv_precision", "fp32", f"what a {kind} model has")
    flash = sum(site.target == "FlashAttention" for site in ledger.sites)
    unused = "flash_attention=False was asked for" if not options.flash_attention else f"no site of a {kind} model uses it"
    if any(decision.feature == "flash_attention" for decision in ledger.decisions):
        return    # measured, and told by who measured
    ledger.decide("flash_attention", "on" if flash else "off", f"{flash} of {len(ledger.sites)} sites" if flash else unused)
