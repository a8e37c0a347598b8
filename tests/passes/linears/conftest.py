"""Graphs for the tests of linears: written as text, or the tiny decoder made token-flat."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
