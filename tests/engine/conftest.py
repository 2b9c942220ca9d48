"""Tests here use the small exported models of tests/deploy, too."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "deploy"))
