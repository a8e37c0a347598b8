"""What `bench` runs: prompts of random ids, and how many tokens to go on with. The same ids in every engine that is compared."""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import OptionError

# Ids are drawn from [FIRST_ID, LAST_ID): no vocabulary of a real model is smaller, and special tokens mostly lie outside.
FIRST_ID, LAST_ID = 100, 40_000


@dataclass(frozen=True)
class Workload:
    """`sequences` prompts of `prompt` tokens each, all at once, each continued by `generate` tokens after its first."""

    name: str
    prompt: int
    generate: int
    sequences: int

    def __post_init__(self) -> None:
        for field in ("prompt", "generate", "sequences"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise OptionError(f"workload {self.name!r}: {field} is {value!r}, not an int ≥ 1")

    def prompts(self, vocab_size: int) -> NDArray[np.int64]:
        """Token ids [sequences, prompt], seeded by the name, so that no workload's prompt begins like another's."""
        first, last = (FIRST_ID, min(LAST_ID, vocab_size)) if vocab_size > FIRST_ID else (0, vocab_size)
        return np.random.default_rng(zlib.crc32(self.name.encode())).integers(first, last, (self.sequences, self.prompt))


WARM_UP = Workload("warm-up", prompt=16, generate=4, sequences=1)
WORKLOADS = (
    Workload("decode-512", prompt=512, generate=128, sequences=1),
    Workload("decode-4096", prompt=4096, generate=64, sequences=1),
    Workload("prefill-2048", prompt=2048, generate=8, sequences=1),
    Workload("batch-16", prompt=128, generate=64, sequences=16),
    Workload("batch-16-long", prompt=512, generate=64, sequences=16),
)


def read_workloads(path: str | os.PathLike[str]) -> tuple[Workload, ...]:
    """The workloads in a JSON file: a list of objects with the fields of Workload. OptionError for anything else."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OptionError(f"{path} is no file of workloads: {error}", hint="give a JSON list, as octavo bench -h shows") from error
    names = {field.name for field in fields(Workload)}
    example = json.dumps([asdict(WORKLOADS[0])])
    if not isinstance(data, list) or not data or not all(isinstance(item, dict) and set(item) == names for item in data):
        raise OptionError(f"{path} is no list of workloads", hint=f"for example {example}")
    workloads = tuple(Workload(**item) for item in data)
    if not all(isinstance(load.name, str) for load in workloads) or len({load.name for load in workloads}) != len(workloads):
        raise OptionError(f"{path}: each workload needs a name of its own", hint=f"for example {example}")
    return workloads
