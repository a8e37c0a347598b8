"""What changed between two graphs, once per pattern and not once per layer."""

from .entry import snapshot as snapshot
