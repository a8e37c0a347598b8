"""What a user can ask of a compile. Frozen, validated at construction; an option exists when it does something."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

from ..custom_ops.contract import ZeroPoint
from ..errors import OptionError
from ..models.sizes import parse_size
from ..models.spec import CacheName
from ..passes.cache_formats import check_formats
from ..passes.linears.precision import Precision
from ..passes.quantize.groups import GroupSize
from ..passes.quantize.methods import Method

KVCache = Literal["auto", "fp32", "fp16", "int8"]
Masking = Literal["auto", "causal", "none"]
Activations = Literal["int8", "int8-static", "fp32"]


@dataclass(frozen=True)
class CompileOptions:
    """Options of `octavo.compile`.

    weights          "fp32", "int8", "int4", or "stored" (what the source stores quantized stays so, to the bit), or a map of patterns over the names
                     of linears, read in order: {"head": "int8", "layers.0.*": "fp32", "*": "int4"}. Linears that the source stores in the width
                     asked for are taken as they are.
                     "int4" by itself keeps the head in int8, or leaves it to weight_budget; a map says exactly what it says.
    group_size       32, 64 or 128 inputs share a scale, in weights that are quantized here. None: 64, or 32 where 64 doesn't divide the inputs.
    zero_point       what a group of int4 has besides its scale, where it is rounded here: "float" (a minimum), "uint8" (a zero point), "none"
                     (symmetric); int8 is symmetric.
    quantizer        how those are rounded: "rtn" (to the nearest), "search" (scales by least squared error), "hqq" (half-quadratic zero points; int4
                     with zero_point="float", int8 is searched), "gptq" (errors are made up for by what is rounded later; wants calibration text).
    weight_budget    bytes, or text such as "90MB", that all quantized weights together may take: what int4 is measured to harm most is raised to int8.
    calibration      a file for "gptq", weight_budget and "int8-static": UTF-8 text, or (.json) token ids, of which the first 16,384 tokens count.
                     None: random ids ("int8-static" has to have a text).
    activations      with quantized weights: "int8" (dynamic, per row and group), "int8-static" (scales per group from calibration, inputs smoothed) or
                     "fp32" (weight-only in the strict sense).
    kv_cache         "fp32", "fp16", "int8", False (no cache: the decoder becomes stateless) or "auto" (fp16 where the kind has it, else fp32; recorded).
                     Or a map of layers, read in order: {"0-1": "fp16", "*": "int8"}; layers that none names are fp16.
                     An explicit format that the resulting kind can't have is an error, never a silent other one.
    paged            True: token-flat paged attention when every site allows it. False: the exporter's own past/present with stock GroupQueryAttention.
    flash_attention  True: `FlashAttention` in stateless graphs where a site was matched. False: the graph's own attention. Says nothing about `paged`.
    masking          "auto": whatever the graph's mask is proved to mean. "causal" and "none" (bidirectional) assert: another proved mask is an error.
    max_context      the longest sequence, tokens (≥ 1). None: the smallest bound in the graph, else `config.json` beside it.
    strict           every refusal becomes an error.
    tune             measures each optional rewrite (FlashAttention, stock GroupQueryAttention) on this machine against the graph's own attention, and
                     leaves out what is slower here. Paged attention is no option of speed: it is what serves many sequences.
    """

    weights: Precision | Mapping[str, Precision] = "fp32"
    group_size: int | None = None
    zero_point: ZeroPoint = "float"
    quantizer: Method = "search"
    weight_budget: int | str | None = None
    calibration: str | PathLike[str] | None = None
    activations: Activations = "int8"
    kv_cache: KVCache | Literal[False] | Mapping[str, CacheName] = "auto"
    paged: bool = True
    flash_attention: bool = True
    masking: Masking = "auto"
    max_context: int | None = None
    strict: bool = False
    tune: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.kv_cache, Mapping):
            check_formats(self.kv_cache)
        elif self.kv_cache is not False and self.kv_cache not in get_args(KVCache):
            raise OptionError(f"kv_cache={self.kv_cache!r} is not one of {_listed(KVCache)}, False or a map of layers")
        for name, known in (("masking", Masking), ("activations", Activations), ("quantizer", Method), ("zero_point", ZeroPoint)):
            if getattr(self, name) not in get_args(known):
                raise OptionError(f"{name}={getattr(self, name)!r} is not one of {_listed(known)}")
        if self.group_size is not None and (self.group_size not in get_args(GroupSize) or isinstance(self.group_size, bool)):
            raise OptionError(f"group_size={self.group_size!r} is not one of {_listed(GroupSize)}")
        for pattern, precision in self.patterns.items():
            if not isinstance(pattern, str) or precision not in get_args(Precision):
                raise OptionError(f"weights={self.weights!r}: {precision!r} is not one of {_listed(Precision)}")
        if self.quantizer == "hqq" and self.zero_point != "float":
            raise OptionError('quantizer="hqq" finds zero points that are floats', hint='zero_point="float"')
        if self.weight_budget is not None:
            parse_size(self.weight_budget, "weight_budget")
            if "int4" not in self.patterns.values():
                raise OptionError("weight_budget= raises linears from int4, and none is asked for", hint='weights="int4"')
        if self.calibration is not None and not isinstance(self.calibration, (str, PathLike)):
            raise OptionError(f"calibration={self.calibration!r} is no path")
        if self.calibration is not None and not self.calibrates:
            raise OptionError("calibration= is given, and nothing calibrates", hint='quantizer="gptq", weight_budget= and activations="int8-static" do')
        if self.activations == "int8-static":
            self._check_static()
        for name in ("paged", "flash_attention", "strict", "tune"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name}={getattr(self, name)!r} is not True or False")
        if self.max_context is not None and (isinstance(self.max_context, bool) or not isinstance(self.max_context, int) or self.max_context < 1):
            raise OptionError(f"max_context={self.max_context!r} is not a positive number of tokens")

    def _check_static(self) -> None:
        asked = 'activations="int8-static"'
        if not self.quantizes:
            raise OptionError(f"{asked} rounds the inputs of quantized weights, and weights={self.weights!r} has none", hint='weights="int8"')
        if self.calibration is None:
            raise OptionError(f"{asked} takes its scales from a text, and none is given", hint="calibration= a file with a few thousand tokens of it")
        if self.weight_budget is not None:
            raise OptionError(f"{asked} changes the weights that weight_budget= measures", hint="one of them")

    @property
    def patterns(self) -> Mapping[str, Precision]:
        """`weights` as a map of patterns."""
        return self.weights if isinstance(self.weights, Mapping) else {"*": self.weights}

    @property
    def head(self) -> Precision | None:
        """What the head is stored as, where `patterns` don't have the last word on it."""
        return "int8" if self.weights == "int4" and self.weight_budget is None else None

    @property
    def cache_formats(self) -> Mapping[str, CacheName]:
        """`kv_cache` as a map of layers; "auto" and False say nothing, which is fp16 where there is a paged cache."""
        if isinstance(self.kv_cache, Mapping):
            return self.kv_cache
        return {} if self.kv_cache is False or self.kv_cache == "auto" else {"*": self.kv_cache}

    @property
    def quantizes(self) -> bool:
        """Whether any linear may be stored quantized."""
        return any(precision != "fp32" for precision in self.patterns.values())

    @property
    def calibrates(self) -> bool:
        """Whether the model is run on text before it is rewritten."""
        return self.quantizer == "gptq" or self.weight_budget is not None or self.activations == "int8-static"

    @property
    def budget_bytes(self) -> int | None:
        return None if self.weight_budget is None else parse_size(self.weight_budget, "weight_budget")

    def to_json(self) -> dict[str, Any]:
        """With plain maps, and of a path the name alone: an artifact names none."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        given["calibration"] = None if self.calibration is None else Path(self.calibration).name
        return {name: dict(value) if isinstance(value, Mapping) else value for name, value in given.items()}


def _listed(literal: Any) -> str:
    return ", ".join(repr(value) for value in get_args(literal))
