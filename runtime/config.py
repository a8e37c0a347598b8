"""How a model runs: threads, memory, block size, batching. Nothing here changes what a model computes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import get_args

from ..custom_ops.contract import BLOCK_SIZES
from ..errors import OptionError
from ..models.sizes import parse_size
from .pace import Policy

MAX_THREADS = 1024


@dataclass(frozen=True)
class RuntimeOptions:
    """Options of `octavo.load`.

    threads: 1 … 1024 threads of onnxruntime's pool; None: as many as the CPUs that this process may use.
    memory: what model files and caches may take together: bytes, or text such as "2GiB" or "800 MB"; None: see `runtime/kv/budget.py`.
        Acts on `paged` models, whose cache is one pool; the other kinds allocate as their sequences grow.
    block_size: 16, 32, 64, 128 or 256 token slots of a cache block. Small blocks waste less at a sequence's end, large ones need shorter
        tables. Acts on `paged` models.
    swap_memory: what the caches of requests that were preempted, and of idle sequences that made room, may take outside `memory`, like it; they
        are copied back then and not computed again. None: nothing is copied. Acts on `paged` models.
    batching: True computes several sequences in one step where the kind can; False always one, first come, first served.
    max_sequences: 1 … 4096 sequences in one step. Idle sequences don't count; they cost blocks, and may be dropped where those run short, and
        computed again to the same bits.
    max_step_tokens: 16 … 65536 tokens in one step: what a stream's longest gap, and the memory of a step, are bounded by.
    max_waiting: requests that may wait for a place; one more is refused with QueueFullError. None: any number.
    policy: how long streams' gaps may get while prompts are computed beside them: "latency" about 1.5 times as long as without, "auto" about
        2.5 times (more where more than two prompts queue), "throughput" as long as a step takes. Acts on `paged` models.
    prefix_cache: True keeps the blocks of sequences that have ended, as long as nothing else needs them, for those that begin alike. Acts on
        `paged` models.
    session_folder: where named sessions are kept between their uses; None: there are none.
    session_disk: what all of them may take together, like `memory`; the longest unused go first. None: no limit.
    optimize_graph: False runs the graph node by node as it stands, without onnxruntime's fusions: to compare with, not to serve with.
    profile: the beginning of the name of a file into which onnxruntime writes the time of every node when the model is gone; slow.
    """

    threads: int | None = None
    memory: int | str | None = None
    swap_memory: int | str | None = None
    block_size: int = 32
    batching: bool = True
    max_sequences: int = 32
    max_step_tokens: int = 512
    max_waiting: int | None = None
    policy: Policy = "auto"
    prefix_cache: bool = True
    optimize_graph: bool = True
    session_folder: str | os.PathLike[str] | None = None
    session_disk: int | str | None = None
    profile: str | None = None

    def __post_init__(self) -> None:
        if self.threads is not None and not (_is_int(self.threads) and 1 <= self.threads <= MAX_THREADS):
            raise OptionError(f"threads={self.threads!r} is not in 1 … {MAX_THREADS}", hint="leave it out to use every CPU of this process")
        if self.block_size not in BLOCK_SIZES or not _is_int(self.block_size):
            raise OptionError(f"block_size={self.block_size!r} is not one of {', '.join(map(str, BLOCK_SIZES))}")
        for name in ("batching", "prefix_cache", "optimize_graph"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name}={getattr(self, name)!r} is neither True nor False")
        if self.session_folder is not None and not isinstance(self.session_folder, str | os.PathLike):
            raise OptionError(f"session_folder={self.session_folder!r} is not a path")
        for name, least, most in (("max_sequences", 1, 4096), ("max_step_tokens", 16, 65536), ("max_waiting", 0, 2**31)):
            value = getattr(self, name)
            if not (_is_int(value) and least <= value <= most) and not (name == "max_waiting" and value is None):
                raise OptionError(f"{name}={value!r} is not in {least} … {most}")
        if self.policy not in get_args(Policy):
            raise OptionError(f"policy={self.policy!r} is not one of {', '.join(map(repr, get_args(Policy)))}")
        for name in ("memory", "swap_memory", "session_disk"):
            if getattr(self, name) is not None:
                parse_size(getattr(self, name), name)
        if self.profile is not None and not (isinstance(self.profile, str) and self.profile):
            raise OptionError(f"profile={self.profile!r} is not the beginning of a file's name")

    @property
    def memory_bytes(self) -> int | None:
        return None if self.memory is None else parse_size(self.memory, "memory")

    @property
    def swap_bytes(self) -> int:
        return 0 if self.swap_memory is None else parse_size(self.swap_memory, "swap_memory")

    @property
    def session_bytes(self) -> int | None:
        return None if self.session_disk is None else parse_size(self.session_disk, "session_disk")

    @property
    def num_threads(self) -> int:
        return self.threads if self.threads is not None else min(cpus(), MAX_THREADS)


def cpus() -> int:
    """CPUs that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
