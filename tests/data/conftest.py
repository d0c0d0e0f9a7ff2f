"""The scripts of data/nano import one another by name, as when they are run from their directory."""

from __future__ import annotations

import sys
from pathlib import Path

NANO = Path(__file__).parents[2] / "data" / "nano"
sys.path.insert(0, str(NANO))
