"""Makes `toy_stage` importable by name, as a stage of a user's own would be."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
