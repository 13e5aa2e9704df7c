"""What the musical examples share: songs in and out, models, training, metrics, pictures."""

import sys
from pathlib import Path

# benchmarks has the songs' class and the literature's attention systems
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
