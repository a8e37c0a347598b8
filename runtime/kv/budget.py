"""From memory to blocks: how many the pool gets, or the arithmetic of why it gets none.

With `memory=`, model files and caches together stay below it. Without, the pool holds four sequences of the model's longest context, or
what half of the memory now free holds, whichever is less. onnxruntime's own working memory (activations, repacked weights) is not counted.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ...custom_ops.contract import CACHE_FORMATS
from ...errors import CapacityError
from ...models.spec import ModelSpec

DEFAULT_CONTEXTS = 4


@dataclass(frozen=True)
class Budget:
    """`num_blocks` blocks per KV group of `block_bytes` together, and the sentence that says how the number came about."""

    num_blocks: int
    block_bytes: int
    reason: str

    @property
    def cache_bytes(self) -> int:
        return self.num_blocks * self.block_bytes


def block_bytes(spec: ModelSpec, block_size: int) -> int:
    """Bytes of one block of every KV group: keys and values of `block_size` tokens in all layers."""
    return block_size * sum(
        CACHE_FORMATS[layer.cache].bytes_per_token(layer.kv_heads, layer.head_size, layer.value_size) for layer in spec.cache_layers
    )


def plan_blocks(spec: ModelSpec, block_size: int, *, memory: int | None, model_bytes: int, free_memory: int | None) -> Budget:
    """The pool's size. Raises CapacityError, with the arithmetic, where not one block fits."""
    size = block_bytes(spec, block_size)
    if memory is not None:
        count = (memory - model_bytes) // size
        reason = f"({memory:,} bytes of memory − {model_bytes:,} of model files) ÷ {size:,} bytes a block of {block_size} tokens"
    else:
        contexts = DEFAULT_CONTEXTS * -(-spec.max_context // block_size)
        half = contexts if free_memory is None else free_memory // 2 // size
        count = min(contexts, half)
        why = f"{DEFAULT_CONTEXTS} contexts of {spec.max_context:,} tokens" if count == contexts else f"half of {free_memory:,} bytes free"
        reason = f"{why}, at {size:,} bytes a block of {block_size} tokens"
    if count < 1:
        raise CapacityError(
            f"no block of the cache fits: {reason} is {max(count, 0)}",
            hint=f"memory= must be {model_bytes + size:,} bytes or more; a smaller block_size or an fp16 or int8 cache needs less",
        )
    return Budget(count, size, reason)


def sequences_that_fit(spec: ModelSpec, block_size: int, num_blocks: int, length: int) -> int:
    """How many sequences of `length` tokens the pool holds at once; in groups with a window, once all have passed it."""
    def blocks(window: int | None) -> int:
        whole = -(-length // block_size)
        # A window's positions can begin and end within a block, and the last full block's beginning still sees its own.
        return whole if window is None else min(whole, -(-(window + block_size) // block_size) + 1)

    return min(num_blocks // blocks(group.window) for group in spec.cache_groups)


def free_memory() -> int | None:
    """Bytes that this process could still get without swapping, its control group's limit included; None where nobody says."""
    found = [value for value in (_available(), _cgroup_free()) if value is not None]
    return min(found) if found else None


def _available() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def _cgroup_free() -> int | None:
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        return None if limit == "max" else max(0, int(limit) - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    except (OSError, ValueError):
        return None
