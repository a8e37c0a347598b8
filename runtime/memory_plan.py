"""What a pool of some memory holds, told before a model is loaded: the same arithmetic as `load` does."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import UnsupportedError
from ..models.artifact import WEIGHTS, Artifact
from .config import RuntimeOptions
from .kv.budget import free_memory, plan_blocks, sequences_that_fit
from .model import file_bytes


@dataclass(frozen=True)
class MemoryPlan:
    """`sequences[length]` is how many sequences of that length fit at once. Bytes, blocks and tokens are the pool's."""

    model_bytes: int
    cache_bytes: int
    token_bytes: int
    num_blocks: int
    num_tokens: int
    reason: str
    sequences: dict[int, int]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def to_text(self) -> str:
        lines = [
            f"model files     {self.model_bytes:>16,} bytes",
            f"cache           {self.cache_bytes:>16,} bytes: {self.num_blocks:,} blocks, {self.num_tokens:,} tokens of {self.token_bytes:,} bytes",
            f"                {self.reason}",
            "",
            "tokens each     sequences at once",
            *(f"{length:>11,}     {count:>17,}" for length, count in self.sequences.items()),
        ]
        return "\n".join(lines)


def plan_memory(path: str | os.PathLike[str], *, memory: int | str | None, block_size: int) -> MemoryPlan:
    """The plan for an artifact. Raises OptionError, ArtifactError, UnsupportedError (no paged model), CapacityError (no block fits)."""
    options = RuntimeOptions(memory=memory, block_size=block_size)
    artifact = Artifact.open(Path(path))
    spec = artifact.manifest.spec
    if artifact.manifest.kind != "paged" or spec is None:
        raise UnsupportedError(f"a {artifact.manifest.kind} model has no pool: its cache grows with each sequence", hint="plan is for paged models")
    model_bytes = file_bytes(artifact.graph, artifact.folder / WEIGHTS)
    budget = plan_blocks(spec, block_size, memory=options.memory_bytes, model_bytes=model_bytes, free_memory=free_memory())
    lengths = sorted({length for length in (128, 512, 1024, 2048, 4096, 8192, 32768, 131072) if length < spec.max_context} | {spec.max_context})
    return MemoryPlan(
        model_bytes, budget.cache_bytes, budget.block_bytes // block_size, budget.num_blocks, budget.num_blocks * block_size, budget.reason,
        {length: sequences_that_fit(spec, block_size, budget.num_blocks, length) for length in lengths},
    )
