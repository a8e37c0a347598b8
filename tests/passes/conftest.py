"""The sketched decoders and drivers of the attention tests serve the passes around attention too."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "attention"))
