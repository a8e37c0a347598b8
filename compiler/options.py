"""What a user can ask of a compile. Frozen, validated at construction; an option exists when it does something."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from ..errors import OptionError

KVCache = Literal["auto", "fp32", "fp16"]
Masking = Literal["auto", "causal", "none"]


@dataclass(frozen=True)
class CompileOptions:
    """Options of `octavo.compile`.

    kv_cache         "fp32", "fp16", False (no cache: the decoder becomes stateless) or "auto" (fp16 where the kind has it, else fp32; recorded).
                     An explicit format that the resulting kind can't have is an error, never a silent other one.
    paged            True: token-flat paged attention when every site allows it. False: the exporter's own past/present with stock GroupQueryAttention.
    flash_attention  True: `FlashAttention` in stateless graphs where a site was matched. False: the graph's own attention. Says nothing about `paged`.
    masking          "auto": whatever the graph's mask is proved to mean. "causal" and "none" (bidirectional) assert: another proved mask is an error.
    max_context      the longest sequence, tokens (≥ 1). None: the smallest bound in the graph, else `config.json` beside it.
    strict           every refusal becomes an error.
    """

    kv_cache: KVCache | Literal[False] = "auto"
    paged: bool = True
    flash_attention: bool = True
    masking: Masking = "auto"
    max_context: int | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        if self.kv_cache is not False and self.kv_cache not in get_args(KVCache):
            raise OptionError(f"kv_cache={self.kv_cache!r} is not one of {_listed(KVCache)} or False")
        if self.masking not in get_args(Masking):
            raise OptionError(f"masking={self.masking!r} is not one of {_listed(Masking)}")
        for name in ("paged", "flash_attention", "strict"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name}={getattr(self, name)!r} is not True or False")
        if self.max_context is not None and (isinstance(self.max_context, bool) or not isinstance(self.max_context, int) or self.max_context < 1):
            raise OptionError(f"max_context={self.max_context!r} is not a positive number of tokens")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def _listed(literal: Any) -> str:
    return ", ".join(repr(value) for value in get_args(literal))
