"""How far an artifact may lie from its source: the limits that `check` holds its figures against, each with where it comes from."""

from __future__ import annotations

from dataclasses import dataclass

from ..models.spec import CacheName, ModelSpec


@dataclass(frozen=True)
class Limits:
    """What a case may differ by; None is shown and does not decide. `relative` is max abs over the other side's largest absolute logit."""

    relative: float | None = None
    mean_kl: float | None = None
    top1: float | None = None


# Against the source with fp32 weights and no fusions. fp32 cache: both sides compute the same sums in another order; a logit is off by
# about ε·√(L·K) of the largest (1.5e-5 for 30 layers of 576), and the limit leaves a factor of ten. fp16 cache: keys and values are
# rounded to 2⁻¹¹ once; a mean KL of 1e-5 is what is promised for it.
_TIGHT: dict[CacheName, Limits] = {"fp32": Limits(relative=2e-4, mean_kl=1e-7), "fp16": Limits(relative=2e-2, mean_kl=1e-5)}

# Against the source as it stands, where onnxruntime may compute quantized weights in int8: its error then is larger than ours, and the
# limits are those of int8 activations, not of the rewrite.
_QUALITY = {"mean_kl": 0.05, "top1": 0.9}


def tight(spec: ModelSpec | None) -> Limits:
    """The limits that decide, by what the cache stores."""
    return _TIGHT["fp16" if spec and any(layer.cache == "fp16" for layer in spec.cache_layers) else "fp32"]


def quality_thresholds() -> dict[str, float]:
    """What a compile records in the manifest: the limits against the source as it stands."""
    return dict(_QUALITY)


def quality(thresholds: dict[str, float]) -> Limits:
    """The limits against the source as it stands, out of a manifest."""
    return Limits(mean_kl=thresholds.get("mean_kl"), top1=thresholds.get("top1"))
