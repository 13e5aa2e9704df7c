"""Music for the examples: where songs come from, what is measured, drawn and trained."""

import sys
from pathlib import Path

_BENCHMARKS = str(Path(__file__).parent.parent.parent / "benchmarks")
if _BENCHMARKS not in sys.path:
    # `corpus`, which benchmarks share
    sys.path.insert(0, _BENCHMARKS)
