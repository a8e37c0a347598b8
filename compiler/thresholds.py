"""How far an artifact may lie from its source: the limits that `check` holds its figures against, each with where it comes from."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ArtifactError
from ..models.spec import CacheName, ModelSpec


@dataclass(frozen=True)
class Limits:
    """What a case may differ by; None is shown and does not decide. `relative` is max abs over the other side's largest absolute logit."""

    relative: float | None = None
    mean_kl: float | None = None
    top1: float | None = None


# Against the source with fp32 weights and no fusions. fp32 cache: both sides compute the same sums in another order; a logit is off by
# about ε·√(L·K) of the largest (1.5e-5 for 30 layers of 576), and the limits leave a factor of seven. fp16 cache: keys and values are
# rounded to 2⁻¹¹ once; a mean KL of 1e-5 is what is promised for it. int8 cache: 127 steps of a head's largest element, for queries and
# probabilities too; a mean KL of 1e-3 on text is promised, and the tokens of the check need not be text.
TIGHT: dict[CacheName, Limits] = {
    "fp32": Limits(relative=1e-4, mean_kl=1e-8),
    "fp16": Limits(relative=1e-2, mean_kl=1e-5),
    "int8": Limits(relative=0.1, mean_kl=1e-2),
}

# Against the source as it stands. Where its weights are quantized, onnxruntime may multiply them in int8: its error then is larger than
# ours, and the limits are those of int8 activations. Else only its fusions lie between the two sides, and the tight limits hold.
# Cases are short (18 rows): top-1 allows for near-ties that flip.
_INT8 = {"relative": 0.2, "mean_kl": 0.05, "top1": 0.75}
# Weights rounded here to int8 or int4: as far off as such weights are, which `octavo eval` measures on text.
_ROUNDED = {"relative": 0.5, "mean_kl": 0.3, "top1": 0.7}
# Activations rounded with scales from calibration: on SmolLM2-135M (int8 in groups of 64) a prompt of 296 tokens has a mean KL of 0.06 and 86 % of
# top-1, the cases of 18 rows 0.05 to 0.07 and 10 to 12 rows.
_STATIC = {"relative": 0.5, "mean_kl": 0.3, "top1": 0.5}
_TOP1 = 0.98


def tight(spec: ModelSpec | None) -> Limits:
    """The limits that decide, by the coarsest format that a cache layer has."""
    formats = {layer.cache for layer in spec.cache_layers} if spec else set()
    return next(limits for cache, limits in reversed(TIGHT.items()) if cache in formats or cache == "fp32")


def quality_thresholds(spec: ModelSpec | None, *, quantized: bool, rounded: bool = False, static: bool = False) -> dict[str, float]:
    """What a compile records in the manifest: the limits against the source as it stands. `quantized`: one of the two sides multiplies in
    int8; `rounded`: the artifact's weights are not the source's; `static`: its activations are rounded with scales from calibration.
    """
    if static:
        return dict(_STATIC)
    if rounded:
        return dict(_ROUNDED)
    if quantized:
        return dict(_INT8)
    limits = tight(spec)
    assert limits.relative is not None and limits.mean_kl is not None
    return {"relative": limits.relative, "mean_kl": limits.mean_kl, "top1": _TOP1}


def quality(thresholds: dict[str, float]) -> Limits:
    """The limits against the source as it stands, out of a manifest. ArtifactError for one that is not known here."""
    if unknown := thresholds.keys() - Limits.__dataclass_fields__.keys():
        raise ArtifactError(f"the manifest has a threshold {min(unknown)!r} that is not known here", hint="compile the model again")
    return Limits(**thresholds)
