"""cb_vit: Vision Transformers with Context Broadcasting (arXiv 2210.08457) in JAX and Flax."""
from __future__ import annotations

import importlib

__version__ = "0.1.0"
# Imported on first use, so that `import cb_vit` stays light.
_HOMES = {
    "Model": "cb_vit.models.vit",
    "load": "cb_vit.weights",
    "merge": "cb_vit.weights",
    "broadcast_context": "cb_vit.models.context",
    "batches": "cb_vit.own_loop",
    "compare": "cb_vit.analysis.comparison",
    "get_config": "cb_vit.tools.config_files",
    "train_and_evaluate": "cb_vit.train",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'cb_vit' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
