"""What changed between two graphs, once per pattern and not once per layer."""

from .entry import diff as diff
from .entry import snapshot as snapshot
from .model import GraphDiff as GraphDiff
