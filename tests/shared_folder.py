"""Where the reference material is that no clone brings along."""

from __future__ import annotations

import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("VIDUR_SHARED") or REPOSITORY.parent / "shared")
