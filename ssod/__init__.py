"""Semi-supervised object detection: label 10 % of your images, train on all of them, deploy the student.

Public names are loaded on first use, so that `import ssod` stays light (no torch).
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what __getattr__ gives, for editors and type checkers
    from ssod.api import SSOD as SSOD
    from ssod.config import load_config as load_config
    from ssod.deploy.predictor import Predictor as Predictor
    from ssod.deploy.results import Results as Results
    from ssod.detectors import build_detector as build_detector
    from ssod.engine.trainer import SemiTrainer as SemiTrainer
    from ssod.errors import UserError as UserError

# Worker threads that spin while idle starve the other process of a small machine; it must be said before
# torch loads its OpenMP runtime. A user's own setting wins.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Training sees many input shapes; oneDNN otherwise evicts and re-creates its primitives (CPU only).
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")

__version__ = "0.1.0"

_PUBLIC = {
    "SSOD": "ssod.api",
    "SemiTrainer": "ssod.engine.trainer",
    "Predictor": "ssod.deploy.predictor",
    "Results": "ssod.deploy.results",
    "build_detector": "ssod.detectors",
    "load_config": "ssod.config",
    "UserError": "ssod.errors",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'ssod' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
