"""A decision: a feature on or off, and why. Compile, load and run time write the same type, so that one list tells the whole story."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Decision:
    """`feature` is an option's or a capability's name, `value` what was decided, `reason` a sentence, `where` a node, layer or file."""

    feature: str
    value: str
    reason: str
    stage: Literal["compile", "load", "run"] = "compile"
    where: str = ""

    def __str__(self) -> str:
        where = f" at {self.where}" if self.where else ""
        return f"{self.feature} = {self.value}{where}: {self.reason}"
